"""Policies as key functions: how much attained service counts against a call.

A level is a range of attained service with geometric bounds, so a policy is just the number that
is looked up in those ranges. Names and formulas follow Autellix (arXiv 2502.13965).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from autellix_sglang.core.program import Call


@dataclass(frozen=True, slots=True)
class Policy:
    """One row of the registry.

    `attained(call)` is in steps. `is_shared` says that all calls of a program attain together, so
    that charging one of them may move its siblings. `turn(call)` orders calls of one level, the
    least first. What is `is_learned` is not attained but a rank, which changes only as the program
    enters or leaves a bucket of `core.sizes`; else it never shrinks while the call lives. Where no
    call that comes later goes first, none `can_starve`, and none is promoted.
    """

    attained: Callable[[Call], float]
    turn: Callable[[Call], float]
    is_shared: bool = False
    is_learned: bool = False
    can_starve: bool = True


def _nothing(call: Call) -> float:
    """First come, first served: every call stays in level 0."""
    return 0.0


def _call_service(call: Call) -> float:
    """MLFQ: t(c), what this call alone has received."""
    return call.service


def _program_service(call: Call) -> float:
    """PLAS, Eq. 1, counted as it happens: the sum of t(c) over all calls of the program."""
    return call.program.service


def _path_service(call: Call) -> float:
    """ATLAS, Eq. 2: max over parents of (p + t), plus what the call itself has received."""
    return call.base_path + call.service


def _rank(call: Call) -> float:
    """Gittins: the program's rank by what its kind has been seen to take (`core.sizes`)."""
    return call.program.rank


def call_turn(call: Call) -> float:
    """In order of the calls' arrival."""
    return call.seq


def program_turn(call: Call) -> float:
    """In order of the programs' arrival."""
    return call.program.seq


def due_turn(call: Call) -> float:
    """By when the program would be through, were it to take no more steps than its rank.

    So a small program goes before a large one, but not before one that has waited for long.
    """
    return call.program.arrived + call.program.rank


POLICIES: Final[dict[str, Policy]] = {
    "fcfs": Policy(_nothing, call_turn, can_starve=False),
    "mlfq": Policy(_call_service, call_turn),
    "plas": Policy(_program_service, program_turn, is_shared=True),
    "atlas": Policy(_path_service, program_turn),
    "gittins": Policy(_rank, due_turn, is_shared=True, is_learned=True),
}


FIRST_QUANTUM: Final = 32.0  # steps, before a learned scale has seen programs
LAST_SHARE: Final = 0.75
TOLERANCE: Final = 1.2  # factor by which learned levels may be off


class Levels:
    """Half-open ranges of attained service: level i ends at `quantum * factor**i` steps.

    The last of the `count` levels has no end. With quantum 0 the scale is learned: it is what keeps
    the begin of the last level at `LAST_SHARE` of the mean service of a program.
    """

    def __init__(self, count: int, quantum: float, factor: float) -> None:
        self.is_learned = quantum == 0
        self.count = count
        self.factor = factor
        self._scale_to(quantum or FIRST_QUANTUM)

    def _scale_to(self, quantum: float) -> None:
        self.quantum = quantum
        self.bounds = [quantum * self.factor**i for i in range(self.count - 1)]

    def for_mean(self, mean: float) -> Levels:
        """Levels for programs of this mean service in steps: these, unless they are far off."""
        if not self.is_learned or not self.bounds or mean <= 0:
            return self
        quantum = LAST_SHARE * mean / self.factor ** (self.count - 2)
        if 1 / TOLERANCE < quantum / self.quantum < TOLERANCE:
            return self
        levels = Levels(self.count, 0, self.factor)
        levels._scale_to(quantum)
        return levels

    def level_of(self, attained: float) -> int:
        """0 is best; a value equal to a bound belongs to the level after it."""
        return bisect_right(self.bounds, attained)

    def quantum_at(self, attained: float) -> float:
        """The service that the level of this value allots; the last level's is its begin."""
        level = self.level_of(attained)
        return self.quantum if level == 0 else self.bounds[level - 1]
