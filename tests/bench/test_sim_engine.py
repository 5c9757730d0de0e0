"""The simulated engine: hand-computed cases, conservation laws, and leaps against single steps."""

import dataclasses

import pytest

from autellix_sglang.config import ProgramConfig
from bench.sim_device import attention_pairs
from bench.sim_engine import BASELINES, Kv, Scheduling, SimEngine, blueprint
from bench.synthetic import corpora
from bench.testing import UNIT_DEVICE as UNIT
from bench.trace import TraceCall, TraceProgram, sample

POLICIES = ("fcfs", "mlfq", "plas", "atlas", "gittins")
KNOWN = [*POLICIES, *BASELINES]


def scheduling(name, **settings):
    """The server's policy of this name, or the simulator's baseline."""
    kv = settings.pop("kv", Kv.KEEP)
    if name in BASELINES:
        return Scheduling(config=ProgramConfig(**settings), baseline=name, kv=kv)
    return Scheduling(config=ProgramConfig(policy=name, **settings), kv=kv)


def chain(name, *calls, gap_s=None):
    """A program whose calls follow each other: (new prompt tokens, output tokens) each."""
    out, history = [], 0
    for i, (new, output) in enumerate(calls):
        parents = (str(i - 1),) if i else ()
        gap = gap_s if i else None
        out.append(TraceCall(str(i), history + new, new, output, parents, gap_s=gap))
        history += new + output
    return TraceProgram(name, "test", "chat", tuple(out))


def run(name, programs, arrivals=None, *, device=UNIT, num_slots=1, kv_tokens=None, **settings):
    """Simulate, and return (engine, finish times of each program's calls)."""
    if kv_tokens is not None:
        device = dataclasses.replace(device, kv_tokens=kv_tokens)
    settings = {"min_run": 0.0, "schedule_interval": 1, "prefill_weight": 1.0, **settings}
    engine = SimEngine(device, scheduling(name, **settings), num_slots=num_slots)
    result = engine.run([blueprint(p) for p in programs], arrivals or [0.0] * len(programs))
    return engine, [[call.finish_s for call in program.calls] for program in result.programs]


# --- by hand ------------------------------------------------------------------------------------


def test_a_call_takes_its_prefill_and_then_a_step_per_further_token():
    """The prefill batch yields the first token: 3 prompt tokens and 4 output tokens are 3 + 3 s."""
    _, finish = run("fcfs", [chain("a", (3, 4))])

    assert finish == [[6.0]]


def test_a_continued_history_is_not_prefilled_again():
    """The second call of a chain pays for its two new tokens only, after the recorded gap."""
    engine, finish = run("fcfs", [chain("a", (3, 4), (2, 1), gap_s=10.0)])

    assert finish == [[6.0, 6.0 + 10.0 + 2.0]]
    assert engine.num_recomputed == 0


def test_calls_reach_the_engine_one_after_another():
    """Each spends half a second outside; two at once and the second is half a second later still.

    Such time is not waiting in the engine's queue, and a followed call takes it again.
    """
    device = dataclasses.replace(UNIT, call_s=0.5)
    engine = SimEngine(device, scheduling("fcfs", prefill_weight=1.0), num_slots=2)
    plans = [blueprint(chain("a", (1, 2), (1, 1))), blueprint(chain("b", (1, 2)))]
    first, second = engine.run(plans, [0.0, 0.0]).programs
    issued = [call.issue_s for call in (*first.calls, *second.calls)]

    # a: prefilled 0.5 to 1.5; b comes at 1.0: prefilled 1.5 to 2.5, both decode until 3.5
    assert [call.finish_s for call in first.calls] == [3.5, 5.0]
    assert [call.finish_s for call in second.calls] == [3.5]
    assert issued == [0.0, 3.5, 0.0]
    assert [call.queue_s for call in second.calls] == [0.5]


def test_what_is_cached_costs_only_where_attention_works_it_out_again():
    """A call after 5 cached tokens: 15 pairs at a tenth of a second each, on such a device."""
    again = dataclasses.replace(UNIT, prefill_cached_pair_s=0.1)
    programs = [chain("a", (3, 2), (2, 1))]
    _, [[_, without]] = run("fcfs", programs)
    _, [[_, more]] = run("fcfs", programs, device=again)

    assert more - without == pytest.approx(0.1 * attention_pairs(0, 5))


def test_first_come_first_served_waits_for_the_slot():
    """With one slot the second program starts when the first is over."""
    _, finish = run("fcfs", [chain("a", (1, 5)), chain("b", (1, 2))], [0.0, 1.0])

    assert finish == [[5.0], [7.0]]


def test_a_newcomer_preempts_a_program_past_its_quantum():
    """PLAS: `a` has used its 4 steps when `b` comes; `b` runs, then `a` recomputes one token."""
    programs = [chain("a", (1, 9)), chain("b", (1, 2))]
    _, finish = run("plas", programs, [0.0, 6.0], quantum=4.0)

    # a: 1 s prefill, tokens 2..6 by t=6; b: 6..8; a: 1 s prefill of one token, 2 more steps
    assert finish == [[11.0], [8.0]]


@pytest.mark.parametrize(
    ("kv", "resumed_s"),
    [
        (Kv.KEEP, 1.0 + 1.0),  # one token again, which gives a token; one more step
        (Kv.SWAP, 0.25 * 8 + 1.0 + 1.0),  # 8 tokens back, then as above
        (Kv.DROP, 8.0 + 1.0),  # all 8 tokens again
    ],
)
def test_what_preemption_costs(kv, resumed_s):
    """Kept KV costs a pass, swapped KV two copies as well, dropped KV a prefill of all of it."""
    programs = [chain("a", (2, 8)), chain("b", (1, 2))]
    _, finish = run("plas", programs, [0.0, 7.0], quantum=4.0, kv=kv)

    away_s = 0.25 * 8 if kv is Kv.SWAP else 0.0
    assert finish[1] == [7.0 + away_s + 2.0]
    assert finish[0] == [7.0 + away_s + 2.0 + resumed_s]


def test_shortest_job_first_takes_the_short_call_and_does_not_preempt():
    """The running long call ends first, then the short one, then the long one that waited."""
    programs = [chain("a", (1, 6)), chain("b", (1, 9)), chain("c", (1, 2))]
    _, finish = run("sjf", programs, [0.0, 1.0, 2.0])

    assert finish == [[6.0], [17.0], [8.0]]


def test_clairvoyant_srpt_preempts_for_less_remaining_work():
    """`b` needs 3 more steps than `a` has left at t=1: no; `c` comes with 1: yes."""
    programs = [chain("a", (1, 9)), chain("b", (1, 12)), chain("c", (1, 1))]
    _, finish = run("srpt", programs, [0.0, 1.0, 2.0], num_slots=1)

    assert finish[2] == [3.0]
    assert finish[0] < finish[1]


def test_program_fcfs_serves_the_older_program_between_its_calls():
    """The second call of `a`, issued after `b` came, still goes before `b`."""
    programs = [chain("a", (1, 3), (1, 3)), chain("b", (1, 2))]
    _, by_call = run("fcfs", programs, [0.0, 1.0])
    _, by_program = run("program-fcfs", programs, [0.0, 1.0])

    assert by_call == [[3.0, 8.0], [5.0]]
    assert by_program == [[3.0, 6.0], [8.0]]


def test_long_prompts_go_in_chunks_and_let_nobody_decode_meanwhile():
    """A prompt of 10 tokens at 4 a pass: three batches, before the running call's next token."""
    engine = SimEngine(UNIT, scheduling("fcfs", prefill_weight=1.0), num_slots=2, chunk_tokens=4)
    plans = [blueprint(chain("a", (1, 5))), blueprint(chain("b", (10, 1)))]
    result = engine.run(plans, [0.0, 1.5])

    # a: token 1 at 1, token 2 at 2; b prefills 2..12; a: tokens 3, 4, 5
    assert [p.calls[0].finish_s for p in result.programs] == [15.0, 12.0]


def test_a_call_that_can_never_fit_is_refused_by_name():
    """More KV than the device has is the trace's mistake, and the message says whose."""
    with pytest.raises(ValueError, match="call 0 of program a needs 30 KV tokens; there are 20"):
        run("fcfs", [chain("a", (20, 10))], kv_tokens=20)


def test_cached_history_is_evicted_when_room_is_needed():
    """`b` needs the room of `a`'s history, so `a`'s second call prefills all of its prompt."""
    programs = [chain("a", (4, 4), (1, 1), gap_s=20.0), chain("b", (10, 2))]
    engine, finish = run("fcfs", programs, [0.0, 8.0], kv_tokens=14)

    assert engine.cache.num_evicted >= 8
    assert finish[0] == [7.0, 7.0 + 20.0 + 9.0]


def samples(name, count, prompt, output):
    """A program that samples one prompt so many times at once."""
    calls = (TraceCall("0", prompt, prompt, output),)
    calls += tuple(
        TraceCall(str(i), prompt, 0, output, same_prompt_as="0") for i in range(1, count)
    )
    return TraceProgram(name, "test", "chat", calls)


@pytest.mark.parametrize(
    ("name", "wait", "finish"),
    [
        # computed for each: 15 s, of which each has its first token; 2 more steps
        ("fcfs", 4, [17.0, 17.0, 17.0]),
        ("plas", 0, [17.0, 17.0, 17.0]),
        ("plas", 5, [17.0, 17.0, 17.0]),  # the last token is computed in any case
        # computed once: 5 s; then a pass of 2 tokens; the first has one token less to go
        ("plas", 4, [9.0, 9.0, 9.0]),
    ],
)
def test_samples_of_a_prompt_wait_for_the_first(name, wait, finish):
    """Unless it is too short to be worth it; stock order computes it for each."""
    _, [calls] = run(name, [samples("a", 3, 5, 3)], num_slots=3, prefix_wait=wait)

    assert calls == finish


def test_a_call_that_waits_for_a_prefix_keeps_its_place():
    """Two slots: `b` comes later and gets one only when both samples of `a` are done."""
    programs = [samples("a", 2, 5, 3), chain("b", (1, 1))]
    _, finish = run("plas", programs, num_slots=2, prefix_wait=4)

    assert finish == [[8.0, 8.0], [9.0]]


def test_nobody_is_preempted_for_a_prompt_that_is_computed_once():
    """Of 100 KV tokens `a` has 62 to come; four samples of 10 tokens need 10 and 4 of their own."""
    programs = [chain("a", (2, 60)), samples("b", 4, 10, 2)]
    found = [
        run("plas", programs, [0.0, 30.0], num_slots=8, kv_tokens=100, quantum=4.0, prefix_wait=w)
        for w in (0, 4)
    ]
    preempted = [engine.table.totals()["num_preemptions"] for engine, _ in found]

    assert preempted == [1, 0]


# --- conservation -------------------------------------------------------------------------------

SMALL = dataclasses.replace(UNIT, prefill_token_s=0.01, kv_tokens=6000, decode_kv_s=1e-6)


def small_mix(num_programs=12):
    """Chats, agents and tree searches small enough to step through one token at a time."""
    drawn = sample(corpora("mixed", num_programs, 3), num_programs, 3, factor=0.05, max_calls=25)
    return [blueprint(program) for program in drawn.programs]


@pytest.mark.parametrize("kv", Kv)
@pytest.mark.parametrize("name", KNOWN)
def test_laws_hold_at_every_step(name, kv):
    """Tables and pools agree at every step, each token is charged once, and all is given back."""
    plans = small_mix()
    chosen = scheduling(name, prefill_weight=0.01, quantum=16.0, beta=2.0, kv=kv)
    engine = SimEngine(SMALL, chosen, num_slots=4)
    steps = []
    original = engine.step

    def checked_step():
        original()
        engine.check_integrity()
        steps.append(engine.now_s)

    engine.step = checked_step
    result = engine.run(plans, [3.0 * i for i in range(len(plans))])

    assert steps == sorted(steps)
    assert engine.table.num_live_calls == engine.table.num_programs == 0
    assert engine.cache.num_tokens == engine.cache.num_evictable <= SMALL.kv_tokens
    for plan, program in zip(plans, result.programs, strict=True):
        for trace_call, call in zip(plan.trace.calls, program.calls, strict=True):
            fresh = max(1, call.prompt_tokens - call.cached_tokens)
            assert call.num_output == trace_call.output_tokens
            assert call.server.service_steps == pytest.approx(call.num_output + 0.01 * fresh)
            assert call.issue_s <= call.first_token_s <= call.finish_s


class StepByStep(SimEngine):
    """The slow, obvious version: one decode step at a time, everyone charged after each."""

    def _leap(self):
        return 1

    def _decode(self, num_steps):
        for request in self._decoding:
            request.program.event_at = self._num_decodes + 1
            self._events.append((self._num_decodes + 1, next(self._counter), request.program))
        self._events.sort(key=lambda event: event[:2])
        super()._decode(num_steps)


@pytest.mark.parametrize("interval", [1, 7])
@pytest.mark.parametrize("name", [n for n in KNOWN if n != "srpt"])
def test_leaps_are_the_same_as_single_steps(name, interval):
    """Finish times, services, levels and preemptions do not depend on how steps are taken."""
    plans = small_mix()
    arrivals = [3.0 * i for i in range(len(plans))]
    settings = {"prefill_weight": 1 / 64, "quantum": 16.0, "beta": 2.0}
    chosen = scheduling(name, schedule_interval=interval, **settings)
    fast = SimEngine(SMALL, chosen, num_slots=4).run(plans, arrivals)
    slow = StepByStep(SMALL, chosen, num_slots=4).run(plans, arrivals)

    for ours, theirs in zip(fast.calls, slow.calls, strict=True):
        assert ours.finish_s == pytest.approx(theirs.finish_s, rel=1e-9)
        assert ours.server.preemptions == theirs.server.preemptions
        assert ours.server.promotions == theirs.server.promotions
        assert ours.server.queue_steps == pytest.approx(theirs.server.queue_steps)


def test_a_run_repeats_exactly():
    """The same input gives the same records, to the last bit."""
    plans = small_mix()
    arrivals = [2.0 * i for i in range(len(plans))]
    chosen = scheduling("plas")

    first, second = (SimEngine(SMALL, chosen, num_slots=4).run(plans, arrivals) for _ in range(2))

    assert first == second


def test_without_a_queue_every_policy_is_the_same():
    """Where nothing waits there is nothing to schedule."""
    plans = small_mix()
    arrivals = [400.0 * i for i in range(len(plans))]
    runs = [SimEngine(SMALL, scheduling(n), num_slots=64).run(plans, arrivals) for n in KNOWN]

    finishes = [[call.finish_s for call in each.calls] for each in runs]
    assert all(times == pytest.approx(finishes[0]) for times in finishes)
