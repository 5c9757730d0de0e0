"""The process table: programs come, are known by their ids, and are forgotten."""

from __future__ import annotations

import json
import time

import pytest

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core import program as program_module
from autellix_sglang.core.program import Call, Phase, ProgramTable
from autellix_sglang.errors import UnknownProgramError
from autellix_sglang.testing import table_from

TTL_S = 60


@pytest.fixture
def table() -> ProgramTable:
    return table_from(ProgramConfig(policy="atlas", quantum=10, ttl=TTL_S))


def serve(table: ProgramTable, call: Call, steps: float = 1) -> None:
    table.start(call)
    table.charge(call, steps)
    table.advance(steps)
    table.finish(call)


def is_known(table: ProgramTable, program_id: str, tenant: str = "") -> bool:
    try:
        table.program(tenant, program_id)
    except UnknownProgramError:
        return False
    return True


# -- open and end --------------------------------------------------------------------------------


def test_opening_twice_is_the_same_program(table: ProgramTable) -> None:
    """A session that was opened and a call that names it meet in one program."""
    program = table.open_program("", "p")
    assert table.open_program("", "p") is program
    assert table.open_call("a", program_id="p").program is program
    assert (table.num_programs, table.counters.num_programs) == (1, 1)


def test_tenants_do_not_share_programs(table: ProgramTable) -> None:
    """The same id under two tenants names two programs, and ending one leaves the other."""
    mine, theirs = table.open_program("me", "p"), table.open_program("them", "p")
    assert mine is not theirs
    table.end_program("me", "p")
    assert not is_known(table, "p", "me")
    assert is_known(table, "p", "them")


def test_an_idle_program_ends_at_once(table: ProgramTable) -> None:
    """After its end a program is unknown, and its id starts from nothing."""
    serve(table, table.open_call("a", program_id="p"), 100)
    table.end_program("", "p")
    assert not is_known(table, "p")
    assert table.open_program("", "p").service == 0


def test_ending_a_program_lets_its_live_calls_finish(table: ProgramTable) -> None:
    """An explicit end takes effect when the last live call, waiting or running, is over."""
    running, waiting = (table.open_call(rid, program_id="p") for rid in "ab")
    table.start(running)
    table.end_program("", "p")
    assert table.program("", "p").state == "ended"
    table.finish(running)
    assert is_known(table, "p")
    serve(table, waiting)
    assert not is_known(table, "p")
    table.check_integrity()


def test_a_last_call_ends_its_program(table: ProgramTable) -> None:
    """A call marked as the last takes the program along once no other call is live."""
    last = table.open_call("a", program_id="p", ends_program=True)
    other = table.open_call("b", program_id="p")
    serve(table, last)
    assert is_known(table, "p")
    serve(table, other)
    assert not is_known(table, "p")


@pytest.mark.parametrize("program_id", ["p", None])
def test_a_warm_up_leaves_its_program_to_the_samples(
    table: ProgramTable, program_id: str | None
) -> None:
    """Neither the end that it is tagged with nor its namelessness counts; the samples' do."""
    tag = {"program_id": program_id or "w", "is_anonymous": program_id is None}
    warm_up = table.open_call("w", ends_program=True, is_warm_up=True, **tag)
    serve(table, warm_up, 20)
    table.check_integrity()
    samples = [table.open_call(rid, ends_program=True, **tag) for rid in "ab"]
    assert {sample.program for sample in samples} == {warm_up.program}
    assert all(sample.level > 0 for sample in samples), "they would begin anew"
    for sample in samples:
        serve(table, sample)
    assert table.num_programs == 0


def test_a_warm_up_whose_samples_never_come_goes_with_the_ttl(table: ProgramTable) -> None:
    """Its client has gone in between; nothing stays for ever."""
    serve(table, table.open_call("w", is_warm_up=True))
    table.expire(table.ttl_s + 1)
    assert table.num_programs == 0


def test_ending_an_unknown_program_is_an_error(table: ProgramTable) -> None:
    """The error names the program that nobody knows."""
    with pytest.raises(UnknownProgramError, match="'nobody'"):
        table.end_program("", "nobody")


@pytest.mark.parametrize("program_id", [None, ""])
def test_a_call_without_id_is_a_program_of_its_own(
    table: ProgramTable, program_id: str | None
) -> None:
    """Anonymous calls share nothing and leave nothing behind."""
    a, b = (table.open_call(rid, program_id=program_id) for rid in "ab")
    assert a.program is not b.program
    serve(table, a)
    assert table.num_programs == 1
    table.finish(b)
    assert table.num_programs == 0
    table.check_integrity()


def test_a_program_named_after_a_live_anonymous_call_is_kept(table: ProgramTable) -> None:
    """Once someone names a program it lives by the rules of named ones."""
    first = table.open_call("a")
    second = table.open_call("b", program_id="a")
    assert second.program is first.program
    serve(table, first)
    serve(table, second)
    assert is_known(table, "a")


def test_a_live_rid_is_unique(table: ProgramTable) -> None:
    """The engine's request ids name one live call each, and can be used again later."""
    call = table.open_call("a", program_id="p")
    with pytest.raises(AssertionError, match="live already"):
        table.open_call("a", program_id="q")
    table.finish(call)
    assert table.open_call("a", program_id="p") is not call


# -- calls ---------------------------------------------------------------------------------------


def test_phases_of_a_call(table: ProgramTable) -> None:
    """A call waits, runs, waits again if preempted, and ends once."""
    call = table.open_call("a", program_id="p", handle="engine's")
    phases = [call.phase]
    for change in (table.start, table.preempt, table.start, table.finish):
        change(call)
        phases.append(call.phase)
    waiting, running = Phase.WAITING, Phase.RUNNING
    assert phases == [waiting, running, waiting, running, Phase.FINISHED]
    assert (call.num_preemptions, table.counters.num_preemptions) == (1, 1)
    assert call.handle is None
    for change in (table.start, table.preempt, table.finish):
        with pytest.raises(AssertionError):
            change(call)


def test_a_call_can_end_while_it_waits(table: ProgramTable) -> None:
    """An abort in the queue leaves nothing there, and its waiting is on record."""
    call, other = (table.open_call(rid, program_id="p") for rid in "ab")
    table.advance(7)
    table.finish(call)
    assert list(table.queue) == [other]
    assert call.queue_steps == 7
    assert table.live_call("a") is None
    table.check_integrity()


def test_queueing_adds_up_over_preemptions(table: ProgramTable) -> None:
    """Steps in the queue are counted on the virtual clock, before and after a preemption."""
    call = table.open_call("a")
    table.advance(3)
    table.start(call)
    table.advance(10)
    table.preempt(call)
    table.advance(4)
    table.start(call)
    assert call.queue_steps == 7


def test_samples_share_a_call_id(table: ProgramTable) -> None:
    """Several samples of one request are one node: a child waits for the longest of them."""
    for i, steps in enumerate((5, 9, 7)):
        serve(table, table.open_call(f"a-{i}", program_id="p", call_id="a"), steps)
    # These samples do not tell their parents: each continues the longest chain before it.
    longest = 5 + 9 + 7
    child = table.open_call("b", program_id="p", parent_call_ids=["a", "a"])
    assert child.base_path == longest
    assert child.parents == ("a",)


def test_unknown_parents_are_ignored(table: ProgramTable) -> None:
    """Parents of other programs, or never seen, count as if they had not been named."""
    serve(table, table.open_call("a", program_id="p"), 5)
    serve(table, table.open_call("x", program_id="other"), 50)
    some = table.open_call("b", program_id="p", parent_call_ids=["a", "x", "nobody"])
    none = table.open_call("c", program_id="p", parent_call_ids=["x", "nobody"])
    assert (some.parents, some.base_path) == (("a",), 5)
    assert (none.parents, none.base_path) == ((), 5)  # as if not told: the longest chain


def test_no_parents_and_unknown_parents_differ(table: ProgramTable) -> None:
    """A call that says it waited for nothing begins a chain; one that is silent continues one."""
    serve(table, table.open_call("a", program_id="p"), 5)
    assert table.open_call("b", program_id="p", parent_call_ids=[]).base_path == 0
    assert table.open_call("c", program_id="p").base_path == 5


def test_a_preempted_call_counts_min_run_from_its_resumption(table: ProgramTable) -> None:
    """Own service when a call last started is what `min_run` is measured from."""
    call = table.open_call("a")
    table.start(call)
    table.charge(call, 5)
    table.preempt(call)
    table.start(call)
    table.charge(call, 2)
    assert call.service - call.started_service == 2


# -- forgetting ----------------------------------------------------------------------------------


def test_idle_programs_expire_after_the_ttl(table: ProgramTable) -> None:
    """The TTL runs from the last activity, and a live call holds its program without end."""
    table.expire(1000)
    table.open_program("", "opened again")
    table.open_program("", "opened")
    serve(table, table.open_call("a", program_id="called"))
    table.open_call("b", program_id="live")
    table.expire(1000 + TTL_S / 2)
    table.open_program("", "opened again")
    assert table.expire(1000 + TTL_S - 1) == 0
    assert table.expire(1000 + TTL_S) == 2
    assert [program.program_id for program in table.programs()] == ["live", "opened again"]
    assert table.counters.num_expired == 2
    table.check_integrity()


def test_a_finished_call_renews_the_ttl(table: ProgramTable) -> None:
    """A program is idle from the end of its last call, not from its arrival."""
    table.expire(1000)
    call = table.open_call("a", program_id="p")
    table.expire(5000)
    serve(table, call)
    assert table.expire(5000 + TTL_S - 1) == 0
    assert table.expire(5000 + TTL_S) == 1


def test_time_does_not_run_backwards(table: ProgramTable) -> None:
    """A message with an older time neither expires nor renews anything."""
    table.expire(1000)
    table.expire(500)
    table.open_program("", "p")
    assert table.expire(1000 + TTL_S - 1) == 0


def test_memory_per_program_is_bounded(
    table: ProgramTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program remembers its newest finished calls; older ones are unknown as parents."""
    monkeypatch.setattr(program_module, "MAX_CALLS_KEPT", 3)
    for i in range(10):
        call_id = f"c{i}" if i != 8 else "c9"
        parents = [f"c{i - 1}"] if i else []
        call = table.open_call(str(i), program_id="p", call_id=call_id, parent_call_ids=parents)
        serve(table, call)
    program = table.program("", "p")
    assert [call.rid for call in program.calls()] == ["7", "8", "9"]
    assert set(program.by_call_id) == {"c7", "c9"}
    assert (program.num_calls, program.service) == (10, 10)
    child = table.open_call("x", program_id="p", parent_call_ids=["c6", "c7"])
    assert child.parents == ("c7",)
    table.check_integrity()


@pytest.mark.parametrize("has_calls", [False, True])
def test_the_number_of_idle_programs_is_bounded(
    table: ProgramTable, monkeypatch: pytest.MonkeyPatch, has_calls: bool
) -> None:
    """Beyond the bound the longest idle program goes; live ones never do."""
    monkeypatch.setattr(program_module, "MAX_IDLE_PROGRAMS", 3)
    live = [table.open_call(f"live {i}", program_id=f"live {i}") for i in range(5)]
    for i in range(10):
        if has_calls:
            serve(table, table.open_call(str(i), program_id=f"p{i}"))
        else:
            table.open_program("", f"p{i}")
    known = [program.program_id for program in table.programs()]
    assert known == [call.program.program_id for call in live] + ["p7", "p8", "p9"]
    for call in live:
        serve(table, call)
    assert table.num_programs == 3
    assert table.counters.num_expired == 12
    table.check_integrity()


# -- what is told --------------------------------------------------------------------------------


def test_summaries_are_json(table: ProgramTable) -> None:
    """Summaries of calls and programs are plain JSON with the documented keys."""
    serve(table, table.open_call("a", program_id="p", tenant="t", thread_id="th"), 12.34567)
    call = table.open_call(
        "r", program_id="p", tenant="t", call_id="b", thread_id="th", parent_call_ids=["a"]
    )
    table.advance(5)
    table.start(call)
    assert json.loads(json.dumps(call.summary())) == {
        "id": "b", "rid": "r", "thread": "th", "parents": ["a"], "state": "running", "level": 1,
        "service_steps": 0, "queue_steps": 5, "preemptions": 0, "promotions": 0,
    }  # fmt: skip
    assert json.loads(json.dumps(call.program.summary())) == {
        "id": "p", "tenant": "t", "state": "running", "level": 1, "service_steps": 12.346,
        "longest_path_steps": 12.346, "num_calls": 2, "num_waiting": 0, "num_running": 1,
    }  # fmt: skip
    totals = json.loads(json.dumps(table.totals()))
    assert (totals["num_calls"], totals["live_calls"], totals["programs"]) == (2, 1, 1)


def test_states_of_a_program(table: ProgramTable) -> None:
    """A program is idle, waiting or running by its calls, and ended by its client."""
    program = table.open_program("", "p")
    states = [program.state]
    call = table.open_call("a", program_id="p")
    states.append(program.state)
    table.start(call)
    states.append(program.state)
    table.end_program("", "p")
    states.append(program.state)
    assert states == ["idle", "waiting", "running", "ended"]
    assert set(states) == set(program_module.STATES)


def test_calls_are_listed_by_arrival(table: ProgramTable) -> None:
    """A program's calls come in order of arrival, finished or not."""
    calls = [table.open_call(rid, program_id="p") for rid in "abcd"]
    table.start(calls[2])
    serve(table, calls[1])
    assert list(calls[0].program.calls()) == calls


def test_a_call_prints_in_one_short_line(table: ProgramTable) -> None:
    """A log line or a failed assertion about a call does not print its whole program."""
    calls = [table.open_call(str(i), program_id="p", parent_call_ids=["0"]) for i in range(50)]
    assert len(repr(calls[-1])) < 500
    assert len(repr(calls[-1].program)) < 500


# -- cost ----------------------------------------------------------------------------------------


def test_a_wide_program_costs_its_siblings_only_at_level_ends() -> None:
    """Charging a program with 4,000 waiting calls 4,000 times is not 16 million moves."""
    table = table_from(ProgramConfig(policy="plas", levels=8, quantum=10, beta=1))
    calls = [table.open_call(str(i), program_id="p") for i in range(4000)]
    table.start(calls[0])
    started = time.perf_counter()
    num_versions = table.queue.version
    for _ in range(4000):
        table.charge(calls[0], 1)
        table.advance(1)
        table.queue.first()
    assert table.queue.version - num_versions == 7 * 3999
    assert time.perf_counter() - started < 5  # about 0.1 s; quadratic would be a minute
    for call in calls:
        table.finish(call)
    assert time.perf_counter() - started < 10
    table.check_integrity()


def test_naming_every_call_as_parent_stays_small(table: ProgramTable) -> None:
    """A parent named again and again, with many samples behind it, is one parent."""
    for i in range(300):
        serve(table, table.open_call(str(i), program_id="p", call_id="same"))
    call = table.open_call("x", program_id="p", parent_call_ids=["same"] * 10_000)
    assert call.parents == ("same",)


def test_a_program_that_is_started_again_goes_on() -> None:
    """Ended with a call live, then started anew: it stays when the call is done."""
    table = table_from(ProgramConfig())
    call = table.open_call("r", program_id="p")
    table.start(call)
    table.end_program("", "p")
    table.start_program("", "p")
    table.finish(call)
    assert table.program("", "p").state == "idle"


def test_parents_are_kept_once() -> None:
    """A thousand ids in each of thousands of calls are names of calls that are there already."""
    table = table_from(ProgramConfig())
    first = table.open_call("r0", program_id="p", call_id="c" * 250)
    table.start(first)
    table.finish(first)
    told = "c" * 125 + "c" * int("125")  # what a message brings: another object
    second = table.open_call("r1", program_id="p", parent_call_ids=(told,))
    assert second.parents[0] is first.call_id
