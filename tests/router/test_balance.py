"""Placement: each policy's rule, and what holds for all of them on random states."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autellix_sglang.router.balance import (
    MAX_PLACES,
    POLICIES,
    STICKY_TOKENS,
    Call,
    Place,
    Program,
    Programs,
    Worker,
    autellix,
    least_used,
    new_home,
    rendezvous,
    round_robin,
    sticky,
)


def fleet(*num_live: int, **fields) -> list[Worker]:
    """Workers w0, w1, ... with so many calls in them, four slots each."""
    settings = {"num_slots": 4, "call_s": 2.0, "prefill_tokens_per_s": 1000.0, **fields}
    return [Worker(id=f"w{i}", num_live=n, **settings) for i, n in enumerate(num_live)]


def at(worker: str, num_tokens: int = 1000, **fields) -> Program:
    """A program whose home is this worker, with a prefix of so many tokens in it."""
    return Program(worker, {worker: Place(worker, num_tokens, **fields)})


LONG = Call(program="p", num_tokens=4000)
SHORT = Call(program="p", num_tokens=STICKY_TOKENS)

# -- any policy, any state -----------------------------------------------------------------------

WORKERS = st.lists(
    st.builds(
        Worker,
        id=st.sampled_from("abcdefgh"),
        num_live=st.integers(0, 64),
        num_slots=st.integers(1, 32),
        call_s=st.floats(0.01, 100),
        pending_tokens=st.integers(0, 100_000),
        prefill_tokens_per_s=st.floats(1, 1e6),
        kv_tokens=st.integers(0, 100_000),
        computed_tokens=st.integers(0, 1_000_000),
    ),
    min_size=1,
    unique_by=lambda worker: worker.id,
)
CALLS = st.builds(
    Call,
    program=st.none() | st.sampled_from(["p", "q"]),
    num_tokens=st.integers(1, 200_000),
    turn=st.integers(0, 1000),
)
PLACES = st.dictionaries(
    st.sampled_from("abcdefgh"), st.tuples(st.integers(0, 100_000), st.integers(0, 9)), max_size=8
)
PROGRAMS = st.builds(
    lambda home, places: Program(home, {w: Place(w, n, 0, k) for w, (n, k) in places.items()}),
    st.none() | st.sampled_from("abcdefgh"),
    PLACES,
)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@settings(deadline=None)
@given(call=CALLS, program=PROGRAMS, workers=WORKERS, data=st.data())
def test_choice_is_one_of_the_workers_and_ignores_their_order(policy, call, program, workers, data):
    """Every policy picks a worker that was offered, the same one in whatever order they come."""
    choice = policy(call, program, workers)
    assert choice.worker in {worker.id for worker in workers}
    assert 1 <= choice.uncached_tokens <= call.num_tokens
    shuffled = data.draw(st.permutations(workers))
    assert policy(call, program, shuffled) == choice


@settings(deadline=None)
@given(call=CALLS, program=PROGRAMS, workers=WORKERS)
def test_autellix_home_follows_the_call(call, program, workers):
    """Under `autellix` the home is where the program's last call went."""
    choice = autellix(call, program, workers)
    assert choice.home == (program.home if call.program is None else choice.worker)


@settings(deadline=None)
@given(workers=WORKERS, key=st.text(max_size=8))
def test_a_worker_that_leaves_moves_only_its_own_programs(workers, key):
    """Rendezvous hashing: without some other worker, a program's choice stays what it was."""
    chosen = rendezvous(key, workers)
    for gone in workers:
        rest = [worker for worker in workers if worker is not gone]
        if gone is not chosen:
            assert rendezvous(key, rest) is chosen


# -- autellix ------------------------------------------------------------------------------------


def test_program_stays_where_its_prefix_is():
    """A busier home is chosen as long as what is missing there costs less than elsewhere."""
    choice = autellix(LONG, at("w1", 3900), fleet(0, 3, 0))
    assert (choice.worker, choice.home, choice.is_spill) == ("w1", "w1", False)
    assert choice.uncached_tokens == 100


def test_program_spills_when_the_queue_costs_more_than_the_prefix():
    """Elsewhere twice 4 s of prefill; here twice 0.1 s per call held up, and 0.5 s per call ahead.

    The eleventh call ahead is too many, and the home moves along.
    """
    homes = {n: autellix(LONG, at("w0", 3900), fleet(n, 0)).home for n in range(17)}
    assert homes == {n: "w0" if n < 14 else "w1" for n in range(17)}
    assert autellix(LONG, at("w0", 3900), fleet(14, 0)).is_spill


def test_longer_prefix_holds_a_program_longer():
    """What would be recomputed is what a program waits for."""
    workers = fleet(8, 0)
    assert autellix(LONG, at("w0", 100), workers).worker == "w1"
    assert autellix(LONG, at("w0", 3900), workers).worker == "w0"


def test_recomputing_where_many_decode_costs_more():
    """Of two free workers the one with fewer calls in its batch computes a missing prefix."""
    program = Program("gone", {"w0": Place("w0", 500), "w1": Place("w1", 500)})
    assert autellix(LONG, program, fleet(3, 1)).worker == "w1"


def test_prompts_sent_and_not_answered_count_as_delay():
    """Prompt tokens on their way to a worker delay the next call before any report says so."""
    busy, idle = fleet(1, 0)
    busy = dataclasses.replace(busy, pending_tokens=9000)
    assert autellix(LONG, at("w0", 3900), [busy, idle]).worker == "w1"


def test_short_anonymous_call_goes_to_the_least_loaded():
    """A call without program or prefix has nothing to weigh but load."""
    assert autellix(Call(num_tokens=10), Program(), fleet(3, 1, 2)).worker == "w1"


def test_evicted_prefix_does_not_hold_a_program():
    """A home that has computed more than its cache holds since is taken for cold."""
    workers = fleet(4, 0, kv_tokens=10_000, computed_tokens=50_000)
    assert autellix(LONG, at("w0", 3900, computed_tokens=45_000), workers).worker == "w0"
    assert autellix(LONG, at("w0", 3900, computed_tokens=30_000), workers).worker == "w1"


def test_fan_out_spreads_before_it_fills_its_home():
    """A hundred calls of one program are shared out over the fleet, none of it drowned."""
    table, workers = Programs(), fleet(0, 0, 0, 0, num_slots=32, prefill_tokens_per_s=1e5)
    table.learn("p", workers[0], 4000, 0.0)
    sent: Counter[str] = Counter()
    for turn in range(100):
        call = Call(program="p", num_tokens=4000, turn=turn)
        loads = [dataclasses.replace(w, num_live=sent[w.id]) for w in workers]
        choice = autellix(call, table.get("p"), loads)
        table.sent(call, choice, next(w for w in loads if w.id == choice.worker), 1.0)
        sent[choice.worker] += 1
    assert sent["w0"] >= 16
    assert max(sent.values()) <= 32
    assert min(sent.values()) > 0


def test_new_programs_are_homed_alike_by_routers_with_like_loads():
    """Two routers whose loads differ by a call give nearly all programs the same home."""
    one, other = fleet(10, 10, 11, 10, num_slots=32), fleet(11, 10, 10, 10, num_slots=32)
    same = sum(new_home(f"p{i}", one).id == new_home(f"p{i}", other).id for i in range(200))
    assert same == 200


def test_new_programs_spread_evenly_and_avoid_the_busy():
    """Free workers share new programs about evenly, a full one gets none."""
    workers = fleet(0, 0, 0, 30, num_slots=32)
    counts = Counter(new_home(f"p{i}", workers).id for i in range(600))
    assert counts["w3"] == 0
    assert all(150 < counts[f"w{i}"] < 250 for i in range(3))


# -- baselines -----------------------------------------------------------------------------------


def test_sticky_follows_algorithm_2():
    """Up to 2,048 tokens the least used without a home; above it the home, however busy."""
    workers = fleet(9, 2, 1)
    short = sticky(SHORT, Program(), workers)
    assert (short.worker, short.home) == ("w2", None)
    pinned = sticky(dataclasses.replace(SHORT, num_tokens=STICKY_TOKENS + 1), at("w0"), workers)
    assert (pinned.worker, pinned.home) == ("w0", "w0")
    first = sticky(LONG, Program(), workers)
    assert (first.worker, first.home) == ("w2", "w2")


def test_sticky_short_call_leaves_the_home_alone():
    """A short call runs elsewhere and the program keeps its home."""
    choice = sticky(SHORT, at("w0"), fleet(9, 2, 1))
    assert (choice.worker, choice.home) == ("w2", "w0")


def test_least_used_takes_the_fewest_calls():
    """Only the number of calls decides."""
    assert least_used(LONG, at("w0"), fleet(2, 1, 3)).worker == "w1"


def test_round_robin_takes_turns():
    """Successive calls go to successive workers."""
    chosen = [round_robin(Call(turn=turn), Program(), fleet(5, 0, 0)).worker for turn in range(4)]
    assert chosen == ["w0", "w1", "w2", "w0"]


# -- the table -----------------------------------------------------------------------------------


def send(table: Programs, key: str, worker: Worker) -> None:
    call = Call(program=key, num_tokens=500)
    table.sent(call, round_robin(call, table.get(key), [worker]), worker, now_s=1.0)


def test_live_calls_of_a_program_are_counted_per_place():
    """What was sent and has not ended is counted, and never below zero."""
    table, (worker,) = Programs(), fleet(0)
    send(table, "p", worker)
    send(table, "p", worker)
    assert table.get("p").num_live("w0") == 2
    for _ in range(3):
        table.ended("p", "w0")
    assert table.get("p").num_live("w0") == 0


def test_lost_worker_hands_its_programs_to_their_latest_other_place():
    """A program re-homes to where else its prefix is, or has no home."""
    table, (w0, w1) = Programs(), fleet(0, 0)
    table.learn("both", w1, 100, used_s=1.0)
    table.learn("both", w0, 100, used_s=2.0)
    table.learn("one", w0, 100, used_s=1.0)
    table.forget_worker("w0")
    assert (table.get("both").home, table.get("one").home) == ("w1", None)
    assert table.num_homed() == {"w1": 1}


def test_workers_tell_a_new_router_where_a_program_was_last():
    """In whatever order workers say what they hold, the latest visit is the home."""
    w0, w1 = fleet(0, 0)
    for order in ((w0, w1), (w1, w0)):
        table = Programs()
        for worker in order:
            table.learn("p", worker, 100, used_s={"w0": 5.0, "w1": 3.0}[worker.id])
        assert (table.get("p").home, len(table.get("p").places)) == ("w0", 2)


def test_programs_that_begin_alike_meet():
    """A new program goes where another has computed what its prompt begins with, if it is free."""
    table, workers = Programs(), fleet(0, 0, 0)
    begun = {"num_tokens": 4000, "beginnings": (("tools", 1000), ("tools and rules", 3500))}
    first = Call(program="p", **begun)
    table.sent(first, round_robin(first, Program(), workers[2:]), workers[2], now_s=1.0)
    second = Call(program="q", **begun)
    choice = autellix(second, table.view(second), workers)
    assert (choice.worker, choice.uncached_tokens) == ("w2", 500)
    busy = [*workers[:2], dataclasses.replace(workers[2], num_live=20)]
    assert autellix(second, table.view(second), busy).worker != "w2"
    table.forget_worker("w2")
    assert table.view(second).shared == {}


def test_table_is_bounded():
    """The longest unused program is forgotten first, the oldest place of a program too."""
    table, workers = Programs(capacity=2), fleet(*range(MAX_PLACES + 2))
    for key in ("a", "b", "a", "c"):
        table.learn(key, workers[0], 1, 0.0)
    assert (len(table), table.get("b"), table.get("a").home) == (2, Program(), "w0")
    for worker in workers:
        table.learn("a", worker, 1, 0.0)
    assert list(table.get("a").places) == [w.id for w in workers[-MAX_PLACES:]]


def test_ended_program_is_forgotten():
    """What was known of it is returned once."""
    table, (worker,) = Programs(), fleet(0)
    table.learn("p", worker, 7, 0.0)
    assert table.forget("p").home == "w0"
    assert (table.get("p"), len(table)) == (Program(), 0)
