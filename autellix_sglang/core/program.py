"""Programs, their calls, and the table that owns both.

Service and waiting are counted in steps on the engine's virtual clock, which only executed
batches move. No wall clock is read: the one use of seconds, forgetting idle programs, takes `now_s`
from the caller, so that every tensor-parallel rank decides alike and a run can be replayed.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Final

from autellix_sglang.core.policy import Levels, Policy
from autellix_sglang.core.queue import CallQueue, Key
from autellix_sglang.core.sizes import Ladder, Size, Sizes
from autellix_sglang.errors import UnknownProgramError

MAX_CALLS_KEPT: Final = 4096  # finished calls remembered per program, for parents and for GET
MAX_IDLE_PROGRAMS: Final = 65_536  # idle programs remembered; the longest idle go first
RELEARN_EVERY: Final = 16  # programs after which waiting ones are placed by what was learned since

ProgramKey = tuple[str, str]  # tenant, program id


class Phase(Enum):
    """Where a call is; it alternates between the first two until it is finished."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Call:
    """One LLM request of a program. Created and changed by `ProgramTable` only.

    `call_id` is the client's name for it (several samples of one request share it); `rid` is the
    engine's and unique. `handle` is the engine's own object, opaque here, None once finished.
    """

    program: Program = field(repr=False)
    rid: str
    call_id: str
    thread_id: str
    parents: tuple[str, ...]  # ids of the known calls it waited for
    seq: int
    base_path: float  # steps on the longest known chain that led here, fixed on arrival
    ends_program: bool
    handle: Any = field(repr=False)
    is_warm_up: bool = False  # of samples to come, which the program is kept for
    phase: Phase = Phase.WAITING
    level: int = 0
    service: float = 0.0
    queue_steps: float = 0.0
    waiting_since: float = 0.0
    started_service: float = 0.0  # own service when it last started to run
    promoted_until: float | None = None  # own service at which the promotion ends
    num_preemptions: int = 0
    num_promotions: int = 0
    order_key: Key = (0, 0, 0)

    @property
    def is_promoted(self) -> bool:
        return self.promoted_until is not None

    @property
    def path(self) -> float:
        """Steps on the longest known chain that ends with this call."""
        return self.base_path + self.service

    def summary(self) -> dict[str, Any]:
        """What clients are told of a call, in JSON types; services and waits in steps."""
        return {
            "id": self.call_id,
            "rid": self.rid,
            "thread": self.thread_id,
            "parents": list(self.parents),
            "state": self.phase.value,
            "level": self.level,
            "service_steps": round(self.service, 3),
            "queue_steps": round(self.queue_steps, 3),
            "preemptions": self.num_preemptions,
            "promotions": self.num_promotions,
        }


@dataclass(slots=True, eq=False)
class Program:
    """One run of an agent. Created and changed by `ProgramTable` only."""

    key: ProgramKey
    seq: int
    is_anonymous: bool  # made for a single call that named no program
    arrived: float  # clock
    last_active_s: float
    is_ended: bool = False
    awaits_samples: bool = False  # the call that finished last was their warm-up
    service: float = 0.0  # lifetime, all threads, live calls included
    longest_path: float = 0.0  # steps on its longest finished chain
    level: int = 0
    waiting: dict[Call, None] = field(default_factory=dict, repr=False)  # ordered sets
    running: dict[Call, None] = field(default_factory=dict, repr=False)
    finished: dict[Call, None] = field(default_factory=dict, repr=False)
    by_call_id: dict[str, list[Call]] = field(default_factory=dict, repr=False)
    stall_steps: float = 0.0  # with calls waiting and none running; the present stall not included
    stalled_since: float | None = None
    promote_at: float | None = None  # clock at which a call of it is promoted, if still stalled
    num_calls: int = 0
    size: Size | None = field(default=None, repr=False)  # None before its first call
    rank: float = 0.0  # in steps, less is better; kept where the policy is learned

    @property
    def tenant(self) -> str:
        return self.key[0]

    @property
    def program_id(self) -> str:
        return self.key[1]

    @property
    def is_live(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to keep it for."""
        is_last = self.is_ended or self.is_anonymous
        return is_last and not self.is_live and not self.awaits_samples

    @property
    def state(self) -> str:
        """`running`, `waiting` (calls queue, none runs), `idle` or `ended` (calls still finish)."""
        if self.is_ended:
            return "ended"
        return "running" if self.running else "waiting" if self.waiting else "idle"

    def calls(self) -> Iterator[Call]:
        """Remembered calls in order of arrival."""
        return iter(sorted([*self.finished, *self.running, *self.waiting], key=lambda c: c.seq))

    def summary(self) -> dict[str, Any]:
        return {
            "id": self.program_id,
            "tenant": self.tenant,
            "state": self.state,
            "level": self.level,
            "service_steps": round(self.service, 3),
            "longest_path_steps": round(self.longest_path, 3),
            "num_calls": self.num_calls,
            "num_waiting": len(self.waiting),
            "num_running": len(self.running),
        }


@dataclass(slots=True)
class Counters:
    """Totals since start, for operators."""

    num_programs: int = 0
    num_calls: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    num_promotions: int = 0
    num_demotions: int = 0
    num_expired: int = 0


STATES: Final = ("running", "waiting", "idle", "ended")


class ProgramTable:
    """Owns all programs and calls; the engine reports what happens, the planner reads.

    Rules that hold between calls to its methods are in `check_integrity`.
    """

    def __init__(self, policy: Policy, levels: Levels, beta: float, ttl_s: float) -> None:
        self.policy = policy
        self.levels = levels
        self.beta = beta  # 0: never promote
        self.ttl_s = ttl_s
        self.clock = 0.0  # steps
        self.now_s = 0.0  # the latest time any message carried
        self.num_events = 0  # arrivals, starts, finishes, level changes, promotions
        self.counters = Counters()
        self.queue = CallQueue()
        self.sizes = Sizes()
        self._programs: OrderedDict[ProgramKey, Program] = OrderedDict()  # by last activity
        self._calls: dict[str, Call] = {}  # live calls by rid
        self._num_idle = 0
        self._next_seq = 0
        self._stalls: list[tuple[float, int, ProgramKey]] = []  # heap by promotion time

    def configure(self, policy: Policy, levels: Levels, beta: float, ttl_s: float) -> None:
        """Change the rules while serving: every live call gets the level they give it."""
        self.policy, self.levels = policy, levels
        self.beta, self.ttl_s = beta, ttl_s
        self._place_all()
        self._stalls.clear()
        for program in self._programs.values():
            self._watch(program)

    # -- reading ---------------------------------------------------------------------------------

    @property
    def num_programs(self) -> int:
        return len(self._programs)

    @property
    def num_calls_kept(self) -> int:
        """Calls that ended and are remembered, of all programs; takes a look at each program."""
        return sum(len(program.finished) for program in self._programs.values())

    @property
    def num_live_calls(self) -> int:
        return len(self._calls)

    def live_call(self, rid: str) -> Call | None:
        return self._calls.get(rid)

    def live_calls(self) -> list[Call]:
        return list(self._calls.values())

    def program(self, tenant: str, program_id: str) -> Program:
        """Raises `UnknownProgramError`."""
        program = self._programs.get((tenant, program_id))
        if program is None:
            raise UnknownProgramError(program_id)
        return program

    def is_open(self, tenant: str, program_id: str) -> bool:
        """Whether there is such a program and it has not ended."""
        program = self._programs.get((tenant, program_id))
        return program is not None and not program.is_ended

    def programs(self) -> Iterator[Program]:
        """Longest idle first."""
        return iter(self._programs.values())

    # -- programs --------------------------------------------------------------------------------

    def open_program(self, tenant: str, program_id: str, is_anonymous: bool = False) -> Program:
        """The program of this id, made if need be; counts as activity."""
        key = (tenant, program_id)
        program = self._programs.get(key)
        if program is None:
            program = Program(key, self._take_seq(), is_anonymous, self.clock, self.now_s)
            self._programs[key] = program
            self._num_idle += 1
            self.counters.num_programs += 1
            self._forget_excess()
        program.is_anonymous &= is_anonymous  # someone may name it after its call
        self._note_activity(program)
        return program

    def start_program(self, tenant: str, program_id: str) -> Program:
        """Open a program by its client's wish, also again where it was ended with calls live."""
        program = self.open_program(tenant, program_id)
        program.is_ended = False
        return program

    def end_program(self, tenant: str, program_id: str) -> None:
        """Forget a program once its live calls are done; raises `UnknownProgramError`."""
        program = self.program(tenant, program_id)
        program.is_ended = True
        self._forget_if_over(program)

    def expire(self, now_s: float) -> int:
        """Forget programs idle for more than `ttl_s`; returns how many."""
        self.now_s = max(self.now_s, now_s)
        num_before = len(self._programs)
        for program in list(self._idle_since(self.now_s - self.ttl_s)):
            self._remove(program)
        num_expired = num_before - len(self._programs)
        self.counters.num_expired += num_expired
        return num_expired

    def _idle_since(self, limit_s: float) -> Iterator[Program]:
        for program in self._programs.values():
            if program.last_active_s > limit_s:
                return
            if not program.is_live:
                yield program

    def _note_activity(self, program: Program) -> None:
        program.last_active_s = self.now_s
        self._programs.move_to_end(program.key)

    def _forget_if_over(self, program: Program) -> None:
        if program.is_over:
            self._remove(program)

    def _forget_excess(self) -> None:
        if self._num_idle > MAX_IDLE_PROGRAMS:
            # the newest entry is the program at hand: never that one
            idle = (p for p in self._programs.values() if not p.is_live)
            self._remove(next(idle))
            self.counters.num_expired += 1

    def _remove(self, program: Program) -> None:
        del self._programs[program.key]
        self._num_idle -= 1
        if program.size is not None:
            self.sizes.leave(program.size)

    # -- calls -----------------------------------------------------------------------------------

    def open_call(
        self,
        rid: str,
        *,
        tenant: str = "",
        program_id: str | None = None,
        is_anonymous: bool = False,
        call_id: str | None = None,
        thread_id: str = "",
        parent_call_ids: Sequence[str] | None = None,
        ends_program: bool = False,
        kinds: Ladder = (),
        handle: Any = None,
        is_warm_up: bool = False,
    ) -> Call:
        """A new waiting call; without `program_id` it is a program of its own.

        An anonymous program, made for one request, goes with its last live call. A warm-up neither
        ends its program nor lets it go: the samples that it precedes do. Parents that are
        not known are ignored. A call whose client says that it has none begins a chain; where that
        is not told, or none of them is known, it is taken to continue the program's longest.
        `rid` must not be live already.
        """
        assert rid not in self._calls, f"call {rid} is live already"
        program = self.open_program(tenant, program_id or rid, is_anonymous or not program_id)
        told = dict.fromkeys(parent_call_ids or ())
        known = (program.by_call_id[parent] for parent in told if parent in program.by_call_id)
        parents = tuple(calls[0].call_id for calls in known)  # not the message's own strings
        is_root = parent_call_ids is not None and not told
        base = max(
            (call.path for parent in parents for call in program.by_call_id[parent]),
            default=0.0 if is_root else program.longest_path,
        )
        call = Call(
            program, rid, call_id or rid, thread_id, parents, self._take_seq(), base,
            ends_program and not is_warm_up, handle, is_warm_up,
        )  # fmt: skip
        self._num_idle -= not program.is_live
        size = program.size or self._enter_size(program, kinds)
        if not program.is_live:
            self.sizes.resume(size)
        rank_before = program.rank
        num_live = len(program.waiting) + len(program.running) + 1
        if self.sizes.widen(size, num_live, program.service) or not program.is_live:
            self._rank(program)
        if program.rank != rank_before:
            self._place_calls(program)
        self._calls[rid] = call
        program.by_call_id.setdefault(call.call_id, []).append(call)
        program.num_calls += 1
        self.counters.num_calls += 1
        call.level = self.levels.level_of(self.policy.attained(call))  # no demotion, its start
        self._place(call)
        self._wait(call)
        return call

    def start(self, call: Call) -> None:
        """The engine has put the call into a batch."""
        assert call.phase is Phase.WAITING, f"call {call.rid} is {call.phase.value}"
        self._leave_queue(call)
        call.phase = Phase.RUNNING
        call.started_service = call.service
        call.program.running[call] = None
        self.num_events += 1
        self._update_stall(call.program)

    def preempt(self, call: Call) -> None:
        """The engine has taken the call off the batch; it waits again."""
        assert call.phase is Phase.RUNNING, f"call {call.rid} is {call.phase.value}"
        del call.program.running[call]
        call.num_preemptions += 1
        self.counters.num_preemptions += 1
        self._wait(call)

    def finish(self, call: Call) -> None:
        """The call is over, by whatever end. Its program goes too if that is due."""
        assert call.phase is not Phase.FINISHED, f"call {call.rid} is finished already"
        program = call.program
        if call.phase is Phase.WAITING:
            self._leave_queue(call)
        else:
            del program.running[call]
        if call.is_promoted:
            self._end_promotion(call)
        call.phase = Phase.FINISHED
        call.handle = None
        del self._calls[call.rid]
        self._remember(call)
        program.longest_path = max(program.longest_path, call.path)
        program.is_ended |= call.ends_program
        program.awaits_samples = call.is_warm_up
        self.num_events += 1
        self.counters.num_finished += 1
        if not program.is_live:
            self._num_idle += 1
            if program.size is not None and program.service > 0:
                self.sizes.rest(program.size)
        self._note_activity(program)
        self._update_stall(program)
        if program.stalled_since is not None:
            self._watch(program)  # the promotion, if there was one, may have gone with this call
        self._forget_if_over(program)
        self._forget_excess()

    def charge(self, call: Call, steps: float) -> None:
        """Add service to a running call and its program; demotes what crosses a level's end."""
        program = call.program
        level_before, rank_before = program.level, program.rank
        call.service += steps
        program.service += steps
        assert program.size is not None
        if program.service >= program.size.edge:
            self.sizes.attain(program.size, program.service)
            self._rank(program)
        if call.promoted_until is not None and call.service >= call.promoted_until:
            self._end_promotion(call)
        self._place(call)
        if self.policy.is_shared and (program.level, program.rank) != (level_before, rank_before):
            self._place_calls(program)

    def advance(self, steps: float) -> None:
        """Move the virtual clock over one executed batch, then promote who starves."""
        self.clock += steps
        while self._stalls and self._stalls[0][0] <= self.clock:
            entry = heapq.heappop(self._stalls)
            program = self._watched(entry)
            if program is not None:
                program.promote_at = None
                self._promote(min(program.waiting, key=lambda call: call.order_key))

    def _remember(self, call: Call) -> None:
        program = call.program
        program.finished[call] = None
        if len(program.finished) > MAX_CALLS_KEPT:
            oldest = next(iter(program.finished))
            del program.finished[oldest]
            siblings = program.by_call_id[oldest.call_id]
            siblings.remove(oldest)
            if not siblings:
                del program.by_call_id[oldest.call_id]

    def _take_seq(self) -> int:
        self._next_seq += 1
        return self._next_seq

    # -- sizes -----------------------------------------------------------------------------------

    def _enter_size(self, program: Program, kinds: Ladder) -> Size:
        """Count a new program; every so often bring all others up to what was learned since."""
        program.size = size = self.sizes.enter(kinds)
        if self.sizes.all.num_programs % RELEARN_EVERY == 0:
            levels = self.levels.for_mean(self.sizes.all.mean_service())
            if self.policy.is_learned or levels is not self.levels:
                self.levels = levels
                self._place_all()
        return size

    def _rank(self, program: Program) -> None:
        if self.policy.is_learned and program.size is not None:
            program.rank = self.sizes.rank(program.size)

    def _place_all(self) -> None:
        for program in dict.fromkeys(call.program for call in self._calls.values()):
            self._rank(program)
            program.level = 0
            self._place_calls(program)
            if program.promote_at is None:
                self._watch(program)  # its calls may have needed no promotion before, at level 0

    # -- levels and order ------------------------------------------------------------------------

    def _place_calls(self, program: Program) -> None:
        for call in (*program.running, *program.waiting):
            self._place(call)

    def _place(self, call: Call) -> None:
        """Set the call's level and key from its attained service, or from its promotion."""
        level = self.levels.level_of(self.policy.attained(call))
        if self.policy.is_shared:
            call.program.level = level
        else:
            call.program.level = max(call.program.level, level)
        level = 0 if call.is_promoted else level
        if level != call.level:
            self.counters.num_demotions += level > call.level
            self.num_events += 1
            call.level = level
        # Inside level 0 first of all, or an older program with many calls there could starve it.
        key = (-1 if call.is_promoted else level, self.policy.turn(call), call.seq)
        if key != call.order_key:
            call.order_key = key
            self.queue.touch(call)

    def _wait(self, call: Call) -> None:
        call.phase = Phase.WAITING
        call.waiting_since = self.clock
        call.program.waiting[call] = None
        self.queue.push(call)
        self.num_events += 1
        self._update_stall(call.program)

    def _leave_queue(self, call: Call) -> None:
        del call.program.waiting[call]
        self.queue.discard(call)
        call.queue_steps += self.clock - call.waiting_since

    # -- starvation ------------------------------------------------------------------------------

    def _update_stall(self, program: Program) -> None:
        """A program stalls while it has calls waiting and none running."""
        is_stalled = bool(program.waiting) and not program.running
        if is_stalled and program.stalled_since is None:
            program.stalled_since = self.clock
            self._watch(program)
        elif not is_stalled and program.stalled_since is not None:
            program.stall_steps += self.clock - program.stalled_since
            program.stalled_since = program.promote_at = None

    def stall_ratio(self, program: Program) -> float:
        """What a stalled program has waited over its service, one quantum at least; else 0.

        It is promoted at `beta`.
        """
        if program.stalled_since is None:
            return 0.0
        stall = program.stall_steps + self.clock - program.stalled_since
        return stall / max(program.service, self.levels.quantum)

    def _watch(self, program: Program) -> None:
        """File the clock at which a stalled program's waiting reaches beta x its service."""
        if self.beta and self.policy.can_starve and program.stalled_since is not None:
            allowed = self.beta * max(program.service, self.levels.quantum)
            at = program.stalled_since + max(0.0, allowed - program.stall_steps)
            program.promote_at = at
            heapq.heappush(self._stalls, (at, program.seq, program.key))
            if len(self._stalls) > 4 * len(self._programs) + 64:  # most are out of date
                self._stalls = sorted({e for e in self._stalls if self._watched(e)})

    def _watched(self, entry: tuple[float, int, ProgramKey]) -> Program | None:
        """The program of a filed entry, or None where the entry is out of date."""
        program = self._programs.get(entry[2])
        return program if program is not None and program.promote_at == entry[0] else None

    def _promote(self, call: Call) -> None:
        """First in line, for a quantum of the level that the program's service would give it.

        At level 0 too: there it would wait for all calls of older programs, and could not preempt
        what has not run for long.
        Quanta grow with the levels, so a program about doubles its service by one promotion, and
        who is owed much does not come back for many small turns, each of which costs a preemption.
        """
        if not call.is_promoted:
            call.promoted_until = call.service + self.levels.quantum_at(call.program.service)
            call.num_promotions += 1
            self.counters.num_promotions += 1
            self.num_events += 1
            self._place(call)

    def _end_promotion(self, call: Call) -> None:
        call.promoted_until = None
        self._watch(call.program)
        self._place(call)

    # -- integrity -------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert everything that must hold between two calls of this table's methods."""
        queued = set(self.queue)
        assert [c.order_key for c in self.queue] == sorted(c.order_key for c in queued)
        live: set[str] = set()
        num_idle = 0
        for key, program in self._programs.items():
            assert program.key == key
            assert not program.is_over
            num_idle += not program.is_live
            self._check_program(program, queued)
            live.update(call.rid for call in (*program.waiting, *program.running))
        assert live == set(self._calls), "live calls and programs disagree"
        assert len(queued) == sum(c.phase is Phase.WAITING for c in self._calls.values())
        assert num_idle == self._num_idle

    def _check_program(self, program: Program, queued: set[Call]) -> None:
        assert (program.stalled_since is not None) == bool(program.waiting and not program.running)
        if self.beta and program.stalled_since is not None and program.promote_at is None:
            first = min(program.waiting, key=lambda c: c.order_key)
            assert first.is_promoted or not self.policy.can_starve, "starves unwatched"
        assert program.size is None or program.size.edge > program.service
        assert program.size is None or not (program.size.is_ended and program.is_live)
        for call in program.waiting:
            assert call.phase is Phase.WAITING
            assert call in queued
        for call in program.running:
            assert call.phase is Phase.RUNNING
            assert call not in queued
        for call in (*program.waiting, *program.running):
            attained = self.levels.level_of(self.policy.attained(call))
            assert call.level == (0 if call.is_promoted else attained), call.rid
        total = sum(call.service for call in program.calls())
        is_complete = program.num_calls <= MAX_CALLS_KEPT
        assert not is_complete or abs(total - program.service) < 1e-6 * max(1.0, total)

    def totals(self) -> dict[str, Any]:
        """Counters and sizes, in JSON types."""
        sizes = {
            "clock_steps": self.clock,
            "programs": self.num_programs,
            "live_calls": self.num_live_calls,
            "waiting_calls": len(self.queue),
        }
        return {**asdict(self.counters), **sizes}
