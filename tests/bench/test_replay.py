"""Replay of programs over HTTP, against the fake engine."""

import asyncio
import statistics
from itertools import pairwise

import pytest

from bench.replay import ReplayOptions, poisson_arrivals, recorded_arrivals, replay
from bench.stats import Outcome, Run
from bench.testing import FakeCall, FakeServer, echo_output
from bench.trace import TraceCall, TraceProgram

CHAIN = TraceProgram(
    "a/chain#2",
    "c",
    "react",
    (
        TraceCall("0", 12, 12, 4),
        TraceCall("1", 21, 5, 3, parents=("0",), gap_s=0.05),
        TraceCall("2", 25, 1, 2, parents=("1",)),
    ),
)
DIAMOND = TraceProgram(
    "diamond",
    "c",
    "tree",
    (
        TraceCall("r", 10, 10, 5),
        TraceCall("x", 11, 11, 9, parents=("r",), thread="left"),
        TraceCall("y", 12, 12, 1, parents=("r",), thread="right"),
        TraceCall("end", 13, 13, 2, parents=("x", "y")),
    ),
)
WIDE = TraceProgram(
    "wide", "c", "tree", (TraceCall("0", 5, 5, 2), TraceCall("1", 5, 5, 2, same_prompt_as="0"))
)


def run_against(
    fake: FakeServer,
    *programs: TraceProgram,
    arrivals: list[float] | None = None,
    **options: object,
) -> Run:
    async def go() -> Run:
        async with fake.listen() as url:
            times = arrivals or [0.0] * len(programs)
            return await replay("fake", programs, times, ReplayOptions(base_url=url, **options))

    return asyncio.run(go())


def test_a_call_is_issued_only_after_all_its_parents_and_its_gap():
    """Dependent calls wait for every parent to complete, and then for the recorded gap."""
    fake = FakeServer(token_s=0.01)

    run = run_against(fake, CHAIN, DIAMOND)

    chain, diamond = (dict(zip("0123", p.calls, strict=False)) for p in run.programs)
    assert chain["1"].issue_s - chain["0"].finish_s >= 0.049
    assert chain["2"].issue_s >= chain["1"].finish_s
    assert diamond["3"].issue_s >= max(diamond["1"].finish_s, diamond["2"].finish_s)
    # The two branches run side by side.
    assert diamond["2"].issue_s < diamond["1"].finish_s
    assert all(call.outcome is Outcome.OK for call in run.calls)


def test_prompts_carry_the_outputs_the_server_gave():
    """The second call's input is the first one's input, its actual output and new tokens."""
    fake = FakeServer()

    run_against(fake, CHAIN)

    first, second, third = (call.input_ids for call in fake.calls)
    assert second[:16] == first + echo_output(first, 4)
    assert third[:24] == second + echo_output(second, 3)


def test_headers_name_program_thread_call_and_parents():
    """Every call says whose it is; ids are safe for headers and URLs and unique in the run."""
    fake = FakeServer()

    run_against(fake, DIAMOND, run_id="r7")

    by_call = {call.headers["x-call-id"].rpartition(".")[2]: call.headers for call in fake.calls}
    assert {h["x-program-id"] for h in by_call.values()} == {"r7-0-diamond"}
    assert by_call["1"]["x-thread-id"] == "left"
    assert by_call["0"]["x-parent-call-ids"] == ""
    assert by_call["3"]["x-parent-call-ids"] == "r7-0-diamond.1,r7-0-diamond.2"


def test_the_last_call_announces_the_end_where_it_is_known_to_be_last():
    """A program's only remaining call carries the end header, and no other call does."""
    fake = FakeServer()

    run_against(fake, CHAIN, DIAMOND)

    ended = [call.headers["x-call-id"] for call in fake.calls if "x-program-end" in call.headers]
    assert sorted(ended) == ["run-0-a-chain-2.2", "run-1-diamond.3"]
    assert fake.ended_programs == []


def test_a_program_that_ends_in_parallel_calls_is_ended_explicitly():
    """Where no call is known to be last the program is deleted afterwards; a 404 is fine."""
    fake = FakeServer(token_s=0.01)

    run = run_against(fake, WIDE)

    assert fake.ended_programs == ["run-0-wide"]
    assert all("x-program-end" not in call.headers for call in fake.calls)
    assert run.programs[0].is_complete


def test_identity_can_be_left_out():
    """Without identity no header of ours is sent and no program is ended."""
    fake = FakeServer()

    run_against(fake, WIDE, CHAIN, identify=False)

    assert not any(name.startswith("x-") for call in fake.calls for name in call.headers)
    assert fake.ended_programs == []


def test_the_request_asks_for_exactly_the_recorded_tokens():
    """Sampling is greedy, of fixed length, and not stopped by an end token."""
    fake = FakeServer()

    run_against(fake, CHAIN)

    assert fake.calls[0].body["sampling_params"] == {
        "temperature": 0,
        "max_new_tokens": 4,
        "ignore_eos": True,
    }
    assert fake.calls[0].body["stream"] is False


TIMER_S = 0.002  # uvloop's timers, in force once SGLang is imported, fire up to 1 ms early


def test_programs_start_at_their_arrival_times():
    """Arrivals are kept whatever the server does: nobody waits for a program that is slow."""
    fake = FakeServer(slots=1, token_s=0.2)
    arrivals = [0.0, 0.05, 0.1]

    run = run_against(fake, WIDE, WIDE, WIDE, arrivals=arrivals)

    first_end = min(call.finish_s for call in run.calls)
    for program, arrival in zip(run.programs, arrivals, strict=True):
        assert arrival - TIMER_S <= program.start_s < first_end
        assert all(program.start_s <= call.issue_s < first_end for call in program.calls)


def test_measurements_of_the_server_are_kept():
    """Token counts, queueing and the program's account come from the answer's meta_info."""
    fake = FakeServer(program_info={"queue_steps": 3.5, "level": 2, "preemptions": 1})

    call = run_against(fake, CHAIN).calls[1]

    assert (call.num_output, call.prompt_tokens, call.cached_tokens) == (3, 21, 10)
    assert call.queue_s is not None
    assert call.e2e_s is not None
    assert (call.server.queue_steps, call.server.level, call.preemptions) == (3.5, 2, 1)
    assert call.server.promotions is None


def test_what_the_server_does_not_say_is_unknown():
    """Without queueing times and a program account these are None, not zero."""
    call = run_against(FakeServer(reports_queueing=False), CHAIN).calls[0]

    assert (call.queue_s, call.server, call.first_token_s) == (None, None, None)


def test_streaming_gives_the_same_output_and_the_time_of_the_first_token():
    """A streamed run has the same hash as a plain one and knows when tokens began to come."""
    plain, streamed = (run_against(FakeServer(), CHAIN, DIAMOND, stream=s) for s in (False, True))

    assert streamed.output_hash == plain.output_hash
    for call in streamed.calls:
        assert call.issue_s < call.first_token_s <= call.finish_s


def test_the_hash_tells_whether_two_runs_gave_the_same_outputs():
    """Other prompts give other outputs and another hash; timing does not enter."""
    same = [run_against(FakeServer(token_s=t), DIAMOND).output_hash for t in (0.0, 0.005)]

    assert same[0] == same[1]
    assert run_against(FakeServer(), DIAMOND, seed=5).output_hash != same[0]


@pytest.mark.parametrize(
    ("status", "words"), [(503, "HTTP 503: told to fail"), (0, "ServerDisconnectedError")]
)
def test_a_failed_call_is_recorded_and_its_dependents_are_not_issued(status, words):
    """Errors and dropped connections are outcomes; what depends on them is never sent."""
    fake = FakeServer(fail=lambda call: status if call.headers["x-call-id"][-1] == "1" else 200)

    run = run_against(fake, DIAMOND)

    outcomes = [call.outcome for call in run.calls]
    assert outcomes == [Outcome.OK, Outcome.ERROR, Outcome.OK, Outcome.NOT_ISSUED]
    assert words in run.calls[1].error
    assert run.calls[3].error == "a call it waits for failed"
    assert len(fake.calls) == 3
    assert fake.ended_programs == ["run-0-diamond"]


def test_a_server_that_is_not_there_fails_every_call():
    """With nothing listening every call is recorded as an error and the replay ends."""

    async def go() -> Run:
        options = ReplayOptions(base_url="http://127.0.0.1:9")
        return await replay("none", [WIDE], [0.0], options)

    assert [call.outcome for call in asyncio.run(go()).calls] == [Outcome.ERROR] * 2


def test_an_answer_of_the_wrong_length_is_an_error():
    """A run whose calls did other work than asked cannot be compared, so the call fails."""

    class Short(FakeServer):
        def _reply(self, call: FakeCall, count: int, queue_s: float) -> dict[str, object]:
            return super()._reply(call, count - 1, queue_s)

    run = run_against(Short(), CHAIN)

    assert "got 3 of 4 tokens" in run.calls[0].error


def test_a_deadline_ends_the_run_and_records_what_was_open():
    """At the deadline open calls become errors and the others not issued; none is missing."""
    run = run_against(FakeServer(token_s=0.2), CHAIN, WIDE, deadline_s=0.1)

    assert [call.outcome for call in run.calls] == [
        Outcome.ERROR,
        Outcome.NOT_ISSUED,
        Outcome.NOT_ISSUED,
        Outcome.ERROR,
        Outcome.ERROR,
    ]
    assert run.calls[0].error == "cancelled at the deadline"


def test_a_closed_loop_holds_programs_back():
    """With a limit on programs under way, the next starts when one has ended."""
    run = run_against(FakeServer(token_s=0.02), WIDE, WIDE, max_programs=1)

    first, second = run.programs
    assert second.calls[0].issue_s >= max(call.finish_s for call in first.calls)


def test_the_observer_sees_every_call_once():
    """Progress is told of each call as it ends, failed ones included."""
    seen = []

    async def go() -> None:
        async with FakeServer(fail=lambda call: 500).listen() as url:
            await replay("f", [DIAMOND], [0.0], ReplayOptions(base_url=url), seen.append)

    asyncio.run(go())

    assert sorted(record.call_id for record in seen) == ["end", "r", "x", "y"]


def test_poisson_arrivals_have_the_asked_rate_and_are_seeded():
    """The mean gap is one over the rate; the first arrival is at zero; seeds repeat."""
    times = poisson_arrivals(4000, rate=5.0, seed=1)
    gaps = [b - a for a, b in pairwise(times)]

    assert times[0] == 0.0
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.08)
    assert times == poisson_arrivals(4000, rate=5.0, seed=1)


def test_recorded_arrivals_are_kept_scaled_or_stretched_to_a_rate():
    """Recorded times count from the first one, times a scale or stretched to a mean rate."""
    call = TraceCall("0", 1, 1, 1)
    programs = [TraceProgram(str(t), "c", "chat", (call,), arrival_s=t) for t in (30.0, 10.0, 12.0)]

    assert recorded_arrivals(programs) == [20.0, 0.0, 2.0]
    assert recorded_arrivals(programs, time_scale=0.5) == [10.0, 0.0, 1.0]
    assert recorded_arrivals(programs, rate=0.2) == [10.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="program wide has no recorded arrival"):
        recorded_arrivals([WIDE])
