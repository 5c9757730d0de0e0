"""The beta rule: a program that waited `beta` times its service is promoted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.kv import LossShare
from autellix_sglang.core.program import Call, Program, ProgramTable
from autellix_sglang.testing import FakeEngine, Job, table_from

QUANTUM = 10.0
BETA = 2.0


def table_of(policy: str = "plas", beta: float = BETA) -> ProgramTable:
    """Levels end at 10, 20 and 40 steps."""
    return table_from(ProgramConfig(policy=policy, levels=4, quantum=QUANTUM, factor=2, beta=beta))


def run(table: ProgramTable, call: Call, steps: float) -> None:
    table.charge(call, steps)
    table.advance(steps)


def stalled(table: ProgramTable, service: float = 100, rid: str = "a") -> Call:
    """A call of program p that has run for `service` steps and waits again."""
    call = table.open_call(rid, program_id="p")
    table.start(call)
    run(table, call, service)
    table.preempt(call)
    return call


# -- the promotion -------------------------------------------------------------------------------


@pytest.mark.parametrize(("service", "wait"), [(100, 200), (50, 100), (10, 20)])
def test_promoted_at_exactly_beta_times_the_service(service: float, wait: float) -> None:
    """The call moves to level 0 when its program has waited beta x its service, not before."""
    table = table_of()
    call = stalled(table, service)
    table.advance(wait - 0.5)
    assert (call.is_promoted, call.level > 0) == (False, True)
    table.advance(0.5)
    assert (call.is_promoted, call.level) == (True, 0)
    assert table.counters.num_promotions == call.num_promotions == 1
    table.check_integrity()


def test_little_service_counts_as_a_quantum() -> None:
    """A program is not promoted before it has waited beta quanta, or it always would be."""
    table = table_of("gittins")
    call = table.open_call("a", program_id="p")
    assert call.level > 0
    table.advance(BETA * QUANTUM - 0.5)
    assert not call.is_promoted
    table.advance(0.5)
    assert call.is_promoted


@pytest.mark.parametrize(("service", "wait"), [(100, 200), (4, 20)])
def test_stall_ratio_is_beta_when_the_promotion_comes(service: float, wait: float) -> None:
    """What operators see rises to beta while nothing of the program runs, and is 0 when it does."""
    table = table_of()
    call = stalled(table, service)
    assert table.stall_ratio(call.program) == 0
    table.advance(wait / 2)
    assert table.stall_ratio(call.program) == BETA / 2
    table.advance(wait / 2)
    assert table.stall_ratio(call.program) == BETA
    table.start(call)
    assert table.stall_ratio(call.program) == 0


@pytest.mark.parametrize(("service", "quantum"), [(10, 10), (25, 20), (100, 40)])
def test_runs_a_quantum_of_its_own_level(service: float, quantum: float) -> None:
    """A promoted call keeps level 0 for what its level allots, across preemptions."""
    table = table_of()
    call = stalled(table, service)
    level = call.level
    table.advance(BETA * service)
    table.start(call)
    run(table, call, quantum / 2)
    table.preempt(call)
    table.start(call)
    run(table, call, quantum / 2 - 0.5)
    assert call.level == 0
    run(table, call, 0.5)
    assert not call.is_promoted
    assert call.level >= level
    table.check_integrity()


def test_waiting_is_held_against_all_service() -> None:
    """What was waited and what was received both count for good, promoted or not."""
    table = table_of()
    call = stalled(table)
    table.advance(200)
    table.start(call)
    run(table, call, 40)
    program = call.program
    assert (program.stall_steps, program.service) == (200, 140)
    table.preempt(call)
    table.advance(BETA * 140 - 200 - 0.5)
    assert not call.is_promoted
    table.advance(0.5)
    assert call.num_promotions == 2


def test_waiting_adds_up_over_several_stalls() -> None:
    """Short runs between do not forgive the waiting before them."""
    table = table_of()
    call = stalled(table)
    for _ in range(5):
        table.advance(30)
        table.start(call)
        run(table, call, 1)
        table.preempt(call)
    assert call.program.stall_steps == 150
    table.advance(2 * 105 - 150 - 0.5)
    assert not call.is_promoted
    table.advance(0.5)
    assert call.is_promoted


def test_beta_0_switches_promotion_off() -> None:
    """With beta 0 nobody is promoted, however long it waits."""
    table = table_of(beta=0)
    call = stalled(table)
    table.advance(1e9)
    assert not call.is_promoted


def test_a_program_with_a_running_call_is_not_stalled() -> None:
    """Waiting counts only while none of the program's calls runs."""
    table = table_of()
    call = stalled(table)
    other = table.open_call("b", program_id="p")
    table.start(other)
    table.advance(1e6)
    assert call.program.stall_steps == 0
    assert not call.is_promoted


def test_the_first_in_line_is_promoted_alone() -> None:
    """One call per program is promoted: the one that the policy would admit first."""
    table = table_of("mlfq")
    first, second = stalled(table, 25, "a"), stalled(table, 15, "b")
    table.advance(1000)
    assert (first.is_promoted, second.is_promoted) == (False, True)


def test_level_0_is_promoted_too() -> None:
    """It may wait behind ever new calls of older programs, and for what has just begun to run."""
    table = table_of()
    call = table.open_call("a")
    table.advance(1e6)
    assert call.num_promotions == 1


@pytest.mark.parametrize("levels", [1, 8])
@pytest.mark.parametrize("policy", ["mlfq", "plas", "atlas", "gittins"])
def test_nobody_waits_for_ever_behind_an_older_program(policy: str, levels: int) -> None:
    """One slot, and a program that always has one more call waiting; all other settings default."""
    table = table_from(ProgramConfig(policy=policy, levels=levels, prefill_weight=0.01))

    def send(i: int) -> Call:
        return table.open_call(f"old-{i}", program_id="old", parent_call_ids=())

    send(0)
    send(1)
    late = None
    for i in range(2, 2000):
        call = table.queue.first()
        assert call is not None
        if call is late:
            break
        table.start(call)
        for _ in range(8):
            run(table, call, 1.0)
        table.finish(call)
        send(i)
        if late is None:
            late = table.open_call("late", program_id="new", parent_call_ids=())
    assert late is not None
    assert table.stall_ratio(late.program) <= 2 * table.beta


def test_preemption_comes_back_after_a_shortage_of_kv() -> None:
    """What was lost then keeps calls from being preempted; who starves by that ends it."""

    class Short(FakeEngine):
        """An engine that had lost most KV of preempted calls, and loses none any more."""

        loss = LossShare()

        def resume_steps(self, call: Call) -> float:
            return float(self.loss.value * call.handle.num_tokens * 0.01)

        def _admit(self) -> None:
            waiting = list(self.waiting)
            super()._admit()
            for request in waiting:
                if request in self.running and request.call.num_preemptions:
                    self.loss.note(0, request.num_tokens)

    engine = Short(ProgramConfig(policy="plas", prefill_weight=0.01), num_slots=8)
    engine.loss.value = 0.9
    for i in range(16):
        job = Job(rid=f"long-{i}", num_prompt=8000, num_output=2000, program_id=f"long-{i}")
        engine.submit(job)
    ratio = 0.0
    for i in range(30):
        for _ in range(250):
            engine.step()
        rid = f"short-{i}"
        engine.submit(Job(rid=rid, num_prompt=20, num_output=10, program_id=rid))
        program = engine.table.live_call(rid).program
        while rid not in engine.ended:
            engine.step()
            ratio = max(ratio, engine.table.stall_ratio(program))
    assert ratio <= 2 * engine.table.beta
    assert engine.loss.value < 0.5


def test_nobody_is_promoted_where_nobody_can_starve() -> None:
    """First come, first served stays that."""
    table = table_of("fcfs")
    calls = [table.open_call(name) for name in "ab"]
    table.advance(1e6)
    assert [call.num_promotions for call in calls] == [0, 0]


def test_goes_before_level_0_calls_of_older_programs() -> None:
    """Promotion is a turn now: not behind whatever an older program has at level 0."""
    table = table_of("atlas")
    root = table.open_call("root", program_id="older")
    table.finish(root)
    call = stalled(table)
    wide = [table.open_call(str(i), program_id="older", parent_call_ids=["root"]) for i in range(9)]
    table.start(wide[0])
    assert list(table.queue) == [*wide[1:], call]
    table.advance(200)
    assert list(table.queue) == [call, *wide[1:]]


# -- calls that leave ----------------------------------------------------------------------------


def test_siblings_of_an_aborted_promoted_call_do_not_starve() -> None:
    """If a promoted call is aborted in the queue, its turn goes to the program's next call."""
    table = table_of()
    promoted = stalled(table)
    sibling = table.open_call("b", program_id="p")
    table.advance(200)
    assert promoted.is_promoted
    table.finish(promoted)
    table.check_integrity()
    table.advance(1)
    assert sibling.is_promoted


def test_siblings_of_an_aborted_level_0_call_do_not_starve() -> None:
    """If the first in line needed no promotion and leaves, the next one gets it."""
    table = table_of("mlfq")
    deep = stalled(table)
    fresh = table.open_call("b", program_id="p")
    table.advance(1000)
    assert not deep.is_promoted
    table.finish(fresh)
    table.advance(1)
    assert deep.is_promoted


@pytest.mark.parametrize("is_started", [False, True])
def test_a_promoted_call_that_ends_early_leaves_its_program_its_due(is_started: bool) -> None:
    """What a short promoted call did not use, the program's next call gets at once."""
    table = table_of()
    call = stalled(table)
    table.advance(200)
    if is_started:
        table.start(call)
        run(table, call, 3)
    table.finish(call)
    assert not call.is_promoted
    following = table.open_call("b", program_id="p")
    table.advance(6.5)
    assert following.is_promoted
    table.check_integrity()


def test_promotion_records_do_not_pile_up() -> None:
    """Thousands of stalls of one program leave a handful of records behind."""
    table = table_of()
    call = stalled(table)
    for _ in range(5000):
        table.start(call)
        run(table, call, 0.001)
        table.preempt(call)
    for i in range(5000):
        table.finish(table.open_call(str(i), program_id="p"))
    assert len(table._stalls) < 100
    table.advance(1000)
    assert call.is_promoted


def test_changed_settings_hold_for_calls_that_wait_already() -> None:
    """A new beta applies to stalls under way."""
    table = table_of(beta=0)
    call = stalled(table)
    table.configure(table.policy, table.levels, BETA, 600)
    table.advance(200)
    assert call.is_promoted


# -- the promise ---------------------------------------------------------------------------------


def stall_of(program: Program, clock: float) -> float:
    since = clock if program.stalled_since is None else program.stalled_since
    return program.stall_steps + clock - since


def longest_excess(engine: FakeEngine, num_steps: int, ratio: float, only: str = "") -> float:
    """Steps that any program waited in all beyond ratio x max(its service, quantum), at worst."""
    table, worst = engine.table, 0.0
    for _ in range(num_steps):
        engine.step()
        for program in table.programs():
            allowed = ratio * max(program.service, table.levels.quantum)
            if only in ("", program.program_id):
                worst = max(worst, stall_of(program, table.clock) - allowed)
    return worst


def quanta_of(table: ProgramTable) -> float:
    """One quantum of each level."""
    return sum(table.levels.quantum_at(start) for start in (0.0, *table.levels.bounds))


def stream_of_short_programs(beta: float) -> FakeEngine:
    """One slot, one long program, and a new program for every quantum that is served."""
    engine = FakeEngine(ProgramConfig(quantum=QUANTUM, beta=beta, min_run=2), num_slots=1)
    engine.submit(Job(rid="long", program_id="long", num_output=10_000))
    for i in range(400):
        parents = (f"s{i - 2}",) if i > 1 else ()
        engine.submit(
            Job(rid=f"s{i}", program_id=f"s{i}", num_output=int(QUANTUM), parents=parents)
        )
    return engine


def test_a_stream_of_short_programs_cannot_starve_a_long_one() -> None:
    """With beta the long program waits beta x its service and one that runs; without, for good."""
    assert longest_excess(stream_of_short_programs(beta=4), 2000, 4, "long") <= QUANTUM + 1
    assert longest_excess(stream_of_short_programs(beta=0), 2000, 4, "long") > 1000


def test_a_promoted_long_program_does_not_starve_short_ones() -> None:
    """While it has its turn the others wait for one quantum of its level, at most the last's."""
    engine = stream_of_short_programs(beta=4)
    assert longest_excess(engine, 4000, 4) <= engine.table.levels.bounds[-1]


@st.composite
def crowds(draw: st.DrawFn) -> list[list[int]]:
    """Outputs of the calls of up to four programs, with calls in sequence."""
    outputs = st.lists(st.integers(1, 60), min_size=1, max_size=8)
    return draw(st.lists(outputs, min_size=2, max_size=4))


@settings(max_examples=60, deadline=None)
@given(
    crowd=crowds(),
    num_slots=st.integers(1, 2),
    policy=st.sampled_from(["mlfq", "plas", "atlas", "gittins"]),
)
def test_stalls_are_bounded(crowd: list[list[int]], num_slots: int, policy: str) -> None:
    """No program waits more than (beta + 1) x its service and one quantum of each level."""
    beta, quantum, min_run = 8.0, 3.0, 2.0
    rules: dict[str, Any] = {"levels": 5, "schedule_interval": 1}
    config = ProgramConfig(policy=policy, quantum=quantum, beta=beta, min_run=min_run, **rules)
    engine = FakeEngine(config, num_slots=num_slots)
    for p, outputs in enumerate(crowd):
        for i, num_output in enumerate(outputs):
            parents = (f"{p}-{i - 1}",) if i else ()
            engine.submit(
                Job(rid=f"{p}-{i}", program_id=str(p), num_output=num_output, parents=parents)
            )
    assert longest_excess(engine, sum(map(sum, crowd)), beta + 1) <= quanta_of(engine.table)
    assert engine.is_idle


def test_a_wide_program_cannot_starve_a_deep_one() -> None:
    """Under ATLAS a tree search has endless short paths, and still others get their turns."""
    config = ProgramConfig(policy="atlas", quantum=QUANTUM, beta=4, min_run=2)
    engine = FakeEngine(config, num_slots=1)
    engine.submit(Job(rid="root", program_id="wide", num_output=1))
    engine.submit(Job(rid="deep", program_id="deep", num_output=300))
    for _ in range(60):
        engine.step()
    for i in range(500):
        engine.submit(Job(rid=str(i), program_id="wide", num_output=5, parents=("root",)))
    assert longest_excess(engine, 2500, 4, "deep") <= QUANTUM + 1


def test_promotion_is_what_keeps_the_promise() -> None:
    """Many short programs and a long one: each gets its turn, and every call ends."""
    engine = stream_of_short_programs(beta=4)
    engine.run()
    assert len(engine.ended) == 401
    assert engine.ended["long"].call.num_promotions > 5
