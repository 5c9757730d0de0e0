"""The simulated fleet: what it conserves, that leaps change nothing, and how its peers place."""

from __future__ import annotations

import pytest

from autellix_sglang.config import ProgramConfig
from autellix_sglang.router.balance import Call, Programs, Worker
from bench import synthetic
from bench.replay import poisson_arrivals
from bench.sim import Setup
from bench.sim_device import PRESETS
from bench.sim_engine import Scheduling, SimEngine, blueprint
from bench.sim_fleet import POLICY_NAMES, CacheAware, SimFleet
from bench.stats import summarize

DEVICE = PRESETS["a100-8b"]
SCHEDULING = Scheduling(config=ProgramConfig())


def plans(kind: str, count: int):
    return [blueprint(program) for program in synthetic.generate(kind, count, seed=3)]


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_call_runs_once(policy):
    """Every call of every program ends, after its parents, on replicas that share the work."""
    programs = [*plans("react", 20), *plans("tree", 3)]
    fleet = SimFleet(policy, 3, DEVICE, SCHEDULING, num_slots=8)
    run = fleet.run(programs, poisson_arrivals(len(programs), 2.0, seed=3))
    assert summarize(run)["lost"] == 0
    assert sum(replica.num_calls for replica in fleet.replicas.values()) == len(run.calls)
    assert 1 <= fleet.balance < 3
    for plan, program in zip(programs, run.programs, strict=True):
        ends = {record.call_id: record.span for record in program.calls}
        for call in plan.trace.calls:
            issued_s, _ = ends[call.id]
            assert all(ends[parent][1] <= issued_s for parent in plan.trace.waits_for(call))
    for replica in fleet.replicas.values():
        replica.check_integrity()
        assert replica.table.num_live_calls == 0


@pytest.mark.parametrize("scheduling", [SCHEDULING, Setup(device=DEVICE).scheduling("srpt")])
def test_one_replica_is_the_simulators_engine(scheduling):
    """With one replica there is nothing to place: results are those of `SimEngine` itself.

    Of the clairvoyant order, too, which has to be told how long programs are.
    """
    programs, arrivals = plans("chat", 30), poisson_arrivals(30, 1.0, seed=3)
    fleet = SimFleet("autellix", 1, DEVICE, scheduling, num_slots=8)
    mine = fleet.run(programs, arrivals)
    engine = SimEngine(DEVICE, scheduling, num_slots=8).run(programs, arrivals)
    for one, other in zip(mine.programs, engine.programs, strict=True):
        assert one.response_s == pytest.approx(other.response_s, rel=1e-9)
    assert summarize(mine)["prefix_hit_rate"] == pytest.approx(
        summarize(engine)["prefix_hit_rate"], abs=0.01
    )


def test_a_run_can_be_repeated():
    """The same input gives the same run."""

    def once():
        fleet = SimFleet("autellix", 4, DEVICE, SCHEDULING, num_slots=8)
        return fleet.run(plans("react", 20), poisson_arrivals(20, 2.0, seed=3))

    assert once() == once()


def test_placement_that_keeps_programs_at_home_keeps_their_cache():
    """Round robin loses prefixes that `autellix` finds again, and takes longer for it."""
    programs = plans("react", 120)
    arrivals = poisson_arrivals(len(programs), 3.0, seed=3)
    found = {
        policy: summarize(
            SimFleet(policy, 4, DEVICE, SCHEDULING, num_slots=64).run(programs, arrivals)
        )
        for policy in ("autellix", "round-robin")
    }
    assert found["autellix"]["prefix_hit_rate"] > found["round-robin"]["prefix_hit_rate"] + 0.1
    mean = {name: s["program_token_latency_ms"]["mean"] for name, s in found.items()}
    assert mean["autellix"] < 0.72 * mean["round-robin"]


def test_cache_aware_follows_the_longest_prefix_unless_loads_are_uneven():
    """As sglang-router: the best match above 30 %, otherwise the least loaded."""
    peer, table = CacheAware(), Programs()

    def place(pieces, *num_live):
        workers = [Worker(id=f"w{i}", num_live=n) for i, n in enumerate(num_live)]
        call = Call(num_tokens=sum(length for _, length in pieces))
        return peer.place(call, pieces, table, workers).worker

    assert place([("a", 100)], 1, 0) == "w1"
    assert place([("a", 100), ("b", 100)], 0, 1) == "w1"
    assert place([("a", 20), ("c", 180)], 0, 1) == "w0"
    assert place([("a", 100), ("b", 100)], 0, 65) == "w0"
