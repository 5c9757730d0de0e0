"""Many replicas in virtual time: the simulator's engines behind the router's own placement.

    fleet = SimFleet("autellix", 4, PRESETS["a100-8b"], Scheduling(config=ProgramConfig()))
    run = fleet.run(programs, arrivals_s)

Engines, schedulers and caches are those of `bench.sim_engine`; the policies and the table of
programs are the router's (`router/balance.py`). Only time is simulated: a run is exact, repeatable
and quick. What the router would know from reports is exact and immediate here.

`cache-aware` and `manual` are our reading of sglang-router's policies of these names with their
default settings (sgl-model-gateway/src/policies of SGLang): the longest prefix ever sent to a
worker while loads are about even, otherwise the least loaded; and a random worker for good.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from autellix_sglang.errors import UnknownProgramError
from autellix_sglang.router.balance import (
    BEGINNING_BYTES,
    POLICIES,
    Call,
    Choice,
    Programs,
    Worker,
    rendezvous,
)
from bench.sim_cache import Node
from bench.sim_device import Device
from bench.sim_engine import Blueprint, Request, Scheduling, SimEngine, SimProgram
from bench.stats import CallRecord, ProgramRecord, Run

CACHE_AWARE: Final = "cache-aware"
MANUAL: Final = "manual"
POLICY_NAMES: Final = (*POLICIES, CACHE_AWARE, MANUAL)
SMOOTHING: Final = 0.02  # as in the worker agent
BYTES_PER_TOKEN: Final = 4

Piece = tuple[object, int]  # tokens by name: two prompts that share a name share those tokens


class SimFleet:
    """Programs arrive, call after call is placed and run, until all are over. Good for one run."""

    def __init__(
        self,
        policy: str,
        num_replicas: int,
        device: Device,
        scheduling: Scheduling,
        *,
        num_slots: int,
        gap_scale: float = 1.0,
    ) -> None:
        self.policy = policy
        self.replicas = {
            f"w{i}": _Replica(f"w{i}", self, device, scheduling, num_slots=num_slots)
            for i in range(num_replicas)
        }
        self._place = _placements(policy)
        self._table = Programs()
        self._gap_scale = gap_scale
        self._programs: list[_Program] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._turns = count()

    def run(self, plans: Sequence[Blueprint], arrivals_s: Sequence[float]) -> Run:
        """Simulate until every call is done."""
        for number, (plan, at_s) in enumerate(zip(plans, arrivals_s, strict=True)):
            self._programs.append(_Program(number, plan, at_s, list(plan.num_waits)))
            for index, num_waits in enumerate(plan.num_waits):
                if num_waits == 0:
                    self.plan_call(number, index, at_s)
        while self._events:
            _, _, act = heapq.heappop(self._events)
            act()
        return Run(self.policy, tuple(p.record() for p in self._programs), "simulated")

    @property
    def balance(self) -> float:
        """Calls of the busiest replica over the mean; 1 is even."""
        calls = [replica.num_calls for replica in self.replicas.values()]
        return max(calls) * len(calls) / max(1, sum(calls))

    # -- what replicas tell ----------------------------------------------------------------------

    def at(self, time_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), act))

    def plan_call(self, number: int, index: int, after_s: float) -> None:
        """All that a call waits for is done: its client sends it after the recorded gap."""
        gap_s = max(0.0, self._programs[number].plan.trace.calls[index].gap_s or 0.0)
        at_s = after_s + gap_s * self._gap_scale
        self.at(at_s, lambda: self._send(number, index, at_s))

    def ended(self, number: int, replica: _Replica) -> None:
        """A call of the program is over in this replica."""
        program = self._programs[number]
        self._table.ended(program.key, replica.id)
        if len(program.records) == len(program.num_waits):
            self._table.forget(program.key)
            for visited in self.replicas.values():
                visited.forget(number)

    # -- placement -------------------------------------------------------------------------------

    def _send(self, number: int, index: int, now_s: float) -> None:
        program = self._programs[number]
        pieces = program.prompt(index)
        call = Call(
            program=program.key,
            num_tokens=sum(length for _, length in pieces),
            turn=next(self._turns),
            beginnings=_beginnings(pieces),
        )
        loads = [replica.load() for replica in self.replicas.values()]
        choice = self._place(call, pieces, self._table, loads)
        replica = self.replicas[choice.worker]
        self._table.sent(call, choice, replica.load(), now_s)
        replica.deliver(program, index, choice.uncached_tokens, now_s)


@dataclass(slots=True)
class _Program:
    """One run of a program, wherever its calls run."""

    number: int
    plan: Blueprint
    arrival_s: float
    num_waits: list[int]
    records: dict[int, CallRecord] = field(default_factory=dict)
    prompts: dict[int, tuple[Piece, ...]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"p{self.number}"

    def prompt(self, index: int) -> tuple[Piece, ...]:
        """The prompt of a call whose predecessors have been asked for theirs."""
        leader = self.plan.leaders[index]
        if leader not in self.prompts:
            self.prompts[leader] = self._build(leader)
        return self.prompts[leader]

    def _build(self, index: int) -> tuple[Piece, ...]:
        trace, base = self.plan.trace, self.plan.bases[index]
        call = trace.calls[index]
        if base is not None:
            output: Piece = ((self.number, base, "output"), trace.calls[base].output_tokens)
            head = _cut((*self.prompt(base), output), call.reused_tokens)
        else:
            num_shared = min(call.shared_prefix_tokens, call.prompt_tokens)
            head = ((("shared", trace.corpus, trace.prefix_group, call.op), num_shared),)
        num_own = call.prompt_tokens - sum(length for _, length in head)
        return (*head, ((self.number, index, "own"), max(1, num_own)))

    def record(self) -> ProgramRecord:
        calls = tuple(self.records[i] for i in range(len(self.num_waits)))
        trace = self.plan.trace
        return ProgramRecord(trace.id, trace.kind, self.arrival_s, self.arrival_s, calls)


class _Replica(SimEngine):
    """An engine that is given its calls one by one, and what a router knows of it.

    Decode steps are taken in leaps up to the engine's next event; a call that arrives meanwhile
    cuts the leap short, at the end of the step under way.
    """

    def __init__(
        self,
        name: str,
        fleet: SimFleet,
        device: Device,
        scheduling: Scheduling,
        *,
        num_slots: int,
    ) -> None:
        super().__init__(device, scheduling, num_slots=num_slots)
        self.id = name
        self.num_calls = 0
        self._fleet = fleet
        self._visits: dict[int, SimProgram] = {}
        self._uncached: dict[tuple[int, int], int] = {}  # as the router reckoned, until answered
        self._call_s = 0.0
        self._num_computed = 0
        self._num_leaping = 0  # decode steps under way
        self._wake = 0  # number of the only wake-up that counts
        self._load: Worker | None = None  # None: it may have changed

    def load(self) -> Worker:
        if self._load is None:
            device = self.device
            self._load = Worker(
                id=self.id,
                num_live=self.table.num_live_calls + len(self._agenda),
                num_slots=self._num_slots,
                call_s=self._call_s or 1.0,
                pending_tokens=sum(self._uncached.values()),
                prefill_tokens_per_s=1 / device.prefill_token_s,
                kv_tokens=device.kv_tokens,
                computed_tokens=self._num_computed,
            )
        return self._load

    def deliver(self, program: _Program, index: int, num_uncached: int, now_s: float) -> None:
        """A call arrives."""
        self._load = None
        self._finish_leap(now_s)
        if program.number not in self._visits:
            total = program.plan.total_steps(self.weight) if self._is_clairvoyant else 0.0
            visit = SimProgram(program.number, program.plan, now_s, total, program.num_waits)
            visit.records = program.records
            self._visits[program.number] = visit
        self.num_calls += 1
        self._uncached[program.number, index] = num_uncached
        entry = (now_s, next(self._counter), self._visits[program.number], index)
        heapq.heappush(self._agenda, entry)
        self._wake_at(max(now_s, self.now_s))

    def forget(self, number: int) -> None:
        """A program is over, wherever its last call was."""
        if self._visits.pop(number, None) is not None:
            with suppress(UnknownProgramError):  # it ended here, or was idle beyond its TTL
                self.table.end_program("", str(number))

    def _wake_at(self, time_s: float) -> None:
        self._wake += 1
        number = self._wake
        self._fleet.at(time_s, lambda: self._run(number))

    def _run(self, number: int) -> None:
        """End the leap under way, or take the next step; calls that follow come in between."""
        if number != self._wake:
            return
        self._load = None
        if self._num_leaping:
            self._finish_leap(math.inf)
            self._wake_at(self.now_s)
        elif self._agenda or self.table.num_live_calls:
            self.step()
            self._wake_at(self.now_s + self._leap_s)

    @property
    def _leap_s(self) -> float:
        """Seconds that the decode steps under way take."""
        if not self._num_leaping:
            return 0.0
        return self.device.decode_time_s(len(self._decoding), self._context, self._num_leaping)

    def _finish_leap(self, now_s: float) -> None:
        if self._num_leaping:
            num_steps, self._num_leaping = self._num_leaping, 0
            if now_s < math.inf:
                passed_s = max(0.0, now_s - self.now_s)
                batch = len(self._decoding)
                until = self.device.decode_steps_until(batch, self._context, passed_s)
                num_steps = min(num_steps, until)
            super()._decode(num_steps)

    # -- what the engine does otherwise ----------------------------------------------------------

    def _decode(self, num_steps: int) -> None:
        self._num_leaping = num_steps

    def _plan_issue(self, program: SimProgram, index: int, after_s: float) -> None:
        self._fleet.plan_call(program.number, index, after_s)

    def _issue(self, program: SimProgram, index: int, at_s: float) -> None:
        self._lay_out(program, program.plan.leaders[index])
        super()._issue(program, index, at_s)

    def _lay_out(self, program: SimProgram, index: int) -> None:
        """Name the tokens before a call's own as if the calls that they come from had run here."""
        plan = program.plan
        chain, base = [], plan.bases[index]
        while base is not None and base not in program.full_leaves:
            chain.append(base)
            base = plan.bases[plan.leaders[base]]
        for earlier in reversed(chain):
            leaf = self._prompt_leaf(program, plan.leaders[earlier])
            end = leaf.end + max(1, plan.trace.calls[earlier].output_tokens)
            program.full_leaves[earlier] = Node(leaf, end)

    def _charge_prefill(self, request: Request, num_before: int, num_now: int) -> None:
        self._num_computed += num_now
        super()._charge_prefill(request, num_before, num_now)

    def _begin_decoding(self, request: Request) -> None:
        self._uncached.pop((request.program.number, request.index), None)
        super()._begin_decoding(request)

    def _finish(self, request: Request) -> None:
        super()._finish(request)
        seconds = self.now_s - request.issue_s
        in_slot_s = seconds * min(1.0, self._num_slots / (self.table.num_live_calls + 1))
        self._call_s += (SMOOTHING if self._call_s else 1.0) * (in_slot_s - self._call_s)
        self._fleet.ended(request.program.number, self)


# -- policies ------------------------------------------------------------------------------------

_Placement = Callable[[Call, Sequence[Piece], Programs, Sequence[Worker]], Choice]


def _placements(policy: str) -> _Placement:
    if policy == CACHE_AWARE:
        return CacheAware().place
    if policy == MANUAL:
        return lambda call, pieces, table, workers: Choice(
            worker=rendezvous(str(call.program), workers).id, uncached_tokens=call.num_tokens
        )
    return lambda call, pieces, table, workers: POLICIES[policy](call, table.view(call), workers)


class CacheAware:
    """sglang-router's `cache_aware` with its default thresholds, on named pieces of text."""

    CACHE_THRESHOLD: Final = 0.3
    BALANCE_ABS: Final = 64
    BALANCE_REL: Final = 1.5

    def __init__(self) -> None:
        self._trees: dict[str, dict[object, int]] = {}

    def place(
        self, call: Call, pieces: Sequence[Piece], table: Programs, workers: Sequence[Worker]
    ) -> Choice:
        least = min(workers, key=lambda w: w.num_live)
        most = max(w.num_live for w in workers)
        is_uneven = (
            most - least.num_live > self.BALANCE_ABS and most > self.BALANCE_REL * least.num_live
        )
        chosen = least.id
        if not is_uneven:
            matched = {w.id: self._matched(w.id, pieces) for w in workers}
            best = max(matched, key=lambda name: matched[name])
            if matched[best] > self.CACHE_THRESHOLD * call.num_tokens:
                chosen = best
        tree = self._trees.setdefault(chosen, {})
        for name, length in pieces:
            tree[name] = max(length, tree.get(name, 0))
        return Choice(worker=chosen, uncached_tokens=call.num_tokens)

    def _matched(self, worker: str, pieces: Sequence[Piece]) -> int:
        tree, total = self._trees.get(worker, {}), 0
        for name, length in pieces:
            known = min(length, tree.get(name, 0))
            total += known
            if known < length:
                break
        return total


def _cut(pieces: Sequence[Piece], num_tokens: int) -> tuple[Piece, ...]:
    """The first so many tokens."""
    found: list[Piece] = []
    for name, length in pieces:
        part = min(length, num_tokens)
        if part == 0:
            break
        found.append((name, part))
        num_tokens -= part
    return tuple(found)


def _beginnings(pieces: Sequence[Piece]) -> tuple[tuple[str, int], ...]:
    """As the router's: names of the prompt's first parts, four bytes to a token."""
    total = sum(length for _, length in pieces)
    cuts = [num_bytes // BYTES_PER_TOKEN for num_bytes in BEGINNING_BYTES]
    return tuple((str(hash(_cut(pieces, cut))), cut) for cut in cuts if cut <= total)
