"""Where a call runs: placement as a pure function of (call, program, worker loads).

    cost(worker) = queueing delay(worker)
                   + 2 * uncached tokens(call, worker) / prefill rate(worker) * (1 + calls in it)

`autellix` takes the cheapest worker. Prefill holds up everybody, those in the batch and those who
wait, hence the number of calls; and a prefix that is computed again takes the place of another in
the cache, which will be computed again in its turn, hence the 2. Without the two, calls that spill
under overload recompute prefixes and make the overload worse. A program's prefix is cached at its
`places`, so its home wins until its queue costs more than recomputing the prefix elsewhere; then
the call spills, and the home moves with it. Programs whose prompts begin alike (the same tools, the
same instructions) count each other's prefix as cached. A program about which nothing is known gets
a home by rendezvous hashing among the least loaded: routers that see about the same loads choose
alike, without talking to each other.

Standard library only; no clock, no randomness, no I/O. What a policy knows of the outside are its
arguments, and what it decides is a value, a `Choice`.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

STICKY_TOKENS: Final = 2048  # the paper's Algorithm 2: shorter inputs are not pinned
MAX_PLACES: Final = 8  # per program: where its prefix may be cached
BEGINNING_BYTES: Final = (1024, 4096, 16_384)  # of a request, that programs may have in common
NEAR_SHARE: Final = 0.1  # of a worker's slots: loads that differ by less count as equal
RECOMPUTE_WEIGHT: Final = 2.0  # a prefix computed again pushes another out of the cache
FAN_OUT_SHARE: Final = 0.5  # of a worker's slots that one program takes free of charge


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What is known of a call before it runs; `turn` numbers the router's calls."""

    program: str | None = None  # None: a program of its own
    num_tokens: int = 1
    turn: int = 0
    beginnings: tuple[tuple[str, int], ...] = ()  # (name, tokens) of its prompt's first parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker that may take calls: its last report, corrected by what was sent since."""

    id: str
    num_live: int = 0  # calls in it, running or waiting
    num_slots: int = 1  # calls it runs at once
    call_s: float = 1.0  # mean time a call holds a slot
    pending_tokens: int = 0  # uncached prompt tokens sent to it that it has not answered
    prefill_tokens_per_s: float = 1000.0
    kv_tokens: int = 0  # capacity of its cache; 0: not known
    computed_tokens: int = 0  # prompt tokens it has computed since its start

    @property
    def delay_s(self) -> float:
        """How long a call sent now waits before its own prompt is computed."""
        num_ahead = max(0, self.num_live + 1 - self.num_slots)
        slot_s = num_ahead / self.num_slots * self.call_s  # with the prefill of those ahead
        return max(slot_s, self.pending_tokens / self.prefill_tokens_per_s)


@dataclass(frozen=True, slots=True)
class Place:
    """A worker that holds a program's prefix, unless it has computed more than fits since then."""

    worker: str
    num_tokens: int
    computed_tokens: int = 0  # the worker's counter when the program was last there
    num_live: int = 0  # the program's calls in it
    used_s: float = 0.0  # when its last call went there

    def cached_tokens(self, worker: Worker) -> int:
        """How much of the prefix is likely still there, if the oldest is evicted first."""
        is_evicted = 0 < worker.kv_tokens <= worker.computed_tokens - self.computed_tokens
        return 0 if is_evicted else self.num_tokens


@dataclass(frozen=True, slots=True)
class Program:
    """Where a program lives: its home, and every place that has seen its prefix."""

    home: str | None = None
    places: Mapping[str, Place] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, Place] = dataclasses.field(default_factory=dict)  # by other programs

    def uncached_tokens(self, call: Call, worker: Worker) -> int:
        """Prompt tokens that this worker would have to compute; at least one."""
        cached = 0
        for places in (self.places, self.shared):
            place = places.get(worker.id)
            if place is not None:
                cached = max(cached, place.cached_tokens(worker))
        return max(1, call.num_tokens - cached)

    def num_live(self, worker: str) -> int:
        place = self.places.get(worker)
        return place.num_live if place else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Where a call runs, what is computed there, and the program's home from now on."""

    worker: str
    uncached_tokens: int
    home: str | None = None
    is_spill: bool = False  # it ran away from a home that was there to take it


Policy = Callable[[Call, Program, Sequence[Worker]], Choice]


def autellix(call: Call, program: Program, workers: Sequence[Worker]) -> Choice:
    """The worker where the call costs least; a new program by `new_home`."""
    home = _find(program.home, workers)
    is_known = any(w.id in program.places or w.id in program.shared for w in workers)
    if call.program is not None and not is_known:
        chosen = new_home(call.program, workers)
        return _choose(call, program, workers, chosen, moves_home=True)
    costs_s = [cost_s(call, program, worker) for worker in workers]
    least_s = min(costs_s)
    cheapest = [worker for worker, cost in zip(workers, costs_s, strict=True) if cost == least_s]
    best = home if home in cheapest else _least_used(call, cheapest)
    return _choose(call, program, workers, best, moves_home=True)


def cost_s(call: Call, program: Program, worker: Worker) -> float:
    """Seconds that this call costs here: its wait, and the work that holds up it and others."""
    recompute_s = program.uncached_tokens(call, worker) / worker.prefill_tokens_per_s
    own = program.num_live(worker.id) + 1
    too_many = max(0.0, own - max(1.0, FAN_OUT_SHARE * worker.num_slots))
    crowding_s = too_many / worker.num_slots * worker.call_s
    return worker.delay_s + RECOMPUTE_WEIGHT * recompute_s * (1 + worker.num_live) + crowding_s


def new_home(program: str, workers: Sequence[Worker]) -> Worker:
    """By rendezvous hashing among the workers that are about as free as the freest."""
    slack = {w.id: max(1.0, NEAR_SHARE * w.num_slots) for w in workers}
    freest = min(workers, key=lambda w: (w.delay_s, w.num_live))
    near = [
        worker
        for worker in workers
        if worker.delay_s <= freest.delay_s + NEAR_SHARE * worker.call_s
        and worker.num_live <= freest.num_live + slack[worker.id]
    ]
    return rendezvous(program, near)


def sticky(call: Call, program: Program, workers: Sequence[Worker]) -> Choice:
    """The paper's Algorithm 2: short calls to the least used, others where their program is."""
    if call.num_tokens <= STICKY_TOKENS:
        return _choose(call, program, workers, _least_used(call, workers), moves_home=False)
    home = _find(program.home, workers)
    chosen = home or _least_used(call, workers)
    return _choose(call, program, workers, chosen, moves_home=True)


def least_used(call: Call, program: Program, workers: Sequence[Worker]) -> Choice:
    """The worker with the fewest calls in it."""
    return _choose(call, program, workers, _least_used(call, workers), moves_home=False)


def round_robin(call: Call, program: Program, workers: Sequence[Worker]) -> Choice:
    """Each worker in turn, in the order of their ids."""
    in_order = sorted(workers, key=lambda worker: worker.id)
    chosen = in_order[call.turn % len(in_order)]
    return _choose(call, program, workers, chosen, moves_home=False)


POLICIES: Final[Mapping[str, Policy]] = {
    "autellix": autellix,
    "sticky": sticky,
    "least-used": least_used,
    "round-robin": round_robin,
}


def rendezvous(key: str, workers: Iterable[Worker]) -> Worker:
    """The worker with the highest weight for this key: one that joins or leaves moves few keys."""
    return max(workers, key=lambda worker: _weight(key, worker.id))


def _weight(key: str, worker: str) -> int:
    return int.from_bytes(blake2b(f"{key}\0{worker}".encode(), digest_size=8).digest(), "big")


def _least_used(call: Call, workers: Sequence[Worker]) -> Worker:
    fewest = min(worker.num_live for worker in workers)
    return rendezvous(_name(call), [w for w in workers if w.num_live == fewest])


def _name(call: Call) -> str:
    return f"turn {call.turn}" if call.program is None else call.program


def _find(worker_id: str | None, workers: Sequence[Worker]) -> Worker | None:
    return next((worker for worker in workers if worker.id == worker_id), None)


def _choose(
    call: Call, program: Program, workers: Sequence[Worker], chosen: Worker, *, moves_home: bool
) -> Choice:
    home = _find(program.home, workers)
    return Choice(
        worker=chosen.id,
        uncached_tokens=program.uncached_tokens(call, chosen),
        home=chosen.id if moves_home and call.program is not None else program.home,
        is_spill=home is not None and home is not chosen,
    )


# -- the table of programs -----------------------------------------------------------------------


class Programs:
    """Where every program lives; forgets the longest unused beyond `capacity`."""

    def __init__(self, capacity: int = 100_000) -> None:
        self._capacity = capacity
        self._programs: OrderedDict[str, Program] = OrderedDict()
        self._beginnings: OrderedDict[str, dict[str, Place]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._programs)

    def get(self, key: str | None) -> Program:
        """What is known of a program; nothing for one never seen."""
        return (self._programs.get(key) if key is not None else None) or Program()

    def view(self, call: Call) -> Program:
        """What a policy is given: the call's program, and who else began as its prompt does."""
        program = self.get(call.program)
        shared: dict[str, Place] = {}
        for name, _ in call.beginnings:  # the longest is last and wins
            shared.update(self._beginnings.get(name, {}))
        return dataclasses.replace(program, shared=shared) if shared else program

    def num_homed(self) -> dict[str, int]:
        """How many programs call each worker their home."""
        counts: dict[str, int] = {}
        for program in self._programs.values():
            if program.home is not None:
                counts[program.home] = counts.get(program.home, 0) + 1
        return counts

    def sent(self, call: Call, choice: Choice, worker: Worker, now_s: float) -> None:
        """A call was sent to where `choice` says; its prefix will be cached there."""
        if call.program is not None:
            num_live = self.get(call.program).num_live(worker.id) + 1
            new = Place(worker.id, call.num_tokens, worker.computed_tokens, num_live, now_s)
            self._put(call.program, choice.home, new)
        for name, num_tokens in call.beginnings:
            places = self._beginnings.setdefault(name, {})
            places[worker.id] = Place(worker.id, num_tokens, worker.computed_tokens)
            self._beginnings.move_to_end(name)
        while len(self._beginnings) > self._capacity:
            self._beginnings.popitem(last=False)

    def ended(self, key: str | None, worker: str) -> None:
        """One of the program's calls in this worker is over."""
        place = self.get(key).places.get(worker)
        if key is not None and place is not None:
            left = dataclasses.replace(place, num_live=max(0, place.num_live - 1))
            program = self._programs[key]
            self._programs[key] = Program(program.home, {**program.places, worker: left})

    def learn(self, key: str, worker: Worker, num_tokens: int, used_s: float) -> None:
        """A worker says that it holds a program's prefix, from before or by another router.

        Where the program's latest call went is its home: a call elsewhere is how a home moves.
        """
        program = self.get(key)
        home = program.places.get(program.home or "")
        is_latest = home is None or home.used_s <= used_s
        place = Place(
            worker.id, num_tokens, worker.computed_tokens, program.num_live(worker.id), used_s
        )
        self._put(key, worker.id if is_latest else program.home, place)

    def forget_worker(self, worker: str) -> None:
        """A worker is gone, and with it every prefix that it held."""
        for held in self._beginnings.values():
            held.pop(worker, None)
        for key, program in list(self._programs.items()):
            if worker in program.places or program.home == worker:
                places = {name: p for name, p in program.places.items() if name != worker}
                home = program.home if program.home != worker else _latest(places)
                self._programs[key] = Program(home, places)

    def forget(self, key: str) -> Program:
        """A program is over; returns what was known of it."""
        return self._programs.pop(key, Program())

    def _put(self, key: str, home: str | None, place: Place) -> None:
        places = dict(self.get(key).places)
        places.pop(place.worker, None)
        places[place.worker] = place  # the latest is last
        while len(places) > MAX_PLACES:
            places.pop(next(name for name in places if name != home))
        self._programs[key] = Program(home, places)
        self._programs.move_to_end(key)
        while len(self._programs) > self._capacity:
            self._programs.popitem(last=False)


def _latest(places: Mapping[str, Place]) -> str | None:
    return max(places, key=lambda name: places[name].used_s, default=None)
