"""Beyond the paper: other schedulers' orders on its workloads, and what promotion promises."""

from __future__ import annotations

from typing import Final

from bench import charts
from bench.charts import Series
from bench.paper_base import (
    LEARNING,
    NOT_THERE,
    WORKLOADS,
    Figure,
    Findings,
    Results,
    Size,
    colour_of,
    shown,
    verdict_of,
)
from bench.paper_rates import load_cell
from bench.paper_runs import DEVICE, PROMISED_BETA, Cell, Result, cell

# --- other schedulers' orders -------------------------------------------------------------------

# By policy or baseline: whose order it is.
ORDERS: Final = {
    "fcfs": "SGLang, vLLM",
    "lpm": "SGLang",
    "hrrn": "SGLang",
    "program-fcfs": "Continuum",
    "las": "llm-d's router",
    "sjf": "clairvoyant",
    "mlfq": "the paper's baseline",
    "plas": "the paper's",
    LEARNING: "ours",
    "srpt": "clairvoyant",
}
# Drawn, with colours that other figures give to policies that are not drawn here.
DRAWN: Final = {
    "lpm": "p7", "hrrn": "p8", "las": "p2", "program-fcfs": "p5",
    **{policy: colour_of(policy) for policy in ("mlfq", "plas", LEARNING, "srpt")},
}  # fmt: skip
ORDER_LOADS: Final = (1.2, 2.0)


def _order_loads(size: Size) -> list[float]:
    """The loads of the sweep that are nearest to those wanted."""
    return list(
        dict.fromkeys(min(size.loads, key=lambda at: abs(at - load)) for load in ORDER_LOADS)
    )


def _orders_cells(size: Size) -> list[Cell]:
    return [
        load_cell(size, workload, policy, load, DEVICE)
        for workload in WORKLOADS
        for policy in ORDERS
        for load in _order_loads(size)
    ]


def _orders_find(size: Size, results: Results) -> Findings:
    loads = _order_loads(size)

    def of(workload: str, policy: str, load: float) -> Result:
        return results[load_cell(size, workload, policy, load, DEVICE)]

    def over(workload: str, policy: str, load: float, measure: str, statistic: str) -> float:
        stock = of(workload, "fcfs", load)[measure][statistic]
        return float(of(workload, policy, load)[measure][statistic] / stock)

    def row(policy: str) -> tuple[object, ...]:
        means = [over(w, policy, at, "latency_ms", "mean") for at in loads for w in WORKLOADS]
        tail = max(over(w, policy, at, "response_s", "p99") for at in loads for w in WORKLOADS)
        return (policy, ORDERS[policy], *(f"{mean:.2f}" for mean in means), f"{tail:.2f}")

    mixed = {p: over("mixed", p, loads[-1], "latency_ms", "mean") for p in ORDERS}
    others = {p: mixed[p] for p in ("lpm", "hrrn", "las", "program-fcfs")}
    nearest = min(others, key=lambda policy: others[policy])
    return Findings(
        answer=f"On the mix at load {loads[-1]:g} plas takes {mixed['plas']:.2f} of stock order's"
        f" time per token and {LEARNING} {mixed[LEARNING]:.2f}; of the orders that others have,"
        f" {nearest} is best with {others[nearest]:.2f}, and clairvoyant srpt takes"
        f" {mixed['srpt']:.2f}.",
        verdict=verdict_of([]),
        remark="The paper compares with first come first served and MLFQ only. None of lpm, hrrn,"
        " las (least attained service), program-fcfs (program arrival order) and sjf (shortest"
        " call first) preempts. lpm is longest prefix match, hrrn highest response ratio next. All"
        " numbers are over stock order's; the last is who pays: the largest p99 response of all"
        " workloads and loads. `bench/sim_orders.py` says what of each order is left out.",
        charts=tuple(
            charts.bars(
                f"Mean token latency over fcfs's, load {load:g}",
                WORKLOADS,
                [
                    Series(
                        policy,
                        css,
                        [
                            (i, over(w, policy, load, "latency_ms", "mean"))
                            for i, w in enumerate(WORKLOADS)
                        ],
                    )
                    for policy, css in DRAWN.items()
                ],
                "times fcfs",
            )
            for load in loads
        ),
        header=("order", "whose", *(f"{w} {at:g}" for at in loads for w in WORKLOADS), "p99"),
        rows=tuple(row(policy) for policy in ORDERS),
        keys=tuple((css, policy) for policy, css in DRAWN.items()),
        data={
            f"{load:g}": {
                w: {
                    p: {key: of(w, p, load)[key] for key in ("latency_ms", "response_s")}
                    for p in ORDERS
                }
                for w in WORKLOADS
            }
            for load in loads
        },
    )


# --- what promotion promises --------------------------------------------------------------------

# Workload, slots, load. Few slots, because at 64 hardly a program waits in a stable run.
STABLE: Final = (("react", 4, 0.9), ("chat", 8, 0.95), ("mixed", 8, 0.9))
UNSTABLE: Final = ("chat", 4, 1.2)
BOUND: Final = "p0"


def _starvation_cell(size: Size, case: tuple[str, int, float], beta: float) -> Cell:
    workload, slots, load = case
    return cell(
        "starvation",
        workload=workload,
        load=load,
        minutes=size.starvation_minutes,
        slots=slots,
        beta=beta,
    )


def _starvation_cells(size: Size) -> list[Cell]:
    return [
        _starvation_cell(size, case, beta)
        for case in (*STABLE, UNSTABLE)
        for beta in (PROMISED_BETA, 0.0)
    ]


def _starvation_find(size: Size, results: Results) -> Findings:
    found = {
        case: {beta: results[_starvation_cell(size, case, beta)] for beta in (PROMISED_BETA, 0.0)}
        for case in (*STABLE, UNSTABLE)
    }
    kept = max(found[case][PROMISED_BETA]["worst"] for case in STABLE)
    without = max(found[case][0.0]["worst"] for case in STABLE)
    return Findings(
        answer=f"In stable runs no program waits more than {kept:.2f} of what the promise allows;"
        f" without promotion the worst waits {without:.2f} times as long as it would allow.",
        verdict=verdict_of([kept <= 1.0]),
        remark="Each dot is a program of a run under plas, at the moment when it was owed most:"
        " what it had waited with none of its calls running, against the service it had received,"
        f" in decode steps. The line is the promise: (beta + 1) x service, beta being"
        f" {PROMISED_BETA:g}, and one quantum of each level. Few slots, because at {size.slots}"
        " hardly a program waits below load 1. The last case is overloaded, where nothing is"
        " promised, and nothing is kept: everybody is owed a turn. The paper has the rule, and"
        " neither its beta nor a figure; srpt promotes nobody.",
        charts=tuple(
            chart
            for case in STABLE[:2]
            for beta in (PROMISED_BETA, 0.0)
            if (chart := _starvation_chart(case, beta, found[case]))
        ),
        header=("workload", "slots", "load", "stable", "beta", "programs", "waited", "promotions",
                "worst over the promise", "the paper's", "srpt"),
        rows=tuple(
            (case[0], case[1], f"{case[2]:g}", "no" if case is UNSTABLE else "yes",
             f"{beta:g}" if beta else "off", one["programs"], len(one["points"]),
             one["promotions"], shown(one["worst"]), NOT_THERE, NOT_THERE)
            for case, by_beta in found.items()
            for beta, one in by_beta.items()
        ),
        keys=(("p1", "kept"), ("p3", "owed more"), (BOUND, "the promise")),
        data={
            f"{workload}/{slots}/{load:g}": {f"{beta:g}": one for beta, one in by_beta.items()}
            for (workload, slots, load), by_beta in found.items()
        },
    )  # fmt: skip


def _starvation_chart(
    case: tuple[str, int, float], beta: float, by_beta: dict[float, Result]
) -> str:
    """Waiting against service; both settings of beta with the same axes."""
    workload, slots, load = case
    every = [point for one in by_beta.values() for point in one["points"]]
    if not every:
        return ""
    quanta = by_beta[beta]["quanta"]
    low, high = min(service for service, _ in every), max(service for service, _ in every)
    line = [(at, (PROMISED_BETA + 1) * at + quanta) for at in _steps(low, high)]
    points = by_beta[beta]["points"]
    owed = [waited > (PROMISED_BETA + 1) * service + quanta for service, waited in points]
    return charts.lines(
        f"{workload}, {slots} slots, load {load:g}, beta {f'{beta:g}' if beta else 'off'}",
        [
            Series("the promise", BOUND, line, has_dots=False),
            *(
                Series(
                    name,
                    css,
                    [(x, y) for (x, y), is_owed in zip(points, owed, strict=True)
                     if is_owed == wanted],
                    has_line=False,
                )
                for name, css, wanted in (("kept", "p1", False), ("owed more", "p3", True))
            ),
            Series("axes", BOUND, [(x, y) for x, y in every], has_line=False, has_dots=False),
        ],
        "service received, steps",
        "steps waited",
        is_log_x=True,
        is_log_y=True,
    )  # fmt: skip


def _steps(low: float, high: float, count: int = 40) -> list[float]:
    """From `low` to `high` in equal ratios."""
    return [low * (high / low) ** (i / count) for i in range(count + 1)]


FIGURES: Final = (
    Figure(
        "orders",
        "Other schedulers' orders",
        "How do the orders that other engines and routers have fare on the same programs?",
        _orders_cells,
        _orders_find,
    ),
    Figure(
        "starvation",
        "What promotion promises",
        "With beta on, does any program of a stable engine wait longer than it should?",
        _starvation_cells,
        _starvation_find,
    ),
)
