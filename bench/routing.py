"""Routing in virtual time: recorded programs over many `StepEngine`s, placed by a policy.

The policies are the router's own functions with the router's own table; only time is simulated.
Loads are exact and immediate. `cache-aware` is our reading of sglang-router's policy of that name:
the longest matching prefix in a tree per worker, unless loads are out of balance.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Final

from autellix_sglang.router.balance import (
    BEGINNING_BYTES,
    POLICIES,
    Call,
    Choice,
    Program,
    Programs,
    Worker,
)
from autellix_sglang.router.testing import Job, StepEngine, Timing, block_keys
from bench.prompts import ProgramPrompts
from bench.stats import distribution
from bench.trace import TraceCall, TraceProgram

CACHE_AWARE: Final = "cache-aware"
POLICY_NAMES: Final = (*POLICIES, CACHE_AWARE)
SMOOTHING: Final = 0.02  # as in the worker agent


class CacheAware:
    """sglang-router's `cache_aware` with its default thresholds, on blocks in place of text."""

    CACHE_THRESHOLD: Final = 0.3
    BALANCE_ABS: Final = 64
    BALANCE_REL: Final = 1.5

    def __init__(self) -> None:
        self._trees: dict[str, set[int]] = {}

    def place(self, prompt: Sequence[int], workers: Sequence[Worker]) -> str:
        keys = block_keys(prompt)
        least = min(workers, key=lambda w: w.num_live)
        most = max(w.num_live for w in workers)
        is_uneven = (
            most - least.num_live > self.BALANCE_ABS and most > self.BALANCE_REL * least.num_live
        )
        chosen = least.id if is_uneven else self._by_prefix(keys, workers)
        self._trees.setdefault(chosen, set()).update(keys)
        return chosen

    def _by_prefix(self, keys: Sequence[int], workers: Sequence[Worker]) -> str:
        matched = {w.id: self._matched(w.id, keys) for w in workers}
        best = max(workers, key=lambda w: matched[w.id])
        if keys and matched[best.id] / len(keys) > self.CACHE_THRESHOLD:
            return best.id
        return min(workers, key=lambda w: len(self._trees.get(w.id, ()))).id

    def _matched(self, worker: str, keys: Sequence[int]) -> int:
        tree = self._trees.get(worker, set())
        return next((i for i, key in enumerate(keys) if key not in tree), len(keys))


@dataclass(slots=True)
class _Replica:
    """An engine and what its agent and the router know of it."""

    id: str
    engine: StepEngine
    is_stepping: bool = False
    call_s: float = 0.0
    pending_tokens: int = 0
    num_calls: int = 0

    def load(self) -> Worker:
        timing = self.engine.timing
        return Worker(
            id=self.id,
            num_live=self.engine.num_live,
            num_slots=timing.num_slots,
            call_s=self.call_s or 1.0,
            pending_tokens=self.pending_tokens,
            prefill_tokens_per_s=timing.prefill_tokens_per_s,
            kv_tokens=timing.kv_tokens,
            computed_tokens=self.engine.num_computed_tokens,
        )


@dataclass(slots=True)
class _Flight:
    """One call on its way; the handle of its job."""

    walk: _Walk
    call: TraceCall
    replica: _Replica
    num_uncached: int
    issued_s: float


@dataclass(slots=True)
class _Walk:
    """One run of a program."""

    key: str
    program: TraceProgram
    prompts: ProgramPrompts
    arrival_s: float
    missing: dict[str, set[str]]  # calls not issued, and what they wait for
    num_open: int
    end_s: float = 0.0


class Simulation:
    """Programs arrive, call after call runs, until all are over."""

    def __init__(self, policy: str, num_replicas: int, timing: Timing) -> None:
        self.policy = policy
        self.timing = timing
        names = [f"w{i}" for i in range(num_replicas)]
        self._replicas = {name: _Replica(name, StepEngine(timing)) for name in names}
        self._table = Programs()
        self._peer = CacheAware()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._turns = count()
        self._now_s = 0.0

    def run(self, programs: Sequence[TraceProgram], arrivals: Sequence[float]) -> dict[str, Any]:
        """The results of one run; a program's token latency is response time over tokens."""
        pairs = zip(programs, arrivals, strict=True)
        walks = [self._walk(i, program, at_s) for i, (program, at_s) in enumerate(pairs)]
        while self._events:
            self._now_s, _, act = heapq.heappop(self._events)
            act()
        assert all(walk.num_open == 0 for walk in walks), "a call was lost"
        return self._summary(walks)

    def _at(self, time_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), act))

    def _walk(self, index: int, program: TraceProgram, arrival_s: float) -> _Walk:
        missing = {call.id: set(program.waits_for(call)) for call in program.calls}
        prompts = ProgramPrompts(program, instance=str(index))
        walk = _Walk(f"p{index}", program, prompts, arrival_s, missing, len(missing))
        self._at(arrival_s, lambda: self._issue_ready(walk, arrival_s))
        return walk

    def _issue_ready(self, walk: _Walk, now_s: float) -> None:
        ready = [call for call in walk.program.calls if walk.missing.get(call.id) == set()]
        for call in ready:
            del walk.missing[call.id]
            gap_s = max(0.0, call.gap_s or 0.0)
            self._at(now_s + gap_s, partial(self._issue, walk, call))

    def _issue(self, walk: _Walk, call: TraceCall) -> None:
        prompt = walk.prompts.prompt(call)
        asked = Call(
            program=walk.key,
            num_tokens=len(prompt),
            turn=next(self._turns),
            beginnings=_beginnings(prompt),
        )
        loads = [replica.load() for replica in self._replicas.values()]
        choice = self._place(asked, prompt, loads)
        replica = self._replicas[choice.worker]
        self._table.sent(asked, choice, replica.load(), self._now_s)
        replica.num_calls += 1
        replica.pending_tokens += choice.uncached_tokens
        flight = _Flight(walk, call, replica, choice.uncached_tokens, self._now_s)
        replica.engine.submit(Job(prompt, max(1, call.output_tokens), handle=flight))
        if not replica.is_stepping:
            self._step(replica)

    def _place(self, call: Call, prompt: Sequence[int], loads: Sequence[Worker]) -> Choice:
        if self.policy == CACHE_AWARE:
            return Choice(worker=self._peer.place(prompt, loads), uncached_tokens=1)
        program: Program = self._table.view(call)
        return POLICIES[self.policy](call, program, loads)

    def _step(self, replica: _Replica) -> None:
        replica.is_stepping = replica.engine.num_live > 0
        if replica.is_stepping:
            seconds, jobs = replica.engine.step()
            self._at(self._now_s + seconds, lambda: self._end_step(replica, jobs))

    def _end_step(self, replica: _Replica, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.num_generated == 1:
                replica.pending_tokens -= job.handle.num_uncached
            if job.is_done:
                self._end_call(job.handle)
        self._step(replica)

    def _end_call(self, flight: _Flight) -> None:
        walk, call, replica = flight.walk, flight.call, flight.replica
        busy = max(1, replica.engine.num_live + 1)
        in_slot_s = (self._now_s - flight.issued_s) * min(1.0, self.timing.num_slots / busy)
        weight = SMOOTHING if replica.call_s else 1.0
        replica.call_s += weight * (in_slot_s - replica.call_s)
        self._table.ended(walk.key, replica.id)
        seed = hash((walk.key, call.id))
        walk.prompts.complete(call, [(seed + i) % 256 for i in range(max(1, call.output_tokens))])
        walk.num_open -= 1
        walk.end_s = self._now_s
        for waits in walk.missing.values():
            waits.discard(call.id)
        self._issue_ready(walk, self._now_s)

    def _summary(self, walks: Sequence[_Walk]) -> dict[str, Any]:
        engines = [replica.engine for replica in self._replicas.values()]
        num_prompt = sum(engine.num_prompt_tokens for engine in engines)
        num_computed = sum(engine.num_computed_tokens for engine in engines)
        calls = [replica.num_calls for replica in self._replicas.values()]
        latency = [1e3 * (w.end_s - w.arrival_s) / max(1, w.program.output_tokens) for w in walks]
        return {
            "policy": self.policy,
            "replicas": len(self._replicas),
            "program_token_latency_ms": distribution(latency),
            "prefix_hit_rate": 1 - num_computed / max(1, num_prompt),
            "balance": max(calls) * len(calls) / max(1, sum(calls)),
            "makespan_s": self._now_s,
        }


def _beginnings(prompt: Sequence[int]) -> tuple[tuple[str, int], ...]:
    """As the router's: names of the prompt's first parts, four bytes to a token."""
    cuts = [num_bytes // 4 for num_bytes in BEGINNING_BYTES if num_bytes // 4 <= len(prompt)]
    return tuple((str(hash(tuple(prompt[:cut]))), cut) for cut in cuts)


def service_s(program: TraceProgram, timing: Timing) -> float:
    """Seconds of one engine that a program takes in a full batch, its own prefixes cached."""
    per_token_s = timing.step_s / timing.num_slots + timing.step_call_s
    fresh = sum(
        max(0, c.new_tokens - c.shared_prefix_tokens) for c in program.calls if not c.same_prompt_as
    )
    return fresh / timing.prefill_tokens_per_s + program.output_tokens * per_token_s
