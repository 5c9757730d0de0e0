"""The scheduling decision as a value: what to admit first, and whom to preempt for it.

Reads the program table and asks the engine what fits; changes neither. The engine's adapter
carries the plan out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from autellix_sglang.core.program import Call, ProgramTable


@dataclass(frozen=True, slots=True)
class Demand:
    """What admitting a call takes: KV tokens reserved for it, tokens to prefill at once."""

    kv_tokens: int
    prefill_tokens: int


class EngineView(Protocol):
    """What the planner asks of an engine, all for the pass at hand."""

    @property
    def free_slots(self) -> int:
        """Calls that still fit into the running batch."""

    @property
    def free_kv_tokens(self) -> int:
        """KV tokens to be had after eviction of unreferenced cache, less reservations."""

    @property
    def prefill_tokens(self) -> int:
        """Tokens that one prefill batch may hold."""

    def preemptible(self) -> Sequence[Call]:
        """Running calls that the engine is able to take off the batch now."""

    def demand(self, call: Call, ahead: Sequence[Call]) -> Demand:
        """What admitting a waiting call takes, if those `ahead` are admitted before it."""

    def holding(self, call: Call) -> int:
        """KV tokens that preempting a running call would make available."""

    def resume_steps(self, call: Call) -> float:
        """Steps that resuming a running call, were it preempted, would probably take."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One pass: `order` is None when the admission order of the last plan still stands."""

    order: tuple[Call, ...] | None
    preempt: tuple[Call, ...] = ()


NOTHING: Final = Plan(order=None)


def standing(call: Call) -> tuple[int, int, int]:
    """Who keeps its place first: promoted and better levels, then older programs and calls."""
    return (-1 if call.is_promoted else call.level, call.program.seq, call.seq)


class Planner:
    """Plans one pass after the other over one table.

    `interval` is in steps of the virtual clock between two considerations of preemption. `min_run`
    is in steps of own service since a call last started. Where a call would have to be computed
    again it is more: that holds up all running calls, so it first runs for as many steps as they
    would lose by it together. Otherwise, with KV short, calls would mostly undo each other's work.

    Whoever is preempted resumes in a batch in which nobody decodes: a step of each running call.
    So a call waits for as many steps as calls run, in which a slot may well come free, before
    anybody is preempted for it. For a promoted call, or with `min_run` 0, none of this counts.
    """

    def __init__(self, table: ProgramTable, min_run: float, interval: float) -> None:
        self._table = table
        self._min_run = min_run
        self._interval = interval
        self._seen_version = -1
        self._seen_events = -1
        self._considered_at = float("-inf")
        self._is_settled = False  # only an event can bring the next preemption

    def plan(self, engine: EngineView) -> Plan:
        """The plan of this pass. Ask once per pass: it remembers what it has seen."""
        queue = self._table.queue
        order = None
        if queue.version != self._seen_version:
            self._seen_version = queue.version
            order = tuple(queue)
        return Plan(order, self._victims(engine)) if self._is_due() else Plan(order)

    def reconsider(self) -> None:
        """Treat the next pass as if something had happened."""
        self._seen_events = -1

    def _is_due(self) -> bool:
        table = self._table
        if not len(table.queue):
            return False
        if self._seen_events == table.num_events and self._is_settled:
            return False
        if table.clock - self._considered_at < self._interval:
            return False
        self._seen_events = table.num_events
        self._considered_at = table.clock
        return True

    def _victims(self, engine: EngineView) -> tuple[Call, ...]:
        """Running calls to preempt so that strictly better waiting ones get in; no more."""
        table = self._table
        best = table.queue.first()
        if best is None:
            return ()
        running = engine.preemptible()
        worse = [c for c in running if c.level > best.level]  # no promoted one: it has level 0
        # What fits, and who may be preempted yet, changes without an event.
        is_all_seen = len(running) == table.num_live_calls - len(table.queue)
        self._is_settled = is_all_seen and not worse
        least = self.least_run(engine, best, len(running))
        candidates = [c for c in worse if c.service - c.started_service >= least(c)]
        candidates.sort(key=standing)  # the last one goes first
        return self._select(engine, candidates, len(running))

    def patience(self, call: Call, num_running: int) -> float:
        """Steps that a call still waits before anybody is preempted for it."""
        if call.is_promoted or not self._min_run:
            return 0.0
        return max(0.0, num_running - (self._table.clock - call.waiting_since))

    def least_run(
        self, engine: EngineView, best: Call, num_running: int
    ) -> Callable[[Call], float]:
        """What a running call must have run before it may be preempted for `best`, in steps."""
        if best.is_promoted or not self._min_run:
            return lambda call: self._min_run
        return lambda call: max(self._min_run, num_running * engine.resume_steps(call))

    def _select(
        self, engine: EngineView, candidates: list[Call], num_running: int
    ) -> tuple[Call, ...]:
        """Walk the queue in order, admitting on paper, and take victims where nothing is left."""
        slots, kv_tokens = engine.free_slots, engine.free_kv_tokens
        prefill_tokens = engine.prefill_tokens
        chosen: list[Call] = []
        ahead: list[Call] = []
        for call in self._table.queue:
            if not candidates or candidates[-1].level <= call.level or prefill_tokens <= 0:
                break
            demand = engine.demand(call, ahead)
            taken: list[Call] = []
            slots_then, kv_then = slots, kv_tokens
            while (slots_then < 1 or kv_then < demand.kv_tokens) and candidates:
                if candidates[-1].level <= call.level or self.patience(call, num_running) > 0:
                    break
                victim = candidates.pop()
                taken.append(victim)
                slots_then += 1
                kv_then += engine.holding(victim)
            if slots_then < 1 or kv_then < demand.kv_tokens:
                break  # even all worse calls together do not make room: leave them alone
            chosen += taken
            slots = slots_then - 1
            kv_tokens = kv_then - demand.kv_tokens
            prefill_tokens -= demand.prefill_tokens
            ahead.append(call)
        return tuple(chosen)
