"""A seeded random blast: 25,000 rounds of everything at once, with all invariants checked."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.policy import POLICIES, Levels
from autellix_sglang.testing import FakeEngine, Job

NUM_ROUNDS = 5000  # per policy
ROUNDS_PER_SEED = 250
TTL_S = 30


def random_config(rng: random.Random, policy: str) -> ProgramConfig:
    return ProgramConfig(
        policy=policy,
        levels=rng.choice([1, 2, 4, 8]),
        quantum=rng.choice([0, 0.7, 3, 10]),
        factor=rng.choice([1.3, 2, 4]),
        beta=rng.choice([0, 0.5, 2, 8]),
        min_run=rng.choice([0, 1, 4]),
        schedule_interval=rng.choice([1, 1, 3]),
        prefill_weight=rng.choice([0, 0.01, 0.3]),
        ttl=TTL_S,
    )


def random_engine(rng: random.Random, policy: str) -> FakeEngine:
    return FakeEngine(
        random_config(rng, policy),
        num_slots=rng.choice([1, 3, 8]),
        num_kv_tokens=rng.choice([70, 120, 400]),
        prefill_budget=rng.choice([7, 30, 1000]),
    )


@dataclass
class Blast:
    """Clients that do anything, at random, to one engine."""

    rng: random.Random
    engine: FakeEngine
    now_s: float = 1e9
    num_programs: int = 0
    jobs: dict[str, Job] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)

    def round(self) -> None:
        rng, engine = self.rng, self.engine
        if engine.table.num_live_calls < 25 and rng.random() < 0.3:
            self.new_program()
        for chance, action in [
            (0.06, self.abort),
            (0.02, self.disconnect),
            (0.03, self.end_program),
            (0.05, self.expire),
        ]:
            if rng.random() < chance:
                action()
        engine.step()
        engine.check_integrity()

    def new_program(self) -> None:
        """A program whose calls form a random graph; one in five names no program."""
        self.num_programs += 1
        program_id = None if self.rng.random() < 0.2 else f"p{self.num_programs}"
        num_calls = 1 if program_id is None else self.rng.randint(1, 8)
        rids = [f"{self.num_programs}-{i}" for i in range(num_calls)]
        for i, rid in enumerate(rids):
            num_parents = self.rng.randint(0, min(i, 3))
            job = Job(
                rid=rid,
                program_id=program_id,
                num_prompt=self.rng.randint(0, 40),
                num_output=self.rng.choice([1, 2, 5, 30]),
                parents=tuple(self.rng.sample(rids[:i], num_parents)),
                ends_program=i == num_calls - 1 and self.rng.random() < 0.5,
            )
            self.jobs[rid] = job
            self.engine.submit(job)

    def abort(self) -> None:
        calls = self.engine.table.live_calls()
        if calls:
            chosen = [call for call in calls if call.is_promoted]  # there are few
            call = self.rng.choice(chosen if chosen and self.rng.random() < 0.3 else calls)
            promoted = "promoted " if call.is_promoted else ""
            prefilling = " prefilling" if call.handle.num_missing else ""
            self.seen[f"aborted {promoted}{call.phase.value}{prefilling}"] += 1
            self.engine.abort(call.rid)
        self.engine.abort("nobody")

    def disconnect(self) -> None:
        calls = self.engine.table.live_calls()
        if calls:
            self.engine.disconnect(self.rng.choice(calls).program.program_id)

    def end_program(self) -> None:
        programs = list(self.engine.table.programs())
        if programs:
            program = self.rng.choice(programs)
            self.seen[f"ended {program.state}"] += 1
            self.engine.table.end_program(program.tenant, program.program_id)

    def expire(self) -> None:
        self.now_s += self.rng.uniform(0, TTL_S)
        self.seen["expired"] += self.engine.table.expire(self.now_s)

    def configure(self) -> None:
        config = random_config(self.rng, self.rng.choice(list(POLICIES)))
        levels = Levels(config.levels, config.quantum, config.factor)
        table = self.engine.table
        table.configure(POLICIES[config.policy], levels, config.beta, config.ttl)

    def finish(self) -> None:
        """Serve what is left, and hold the engine to its books."""
        engine, table = self.engine, self.engine.table
        engine.run()
        engine.check_integrity()
        table.expire(self.now_s + 2 * TTL_S)
        assert (table.num_programs, table.num_live_calls, len(table.queue)) == (0, 0, 0)
        assert not engine._kept
        assert engine._num_held == 0
        assert engine.ended.keys() <= self.jobs.keys()
        # `FakeEngine` asserts that none ends twice; here, that each one that was sent did end.
        assert table.counters.num_calls == table.counters.num_finished == len(engine.ended)
        for rid, request in engine.ended.items():
            engine.check_service(request)
            assert request.is_done == (request.num_generated == self.jobs[rid].num_output)
        totals = {"retracted": engine.num_retractions, "evicted": engine.num_evictions}
        counters = table.counters
        self.seen.update(
            **totals,
            preempted=counters.num_preemptions - engine.num_retractions,
            promoted=counters.num_promotions,
            demoted=counters.num_demotions,
            done=sum(request.is_done for request in engine.ended.values()),
        )


def run_blast(seed: int, policy: str, is_configured: bool = False) -> Blast:
    rng = random.Random(f"{seed} {policy}")
    blast = Blast(rng, random_engine(rng, policy))
    for _ in range(ROUNDS_PER_SEED):
        if is_configured and rng.random() < 0.05:
            blast.configure()
        blast.round()
    blast.finish()
    return blast


@pytest.mark.parametrize("policy", POLICIES)
def test_blast(policy: str) -> None:
    """Nothing breaks, leaks, ends twice or is charged twice, whatever comes together."""
    seen = Counter[str]()
    for seed in range(NUM_ROUNDS // ROUNDS_PER_SEED):
        seen.update(run_blast(seed, policy).seen)
    expected = {
        "aborted waiting", "aborted running", "aborted running prefilling", "expired", "done",
        "ended running", "ended waiting", "ended idle", "ended ended", "retracted",
    }  # fmt: skip
    if policy != "fcfs":
        expected |= {"demoted", "promoted", "preempted", "evicted", "aborted promoted waiting"}
    assert expected - {name for name, count in seen.items() if count} == set()


@pytest.mark.parametrize("seed", range(8))
def test_blast_with_changing_settings(seed: int) -> None:
    """The policy and its settings can change at any moment."""
    run_blast(seed, "plas", is_configured=True)


def decisions(seed: int, policy: str) -> list[tuple[str, ...]]:
    """Who runs and who waits, in order, after every round."""
    rng = random.Random(seed)
    blast = Blast(rng, random_engine(rng, policy))
    history = []
    for _ in range(100):
        blast.round()
        requests = (*blast.engine.running, *blast.engine.waiting)
        history.append(tuple(request.job.rid for request in requests))
    return history


@pytest.mark.parametrize("policy", POLICIES)
def test_same_input_same_decisions(policy: str) -> None:
    """Two tables that see the same events decide alike, wherever their objects lie in memory."""
    for seed in range(10):
        first = decisions(seed, policy)
        ballast = [object() for _ in range(seed)]
        assert decisions(seed, policy) == first
        del ballast


def test_the_fake_refuses_what_can_never_run() -> None:
    """A job beyond the KV pool would wait for ever, so it is an error when it is submitted."""
    engine = FakeEngine(ProgramConfig(), num_slots=1, num_kv_tokens=10)
    with pytest.raises(ValueError, match="job big"):
        engine.submit(Job(rid="big", num_prompt=6, num_output=5))
    engine.submit(Job(rid="fits", num_prompt=5, num_output=5))
    with pytest.raises(RuntimeError, match="1 calls live"):
        engine.run(max_steps=4)
    engine.run(max_steps=1)
    assert engine.ended["fits"].is_done
