"""Whom the planner preempts, for whom, and when it looks.

Under MLFQ a call's level is set by its own service alone, which makes scenes easy to build: levels
end at 10, 20 and 40 steps. Programs are older the earlier their first call appears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.planner import NOTHING, Demand, Plan, Planner, standing
from autellix_sglang.core.program import Call, Phase
from autellix_sglang.testing import PLENTY, FakeEngine, Job, table_from


@dataclass
class Scene:
    """A table, a planner and an engine whose answers are set by hand."""

    min_run: float = 0
    interval: float = 1
    free_slots: int = 0
    free_kv_tokens: int = PLENTY
    prefill_tokens: int = PLENTY
    demands: dict[str, Demand] = field(default_factory=dict)
    holdings: dict[str, int] = field(default_factory=dict)
    resumptions: dict[str, float] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)  # running, not preemptible now
    num_looks: int = 0

    def __post_init__(self) -> None:
        config = ProgramConfig(policy="mlfq", levels=4, quantum=10, factor=2, beta=1)
        self.table = table_from(config)
        self.planner = Planner(self.table, self.min_run, self.interval)

    def running(self, rid: str, service: float, program: str | None = None) -> Call:
        call = self.table.open_call(rid, program_id=program)
        self.table.start(call)
        self.table.charge(call, service)
        return call

    def waiting(self, rid: str, service: float = 0, program: str | None = None) -> Call:
        call = self.running(rid, service, program)
        self.table.preempt(call)
        return call

    def plan(self) -> Plan:
        return self.planner.plan(self)

    def victims(self) -> list[str]:
        return [call.rid for call in self.plan().preempt]

    def preemptible(self) -> Sequence[Call]:
        self.num_looks += 1
        calls = self.table.live_calls()
        return [c for c in calls if c.phase is Phase.RUNNING and c.rid not in self.hidden]

    def demand(self, call: Call, ahead: Sequence[Call]) -> Demand:
        return self.demands.get(call.rid, Demand(1, 1))

    def holding(self, call: Call) -> int:
        return self.holdings.get(call.rid, 1)

    def resume_steps(self, call: Call) -> float:
        return self.resumptions.get(call.rid, 0)


# -- whom ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("running", "waiting", "victims"), [(9, 0, 0), (10, 0, 1), (15, 12, 0)])
def test_preempts_only_for_a_strictly_better_level(
    running: float, waiting: float, victims: int
) -> None:
    """A running call of the same level keeps its slot, however little it has had."""
    scene = Scene()
    scene.running("r", running)
    scene.waiting("w", waiting)
    assert len(scene.victims()) == victims


def test_a_free_slot_spares_everyone() -> None:
    """A better call that fits as things are needs no victim."""
    scene = Scene(free_slots=1)
    scene.running("r", 50)
    scene.waiting("w")
    assert scene.victims() == []


def test_the_worst_level_goes_first_then_the_youngest_program_then_call() -> None:
    """Victims come in order of level, age of program, age of call."""
    scene = Scene()
    for rid, service, program in [
        ("old-1", 50, "old"),
        ("young-1", 50, "young"),
        ("old-2", 50, "old"),
        ("better", 15, "youngest"),
        ("young-2", 50, "young"),
    ]:
        scene.running(rid, service, program)
    for i in range(5):
        scene.waiting(f"w{i}")
    assert scene.victims() == ["young-2", "young-1", "old-2", "old-1", "better"]


def test_a_promoted_call_is_never_a_victim() -> None:
    """Promotion protects a call that would otherwise be the first to go."""
    scene = Scene()
    older = scene.running("older", 0)
    starved = scene.waiting("starved", 50)
    scene.table.advance(50)
    scene.table.start(starved)
    assert starved.is_promoted
    scene.running("r", 15)
    scene.waiting("w1")
    scene.waiting("w2")
    assert scene.victims() == ["r"]
    assert standing(starved) < standing(older)


def test_takes_no_more_victims_than_waiting_calls() -> None:
    """Two better calls cost two slots, not the whole batch."""
    scene = Scene()
    for i in range(6):
        scene.running(f"r{i}", 50)
    scene.waiting("w1")
    scene.waiting("w2")
    assert scene.victims() == ["r5", "r4"]


def test_each_waiting_call_is_compared_with_its_own_victim() -> None:
    """A call that waits at a worse level does not ride on the better one before it."""
    scene = Scene()
    scene.running("r1", 25)
    scene.running("r2", 50)
    scene.waiting("best", 0)
    scene.waiting("same", 25)
    assert scene.victims() == ["r2"]


# -- room in the KV pool -------------------------------------------------------------------------


def test_preempts_until_the_kv_demand_is_met() -> None:
    """Victims are taken one by one until what they hold is enough."""
    scene = Scene(free_slots=5, free_kv_tokens=100, demands={"w": Demand(350, 350)})
    for i in range(5):
        scene.running(f"r{i}", 50)
        scene.holdings[f"r{i}"] = 100
    scene.waiting("w")
    assert scene.victims() == ["r4", "r3", "r2"]


def test_nobody_is_preempted_for_a_call_that_cannot_fit_anyway() -> None:
    """If all worse calls together hold too little, they stay."""
    scene = Scene(free_kv_tokens=0, demands={"w": Demand(1000, 1000)}, holdings={"r": 100})
    scene.running("r", 50)
    scene.waiting("w")
    assert scene.victims() == []


def test_equals_do_not_make_up_for_the_room_that_worse_calls_lack() -> None:
    """Of several victims for one call, each must be of a strictly worse level than it."""
    scene = Scene(free_slots=9, free_kv_tokens=1, demands={"w2": Demand(200, 1)})
    scene.running("equal", 15)
    scene.running("worse", 50)
    scene.holdings = {"equal": 100, "worse": 100}
    scene.waiting("w1", 0)
    scene.waiting("w2", 15)
    assert scene.victims() == []
    scene.holdings["worse"] = 200
    scene.planner.reconsider()
    scene.table.advance(1)
    assert scene.victims() == ["worse"]


def test_victims_of_calls_that_fit_stand_when_a_later_one_does_not() -> None:
    """The walk stops at the first call that cannot fit; what it decided before holds."""
    scene = Scene(demands={"w2": Demand(10 * PLENTY, 1)})
    for i in range(4):
        scene.running(f"r{i}", 50)
    scene.waiting("w1")
    scene.waiting("w2")
    assert scene.victims() == ["r3"]


@pytest.mark.parametrize(
    ("slots", "kv_tokens", "num_victims"), [(2, 20, 0), (1, 20, 1), (2, 19, 1)]
)
def test_calls_admitted_on_paper_use_up_what_is_free(
    slots: int, kv_tokens: int, num_victims: int
) -> None:
    """What is free goes to the first waiting call; the second preempts for what it then lacks."""
    demands = {"w1": Demand(10, 1), "w2": Demand(10, 1)}
    scene = Scene(free_slots=slots, free_kv_tokens=kv_tokens, demands=demands)
    scene.running("r", 50)
    scene.waiting("w1")
    scene.waiting("w2")
    assert len(scene.victims()) == num_victims


def test_no_victims_beyond_the_prefill_budget() -> None:
    """A pass that can prefill two calls makes room for two, and the next pass for the others."""
    scene = Scene(prefill_tokens=200)
    for i in range(6):
        scene.running(f"r{i}", 50)
        scene.demands[f"w{i}"] = Demand(100, 100)
    for i in range(6):
        scene.waiting(f"w{i}")
    assert scene.victims() == ["r5", "r4"]


# -- when ----------------------------------------------------------------------------------------


def test_min_run_spares_and_is_reconsidered_without_an_event() -> None:
    """A call spared by `min_run` is preempted as soon as it has run that long."""
    scene = Scene(min_run=8)
    call = scene.waiting("r", 50)
    scene.table.start(call)
    scene.waiting("w")
    assert scene.victims() == []
    for _ in range(7):
        scene.table.charge(call, 1)
        scene.table.advance(1)
        assert scene.victims() == []
    scene.table.charge(call, 1)
    scene.table.advance(1)
    assert scene.victims() == ["r"]


@pytest.mark.parametrize(("ran", "victims"), [(39, ["cheap"]), (40, ["costly", "cheap"])])
def test_call_that_is_costly_to_resume_runs_as_long_as_that_delays_the_batch(
    ran: float, victims: list[str]
) -> None:
    """With KV short, a call first runs for the steps that all running calls lose by it."""
    scene = Scene(min_run=8)
    scene.running("cheap", 50)
    scene.running("costly", ran)
    scene.resumptions["costly"] = 20
    for rid in ("v", "w"):
        scene.waiting(rid)
    scene.table.advance(2)
    assert sorted(scene.victims()) == sorted(victims)


@pytest.mark.parametrize("num_running", [1, 3, 9])
def test_a_call_waits_a_step_for_each_call_that_runs(num_running: int) -> None:
    """A preemption costs each of them a step, and in that time a slot may come free by itself."""
    scene = Scene(min_run=8)
    for i in range(num_running):
        scene.running(f"r{i}", 50)
    scene.waiting("w")
    for _ in range(num_running):
        assert scene.victims() == []
        scene.table.advance(1)
    assert scene.victims() == [f"r{num_running - 1}"]


def test_nobody_waits_for_the_cost_of_a_preemption_when_promoted_or_without_min_run() -> None:
    """Starvation ends at once, and `min_run` 0 switches this rule off, too."""
    free, starving = Scene(min_run=0), Scene(min_run=8)
    for scene in (free, starving):
        for i in range(50):
            scene.running(f"r{i}", 50)
        scene.waiting("w", 15 if scene is starving else 0)
    assert free.victims() == ["r49"]
    assert starving.victims() == []
    starving.table.advance(15)  # beta is 1
    assert starving.victims() == ["r49"]


def test_cost_of_resumption_spares_nobody_from_a_promoted_call_or_without_min_run() -> None:
    """Starvation ends whatever it costs, and `min_run` 0 switches the rule off."""
    free = Scene(min_run=0)
    starving = Scene(min_run=8)
    for scene in (free, starving):
        scene.running("r", 50)
        scene.resumptions["r"] = 1000
        scene.waiting("w", 15 if scene is starving else 0)
    assert free.victims() == ["r"]
    assert starving.victims() == []
    starving.table.advance(15)  # beta is 1
    assert starving.victims() == ["r"]


def test_calls_left_out_for_the_prefill_budget_are_reconsidered_without_an_event() -> None:
    """A better call that one pass had no prefill budget for gets its victim in the next."""
    scene = Scene(prefill_tokens=0)
    scene.running("r", 50)
    scene.waiting("w")
    assert scene.victims() == []
    scene.prefill_tokens = 100
    scene.table.advance(1)
    assert scene.victims() == ["r"]


def test_a_call_that_becomes_preemptible_is_reconsidered_without_an_event() -> None:
    """The end of a prefill is no event of the table, yet opens the way to preemption."""
    scene = Scene(hidden={"r"})
    scene.running("r", 50)
    scene.waiting("w")
    assert scene.victims() == []
    scene.hidden.clear()
    scene.table.advance(1)
    assert scene.victims() == ["r"]


def test_a_better_call_that_the_engine_did_not_admit_is_reconsidered() -> None:
    """Room that was there on paper may be gone a step later; then there is a victim."""
    scene = Scene(free_slots=1)
    scene.running("r", 50)
    scene.waiting("w")
    assert scene.victims() == []
    scene.free_slots = 0
    scene.table.advance(1)
    assert scene.victims() == ["r"]


def test_a_worse_call_that_overtakes_a_better_one_is_an_event() -> None:
    """If the engine starts calls out of order, the one left behind gets its victim."""
    scene = Scene()
    scene.running("r", 5)
    worse = scene.waiting("worse", 50)
    scene.waiting("w")
    assert scene.victims() == []
    scene.table.start(worse)
    scene.table.advance(1)
    assert scene.victims() == ["worse"]


def test_an_arrival_is_an_event() -> None:
    """A better call that arrives in a settled queue gets its victim in the next pass."""
    scene = Scene()
    scene.running("r", 50)
    scene.waiting("same", 50)
    assert scene.victims() == []
    scene.table.open_call("w")
    scene.table.advance(1)
    assert scene.victims() == ["r"]


def test_nothing_happened_means_nobody_is_looked_at() -> None:
    """With no worse call running, the engine is asked again only after an event."""
    scene = Scene()
    first = scene.running("r1", 5)
    scene.running("r2", 5)
    scene.waiting("w")
    scene.plan()
    assert scene.num_looks == 1
    scene.table.advance(1)
    assert scene.plan() == NOTHING
    assert scene.num_looks == 1
    scene.table.charge(first, 5)  # the end of a quantum is an event
    scene.table.advance(1)
    assert scene.victims() == ["r1"]


def test_reconsider_is_an_event() -> None:
    """The engine can ask for another look where the table has seen nothing."""
    scene = Scene()
    scene.running("r", 5)
    scene.waiting("w")
    scene.plan()
    scene.planner.reconsider()
    scene.table.advance(1)
    scene.plan()
    assert scene.num_looks == 2


def test_preemption_is_considered_once_per_interval() -> None:
    """Between two considerations lie at least `interval` steps, and none is forgotten."""
    scene = Scene(interval=5)
    scene.running("r1", 5)
    scene.waiting("w1")
    assert scene.victims() == []
    scene.running("r2", 50)
    scene.table.advance(4)
    assert scene.victims() == []
    scene.table.advance(1)
    assert scene.victims() == ["r2"]


def test_order_is_none_until_the_order_changes() -> None:
    """The plan repeats the order only when arrivals or level changes have touched it."""
    scene = Scene(free_slots=9)
    plan = scene.plan()
    assert plan.order == ()
    first, second = scene.waiting("w1", 15), scene.waiting("w2", 5)
    assert scene.plan().order == (second, first)
    assert scene.plan().order is None
    scene.table.start(second)
    assert scene.plan().order is None  # who has left is no news for the others
    scene.table.finish(second)
    scene.table.advance(15)
    assert first.is_promoted
    third = scene.waiting("w3", 5)
    assert scene.plan().order == (first, third)


def test_a_plan_changes_nothing() -> None:
    """Planning reads: the table is as it was, and a second planner decides alike."""
    scene = Scene()
    for i in range(4):
        scene.running(f"r{i}", 50)
        scene.waiting(f"w{i}", i * 7)
    before = (scene.table.totals(), scene.table.num_events, list(scene.table.queue))
    plan = scene.plan()
    assert before == (scene.table.totals(), scene.table.num_events, list(scene.table.queue))
    assert Planner(scene.table, 0, 1).plan(scene) == plan
    assert plan.preempt


def test_no_waiting_call_no_question() -> None:
    """Without a queue the engine is not asked anything."""
    scene = Scene()
    scene.running("r", 50)
    assert scene.plan().preempt == ()
    assert scene.num_looks == 0


# -- on an engine --------------------------------------------------------------------------------


def run_two(**settings: Any) -> FakeEngine:
    """A long call, and a short one of another program that comes while the long one runs."""
    rules: dict[str, Any] = {"policy": "plas", "quantum": 4, "beta": 0, "schedule_interval": 1}
    engine = FakeEngine(
        ProgramConfig(**{**rules, "min_run": 8.0, "prefill_weight": 0.5, **settings}),
        num_slots=1,
        num_kv_tokens=100,
        prefill_budget=16,
    )
    engine.submit(Job(rid="long", program_id="p", num_prompt=40, num_output=40))
    for _ in range(2):
        engine.step()
    engine.submit(Job(rid="short", program_id="q", num_prompt=4, num_output=4))
    engine.run()
    return engine


def test_a_short_call_overtakes_a_long_one_in_mid_decode() -> None:
    """The long call is preempted once, its KV is kept, and none of its work is repeated."""
    engine = run_two()
    long, short = engine.ended["long"].call, engine.ended["short"].call
    assert (long.num_preemptions, short.num_preemptions) == (1, 0)
    assert long.queue_steps == short.service == 4 * 0.5 + 4
    assert long.service == 40 * 0.5 + 40
    assert engine.num_evictions == 0


def test_prefill_in_progress_is_not_interrupted() -> None:
    """A short call that arrives during a chunked prefill waits until the prefill is done."""
    engine = run_two(min_run=0)
    # the last 8 prompt tokens, and the first generated one with them
    assert engine.ended["short"].call.queue_steps == pytest.approx(8 * 0.5 + 1)


def test_victims_that_would_not_make_room_stay() -> None:
    """A call that does not fit even so is not let in on paper, and nobody leaves for it."""
    scene = Scene(free_slots=0, free_kv_tokens=5)
    scene.running("r", 15)
    scene.waiting("w")
    scene.holdings["r"] = 30
    scene.demands["w"] = Demand(99, 99)
    assert scene.plan() == Plan(order=tuple(scene.table.queue))
