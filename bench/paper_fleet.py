"""Programs over several replicas: Figs. 14 and 15 of the paper."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from bench import charts
from bench.charts import Series
from bench.paper_base import (
    NO_WORSE,
    Figure,
    Findings,
    Results,
    Size,
    Sweep,
    shown,
    shown_spread,
    verdict_of,
)
from bench.paper_runs import Cell, cell
from bench.sim import rate_at

# --- Figs. 14 and 15: many replicas -------------------------------------------------------------

# By name: the colour. `srpt` is our placement with clairvoyant engines, the others have `plas`.
SRPT: Final = "srpt"
ROUTERS: Final = {
    "round-robin": "p0", "least-used": "p3", "sticky": "p1", "autellix": "p2", SRPT: "p4",
}  # fmt: skip
FIG14_WORKLOADS: Final = ("chat", "tree")
FIG14_REPLICAS: Final = 4


def _placement(size: Size, name: str, workload: str, replicas: int, load: float) -> Cell:
    return cell(
        "placement",
        router="autellix" if name == SRPT else name,
        policy=SRPT if name == SRPT else "plas",
        workload=workload,
        replicas=replicas,
        load=load,
        minutes=size.replica_minutes,
        slots=size.slots,
        largest=max(size.replica_loads),
    )


def _fig14_cells(size: Size) -> list[Cell]:
    return [
        _placement(size, policy, workload, FIG14_REPLICAS, load)
        for workload in FIG14_WORKLOADS
        for policy in ROUTERS
        for load in size.replica_loads
    ]


def _router_sweep(
    size: Size, results: Results, workload: str, replicas: int, routers: Iterable[str]
) -> Sweep:
    """A sweep whose policies are placements; round robin stands for the baseline `fcfs`."""
    points = {
        policy: {
            load: results[_placement(size, policy, workload, replicas, load)]
            for load in size.replica_loads
        }
        for policy in routers
    }
    return Sweep(workload, {"fcfs": next(iter(points.values())), **points})


def _fig14_find(size: Size, results: Results) -> Findings:
    sweeps = {w: _router_sweep(size, results, w, FIG14_REPLICAS, ROUTERS) for w in FIG14_WORKLOADS}
    rows: list[tuple[object, ...]] = []
    rates: dict[str, list[float]] = {"sticky": [], "autellix": [], SRPT: []}
    slowest: list[float] = []
    for workload, sweep in sweeps.items():
        for baseline in ("round-robin", "least-used"):
            slowest.append(sweep.slowest("sticky", [baseline]))
            over = {policy: sweep.spread(policy, baseline) for policy in rates}
            for policy, spread in over.items():
                rates[policy] += [ratio.value for ratio in spread or ()]
            sticky, ours, srpt = map(shown_spread, over.values())
            rows.append((workload, baseline, sticky, slowest[-1], ours, "up to 1.4", srpt))
    load = max(size.replica_loads)
    chat = {p: sweeps["chat"].curve(p)[load] for p in ROUTERS}
    return Findings(
        answer=f"{_rates(rates['sticky'], rates['autellix'])} At load {load:g} a chat token takes"
        f" {shown(chat['round-robin'])} ms under round robin, {shown(chat['sticky'])} under sticky"
        f" and {shown(chat['autellix'])} under autellix.",
        verdict=verdict_of(
            [max(rates["sticky"]) >= 0.9 * 1.4, max(slowest) <= NO_WORSE] if rates["sticky"] else []
        ),
        remark="From the level of latency where rates compare worst to that where they do best;"
        " 'slowest' is the largest latency of sticky over the other's at one load from 1 up."
        f" Programs arrive for {size.replica_minutes:g} minutes. The router's own placement"
        " functions over simulated engines that all run plas (the paper: PLAS and ATLAS"
        " everywhere); srpt is our placement over clairvoyant engines. Calls with prompts of up to"
        " 2,048 tokens are not sticky in the paper's rule. The 70B half of the figure is left out.",
        charts=tuple(
            charts.lines(
                f"{workload}, {FIG14_REPLICAS} replicas",
                [Series(p, css, sweep.by_rate(p)) for p, css in ROUTERS.items()],
                "programs per second",
                "mean ms per token",
                levels=sweep.levels_ms(),
                is_log_y=True,
            )
            for workload, sweep in sweeps.items()
        ),
        header=(
            "workload",
            "rate over",
            "sticky (Algorithm 2)",
            "sticky, slowest",
            "autellix",
            "the paper's",
            "srpt",
        ),
        rows=tuple(rows),
        keys=tuple((css, router) for router, css in ROUTERS.items()),
        data={
            w: {p: [list(point) for point in s.by_rate(p)] for p in ROUTERS}
            for w, s in sweeps.items()
        },
    )


def _rates(sticky: Sequence[float], ours: Sequence[float]) -> str:
    if not sticky or not ours:
        return "Round robin and least used cross no level within the loads, so rates have no ratio."
    return (
        f"The paper's sticky placement sustains {min(sticky):.2f} to {max(sticky):.2f} times the"
        f" rate of round robin and least used on {FIG14_REPLICAS} replicas, by the level, our"
        f" `autellix` placement {min(ours):.2f} to {max(ours):.2f} times."
    )


FIG15_ROUTERS: Final = ("sticky", "autellix", SRPT)
FIG15_LEVEL: Final = "2x"


def _fig15_cells(size: Size) -> list[Cell]:
    return [
        _placement(size, policy, "chat", replicas, load)
        for policy in FIG15_ROUTERS
        for replicas in size.replicas
        for load in size.replica_loads
    ]


def _fig15_find(size: Size, results: Results) -> Findings:
    sweeps = {
        n: _router_sweep(size, results, "chat", n, FIG15_ROUTERS) for n in size.replicas
    }  # fmt: skip
    at_ms = sweeps[size.replicas[0]].levels_ms()[FIG15_LEVEL]
    rates: dict[str, dict[int, float | None]] = {
        policy: {n: _sustained(sweep, policy, at_ms) for n, sweep in sweeps.items()}
        for policy in FIG15_ROUTERS
    }
    first, last = size.replicas[0], size.replicas[-1]
    one, many = (rates["autellix"][n] for n in (first, last))
    load = max(size.replica_loads)
    alone, together = (sweeps[n].curve("autellix")[load] for n in (first, last))
    return Findings(
        answer=f"{_growth(one, many, last)} At load {load:g} per replica a chat token takes"
        f" {shown(alone)} ms on one replica and {shown(together)} ms on {last}, placed by autellix;"
        " the paper scales linearly to 8 replicas and about 30 programs per second.",
        verdict=verdict_of([many >= 0.9 * last / first * one] if one and many else []),
        remark="Its objectives of 0.3, 0.5 and 1 s per token are reached only in long overload, so"
        f" the level here is {FIG15_LEVEL} the unloaded latency of one replica. Engines and"
        f" srpt as in Fig. 14. Programs arrive for {size.replica_minutes:g} minutes.",
        charts=(
            charts.lines(
                "Rate at equal latency",
                [
                    *(
                        Series(p, ROUTERS[p], [(n, rate) for n, rate in by.items() if rate])
                        for p, by in rates.items()
                    ),
                    Series("linear", "p0", [(n, one * n) for n in size.replicas] if one else []),
                ],
                "replicas",
                "programs per second",
            ),
            charts.lines(
                "Placed by autellix, one curve per number of replicas",
                [
                    Series(f"{n} replicas", f"p{i}", sweep.by_rate("autellix"))
                    for i, (n, sweep) in enumerate(sweeps.items())
                ],
                "programs per second",
                "mean ms per token",
                levels={FIG15_LEVEL: at_ms},
                is_log_y=True,
            ),
        ),
        header=("replicas", "sticky, programs/s", "autellix, programs/s", "the paper's",
                "srpt, programs/s"),
        rows=tuple(
            (str(n), shown(rates["sticky"][n]), shown(rates["autellix"][n]), "linear",
             shown(rates[SRPT][n]))
            for n in size.replicas
        ),
        keys=(*((ROUTERS[p], p) for p in FIG15_ROUTERS), ("p0", "linear")),
        data={"level_ms": at_ms, "rates": rates},
    )  # fmt: skip


def _growth(one: float | None, many: float | None, replicas: int) -> str:
    if not one or not many:
        return "The level is not crossed within the loads, so no sustained rate is known."
    return f"{replicas} replicas sustain {many / one:.2f} times the rate of one."


def _sustained(sweep: Sweep, policy: str, at_ms: float) -> float | None:
    load = rate_at(sweep.curve(policy), at_ms)
    return None if load is None or load == math.inf else load * sweep.capacity


FIGURES: Final = (
    Figure(
        "14",
        "Placement on four replicas",
        "What is it worth to send a program's calls to the replica that holds its cache?",
        _fig14_cells,
        _fig14_find,
    ),
    Figure(
        "15",
        "One to eight replicas",
        "Does the sustained rate grow with the number of replicas?",
        _fig15_cells,
        _fig15_find,
    ),
)
