"""What is learned of programs' sizes, and the ranks that follow."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core import sizes
from autellix_sglang.core.policy import LAST_SHARE, TOLERANCE, Levels
from autellix_sglang.core.program import Call, Program, ProgramTable
from autellix_sglang.core.sizes import (
    EDGES,
    NUM_BUCKETS,
    PRIOR_HAZARD,
    Kind,
    Size,
    Sizes,
    ladder_of,
)
from autellix_sglang.testing import FakeEngine, Job, table_from

SHORT, LONG = (("short",),), (("long",),)


def rungs_of(size: Size) -> tuple[Kind, ...]:
    return size.standings[-1].rungs


def bucket_of(size: Size) -> int:
    return size.standings[-1].bucket


def teach(known: Sizes, ladder: sizes.Ladder, services: list[float]) -> None:
    """Let programs of one kind come, receive these services, and end."""
    for service in services:
        size = known.enter(ladder)
        known.attain(size, service)
        known.rest(size)


def rank_at(known: Sizes, ladder: sizes.Ladder, service: float) -> float:
    """The rank of a new program that has received so much."""
    size = known.enter(ladder)
    known.attain(size, service)
    return known.rank(size)


def own_rank_at(known: Sizes, ladder: sizes.Ladder, service: float) -> float:
    """The rank by the program's narrowest kind alone, which nothing limits."""
    size = known.enter(ladder)
    known.attain(size, service)
    return rungs_of(size)[-1].rank(bucket_of(size))


# -- what is counted -----------------------------------------------------------------------------


def test_nothing_seen_is_plas() -> None:
    """Without any program to learn from, a rank grows with what is attained."""
    known = Sizes()
    ranks = [rank_at(Sizes(), (), edge) for edge in EDGES[1:-20]]
    assert known.all.hazards == pytest.approx([PRIOR_HAZARD] * NUM_BUCKETS)
    assert all(low < high for low, high in pairwise(ranks))


def test_hazard_is_the_share_that_ends_in_a_bucket() -> None:
    """Programs that went on count as not ended there, and live ones nowhere beyond."""
    known = Sizes()
    first = known.enter(())
    teach(known, (), [200.0] * 3)
    bucket = bucket_of(known.enter(()))
    known.attain(first, 100)
    kind = known.all
    kind._refresh_now()
    assert kind.hazards[bucket] == pytest.approx(0, abs=1e-6)
    weights = [2 ** (i / sizes.HALF_LIFE) for i in range(1, 5)]
    at_200 = next(i for i, edge in enumerate(EDGES) if edge > 200) - 1
    assert kind.hazards[at_200] == pytest.approx(1)  # the first is not there yet
    known.attain(first, 1000)
    kind._refresh_now()
    assert kind.hazards[at_200] == pytest.approx(sum(weights[1:]) / sum(weights))


def test_an_idle_program_counts_as_complete_until_it_goes_on() -> None:
    """Resting and going on leaves nothing behind but where the program is in the end."""
    once, often = Sizes(), Sizes()
    teach(once, SHORT, [500.0])
    size = often.enter(SHORT)
    for service in (20.0, 20.0, 130.0, 500.0):
        often.attain(size, service)
        often.rest(size)
        often.rest(size)
        often.resume(size)
    often.rest(size)
    for rung, same in zip(rungs_of(size), rungs_of(once.enter(SHORT)), strict=True):
        assert rung._ended == same._ended
        assert rung._passed == same._passed


def test_older_programs_fade() -> None:
    """A kind whose programs change is known by the new ones after a few half-lives."""
    known = Sizes()
    teach(known, SHORT, [5000.0] * 200)
    teach(known, SHORT, [100.0] * 8 * sizes.HALF_LIFE)
    assert known.all.mean_service() == pytest.approx(100, rel=0.3)
    assert own_rank_at(known, SHORT, 0) == pytest.approx(100, rel=0.2)


def test_weights_never_overflow() -> None:
    """After any number of programs counts are finite and say the same."""
    kind = Kind(None)
    for _ in range(200 * sizes.HALF_LIFE):
        kind.note_ended(kind.enter(), 20)
    assert kind.num_ended == pytest.approx(sizes.HALF_LIFE / 0.6931, rel=0.01)
    assert kind.hazards[20] == pytest.approx(1)


def test_kinds_are_bounded() -> None:
    """The kinds longest unseen are forgotten; one that keeps coming stays known."""
    known = Sizes()
    for i in range(3 * sizes.MAX_KINDS):
        teach(known, ((f"unique {i}",),), [10.0])
        if i % 100 == 0:
            teach(known, SHORT, [100.0])
    assert len(known._kinds) == sizes.MAX_KINDS
    assert rungs_of(known.enter(SHORT))[1].num_programs > 3 * sizes.MAX_KINDS / 100


# -- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", [40.0, 1000.0, 30_000.0])
def test_rank_of_a_sure_thing_is_what_is_left(service: float) -> None:
    """Where all programs are alike the rank is about their size, and less near the end."""
    known = Sizes()
    teach(known, SHORT, [service] * 300)
    at_start, near_end = (own_rank_at(known, SHORT, share * service) for share in (0, 0.8))
    assert at_start == pytest.approx(service, rel=0.15)
    assert near_end < 0.7 * at_start


def test_rank_is_the_best_ratio_of_reward_to_service() -> None:
    """For programs of 100 or 10,000 steps it is that of the short ones, then that of the rest."""
    known = Sizes()
    teach(known, SHORT, [100.0, 10_000.0] * 300)
    # Half of them end within 100 steps and are worth 1/100: (100 * 100 / 0.5) ** 0.5 steps.
    assert own_rank_at(known, SHORT, 0) == pytest.approx(141, rel=0.15)
    assert own_rank_at(known, SHORT, 200) == pytest.approx(9_900, rel=0.15)


def test_kinds_are_told_apart() -> None:
    """What a kind that has been long takes puts its programs back; a short one's stay in front."""
    known = Sizes()
    for _ in range(30):
        teach(known, SHORT, [100.0])
        teach(known, LONG, [5000.0])
    short, long = (rank_at(known, ladder, 80) for ladder in (SHORT, LONG))
    assert long > 1.5 * short


@pytest.mark.parametrize("service", [0.0, 20.0, 300.0, 4000.0])
def test_a_kind_holds_a_program_back_so_far_and_no_further(service: float) -> None:
    """A rank is at most twice the prior's, however long the kind has been."""
    known = Sizes()
    teach(known, LONG, [50_000.0] * 50)
    size = known.enter(LONG)
    known.attain(size, service)
    assert known.rank(size) == sizes.HOLD_BACK * sizes.PRIOR_RANKS[bucket_of(size)]
    assert own_rank_at(known, LONG, service) > known.rank(size)


def test_an_unknown_kind_is_taken_for_the_average() -> None:
    """A kind of which none has ended ranks like all traffic."""
    known = Sizes()
    teach(known, SHORT, [100.0] * 50)
    size = known.enter((("never seen",),))
    known.attain(size, 80.0)
    assert known.rank(size) == known.all.rank(bucket_of(size))


# -- width ---------------------------------------------------------------------------------------


def wide(known: Sizes, ladder: sizes.Ladder, num_calls: int, service: float) -> Size:
    """A program that has had so many calls at once, and received so much."""
    size = known.enter(ladder)
    known.attain(size, min(service, 10.0))
    known.widen(size, num_calls, min(service, 10.0))
    known.attain(size, service)
    return size


def teach_wide(known: Sizes, num_calls: int, service: float, count: int = 30) -> None:
    for _ in range(count):
        known.rest(wide(known, LONG, num_calls, service))


def test_a_wide_program_is_taken_for_a_large_one() -> None:
    """With nothing learned, who asks for more at once goes after who asks for less."""
    known = Sizes()
    ranks = [known.rank(wide(known, (), num_calls, 10.0)) for num_calls in (1, 4, 16, 64)]
    assert all(2 * low < high for low, high in pairwise(ranks))


@pytest.mark.parametrize("other", [5, 80])
def test_programs_of_one_width_tell_of_those_of_another(other: int) -> None:
    """What 20 calls at once have taken, others take times their number to the power."""
    known = Sizes()
    teach_wide(known, 20, 5000.0)
    expected = 5000.0 * (other / 20) ** sizes.WIDTH_POWER
    assert known.rank(wide(known, LONG, other, 10.0)) == pytest.approx(expected, rel=0.2)


def test_a_wide_program_leaves_the_kinds_of_the_narrow() -> None:
    """From then on it is counted among the wide; of the narrow it says that it went on so far."""
    known = Sizes()
    narrow = rungs_of(known.enter(LONG))[-1]
    teach_wide(known, 8, 5000.0)
    assert narrow.num_ended == 0
    assert sum(narrow._passed) > 0
    assert not any(narrow._passed[2:])  # beyond 10 steps
    teach(known, LONG, [100.0] * 30)
    assert own_rank_at(known, LONG, 0) == pytest.approx(100, rel=0.2)
    size = wide(known, LONG, 8, 10.0)
    assert known.rank(size) == pytest.approx(5000, rel=0.2)


def test_what_was_counted_moves_along_when_a_program_gets_wider() -> None:
    """However it came to its width, it is counted as if it had had it from the start."""
    at_once, by_and_by = Sizes(), Sizes()
    sizes_seen = []
    for known, steps in (
        (at_once, [(40, 10.0)]),
        (by_and_by, [(2, 10.0), (3, 10.0), (12, 200.0), (40, 900.0)]),
    ):
        size = known.enter(LONG)
        for num_calls, service in steps:
            known.attain(size, service)
            assert known.widen(size, num_calls, service)
        known.attain(size, 4000.0)
        known.rest(size)
        sizes_seen.append(size)
    one, other = sizes_seen
    assert bucket_of(one) == bucket_of(other) > 0
    for rung, same in zip(rungs_of(one), rungs_of(other), strict=True):
        assert list(rung._passed) == pytest.approx(list(same._passed))
        assert list(rung._ended) == pytest.approx(list(same._ended))


def test_a_few_more_calls_make_no_wider_program() -> None:
    """Width counts in steps of a bucket, so a fan-out of thousands is placed anew some 40 times."""
    known = Sizes()
    size = known.enter(())
    num_wider = sum(known.widen(size, num_calls, 0.0) for num_calls in range(1, 4001))
    assert 30 < num_wider < 45
    assert not known.widen(size, 10, 0.0)


def test_the_mean_is_that_of_all_programs_wide_or_not() -> None:
    """What is learned of the scale takes a wide program's service as it is."""
    known = Sizes()
    for _ in range(100):
        teach(known, SHORT, [1000.0])
        teach_wide(known, 30, 9000.0, count=1)
    assert known.all.mean_service() == pytest.approx(5000, rel=0.2)


# -- drift ---------------------------------------------------------------------------------------


def gone(known: Sizes, ladder: sizes.Ladder, service: float) -> None:
    """A program comes, receives this service, ends, and is forgotten."""
    size = known.enter(ladder)
    known.attain(size, service)
    known.rest(size)
    known.leave(size)


def test_a_kind_that_drifts_falls_back_to_plas_and_is_learned_anew() -> None:
    """Programs that are not what their kind was cost it its say until new ones have ended."""
    known = Sizes()
    for _ in range(50):
        gone(known, SHORT, 100.0)
        gone(known, LONG, 5000.0)
    kind = rungs_of(known.enter(LONG))[1]
    assert kind.is_trusted
    num_needed = 0
    while not kind.has_drifted:
        gone(known, LONG, 100.0)
        num_needed += 1
    assert num_needed <= 5
    assert rank_at(known, LONG, 0) == sizes.PRIOR_RANKS[0]
    for _ in range(2 * sizes.RELEARN):
        gone(known, LONG, 100.0)
    assert not kind.has_drifted
    assert rank_at(known, LONG, 0) < 200


def test_a_kind_that_stays_as_it_was_keeps_its_say() -> None:
    """Chance alone does not make a kind be forgotten for long."""
    known, rng = Sizes(), random.Random(1)
    num_trusted = 0
    for _ in range(300):
        gone(known, SHORT, rng.lognormvariate(5, 0.8))
        gone(known, LONG, rng.lognormvariate(8, 0.8))
        num_trusted += rungs_of(known.enter(LONG))[1].is_trusted
    assert num_trusted > 200


# -- kinds ---------------------------------------------------------------------------------------


def test_ladder_is_the_tenants_and_ends_with_the_name() -> None:
    """Kinds of different tenants never meet below the top; a name says more than a prompt."""
    prompt = list(range(100))
    named, unnamed = ladder_of("t", "coder", prompt), ladder_of("t", "", prompt)
    assert named[:2] == unnamed[:2] == (("t",), ("t", "prompt", "7"))
    assert named[2] == ("t", "agent", "coder")
    assert not set(named) & set(ladder_of("u", "coder", prompt))


def test_prompts_with_one_beginning_are_one_kind() -> None:
    """Only the leading tokens and the order of length count; a short prompt has no beginning."""
    system = list(range(64))
    one, other = ladder_of("", "", [*system, 1, 2]), ladder_of("", "", [*system, 3])
    assert one == other != ladder_of("", "", [*system[:63], 7, 1, 2])
    assert len(ladder_of("", "", system[:63])) == 2


# -- the table -----------------------------------------------------------------------------------


def served(table: ProgramTable, program_id: str, kinds: sizes.Ladder, steps: float) -> Program:
    call = table.open_call(program_id, program_id=program_id, kinds=kinds)
    table.start(call)
    table.charge(call, steps)
    table.advance(steps)
    table.finish(call)
    return call.program


def gittins(**settings: float) -> ProgramTable:
    return table_from(ProgramConfig(policy="gittins").replace(**settings))


def test_known_short_programs_go_first() -> None:
    """With as much received, one of a kind known to be short goes before an older, long one."""
    table = gittins()
    for i in range(20):
        served(table, f"s{i}", SHORT, 100)
        served(table, f"l{i}", LONG, 5000)
    calls = []
    for name, kinds in (("long", LONG), ("short", SHORT)):
        served(table, name, kinds, 80)
        calls.append(table.open_call(f"{name} again", program_id=name, kinds=kinds))
    long, short = calls
    assert list(table.queue) == [short, long]
    assert short.level < long.level
    table.check_integrity()


def test_a_program_that_outgrows_its_kind_falls_back() -> None:
    """Past what its kind takes a program loses its place, with all its calls."""
    table = gittins()
    for i in range(20):
        served(table, f"s{i}", SHORT, 100)
    call, sibling = (table.open_call(rid, program_id="p", kinds=SHORT) for rid in "ab")
    table.start(call)
    level = sibling.level
    table.charge(call, 1000)
    assert call.level == sibling.level > level
    table.check_integrity()


def test_nothing_is_learned_from_calls_that_received_nothing() -> None:
    """A program that was aborted in the queue says nothing of how much its kind takes."""
    table = gittins()
    for i in range(20):
        table.finish(table.open_call(str(i)))
    assert table.sizes.all.num_ended == 0


def test_ranks_depend_on_the_messages_alone() -> None:
    """Two ranks that see the same messages decide alike, to the last bit."""

    def levels_seen() -> list[object]:
        rng, engine = random.Random(5), FakeEngine(ProgramConfig(policy="gittins"), num_slots=3)
        seen: list[object] = []
        for i in range(60):
            length = rng.randint(1, 300)
            engine.submit(Job(rid=str(i), program_id=f"p{i % 23}", num_output=length))
            engine.step()
            seen += [(call.rid, call.program.rank, call.level) for call in engine.table.queue]
        engine.run()
        return seen

    assert levels_seen() == levels_seen()


def fan_out(table: ProgramTable, program_id: str, num_calls: int) -> list[Call]:
    rids = [f"{program_id}{i}" for i in range(num_calls)]
    return [table.open_call(rid, program_id=program_id, kinds=LONG) for rid in rids]


def test_the_smaller_fan_out_goes_first_though_it_came_later() -> None:
    """Among programs of a kind known to be long; one that has waited for its rank is not passed."""
    table = gittins(beta=0)
    for i in range(30):
        for call in fan_out(table, f"seen{i}-", 8):
            table.start(call)
            table.charge(call, 500)
            table.finish(call)
    large = fan_out(table, "large", 32)
    small = fan_out(table, "small", 4)
    assert list(table.queue)[:4] == small
    assert {call.level for call in small + large} == {table.levels.count - 1}
    table.advance(20_000)
    late = fan_out(table, "late", 4)
    assert list(table.queue) == [*small, *large, *late]
    table.check_integrity()


def test_a_program_that_grows_wider_is_placed_anew_with_all_its_calls() -> None:
    """The first calls of a fan-out do not stay in front of the later ones."""
    table = gittins()
    calls = fan_out(table, "p", 64)
    assert len({call.level for call in calls}) == 1
    assert calls[0].level > 0
    assert list(table.queue) == calls
    table.check_integrity()


# -- the learned scale ---------------------------------------------------------------------------


def test_levels_follow_the_mean_of_the_programs() -> None:
    """With quantum 0 the last level begins at a set share of what a program takes on average."""
    table = table_from(ProgramConfig(quantum=0))
    live = table.open_call("live", program_id="live")
    table.start(live)
    table.charge(live, 300)
    before = live.level
    for i in range(200):
        served(table, str(i), (), 40)
    last = table.levels.bounds[-1]
    assert LAST_SHARE * 40 / TOLERANCE / 1.3 < last < LAST_SHARE * 40 * TOLERANCE * 1.3
    assert live.level == table.levels.count - 1 > before
    table.check_integrity()


def test_levels_stay_where_they_are_about_right() -> None:
    """A fixed scale never moves, a learned one not for small changes, and one level has none."""
    fixed, learned, one = Levels(8, 32, 2), Levels(8, 0, 2), Levels(1, 0, 2)
    assert fixed.for_mean(1e6) is fixed
    assert one.for_mean(1e6) is one
    moved = learned.for_mean(10_000)
    assert moved.bounds[-1] == pytest.approx(LAST_SHARE * 10_000)
    assert moved.for_mean(10_500) is moved
    assert moved.is_learned


def test_ends_that_went_with_a_forgotten_kind_are_not_taken_back() -> None:
    """Agents that rested when it drifted take nothing from those that ended since."""
    known = Sizes()
    resting = [known.enter(SHORT) for _ in range(20)]
    for size in resting:
        known.attain(size, 100.0)
        known.rest(size)
    kind = rungs_of(resting[0])[-1]
    kind.score = -sizes.DEBT - 1
    kind._judge(0.5, 0.5)
    assert kind.has_drifted
    teach(known, SHORT, [100.0] * 12)
    before = kind.num_ended
    for size in resting:
        known.resume(size)
    assert kind.num_ended == before


def test_a_kind_is_judged_by_the_rung_above_it() -> None:
    """Prompts of one agent differ in length, and so in the kind that is above the agent's."""
    known = Sizes()
    known.enter(ladder_of("", "coder", [1] * 100))
    rungs = rungs_of(known.enter(ladder_of("", "coder", [1] * 9000)))
    assert rungs[-1].parent is rungs[-2]


@pytest.mark.parametrize("width", range(2, 60))
def test_a_rescaled_program_is_within_its_bucket(width: int) -> None:
    """Its service over the scale, and the edge times the scale, may round apart."""
    for bucket in range(1, NUM_BUCKETS - 1):
        known = Sizes()
        size = known.enter(SHORT)
        service = EDGES[bucket] * width**sizes.WIDTH_POWER
        known.attain(size, service)
        known.widen(size, width, service)
        assert size.edge > service
