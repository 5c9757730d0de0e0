"""How much service counts against a call, and the level that follows from it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.policy import POLICIES, Levels
from autellix_sglang.core.program import Call, ProgramTable
from autellix_sglang.testing import FakeEngine, Job, table_from


def table_of(policy: str) -> ProgramTable:
    """Levels end at 10, 20 and 40 steps; nobody is promoted."""
    return table_from(ProgramConfig(policy=policy, levels=4, quantum=10, factor=2, beta=0))


Dag = list[tuple[str, float, Sequence[str] | None]]


def serve(
    table: ProgramTable,
    rid: str,
    steps: float,
    parents: Sequence[str] | None = None,
    program: str = "p",
) -> Call:
    """Open a call, run it for `steps` and finish it."""
    call = table.open_call(rid, program_id=program, parent_call_ids=parents)
    table.start(call)
    table.charge(call, steps)
    table.advance(steps)
    table.finish(call)
    return call


@pytest.mark.parametrize(
    ("attained", "level"),
    [(0, 0), (9.99, 0), (10, 1), (19.99, 1), (20, 2), (39.99, 2), (40, 3), (1e12, 3)],
)
def test_levels_are_half_open(attained: float, level: int) -> None:
    """A level holds its lower bound and not its upper one, and the last has no end."""
    assert Levels(4, 10, 2).level_of(attained) == level


def test_one_level_holds_everything() -> None:
    """With a single level there are no bounds to cross."""
    assert Levels(1, 10, 2).level_of(1e12) == 0


@given(
    levels=st.integers(1, 64),
    quantum=st.floats(1e-3, 1e6),
    factor=st.floats(1, 1000, exclude_min=True),
)
def test_any_allowed_setting_gives_levels(levels: int, quantum: float, factor: float) -> None:
    """Every setting that the configuration accepts has bounds in ascending order."""
    ProgramConfig(levels=levels, quantum=quantum, factor=factor)
    bounds = Levels(levels, quantum, factor).bounds
    assert bounds == sorted(bounds)
    assert len(bounds) == levels - 1


DIAMOND = [("a", 4, ()), ("b", 3, ("a",)), ("c", 5, ("a",)), ("d", 2, ("b", "c"))]
LONG_AND_SHORT = [("a", 4, ()), ("b", 9, ("a",)), ("c", 1, ("a",)), ("d", 1, ("c",))]
NO_PARENTS = [("a", 4, None), ("b", 3, None), ("c", 5, None)]
ROOTS = [("a", 4, ()), ("b", 3, ()), ("c", 5, ())]
# A fork of three that is joined, and a last call that follows the join.
WIDE = [
    ("plan", 4, ()), ("1", 8, ("plan",)), ("2", 8, ("plan",)), ("3", 8, ("plan",)),
    ("join", 12, ("1", "2", "3")), ("end", 1, ("join",)),
]  # fmt: skip
WIDE_UNTOLD = [(rid, steps, None) for rid, steps, _ in WIDE]


@pytest.mark.parametrize(
    ("policy", "dag", "expected"),
    [
        ("fcfs", DIAMOND, [0, 0, 0, 0]),
        ("mlfq", DIAMOND, [4, 3, 5, 2]),
        ("plas", DIAMOND, [4, 7, 12, 14]),
        ("atlas", DIAMOND, [4, 7, 9, 11]),  # d: 4 + 5 along a, c; and its own 2
        ("atlas", LONG_AND_SHORT, [4, 13, 5, 6]),  # d follows the short branch
        ("atlas", NO_PARENTS, [4, 7, 12]),  # the paper's scalar: the longest chain so far
        ("plas", NO_PARENTS, [4, 7, 12]),
        ("atlas", ROOTS, [4, 3, 5]),  # each begins a chain of its own, and says so
        ("atlas", WIDE, [4, 12, 12, 12, 24, 25]),  # not 4, 12, 20, 28, 40, 41: paths, not a sum
        ("atlas", WIDE_UNTOLD, [4, 12, 20, 28, 40, 41]),
        ("plas", WIDE, [4, 12, 20, 28, 40, 41]),
    ],
)
def test_attained_service(policy: str, dag: Dag, expected: list[float]) -> None:
    """Each policy counts what its formula says, on graphs small enough to add up by hand."""
    table = table_of(policy)
    attained = []
    for rid, steps, parents in dag:
        call = serve(table, rid, steps, parents)
        attained.append(POLICIES[policy].attained(call))
    assert attained == expected


def test_atlas_by_parents_beats_the_scalar() -> None:
    """Named parents place a call by its own path, no parents by the program's longest."""
    table = table_of("atlas")
    for rid, steps, parents in LONG_AND_SHORT:
        serve(table, rid, steps, parents)
    assert table.open_call("e", program_id="p", parent_call_ids=["d"]).base_path == 6
    assert table.open_call("f", program_id="p").base_path == 13
    assert table.open_call("g", program_id="p", parent_call_ids=["d", "b", "d"]).base_path == 13


@given(st.lists(st.floats(0.25, 50), min_size=1, max_size=20))
def test_plas_is_atlas_on_a_chain(services: list[float]) -> None:
    """Where each call waits for the one before it, work and critical path are the same."""
    plas, atlas = table_of("plas"), table_of("atlas")
    for i, steps in enumerate(services):
        parents = [str(i - 1)] if i else []
        by_work = serve(plas, str(i), steps, parents)
        by_path = serve(atlas, str(i), steps, parents)
        assert by_work.level == by_path.level
        attained = POLICIES["plas"].attained(by_work)
        assert POLICIES["atlas"].attained(by_path) == pytest.approx(attained)


@pytest.mark.parametrize(("policy", "level"), [("fcfs", 0), ("mlfq", 0), ("plas", 2), ("atlas", 2)])
def test_a_call_enters_at_the_level_of_its_history(policy: str, level: int) -> None:
    """PLAS and ATLAS place a new call by what its program has had; that is no demotion."""
    table = table_of(policy)
    serve(table, "a", 25, program="old")
    num_demotions = table.counters.num_demotions
    assert table.open_call("b", program_id="old").level == level
    assert table.open_call("c", program_id="new").level == 0
    assert table.counters.num_demotions == num_demotions


@pytest.mark.parametrize(
    ("policy", "levels"), [("fcfs", [0, 0, 0]), ("mlfq", [1, 0, 0]), ("plas", [1, 1, 1])]
)
def test_siblings_move_together_only_under_plas(policy: str, levels: list[int]) -> None:
    """Charging one call moves its siblings, running or waiting, exactly when work is shared."""
    table = table_of(policy)
    calls = [table.open_call(rid, program_id="p") for rid in "abc"]
    table.start(calls[0])
    table.start(calls[1])
    table.charge(calls[0], 10)
    assert [call.level for call in calls] == levels
    table.check_integrity()


def test_siblings_move_when_the_charge_also_ends_a_promotion() -> None:
    """One charge that ends a promotion and crosses a bound moves every sibling."""
    table = table_from(ProgramConfig(policy="plas", levels=4, quantum=10, factor=2, beta=1))
    serve(table, "a", 15)
    calls = [table.open_call(rid, program_id="p") for rid in "bc"]
    table.advance(15)
    assert calls[0].is_promoted
    table.start(calls[0])
    table.charge(calls[0], 10)
    assert [call.level for call in calls] == [2, 2]
    table.check_integrity()


def test_groups_keep_a_program_together() -> None:
    """Inside a level PLAS and ATLAS serve program by program, FCFS and MLFQ call by call.

    Gittins does so too, and puts the program first that asks for less at once.
    """
    order = {}
    for policy in POLICIES:
        table = table_of(policy)
        for rid in ("a1", "b1", "a2"):
            table.open_call(rid, program_id=rid[0])
        order[policy] = [call.rid for call in table.queue]
    mixed, grouped = ["a1", "b1", "a2"], ["a1", "a2", "b1"]
    assert order == {
        "fcfs": mixed,
        "mlfq": mixed,
        "plas": grouped,
        "atlas": grouped,
        "gittins": ["b1", "a1", "a2"],
    }


@pytest.mark.parametrize("policy", [name for name in POLICIES if not POLICIES[name].is_learned])
@pytest.mark.parametrize("seed", range(5))
def test_a_call_moves_up_only_by_promotion(policy: str, seed: int) -> None:
    """Over a whole run no call gets a better level than it had, unless it is promoted.

    A learned rank may get better: as a program comes near to the size that its kind has.
    """
    rng = random.Random(seed)
    config = ProgramConfig(policy=policy, quantum=4, levels=5, beta=2, min_run=1)
    engine = FakeEngine(config, num_slots=3)
    for i in range(60):
        parents = (str(rng.randrange(i)),) if i and rng.random() < 0.5 else ()
        job = Job(
            rid=str(i), program_id=f"p{i % 7}", num_output=rng.randint(1, 30), parents=parents
        )
        engine.submit(job)
    num_moves = 0
    before: dict[Call, int] = {}
    while not engine.is_idle:
        engine.step()
        for call, level in before.items():
            assert call.level >= level or call.is_promoted
            num_moves += call.level != level
        calls = engine.table.live_calls()
        before = {call: call.level for call in calls if not call.is_promoted}
    assert num_moves > 0 or policy == "fcfs"
