"""A discrete-event simulation of one engine, scheduled by the product's own core.

    engine = SimEngine(PRESETS["a100-8b"], Scheduling(ProgramConfig(policy="plas")), num_slots=64)
    run = engine.run(programs, arrivals_s)

The process table, the policies and the planner are those of the server (`autellix_sglang.core`).
What is simulated is SGLang around them, as `bench.serve` uses it:

- a pass first preempts what the plan says, then admits waiting calls in the table's order up to the
  first that does not fit; a prefill batch runs alone and goes before decoding, at most
  `chunk_tokens` per pass, a longer prompt in chunks; it yields each call's first token;
- a call whose prefix another is computing waits for it, as in the product, but not under the orders
  of SGLang and the other baselines, `srpt` apart: those compute it for each;
- a call is admitted with room for all of its output, as SGLang does with `ignore_eos`, which
  replays set: so decoding never runs out of KV, and nothing is retracted;
- finished calls leave their KV in the prefix cache (`bench.sim_cache`): a program's own history and
  the prefixes that the trace says are shared, by length;
- clients answer at once: a call is issued as its parents complete, plus the recorded gap.

Between two events nothing can change the plan, so decode steps are taken in one leap up to the
next arrival, end of a call, end of a level, end of a `min_run`, or promotion. Services are the same
as if charged step by step; a test holds it to that. Nothing is random: the same input gives the
same run.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.kv import LossShare
from autellix_sglang.core.planner import Demand, Planner
from autellix_sglang.core.policy import POLICIES, Levels, Policy, call_turn, program_turn
from autellix_sglang.core.program import Call, Program, ProgramTable
from autellix_sglang.core.sizes import LEADING_TOKENS, Ladder
from bench.sim_cache import Node, PrefixCache, cut, upwards
from bench.sim_device import Device, attention_pairs
from bench.sim_orders import ORDERS, decayed, served_tokens
from bench.stats import CallRecord, Outcome, ProgramRecord, Run, ServerProgramInfo
from bench.trace import TraceProgram

# --- what is scheduled how ----------------------------------------------------------------------


class Kv(Enum):
    """What becomes of a preempted call's KV."""

    KEEP = "keep"
    SWAP = "swap"
    DROP = "drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduling:
    """The product's settings, or a baseline of this module in place of its policy.

    `prefill_weight` of the settings, where it is 0, is what the device would measure.
    """

    config: ProgramConfig
    baseline: str | None = None
    policy: Policy | None = None  # for sweeps: a variant of the settings' policy
    kv: Kv = Kv.KEEP

    @property
    def name(self) -> str:
        return self.baseline or self.config.policy


def _nothing(call: Call) -> float:
    return 0.0


def _call_work(call: Call) -> float:
    """Clairvoyant: the whole work of the call."""
    request: Request = call.handle
    return request.own_steps


def _program_left(call: Call) -> float:
    """Clairvoyant: the work that the program has still to receive."""
    request: Request = call.handle
    return max(0.0, request.program.total_steps - call.program.service)


BASELINES: Final[dict[str, Policy]] = {
    "program-fcfs": Policy(_nothing, program_turn),
    "sjf": Policy(_call_work, call_turn),
    "srpt": Policy(_program_left, program_turn, is_shared=True),
    **dict.fromkeys(ORDERS, Policy(_nothing, call_turn)),
}
ONE_LEVEL: Final = Levels(1, 1.0, 2.0)
FINE_LEVELS: Final = Levels(240, 1.0, 1.06)  # 1 to a million steps, 6 % apart


class _Table(ProgramTable):
    """The server's table, which also says when it will promote next."""

    @property
    def next_promotion_at(self) -> float:
        """No program is promoted before the virtual clock reads this."""
        return self._stalls[0][0] if self._stalls else math.inf


class _ClairvoyantTable(_Table):
    """A table whose programs move up as they near their end, with all their calls."""

    def charge(self, call: Call, steps: float) -> None:
        super().charge(call, steps)
        for sibling in (*call.program.running, *call.program.waiting):
            self._place(sibling)


def _table(scheduling: Scheduling) -> _Table:
    config = scheduling.config
    if scheduling.baseline is not None:
        policy = BASELINES[scheduling.baseline]
        levels = ONE_LEVEL if policy.attained is _nothing else FINE_LEVELS
        kind = _ClairvoyantTable if policy.attained is _program_left else _Table
        return kind(policy, levels, 0.0, config.ttl)
    policy = scheduling.policy or POLICIES[config.policy]
    levels = Levels(config.levels, config.quantum, config.factor)
    return _Table(policy, ONE_LEVEL if config.policy == "fcfs" else levels, config.beta, config.ttl)


# --- programs as the simulator wants them -------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Blueprint:
    """A trace program with its references resolved to positions; made once, run many times."""

    trace: TraceProgram
    num_waits: tuple[int, ...]
    followers: tuple[tuple[int, ...], ...]
    bases: tuple[int | None, ...]  # the call whose prompt and output begin this call's prompt
    leaders: tuple[int, ...]  # the call that defines this call's prompt
    fresh_tokens: tuple[int, ...]  # prompt tokens that no other call brings into the cache
    ladder: Ladder  # its kinds, as the server sees them

    def steps(self, index: int, prefill_weight: float) -> float:
        """The work of a call that finds all it can in the cache."""
        return self.trace.calls[index].output_tokens + prefill_weight * self.fresh_tokens[index]

    def total_steps(self, prefill_weight: float) -> float:
        return sum(self.steps(i, prefill_weight) for i in range(len(self.leaders)))


class Kinds(Enum):
    """What a server sees of a program's kind: its first prompt, also an agent name, or nothing."""

    PROMPT = "prompt"
    NAME = "name"
    NONE = "none"


def ladder(trace: TraceProgram, kinds: Kinds) -> Ladder:
    """The kinds of a program as `core.sizes.ladder_of` would name them, from lengths alone.

    The name that a header would carry is that of the corpus. Without it, programs that a replay
    starts with the same tokens are known by what the trace says they share; a beginning that no
    other program has tells nothing.
    """
    if kinds is Kinds.NONE:
        return ()
    first = trace.calls[0]
    rungs = [("",), ("", "prompt", str(first.prompt_tokens.bit_length()))]
    if kinds is Kinds.NAME:
        rungs.append(("", "agent", trace.corpus))
    elif first.shared_prefix_tokens >= LEADING_TOKENS:
        rungs.append(("", "leading", trace.corpus, trace.prefix_group or "", first.op or ""))
    return tuple(rungs)


def blueprint(trace: TraceProgram, kinds: Kinds = Kinds.PROMPT) -> Blueprint:
    index = {call.id: i for i, call in enumerate(trace.calls)}
    waits = [trace.waits_for(call) for call in trace.calls]
    followers: list[list[int]] = [[] for _ in trace.calls]
    for i, parents in enumerate(waits):
        for parent in parents:
            followers[index[parent]].append(i)
    leaders = [trace.prompt_leader(call) for call in trace.calls]
    bases = [trace.base(leader) for leader in leaders]
    return Blueprint(
        trace,
        tuple(len(parents) for parents in waits),
        tuple(map(tuple, followers)),
        tuple(None if base is None else index[base.id] for base in bases),
        tuple(index[leader.id] for leader in leaders),
        tuple(_fresh_tokens(trace, i) for i in range(len(waits))),
        ladder(trace, kinds),
    )


def _fresh_tokens(trace: TraceProgram, index: int) -> int:
    call = trace.calls[index]
    if trace.prompt_leader(call) is not call:
        return 1
    known = call.shared_prefix_tokens if trace.base(call) is None else call.reused_tokens
    return max(1, call.prompt_tokens - known)


# --- what runs ----------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class SimProgram:
    """One program under way."""

    number: int
    plan: Blueprint
    arrival_s: float
    total_steps: float
    num_waits: list[int]
    prompt_leaves: dict[int, Node] = field(default_factory=dict)
    full_leaves: dict[int, Node] = field(default_factory=dict)
    decoding: dict[Request, None] = field(default_factory=dict)  # an ordered set
    records: dict[int, CallRecord] = field(default_factory=dict)
    event_at: float = math.inf  # decode step at which it has to be looked at
    sent_s: dict[int, float] = field(default_factory=dict)  # calls not at the engine at once
    served: tuple[float, float] = (0.0, 0.0)  # decayed service in tokens, and when (`las`)


@dataclass(slots=True, eq=False)
class Request:
    """The engine's side of a call, its `handle`. Its tokens up to `leaf` may be in the cache."""

    program: SimProgram
    index: int
    leaf: Node
    num_prompt: int
    num_output: int
    own_steps: float
    issue_s: float
    waiting_from_s: float
    call: Call = field(init=False)
    locked: Node = field(init=False)  # what it stands on in the cache while it runs
    num_generated: int = 0
    num_missing: int = 0  # tokens to prefill before it decodes
    num_computed: int = 0  # longest prefix whose computation was charged
    num_on_host: int = 0
    num_cached: int = 0  # found in the cache at its first admission
    settled_at: int = 0  # decode step up to which it was charged
    queue_s: float = 0.0
    num_prefilled_before: int = 0  # tokens that the engine had prefilled when it came
    first_token_s: float | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + self.num_generated

    @property
    def num_left(self) -> int:
        return self.num_output - self.num_generated

    def record(self, finish_s: float) -> CallRecord:
        call = self.call
        return CallRecord(
            call_id=self.program.plan.trace.calls[self.index].id,
            outcome=Outcome.OK,
            issue_s=self.issue_s,
            first_token_s=self.first_token_s,
            finish_s=finish_s,
            num_output=self.num_output,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.num_cached,
            queue_s=self.queue_s,
            server=ServerProgramInfo(
                call.queue_steps, call.service, call.level, call.num_preemptions,
                call.num_promotions,
            ),
        )  # fmt: skip


class SimEngine:
    """Runs programs on a `Device`; satisfies `core.planner.EngineView`. Good for one `run`."""

    def __init__(
        self,
        device: Device,
        scheduling: Scheduling,
        *,
        num_slots: int,
        chunk_tokens: int = 8192,
        gap_scale: float = 1.0,
    ) -> None:
        config = scheduling.config
        self.device = device
        self.table = _table(scheduling)
        # Shortest job first does not preempt.
        min_run = math.inf if scheduling.baseline == "sjf" else config.min_run
        self.planner = Planner(self.table, min_run, config.schedule_interval)
        self.cache = PrefixCache()
        self.now_s = 0.0
        self.weight = config.prefill_weight or device.prefill_weight
        self.num_prefilled = 0
        self.num_recomputed = 0
        self.kv_loss = LossShare()
        self.num_copied = 0
        self._scheduling = scheduling
        self._order = ORDERS.get(scheduling.name)
        is_stock = scheduling.name == "fcfs" or scheduling.baseline not in (None, "srpt")
        self._prefix_wait = 0 if is_stock else config.prefix_wait
        self._is_clairvoyant = scheduling.baseline is not None
        self._num_slots = num_slots
        self._chunk_tokens = chunk_tokens
        self._gap_scale = gap_scale
        self._decoding: dict[Request, None] = {}
        self._prefilling: dict[Request, None] = {}
        self._num_private = 0  # KV tokens of running calls outside the cache
        self._num_reserved = 0  # KV tokens that running calls will still need
        self._context = 0  # KV tokens that the next decode step reads
        self._num_decodes = 0  # decode steps so far
        self._may_leave_at = math.inf  # decode step at which a worse call has run `min_run`
        self._considered_at = -math.inf  # the clock when the planner last asked for victims
        self._copy_s = 0.0  # copies to or from the host that the next batch waits for
        self._shared: dict[tuple[str, str | None, str | None, int], Node] = {}
        self._events: list[tuple[float, int, SimProgram]] = []  # heap by decode step
        self._agenda: list[tuple[float, int, SimProgram, int]] = []  # heap by time: calls to issue
        self._sent_until_s = 0.0  # when the last call that was sent reaches the engine
        self._counter = itertools.count()

    def run(self, plans: Sequence[Blueprint], arrivals_s: Sequence[float]) -> Run:
        """Simulate until every call is done."""
        programs = [
            self._admit_program(i, plan, at)
            for i, (plan, at) in enumerate(zip(plans, arrivals_s, strict=True))
        ]
        while self._agenda or self.table.num_live_calls:
            self.step()
        return Run(self._scheduling.name, tuple(map(_program_record, programs)), "simulated")

    def step(self) -> None:
        """One scheduler pass and its batch, or the decode steps up to the next event."""
        if not self.table.num_live_calls:
            self.now_s = max(self.now_s, self._agenda[0][0])
        self._issue_due()
        plan = self.planner.plan(self)
        victims: list[Request] = [call.handle for call in plan.preempt]
        for request in victims:
            self._take_off(request)
        self._admit()
        for request in victims:
            request.waiting_from_s = self.now_s
            self.table.preempt(request.call)
        self.now_s += self._copy_s
        self._copy_s = 0.0
        if self._prefilling:
            self._prefill()
        elif self._decoding:
            self._decode(self._leap())

    # -- programs and calls ----------------------------------------------------------------------

    def _admit_program(self, number: int, plan: Blueprint, arrival_s: float) -> SimProgram:
        total = plan.total_steps(self.weight) if self._is_clairvoyant else 0.0
        program = SimProgram(number, plan, arrival_s, total, list(plan.num_waits))
        for index, num_waits in enumerate(plan.num_waits):
            if num_waits == 0:
                self._plan_issue(program, index, arrival_s)
        return program

    def _plan_issue(self, program: SimProgram, index: int, after_s: float) -> None:
        gap_s = program.plan.trace.calls[index].gap_s or 0.0
        at_s = after_s + max(0.0, gap_s) * self._gap_scale
        heapq.heappush(self._agenda, (at_s, next(self._counter), program, index))

    def _issue_due(self) -> None:
        while self._agenda and self._agenda[0][0] <= self.now_s:
            at_s, _, program, index = heapq.heappop(self._agenda)
            if self.device.call_s and index not in program.sent_s:
                self._send(program, index, at_s)
            else:
                self._issue(program, index, at_s)

    def _send(self, program: SimProgram, index: int, at_s: float) -> None:
        """A client sends a call: it reaches the engine after those sent before it."""
        program.sent_s[index] = at_s
        self._sent_until_s = max(self._sent_until_s, at_s) + self.device.call_s
        entry = (self._sent_until_s, next(self._counter), program, index)
        heapq.heappush(self._agenda, entry)

    def _issue(self, program: SimProgram, index: int, at_s: float) -> None:
        self._settle(program)  # the new call is placed by what its siblings have received so far
        trace_call = program.plan.trace.calls[index]
        leaf = self._prompt_leaf(program, program.plan.leaders[index])
        own_steps = program.plan.steps(index, self.weight) if self._is_clairvoyant else 0.0
        issue_s = program.sent_s.get(index, at_s)
        request = Request(
            program, index, leaf, leaf.end, max(1, trace_call.output_tokens), own_steps, issue_s,
            at_s,
        )  # fmt: skip
        if leaf.end + request.num_output > self.device.kv_tokens:
            raise ValueError(
                f"call {trace_call.id} of program {program.plan.trace.id} needs"
                f" {leaf.end + request.num_output} KV tokens; there are {self.device.kv_tokens}"
            )
        request.num_prefilled_before = self.num_prefilled
        request.call = self.table.open_call(
            f"{program.number}/{index}",
            program_id=str(program.number),
            call_id=trace_call.id,
            thread_id=trace_call.thread,
            parent_call_ids=trace_call.parents,
            kinds=program.plan.ladder,
            handle=request,
        )

    def _prompt_leaf(self, program: SimProgram, index: int) -> Node:
        """The cache node at which the prompt of a call ends, made if need be."""
        leaf = program.prompt_leaves.get(index)
        if leaf is None:
            num_prompt = max(1, program.plan.trace.calls[index].prompt_tokens)
            start = self._prompt_start(program, index)
            leaf = Node(start, num_prompt) if num_prompt > start.end else cut(start, num_prompt)
            program.prompt_leaves[index] = leaf
        return leaf

    def _prompt_start(self, program: SimProgram, index: int) -> Node:
        """The cache node up to which other calls have the same tokens."""
        trace = program.plan.trace
        call = trace.calls[index]
        base = program.plan.bases[index]
        if base is not None:
            return cut(program.full_leaves[base], call.reused_tokens)
        num_shared = min(call.shared_prefix_tokens, call.prompt_tokens)
        if num_shared == 0:
            return self.cache.root
        key = (trace.corpus, trace.prefix_group, call.op, num_shared)
        if key not in self._shared:
            self._shared[key] = Node(self.cache.root, num_shared)
        return self._shared[key]

    def _finish(self, request: Request) -> None:
        program, index = request.program, request.index
        served, at_s = program.served
        program.served = (decayed(served, self.now_s - at_s) + served_tokens(request), self.now_s)
        self._release(request)
        program.full_leaves[index] = self._keep(request)
        self.table.finish(request.call)
        program.records[index] = request.record(self.now_s)
        for follower in program.plan.followers[index]:
            program.num_waits[follower] -= 1
            if program.num_waits[follower] == 0:
                self._plan_issue(program, follower, self.now_s)
        if len(program.records) == len(program.num_waits):
            self.table.end_program("", str(program.number))

    # -- what the planner asks -------------------------------------------------------------------

    @property
    def free_slots(self) -> int:
        return self._num_slots - len(self._decoding) - len(self._prefilling)

    @property
    def free_kv_tokens(self) -> int:
        held = self.cache.num_tokens - self.cache.num_evictable + self._num_private
        return self.device.kv_tokens - held - self._num_reserved

    @property
    def prefill_tokens(self) -> int:
        return 0 if self._prefilling else self._chunk_tokens  # a chunk takes the whole pass

    def preemptible(self) -> Sequence[Call]:
        best = self.table.queue.first()
        assert best is not None
        self._considered_at = self.table.clock
        self._may_leave_at = math.inf
        num_running = len(self._decoding)
        waits = (self.planner.patience(call, num_running) for call in self.table.queue)
        to_wait = min((steps for steps in waits if steps > 0), default=math.inf)
        least = self.planner.least_run(self, best, num_running)
        for request in self._decoding:
            call = request.call
            if call.level > best.level or self._is_clairvoyant:
                self._settle(request.program)
                missing = least(call) - (call.service - call.started_service)
                missing = missing if missing > 0 else to_wait
                self._may_leave_at = min(self._may_leave_at, self._num_decodes + missing)
        return [request.call for request in self._decoding]

    def demand(self, call: Call, ahead: Sequence[Call]) -> Demand:
        request: Request = call.handle
        under_way = self._under_way()
        locked = [self.cache.match(other.handle.leaf) for other in ahead]
        for other, node in zip(ahead, locked, strict=True):
            under_way |= self._new_nodes(other.handle)
            self.cache.lock(node)
        demand = self._demand(request, self._num_awaited(request, under_way))
        for node in locked:
            self.cache.unlock(node)
        return demand

    def _demand(self, request: Request, num_awaited: int) -> Demand:
        """What a call takes if others bring so many more of its tokens into the cache."""
        node = self.cache.match(request.leaf)
        num_new = request.num_tokens - node.end - num_awaited
        num_kv = num_new + self.cache.num_unlocked(node) + request.num_left
        return Demand(num_kv, max(1, num_new - request.num_on_host))

    def holding(self, call: Call) -> int:
        request: Request = call.handle
        self._settle(request.program)
        num_alone = self.cache.num_held_alone(request.locked)
        return num_alone + request.num_tokens - request.locked.end + request.num_left

    def resume_steps(self, call: Call) -> float:
        request: Request = call.handle
        return self.kv_loss.value * request.num_tokens * self.weight

    # -- on and off the batch --------------------------------------------------------------------

    def _admit(self) -> None:
        """Start waiting calls in order, up to the first that does not fit.

        Those that wait for a prefix keep their place: others get what they leave.
        """
        num_prefill = self._chunk_tokens - sum(r.num_missing for r in self._prefilling)
        under_way = self._under_way()
        num_held = num_held_kv = 0
        for call in self._next_up():
            if self.free_slots <= num_held or num_prefill <= 0:
                return
            request: Request = call.handle
            num_awaited = self._num_awaited(request, under_way)
            num_kv = self._demand(request, num_awaited).kv_tokens
            if num_awaited:
                num_held += 1
                num_held_kv += num_kv
                continue
            if num_kv > self.free_kv_tokens - num_held_kv:
                return
            self._start(request)
            num_prefill -= request.num_missing
            under_way |= self._new_nodes(request)

    def _under_way(self) -> set[Node]:
        """What is being computed, where calls wait for that."""
        return set().union(*map(self._new_nodes, self._prefilling))

    def _new_nodes(self, request: Request) -> set[Node]:
        """What a call that is prefilled brings into the cache; nothing where nobody waits."""
        return set(_missing(request.leaf)) if self._prefix_wait else set()

    def _num_awaited(self, request: Request, under_way: set[Node]) -> int:
        """Tokens that the call had better wait for, because they are being computed; or 0."""
        if not under_way or request.num_on_host:
            return 0
        for node in _missing(request.leaf):
            if node in under_way:
                end = min(node.end, request.num_tokens - 1)  # the last one is computed in any case
                num_tokens = end - self.cache.match(node).end
                return num_tokens if num_tokens >= self._prefix_wait else 0
        return 0

    def _next_up(self) -> Iterator[Call]:
        """Waiting calls in order, those that do not start passed over."""
        queue = self.table.queue
        if self._order is not None and len(queue):
            yield from self._order(self, tuple(queue))
            return
        num_passed = 0
        while num_passed < len(queue):
            num_waiting = len(queue)
            yield queue[num_passed]
            num_passed += len(queue) == num_waiting

    def _start(self, request: Request) -> None:
        node = self.cache.match(request.leaf)
        num_new = request.num_tokens - node.end
        num_copied = min(request.num_on_host, num_new)
        request.num_missing = max(1, num_new - num_copied)
        request.num_on_host = 0
        if request.call.num_preemptions:
            self.kv_loss.note(request.num_missing - 1, request.num_tokens)
        self._copy(num_copied)
        self.cache.lock(node)
        request.locked = node
        if request.num_computed == 0:
            request.num_cached = min(node.end, request.num_prompt - 1)
        self._num_private += num_new
        self._num_reserved += request.num_left
        self._prefilling[request] = None
        self._make_room()
        request.queue_s += self.now_s - request.waiting_from_s
        self.table.start(request.call)

    def _take_off(self, request: Request) -> None:
        """Preempt: off the batch, with its KV where the settings say."""
        self._settle(request.program)
        self._release(request)
        locked = request.locked
        if self._scheduling.kv is Kv.KEEP:
            request.leaf = self._keep(request)
            return
        num_alone = self.cache.num_held_alone(locked) + request.num_tokens - locked.end
        self.cache.unlock(locked)
        self.cache.drop_branch(locked)
        if self._scheduling.kv is Kv.SWAP:
            request.num_on_host = num_alone
            self._copy(num_alone)

    def _release(self, request: Request) -> None:
        """Give back all that a decoding call holds, but for its lock on the cache."""
        del self._decoding[request]
        del request.program.decoding[request]
        self._plan_event(request.program)
        self._context -= request.num_tokens
        self._num_private -= request.num_tokens - request.locked.end
        self._num_reserved -= request.num_left

    def _keep(self, request: Request) -> Node:
        """Leave the call's tokens in the cache, unlocked; returns where they end."""
        leaf = request.leaf
        if request.num_tokens > leaf.end:
            leaf = Node(leaf, request.num_tokens)
        self.cache.insert(leaf)
        self.cache.unlock(request.locked)
        return leaf

    def _copy(self, num_tokens: int) -> None:
        self.num_copied += num_tokens
        self._copy_s += num_tokens * self.device.copy_token_s

    def _make_room(self) -> None:
        excess = self.cache.num_tokens + self._num_private - self.device.kv_tokens
        if excess > 0:
            self.cache.evict(excess)

    # -- prefill ---------------------------------------------------------------------------------

    def _prefill(self) -> None:
        budget = self._chunk_tokens
        num_tokens, num_pairs, num_cached_pairs = 0, 0.0, 0.0
        for request in self._prefilling:
            num_now = min(budget - num_tokens, request.num_missing)
            num_before = request.num_tokens - request.num_missing
            num_tokens += num_now
            num_pairs += attention_pairs(num_before, num_now)
            num_cached_pairs += attention_pairs(0, num_before)
            request.num_missing -= num_now
            self._charge_prefill(request, num_before, num_now)
        self.num_prefilled += num_tokens
        self.now_s += self.device.prefill_time_s(num_tokens, num_pairs, num_cached_pairs)
        ready = [request for request in self._prefilling if request.num_missing == 0]
        for request in ready:
            self._begin_decoding(request)
        self.table.advance(num_tokens * self.weight)

    def _charge_prefill(self, request: Request, num_before: int, num_now: int) -> None:
        """As the server does: what is computed again after a preemption is not charged."""
        end = num_before + num_now
        num_again = max(0, min(end, request.num_computed) - num_before)
        self.num_recomputed += num_again
        request.num_computed = max(end, request.num_computed)
        if num_now > num_again:
            self._settle(request.program)
            self.table.charge(request.call, (num_now - num_again) * self.weight)
            self._plan_event(request.program)

    def _begin_decoding(self, request: Request) -> None:
        """The prompt is done: it goes into the cache, and the call has its next token."""
        del self._prefilling[request]
        old = request.locked
        self.cache.insert(request.leaf)
        self.cache.lock(request.leaf)
        self.cache.unlock(old)
        self._num_private -= request.leaf.end - old.end
        request.locked = request.leaf
        self._decoding[request] = None
        request.settled_at = self._num_decodes
        self._context += request.num_tokens + 1
        self._num_private += 1
        self._num_reserved -= 1
        if request.first_token_s is None:
            request.first_token_s = self.now_s
        self._settle(request.program)
        request.program.decoding[request] = None
        self._generate(request, 1)
        if request.num_left == 0:
            self._finish(request)
        else:
            self._plan_event(request.program)

    # -- decode ----------------------------------------------------------------------------------

    def _leap(self) -> int:
        """How many decode steps to take before anything else can happen."""
        until = self._next_event_at() - self._num_decodes
        if len(self.table.queue):
            until = min(until, self._steps_until_reconsidered())
        promotion = self.table.next_promotion_at - self.table.clock
        if promotion < until:
            until = float(math.ceil(promotion - 1e-9))
        if self._agenda:
            wait_s = self._agenda[0][0] - self.now_s
            device = self.device
            arrival = device.decode_steps_until(len(self._decoding), self._context, wait_s)
            until = min(until, float(arrival))
        return int(max(1, until))

    def _steps_until_reconsidered(self) -> float:
        """Decode steps until the planner may see victims that it does not see in this pass."""
        if self._considered_at != self.table.clock:
            # It waits for its interval to pass or, if that has passed, for an event.
            interval = self._scheduling.config.schedule_interval
            wait = self._considered_at + interval - self.table.clock
            return math.ceil(wait) if wait > 0 else math.inf
        if self._num_decodes < self._may_leave_at < math.inf:
            return math.ceil(self._may_leave_at - self._num_decodes - 1e-9)
        return math.inf

    def _next_event_at(self) -> float:
        while self._events[0][0] != self._events[0][2].event_at:
            heapq.heappop(self._events)
        return self._events[0][0]

    def _decode(self, num_steps: int) -> None:
        batch = len(self._decoding)
        self.now_s += self.device.decode_time_s(batch, self._context, num_steps)
        self._num_decodes += num_steps
        self._context += batch * num_steps
        self._num_private += batch * num_steps
        self._num_reserved -= batch * num_steps
        self._make_room()
        self.table.advance(num_steps - 1.0)
        while self._events and self._events[0][0] <= self._num_decodes:
            at, _, program = heapq.heappop(self._events)
            if at == program.event_at:
                self._attend(program)
        self.table.advance(1.0)

    def _attend(self, program: SimProgram) -> None:
        """Charge a program at whose event we are, and end those of its calls that are done."""
        self._settle(program)
        for request in [r for r in program.decoding if r.num_left == 0]:
            self._finish(request)
        self._plan_event(program)

    def _settle(self, program: SimProgram) -> None:
        """Charge the decode steps that a program's calls have run since the last time."""
        for request in program.decoding:
            num_steps = self._num_decodes - request.settled_at
            if num_steps:
                request.settled_at = self._num_decodes
                self._generate(request, num_steps)

    def _generate(self, request: Request, num_steps: int) -> None:
        request.num_generated += num_steps
        request.num_computed = request.num_tokens
        self.table.charge(request.call, float(num_steps))

    def _plan_event(self, program: SimProgram) -> None:
        """File the decode step at which a call of the program ends or leaves its level."""
        if not program.decoding:
            program.event_at = math.inf
            return
        at = float(min(r.settled_at + r.num_left for r in program.decoding))
        if not self._is_clairvoyant:
            at = min(at, self._num_decodes + self._steps_in_level(program))
        if at != program.event_at:
            program.event_at = at
            heapq.heappush(self._events, (at, next(self._counter), program))

    def _steps_in_level(self, program: SimProgram) -> float:
        """Decode steps until a running call of a settled program leaves its level; at least 1.

        Of a learned policy: until the program's rank may change.
        """
        levels, policy = self.table.levels, self.table.policy
        rate = len(program.decoding) if policy.is_shared else 1
        least = math.inf
        for request in program.decoding:
            call = request.call
            if call.promoted_until is not None:
                least = min(least, call.promoted_until - call.service)
            if policy.is_learned:
                least = min(least, (_edge(call.program) - call.program.service) / rate)
                continue
            attained = policy.attained(call)
            level = levels.level_of(attained)
            if level < len(levels.bounds):
                least = min(least, (levels.bounds[level] - attained) / rate)
            if policy.is_shared and not call.is_promoted:
                break  # its siblings attain with it
        return max(1.0, float(math.ceil(least - 1e-9))) if least < math.inf else math.inf

    # -- integrity -------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        self.table.check_integrity()
        running = [*self._decoding, *self._prefilling]
        for program in {request.program.number: request.program for request in running}.values():
            self._settle(program)
        private = sum(r.num_tokens - r.locked.end for r in running)
        assert private == self._num_private, "private KV is miscounted"
        assert sum(r.num_left for r in running) == self._num_reserved
        assert sum(r.num_tokens for r in self._decoding) == self._context
        assert self.cache.num_tokens + private <= self.device.kv_tokens
        assert self.free_kv_tokens >= 0
        assert len(running) <= self._num_slots
        assert len(running) + len(self.table.queue) == self.table.num_live_calls


def _missing(leaf: Node) -> Iterator[Node]:
    """The nodes on the way to `leaf` that are not in the cache, from the leaf on."""
    return itertools.takewhile(lambda node: not node.is_resident, upwards(leaf))


def _edge(program: Program) -> float:
    assert program.size is not None
    return program.size.edge


def _program_record(program: SimProgram) -> ProgramRecord:
    return ProgramRecord(
        program_id=program.plan.trace.id,
        kind=program.plan.trace.kind,
        arrival_s=program.arrival_s,
        start_s=program.arrival_s,
        calls=tuple(program.records[i] for i in range(len(program.num_waits))),
    )
