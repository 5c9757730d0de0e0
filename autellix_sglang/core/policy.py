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

    `attained(call)` is in steps and never shrinks while the call lives. `is_shared` says that all
    calls of a program attain together, so that charging one of them may move its siblings.
    `groups_programs` orders calls of one level by their program's arrival and not by their own.
    """

    attained: Callable[[Call], float]
    is_shared: bool = False
    groups_programs: bool = False


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


POLICIES: Final[dict[str, Policy]] = {
    "fcfs": Policy(_nothing),
    "mlfq": Policy(_call_service),
    "plas": Policy(_program_service, is_shared=True, groups_programs=True),
    "atlas": Policy(_path_service, groups_programs=True),
}


class Levels:
    """Half-open ranges of attained service: level i ends at `quantum * factor**i` steps.

    The last of the `count` levels has no end.
    """

    def __init__(self, count: int, quantum: float, factor: float) -> None:
        self.bounds = [quantum * factor**i for i in range(count - 1)]
        self.count = count
        self.quantum = quantum

    def level_of(self, attained: float) -> int:
        """0 is best; a value equal to a bound belongs to the level after it."""
        return bisect_right(self.bounds, attained)
