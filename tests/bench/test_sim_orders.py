"""Orders of other schedulers, each on a queue where it differs from first come, first served."""

from dataclasses import replace

import pytest

from autellix_sglang.config import ProgramConfig
from bench.sim_engine import Scheduling, SimEngine, blueprint
from bench.sim_orders import MAX_MATCHED, decayed
from bench.testing import UNIT_DEVICE
from bench.trace import TraceCall, TraceProgram

UNIT = replace(UNIT_DEVICE, copy_token_s=0.0, kv_tokens=100_000)


def program(name, *calls, shared=0, group="g"):
    """Calls one after the other, each with a prompt of its own: (prompt tokens, output tokens)."""
    return TraceProgram(
        name,
        "test",
        "test",
        tuple(
            TraceCall(
                str(i),
                num_prompt,
                num_prompt,
                num_output,
                (str(i - 1),) if i else (),
                shared_prefix_tokens=shared,
            )
            for i, (num_prompt, num_output) in enumerate(calls)
        ),
        None,
        group,
    )


def order(policy, programs, arrivals):
    """Programs by the time at which their last call starts to run, on one slot."""
    scheduling = Scheduling(config=ProgramConfig(prefill_weight=1.0), baseline=policy)
    engine = SimEngine(UNIT, scheduling, num_slots=1)
    run = engine.run([blueprint(p) for p in programs], arrivals)
    last = {p.program_id: p.calls[-1].first_token_s for p in run.programs}
    return sorted(last, key=last.__getitem__)


def test_longest_prefix_match_prefers_what_is_cached():
    """While the first program runs, one without and one with its prefix arrive."""
    first = program("first", (50, 10), shared=40)
    stranger = program("stranger", (50, 10), shared=40, group="other")
    cousin = program("cousin", (50, 10), shared=40)
    programs, arrivals = [first, stranger, cousin], [0.0, 1.0, 2.0]

    assert order("lpm", programs, arrivals) == ["first", "cousin", "stranger"]
    assert order("program-fcfs", programs, arrivals)[1] == "stranger"


def test_longest_prefix_match_gives_up_on_long_queues():
    """Above SGLang's limit the queue is left as it is."""
    first = program("first", (50, 10), shared=40)
    strangers = [program(f"s{i}", (50, 1), shared=0) for i in range(MAX_MATCHED)]
    cousin = program("cousin", (50, 1), shared=40)
    arrivals = [0.0, *[1.0] * MAX_MATCHED, 2.0]

    found = order("lpm", [first, *strangers, cousin], arrivals)

    assert found[1] == "s0"
    assert found[2] == "cousin"  # one less in the queue


def test_highest_response_ratio_prefers_little_prefill():
    """Of two calls that waited nearly alike, the one that needs less prefill has the ratio."""
    programs = [program("first", (5, 50)), program("large", (90, 1)), program("small", (3, 1))]
    more = [program("next", (20, 1))]

    found = order("hrrn", [*programs, *more], [0.0, 1.0, 2.0, 0.5])

    assert found[0] == "first"
    assert found.index("small") < found.index("large")


def test_least_attained_service_prefers_who_has_had_little():
    """A program whose first call was long goes behind one that has had nothing."""
    heavy, light = program("heavy", (5, 60), (5, 5)), program("light", (5, 5))
    other = program("other", (5, 30))

    found = order("las", [heavy, other, light], [0.0, 1.0, 70.0])

    assert found.index("light") < found.index("heavy")


def test_service_is_forgotten_as_time_goes_by():
    """A minute halves it."""
    assert decayed(100.0, 60.0) == pytest.approx(50.0)
