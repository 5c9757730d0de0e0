"""How much service programs take in all, learned per kind of program, and the rank that follows.

A kind is what programs of one sort have in common and show on arrival. The kinds of a program form
a ladder (`ladder_of`) from all traffic down to its agent's name or system prompt; it is counted on
every rung, and a rung that has seen few programs leans on the one above it. Where nothing was seen
there is a heavy-tailed prior, under which a rank grows with what is attained, as in `plas`.

Counted are, per bucket of service, programs that ended there and programs that went on. Their
ratio is the hazard of ending there, and programs still under way do not bias it (Kaplan and
Meier). Nobody tells for certain that a program is complete: one that is idle counts as complete
so far, and the count is taken back when it goes on. A program counts for half once `HALF_LIFE`
newer ones came.

A rung is heeded only while it foretells better than the one above it. Each program that leaves a
bucket, by going on or for good, scores the rung by the log-likelihood ratio of the two. One that
has lost all credit has drifted: it is forgotten, its programs rank by the prior, and it is learned
anew. Where not even all traffic foretells better than the prior, the rank is the prior's as well.
That comes late where a kind holds programs back that are short of a sudden, for those tell nothing
until they run. So a kind makes a rank at most `HOLD_BACK` times the prior's.

How many calls a program has at once goes along with what it takes in all. So one that has had more
than a single call at once, a wide one, leaves the kinds of the narrow and is counted among the wide
of its kinds, by its service over `width ** WIDTH_POWER`. What one width takes so tells of another.
Its width is what has been seen of it; when it grows, what was counted is moved along. The wide
show in time what they are, by their width and soon by what they receive, so nothing limits how far
their kinds hold them back.

Standard library only. No clock and no chance: everything follows from the order of the calls.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from math import exp2, inf, log, pow
from typing import Final

FIRST_EDGE: Final = 8.0  # steps
PER_OCTAVE: Final = 4
NUM_BUCKETS: Final = 72  # the last one begins near 1.5 million steps and has no end
EDGES: Final = (0.0, *(FIRST_EDGE * 2 ** (i / PER_OCTAVE) for i in range(NUM_BUCKETS - 1)))
WIDTHS: Final = (*(high - low for low, high in pairwise(EDGES)), EDGES[-1])
MIDDLES: Final = tuple(low + width / 2 for low, width in zip(EDGES, WIDTHS, strict=True))
PRIOR_HAZARD: Final = 1 - 2 ** (-1 / PER_OCTAVE)  # half of the programs end per octave of service
PRIOR_WEIGHT: Final = 1.0  # programs that the rung above stands for
HALF_LIFE: Final = 256  # programs
CREDIT: Final = 2.0  # nats: a rung's score is never more
DEBT: Final = 6.0  # nats: below minus that it is forgotten
RELEARN: Final = 8  # programs of a forgotten kind that must end before it is heeded again
SCORE_HALF_LIFE: Final = 16  # programs of its kind
LEAST_CHANCE: Final = 0.02  # no rung is surer than that of where a program ends
MAX_KINDS: Final = 1024  # remembered; the longest unseen go first
LEADING_TOKENS: Final = 64  # what tells system prompts apart
HOLD_BACK: Final = 2.0  # times the prior's rank, for programs with one call at a time
WIDTH_POWER: Final = 0.75  # of the number of calls at once, that service grows with
WIDER: Final = 2 ** (1 / PER_OCTAVE)  # times as many calls at once as before make a wider program
REWARD: Final = 1.0  # a program of S steps is worth S ** -REWARD when it ends
_NOTHING: Final = 1e-9  # programs: decides only where none was seen
_SCORE_DECAY: Final = 2.0 ** (-1 / SCORE_HALF_LIFE)
_RESCALE_AFTER: Final = 64 * HALF_LIFE

Ladder = tuple[tuple[str, ...], ...]


def ladder_of(tenant: str, agent_name: str, prompt_ids: Sequence[int]) -> Ladder:
    """The kinds of a program by its first call, the widest first.

    They are its tenant; the tenant's programs that begin with a prompt of similar length; and those
    of the same agent name or, without one, of the same `LEADING_TOKENS`.
    """
    num_prompt = len(prompt_ids)
    rungs = [(tenant,), (tenant, "prompt", str(num_prompt.bit_length()))]
    if agent_name:
        rungs.append((tenant, "agent", agent_name))
    elif num_prompt >= LEADING_TOKENS:
        leading = array("q", prompt_ids[:LEADING_TOKENS]).tobytes()
        rungs.append((tenant, "leading", blake2b(leading, digest_size=8).hexdigest()))
    return tuple(rungs)


class Kind:
    """One rung: weighted counts of programs per bucket, and the ranks that follow from them."""

    def __init__(self, parent: Kind | None) -> None:
        self.parent = parent
        self.num_programs = 0
        self.score = 0.0  # nats by which it foretold better than its parent of late
        self._ended = array("d", bytes(8 * NUM_BUCKETS))
        self._passed = array("d", bytes(8 * NUM_BUCKETS))
        self.num_forgotten = 0  # times that all was forgotten, because it drifted
        self._base = 0  # the number of the program whose weight is 1
        self._num_new = 0  # programs since the hazards were made
        self._hazards: tuple[float, ...] = ()
        self._ranks: dict[int, float] = {}  # by bucket, as they are asked for

    @property
    def is_trusted(self) -> bool:
        """Whether some of its programs have ended, and it foretells better than its parent."""
        return self.score >= 0 and self.num_ended >= 1

    @property
    def has_drifted(self) -> bool:
        """Whether it was forgotten, and has seen few programs end since."""
        return self.num_forgotten > 0 and self.num_ended < RELEARN

    def enter(self) -> int:
        """Give a new program its number, which decides its weight in all that follows."""
        self.num_programs += 1
        self._num_new += 1
        self.score *= _SCORE_DECAY
        if self.num_programs - self._base > _RESCALE_AFTER:
            self._base += _RESCALE_AFTER
            for counts in (self._ended, self._passed):
                for i, count in enumerate(counts):
                    counts[i] = count * exp2(-_RESCALE_AFTER / HALF_LIFE)
        return self.num_programs

    def note_passed(self, number: int, bucket: int) -> None:
        """A program went on beyond a bucket."""
        self._judge(1 - self.chance(bucket), 1 - self._chance_above(bucket))
        self._passed[bucket] += self._weight(number)

    def recount_passed(self, number: int, bucket: int, times: int) -> None:
        """Count a program once more (1), or once less (-1), as gone on beyond a bucket."""
        count = self._passed[bucket] + times * self._weight(number)
        self._passed[bucket] = max(0.0, count)

    def note_ended(self, number: int, bucket: int) -> None:
        """A program ended in a bucket, so far."""
        self._ended[bucket] += self._weight(number)

    def take_back_end(self, number: int, bucket: int) -> None:
        self._ended[bucket] = max(0.0, self._ended[bucket] - self._weight(number))

    def note_gone(self, bucket: int) -> None:
        """A program that ended in a bucket will not come back."""
        self._judge(self.chance(bucket), self._chance_above(bucket))

    def chance(self, bucket: int) -> float:
        """The chance that a program in a bucket ends there, as far as one may be sure."""
        return min(max(self.hazards[bucket], LEAST_CHANCE), 1 - LEAST_CHANCE)

    def _chance_above(self, bucket: int) -> float:
        return PRIOR_HAZARD if self.parent is None else self.parent.chance(bucket)

    def _judge(self, chance: float, chance_above: float) -> None:
        gain = max(-CREDIT, log(chance / chance_above))  # one stray program is no drift
        self.score = min(CREDIT, self.score + gain)
        if self.score < -DEBT:
            self.score = 0.0
            self.num_forgotten += 1
            self._ended = array("d", bytes(8 * NUM_BUCKETS))
            self._passed = array("d", bytes(8 * NUM_BUCKETS))
            self._refresh_now()

    def _weight(self, number: int) -> float:
        return exp2((number - self._base) / HALF_LIFE)

    @property
    def num_ended(self) -> float:
        """Programs that ended, each by its weight over that of one that comes now."""
        return sum(self._ended) / self._weight(self.num_programs)

    @property
    def hazards(self) -> tuple[float, ...]:
        """Per bucket, the share of the programs in it that end in it."""
        self._refresh()
        return self._hazards

    def rank(self, bucket: int) -> float:
        """The rank in steps of a program in a bucket; less is better."""
        self._refresh()
        if bucket not in self._ranks:
            self._ranks[bucket] = rank(self._hazards, bucket)
        return self._ranks[bucket]

    def mean_service(self) -> float:
        """Mean service of a program in steps, as far as any has been seen to go."""
        alive, total = 1.0, 0.0
        for bucket, hazard in enumerate(self.hazards):
            if not self._ended[bucket] and not self._passed[bucket]:
                break
            total += alive * WIDTHS[bucket] * (1 - hazard / 2)
            alive *= 1 - hazard
        return total

    def _refresh(self) -> None:
        """Make the hazards anew once an eighth more programs have come."""
        if not self._hazards or (self._num_new >= 4 and self._num_new >= self.num_ended / 8):
            self._refresh_now()

    def _refresh_now(self) -> None:
        self._num_new = 0
        above: tuple[float, ...] = (PRIOR_HAZARD,) * NUM_BUCKETS
        prior = _NOTHING
        if self.parent is not None:
            above, prior = self.parent.hazards, PRIOR_WEIGHT * self._weight(self.num_programs)
        self._hazards = tuple(
            (ended + prior * hazard) / (ended + passed + prior)
            for ended, passed, hazard in zip(self._ended, self._passed, above, strict=True)
        )
        self._ranks.clear()


def rank(hazards: Sequence[float], start: int) -> float:
    """The rank in steps of a program at the start of a bucket, from its Gittins index.

    The index is the best ratio, over all services d at which one might stop, of the expected
    reward for ending within d to the expected service until then. Its dimension is steps to the
    -(1 + REWARD), so that root makes steps of it: S for a program sure to need S.
    """
    alive, reward, cost, best = 1.0, 0.0, 0.0, 0.0
    for bucket in range(start, NUM_BUCKETS):
        hazard = hazards[bucket]
        reward += alive * hazard * MIDDLES[bucket] ** -REWARD
        cost += alive * WIDTHS[bucket] * (1 - hazard / 2)
        best = max(best, reward / cost)
        alive *= 1 - hazard
        if alive < 1e-6:
            break
    return pow(best, -1 / (1 + REWARD))


PRIOR_RANKS: Final = tuple(rank((PRIOR_HAZARD,) * NUM_BUCKETS, i) for i in range(NUM_BUCKETS))


@dataclass(slots=True, eq=False)
class Standing:
    """How far a program has come among programs of its kinds.

    `bucket` is that of its service over `scale`, `edge` the service at which it leaves it.
    """

    rungs: tuple[Kind, ...]
    numbers: tuple[int, ...]  # its own on each rung
    scale: float = 1.0
    bucket: int = 0
    edge: float = EDGES[1]

    @property
    def counts(self) -> Iterable[tuple[Kind, int]]:
        return zip(self.rungs, self.numbers, strict=True)

    def move(self, bucket: int) -> None:
        self.bucket = bucket
        self.edge = EDGES[bucket + 1] * self.scale if bucket + 1 < NUM_BUCKETS else inf

    def rescale(self, scale: float, service: float) -> None:
        """Count what the program has passed by another scale."""
        self.scale = scale
        # By the products that `move` takes for edges: a quotient may round to another bucket.
        bucket = bisect_right(EDGES, service, key=lambda edge: edge * scale) - 1
        times = 1 if bucket > self.bucket else -1
        for rung, number in self.counts:
            for passed in range(min(bucket, self.bucket), max(bucket, self.bucket)):
                rung.recount_passed(number, passed, times)
        self.move(bucket)


@dataclass(slots=True, eq=False)
class Size:
    """What is counted of one program: among all traffic and its kinds; if wide, among the wide."""

    ladder: Ladder
    standings: list[Standing]  # the last one makes its rank
    width: int = 1  # calls at once, the most so far
    edge: float = EDGES[1]  # service at which any standing changes
    is_ended: bool = False
    forgotten: tuple[int, ...] = ()  # how often each rung had been forgotten when it ended

    @property
    def counts(self) -> Iterator[tuple[Kind, int, int]]:
        """Every rung that it is counted on, with its number and its bucket there."""
        for standing in self.standings:
            for rung, number in standing.counts:
                yield rung, number, standing.bucket


class Sizes:
    """Owns the kinds, and is told by the process table what programs do."""

    def __init__(self) -> None:
        self.all = Kind(None)
        self.all_wide = Kind(None)
        self._kinds: OrderedDict[tuple[str, ...], Kind] = OrderedDict()

    def enter(self, ladder: Ladder) -> Size:
        """Count a new program as one of these kinds."""
        return Size(ladder, [self._standing(self.all, ladder)])

    def widen(self, size: Size, num_calls: int, service: float) -> bool:
        """A program has so many calls at once; returns whether it is wider than it was known to be.

        Its first standing goes on among all traffic alone, which the mean is taken of.
        """
        if num_calls < size.width * WIDER:
            return False
        size.width = num_calls
        if len(size.standings) == 1:
            first = size.standings[0]
            first.rungs, first.numbers = first.rungs[:1], first.numbers[:1]
            wide = tuple((*name, "wide") for name in size.ladder)
            size.standings.append(self._standing(self.all_wide, wide))
        size.standings[-1].rescale(num_calls**WIDTH_POWER, service)
        size.edge = min(standing.edge for standing in size.standings)
        return True

    def _standing(self, root: Kind, ladder: Ladder) -> Standing:
        rungs = [root]
        for name in ladder:
            rungs.append(self._kind(name, rungs[-1]))
        return Standing(tuple(rungs), tuple(rung.enter() for rung in rungs))

    def _kind(self, name: tuple[str, ...], parent: Kind) -> Kind:
        kind = self._kinds.get(name)
        if kind is None:
            kind = self._kinds[name] = Kind(parent)
            if len(self._kinds) > MAX_KINDS:
                self._kinds.popitem(last=False)
        kind.parent = parent  # an agent's prompts may differ in length, and so in their kind
        self._kinds.move_to_end(name)
        return kind

    def attain(self, size: Size, service: float) -> None:
        """A program's service has grown to this."""
        for standing in size.standings:
            while service >= standing.edge:
                for rung, number in standing.counts:
                    rung.note_passed(number, standing.bucket)
                standing.move(standing.bucket + 1)
        size.edge = min(standing.edge for standing in size.standings)

    def rest(self, size: Size) -> None:
        """A program has no live call any more: it counts as complete so far."""
        if not size.is_ended:
            size.is_ended = True
            size.forgotten = tuple(rung.num_forgotten for rung, _, _ in size.counts)
            for rung, number, bucket in size.counts:
                rung.note_ended(number, bucket)

    def resume(self, size: Size) -> None:
        """A program has a live call again: it was not complete."""
        if size.is_ended:
            size.is_ended = False
            for (rung, number, bucket), forgotten in zip(size.counts, size.forgotten, strict=True):
                if rung.num_forgotten == forgotten:  # else its end went with all others
                    rung.take_back_end(number, bucket)

    def leave(self, size: Size) -> None:
        """A program is forgotten: if it was complete, it stays so."""
        if size.is_ended:
            for rung, _, bucket in size.counts:
                rung.note_gone(bucket)

    def rank(self, size: Size) -> float:
        """A program's rank in steps, by the most specific of its kinds that is to be trusted."""
        standing = size.standings[-1]
        prior = PRIOR_RANKS[standing.bucket]
        most = HOLD_BACK * prior if size.width == 1 else inf
        for rung in reversed(standing.rungs):
            if rung.has_drifted:
                break
            if rung.is_trusted:
                return standing.scale * min(rung.rank(standing.bucket), most)
        return standing.scale * prior
