"""What the figures of `bench.paper` have in common: their size, their parts, and their words.

A figure names its cells (`bench.paper_runs`), and makes of their results charts, a table (ours,
the paper's, SRPT), one sentence of answer, and a verdict. Every sentence with a number in it is
made from the results. What the paper reports is written in `PAPER_*` beside the figure; it gives
few numbers and no constants (batch size, queue bounds, quanta), so most comparisons are of
direction and size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from autellix_sglang.config import ProgramConfig
from bench.charts import Points
from bench.common import format_number
from bench.paper_runs import VLLM, Cell, Result
from bench.sim import PAPER_LEVEL_MS, Ratio, ratio_at, ratios

Results = Mapping[Cell, Result]

OURS: Final = ProgramConfig().policy
LEARNING: Final = "gittins"
POLICIES: Final = tuple(
    dict.fromkeys((VLLM, "fcfs", "mlfq", "plas", "atlas", LEARNING, OURS, "srpt"))
)
ATTAINED: Final = ("plas", "atlas")
WORKLOADS: Final = ("chat", "react", "tree", "mixed")
PAPER_NAMES: Final = {"chat": "ShareGPT", "react": "BFCL", "tree": "LATS", "mixed": "Mixed"}
NAMES: Final = {VLLM: "vLLM (no prefix cache)", "fcfs": "fcfs (vLLM-opt)"}
COLOURS: Final = {
    "fcfs": "p0", "plas": "p1", "atlas": "p2", "mlfq": "p3", "srpt": "p4", VLLM: "p5",
    LEARNING: "p6",
}  # fmt: skip
THE_PAPER: Final = "p8"
OBJECTIVES_MS: Final = (PAPER_LEVEL_MS, 500.0, 1000.0)  # the paper's Fig. 15
MULTIPLES: Final = (2.0, 4.0)  # of the unloaded latency
NOT_THERE: Final = "-"
NO_WORSE: Final = 1.001  # as large a ratio as rounding leaves between equals


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is simulated."""

    minutes: float = 4.0
    loads: tuple[float, ...] = (0.3, 0.6, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0)
    large_minutes: float = 6.0  # of the 70B model, whose rates are half as high
    large_loads: tuple[float, ...] = (0.5, 1.0, 1.3, 1.7, 2.2, 3.0)
    wait_loads: tuple[float, ...] = (0.5, 0.9, 1.1, 1.5, 2.0)
    steady_minutes: float = 60.0
    steady_load: float = 1.1
    size_minutes: float = 20.0
    hit_programs: int = 400
    offline: tuple[int, ...] = (1000, 2000, 4000)
    swap_minutes: float = 4.0
    swap_loads: tuple[float, ...] = (1.2, 1.5, 2.0)
    starvation_minutes: float = 30.0
    passes: int = 20
    replica_minutes: float = 3.0
    replicas: tuple[int, ...] = (1, 2, 4, 8)
    replica_loads: tuple[float, ...] = (0.4, 1.0, 1.3, 1.7, 2.2)
    slots: int = 64


FULL: Final = Size()
QUICK: Final = Size(
    minutes=1.0,
    loads=(0.5, 1.8),
    large_minutes=1.0,
    large_loads=(0.5, 1.8),
    wait_loads=(0.5, 0.9),
    steady_minutes=3.0,
    size_minutes=2.0,
    hit_programs=40,
    offline=(60, 120),
    swap_minutes=1.0,
    swap_loads=(1.5,),
    starvation_minutes=3.0,
    passes=3,
    replica_minutes=1.0,
    replicas=(1, 2),
    replica_loads=(0.4, 2.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a figure has to say, apart from what it asks."""

    answer: str
    verdict: str  # one of VERDICTS
    remark: str
    charts: tuple[str, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    policies: tuple[str, ...] = ()  # in the legend
    keys: tuple[tuple[str, str], ...] = ()  # and what else is: CSS class, words
    data: dict[str, Any] = field(default_factory=dict)


VERDICTS: Final = ("agrees", "partly", "disagrees", "nothing to compare")


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the paper."""

    number: str
    title: str
    question: str
    cells: Callable[[Size], list[Cell]]
    find: Callable[[Size, Results], Findings]


def colour_of(policy: str) -> str:
    return COLOURS.get(policy, "p7")


def name_of(policy: str) -> str:
    return NAMES.get(policy, policy)


def verdict_of(shares: Sequence[bool]) -> str:
    """All, some or none of the paper's statements hold here."""
    if not shares:
        return VERDICTS[3]
    return VERDICTS[0] if all(shares) else VERDICTS[1] if any(shares) else VERDICTS[2]


def shown(value: float | None, digits: int = 3) -> str:
    return NOT_THERE if value is None else format_number(value, digits)


def shown_spread(spread: tuple[Ratio, Ratio] | None) -> str:
    return NOT_THERE if spread is None else " to ".join(map(str, spread))


def span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"


# --- curves over load ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """One workload on one device: results by policy and load."""

    workload: str
    points: Mapping[str, Mapping[float, Result]]

    def curve(self, policy: str, statistic: str = "mean") -> dict[float, float]:
        return {load: r["latency_ms"][statistic] for load, r in self.points[policy].items()}

    def by_rate(self, policy: str, statistic: str = "mean") -> Points:
        return [(r["rate"], r["latency_ms"][statistic]) for r in self.points[policy].values()]

    @cached_property
    def capacity(self) -> float:
        load, result = next(iter(self.points["fcfs"].items()))
        return float(result["rate"]) / load

    def levels_ms(self, statistic: str = "mean") -> dict[str, float]:
        """Where rates are compared: multiples of the unloaded latency, and the objectives."""
        curve = self.curve("fcfs", statistic)
        unloaded = curve[min(curve)]
        return {f"{m:g}x": m * unloaded for m in MULTIPLES} | {
            f"{at:g} ms": at for at in OBJECTIVES_MS if at > MULTIPLES[-1] * unloaded
        }

    def ratios(self, policy: str, baseline: str, statistic: str = "mean") -> list[Ratio]:
        """Rate over the baseline's at every level that the baseline crosses, lowest first."""
        return ratios(self.curve(policy, statistic), self.curve(baseline, statistic))

    def best(self, policy: str, baseline: str, statistic: str = "mean") -> Ratio | None:
        """The largest ratio at any level: the paper's "up to"."""
        return max(self.ratios(policy, baseline, statistic), default=None)

    def spread(
        self, policy: str, baseline: str, statistic: str = "mean"
    ) -> tuple[Ratio, Ratio] | None:
        """The smallest ratio that is no mere bound, if there is one, and the largest."""
        found = self.ratios(policy, baseline, statistic)
        known = [ratio for ratio in found if not ratio.is_least]
        return (min(known or found), max(found)) if found else None

    def slowest(self, policy: str, baselines: Iterable[str], statistic: str = "mean") -> float:
        """The largest latency over any baseline's at one load, of all from 1 up."""
        mine = self.curve(policy, statistic)
        return max(
            mine[load] / self.curve(baseline, statistic)[load]
            for baseline in baselines
            for load in mine
            if load >= 1
        )

    def at_paper_level(self, policy: str, baseline: str) -> Ratio | None:
        """The ratio at the tightest objective of the paper's Fig. 15."""
        return ratio_at(self.curve(policy), self.curve(baseline), OBJECTIVES_MS[0])
