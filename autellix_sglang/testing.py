"""A fake engine for tests: SGLang's scheduler loop over the real table and planner, no model.

    engine = FakeEngine(ProgramConfig(policy="plas"), num_slots=2)
    engine.submit(Job(rid="a", num_prompt=10, num_output=4, program_id="p"))
    engine.run()

It has what scheduling depends on (batch slots, a KV pool, a prefill budget with chunks, retraction
when the pool is full) and nothing else: no clock, no randomness, no threads. How KV moves:

                    admitted                    preempted
    (none) ---------------------> held by a call ---------> kept, evictable ---> evicted
                                       |     ^                     |
      ended or retracted: dropped <----+     +---- admitted again -+
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.planner import Demand, Planner, standing
from autellix_sglang.core.policy import POLICIES, Levels
from autellix_sglang.core.program import Call, Phase, ProgramTable

PLENTY = 1_000_000_000


def table_from(config: ProgramConfig) -> ProgramTable:
    """An empty process table with these settings."""
    levels = Levels(config.levels, config.quantum, config.factor)
    return ProgramTable(POLICIES[config.policy], levels, config.beta, config.ttl)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A call as its client plans it: sent once all of its `parents` (rids) are over."""

    rid: str
    num_output: int
    num_prompt: int = 0
    program_id: str | None = None
    parents: tuple[str, ...] = ()
    ends_program: bool = False


@dataclass(slots=True, eq=False)
class Request:
    """The engine's side of a call, its `handle`."""

    job: Job
    call: Call = field(init=False)
    num_generated: int = 0
    num_missing: int = 0  # tokens to prefill before it decodes; means nothing while it waits
    num_charged: int = 0  # longest prefix whose computation was charged
    is_done: bool = False  # ended with all its tokens

    @property
    def num_tokens(self) -> int:
        return self.job.num_prompt + self.num_generated


class FakeEngine:
    """Runs jobs step by step; satisfies `core.planner.EngineView`.

    One `step` is one scheduler pass, then one batch: missing tokens are prefilled within
    `prefill_budget`, and every running call that misses none generates a token.
    """

    def __init__(
        self,
        config: ProgramConfig,
        *,
        num_slots: int,
        num_kv_tokens: int = PLENTY,
        prefill_budget: int = PLENTY,
    ) -> None:
        self.table = table_from(config)
        self.planner = Planner(self.table, config.min_run, config.schedule_interval)
        self.waiting: list[Request] = []
        self.running: dict[Request, None] = {}
        self.ended: dict[str, Request] = {}  # by rid
        self.num_retractions = 0
        self.num_evictions = 0
        self._weight = config.prefill_weight
        self._num_slots = num_slots
        self._num_kv_tokens = num_kv_tokens
        self._prefill_budget = prefill_budget
        self._num_held = 0  # KV tokens of running calls
        self._kept: dict[Request, int] = {}  # KV tokens of preempted calls, longest kept first
        self._later: dict[str, list[Job]] = {}  # by one parent that is not over yet

    # -- what clients do -------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Send a call now, or as soon as its parents are over."""
        if not 0 < job.num_output <= self._num_kv_tokens - job.num_prompt:
            raise ValueError(f"job {job.rid} cannot fit {self._num_kv_tokens} KV tokens")
        for parent in job.parents:
            if parent not in self.ended:
                self._later.setdefault(parent, []).append(job)
                return
        self._arrive(job)

    def abort(self, rid: str) -> None:
        """Stop a call where it is; one that is not live is left alone."""
        call = self.table.live_call(rid)
        if call is not None:
            self._end(call.handle)

    def disconnect(self, program_id: str) -> None:
        """The program's client is gone: its calls stop, and the planned ones are never sent."""
        for jobs in self._later.values():
            jobs[:] = [job for job in jobs if job.program_id != program_id]
        for call in self.table.live_calls():
            if call.program.program_id == program_id:
                self._end(call.handle)

    def _arrive(self, job: Job) -> None:
        assert job.rid not in self.ended, f"job {job.rid} was over already"
        request = Request(job)
        request.call = self.table.open_call(
            job.rid,
            program_id=job.program_id,
            parent_call_ids=job.parents,
            ends_program=job.ends_program,
            handle=request,
        )
        self.waiting.append(request)

    # -- what the planner asks -------------------------------------------------------------------

    @property
    def free_slots(self) -> int:
        return self._num_slots - len(self.running)

    @property
    def free_kv_tokens(self) -> int:
        return self._num_kv_tokens - self._num_held

    @property
    def prefill_tokens(self) -> int:
        return max(0, self._prefill_budget - sum(r.num_missing for r in self.running))

    def preemptible(self) -> Sequence[Call]:
        return [request.call for request in self.running if not request.num_missing]

    def demand(self, call: Call, ahead: Sequence[Call]) -> Demand:
        request: Request = call.handle
        num_uncached = request.num_tokens - self._kept.get(request, 0)
        return Demand(request.num_tokens + 1, num_uncached)

    def holding(self, call: Call) -> int:
        request: Request = call.handle
        return request.num_tokens

    def resume_steps(self, call: Call) -> float:
        return 0.0  # all KV is kept

    # -- one step --------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running)

    def run(self, max_steps: int = 100_000) -> None:
        """Step until no call is live; `RuntimeError` after `max_steps`."""
        num_steps = 0
        while not self.is_idle:
            if num_steps == max_steps:
                raise RuntimeError(
                    f"{self.table.num_live_calls} calls live after {num_steps} steps"
                )
            self.step()
            num_steps += 1

    def step(self) -> None:
        plan = self.planner.plan(self)
        if plan.order is not None:
            self.waiting[:] = [call.handle for call in plan.order]
        assert [r.call for r in self.waiting] == list(self.table.queue), "a stale order stands"
        victims: list[Request] = [call.handle for call in plan.preempt]
        for request in victims:
            self._take_off(request)
            self._kept[request] = request.num_tokens
        self._admit()
        for request in victims:
            self._requeue(request)
        self._execute()

    def _admit(self) -> None:
        """Start waiting calls in order, up to the first that does not fit."""
        num_prefill = self.prefill_tokens
        while self.waiting and self.free_slots > 0 and num_prefill > 0:
            request = self.waiting[0]
            if self.demand(request.call, ()).kv_tokens > self.free_kv_tokens:
                return
            del self.waiting[0]
            request.num_missing = request.num_tokens - self._kept.pop(request, 0)
            num_prefill -= request.num_missing
            self.running[request] = None
            self._num_held += request.num_tokens
            self._evict()
            self.table.start(request.call)

    def _execute(self) -> None:
        prefill_steps = self._prefill()
        decoding = self._make_room()
        for request in decoding:
            request.num_generated += 1
            request.num_charged = request.num_tokens
            self.table.charge(request.call, 1.0)
        self._num_held += len(decoding)
        self._evict()
        self.table.advance(prefill_steps + (1.0 if decoding else 0.0))
        for request in decoding:
            if request.num_generated == request.job.num_output:
                request.is_done = True
                self._end(request)

    def _prefill(self) -> float:
        """Compute missing tokens; those computed before a preemption are not charged again."""
        budget = self._prefill_budget
        for request in self.running:
            num_now = min(request.num_missing, budget)
            budget -= num_now
            request.num_missing -= num_now
            end = request.num_tokens - request.num_missing
            if end > request.num_charged:
                self.table.charge(request.call, (end - request.num_charged) * self._weight)
                request.num_charged = end
        return (self._prefill_budget - budget) * self._weight

    def _make_room(self) -> list[Request]:
        """The calls that decode now; others are retracted until each has a token of KV."""
        while True:
            decoding = [request for request in self.running if not request.num_missing]
            if len(decoding) <= self.free_kv_tokens:
                return decoding
            victim = max(self.running, key=lambda request: standing(request.call))
            self._take_off(victim)
            self._requeue(victim)
            self.num_retractions += 1

    def _take_off(self, request: Request) -> None:
        del self.running[request]
        self._num_held -= request.num_tokens
        request.num_missing = 0

    def _requeue(self, request: Request) -> None:
        self.waiting.append(request)
        self.table.preempt(request.call)

    def _evict(self) -> None:
        """Drop kept KV, longest kept first, until what is held fits."""
        while self._num_held + sum(self._kept.values()) > self._num_kv_tokens:
            del self._kept[next(iter(self._kept))]
            self.num_evictions += 1

    def _end(self, request: Request) -> None:
        rid = request.job.rid
        assert rid not in self.ended, f"job {rid} ended twice"
        self.ended[rid] = request
        if request in self.running:
            self._take_off(request)
        else:
            self.waiting.remove(request)
            self._kept.pop(request, None)
        self.table.finish(request.call)
        for job in self._later.pop(rid, ()):
            self.submit(job)

    # -- integrity -------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert what must hold between steps, in the table and between table and engine."""
        self.table.check_integrity()
        assert {r.call for r in self.waiting} == set(self.table.queue)
        assert len(self.waiting) + len(self.running) == self.table.num_live_calls
        assert all(r.call.phase is Phase.RUNNING for r in self.running)
        assert self._kept.keys() <= set(self.waiting), "KV is kept for a call that does not wait"
        assert self._num_held == sum(r.num_tokens for r in self.running)
        assert self._num_held + sum(self._kept.values()) <= self._num_kv_tokens
        assert len(self.running) <= self._num_slots
        for request in (*self.waiting, *self.running):
            self.check_service(request)

    def check_service(self, request: Request) -> None:
        """Assert that each token of a call was charged exactly once."""
        num_prefilled = min(request.num_charged, request.job.num_prompt)
        due = num_prefilled * self._weight + request.num_generated
        assert abs(request.call.service - due) < 1e-6, f"{request.call.service} instead of {due}"
