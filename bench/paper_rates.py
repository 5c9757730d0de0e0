"""Which rate one engine sustains at equal latency: Figs. 12, 13, and the distance to SRPT."""

from __future__ import annotations

from typing import Final

from bench import charts
from bench.charts import Series
from bench.paper_base import (
    ATTAINED,
    LEARNING,
    NO_WORSE,
    NOT_THERE,
    OURS,
    PAPER_NAMES,
    POLICIES,
    WORKLOADS,
    Figure,
    Findings,
    Results,
    Size,
    Sweep,
    colour_of,
    name_of,
    shown_spread,
    verdict_of,
)
from bench.paper_runs import DEVICE, VLLM, Cell, cell
from bench.sim import Ratio, best

# What the paper (arXiv 2502.13965v1 and its NSDI'26 version) says.
PAPER_RATES: Final = {
    "chat": {VLLM: 8.0, "fcfs": 2.0, "mlfq": 1.5},
    "react": {VLLM: 8.0, "fcfs": 2.0, "mlfq": 1.5},
    "tree": {VLLM: 5.0, "fcfs": 2.0, "mlfq": 2.5},
    "mixed": {VLLM: 15.0, "fcfs": 4.0, "mlfq": 5.5},
}

# --- Figs. 12, 13 and the SRPT figure: latency over rate ----------------------------------------


def load_cell(size: Size, workload: str, policy: str, load: float, device: str) -> Cell:
    is_large = device != DEVICE
    loads = size.large_loads if is_large else size.loads
    return cell(
        "load_run",
        workload=workload,
        policy=policy,
        load=load,
        minutes=size.large_minutes if is_large else size.minutes,
        slots=size.slots,
        device=device,
        largest=max(loads),
    )


LARGE: Final = "a100-70b"
SHORT_NAMES: Final = {VLLM: "vLLM", "fcfs": "vLLM-opt"}
LARGE_POLICIES: Final = tuple(dict.fromkeys(("fcfs", "mlfq", "plas", OURS, "srpt")))


def _policies(workload: str, device: str) -> tuple[str, ...]:
    """On chains `atlas` is `plas`, so it is run where programs fan out only."""
    if device != DEVICE:
        return LARGE_POLICIES
    is_chain = workload in ("chat", "react")
    return tuple(p for p in POLICIES if p != "atlas" or OURS == "atlas" or not is_chain)


def _load_cells(size: Size, device: str) -> list[Cell]:
    loads = size.loads if device == DEVICE else size.large_loads
    return [
        load_cell(size, workload, policy, load, device)
        for workload in WORKLOADS
        for policy in _policies(workload, device)
        for load in loads
    ]


def _sweeps(size: Size, results: Results, device: str) -> dict[str, Sweep]:
    loads = size.loads if device == DEVICE else size.large_loads
    return {
        workload: Sweep(
            workload,
            {
                policy: {
                    load: results[load_cell(size, workload, policy, load, device)] for load in loads
                }
                for policy in _policies(workload, device)
            },
        )
        for workload in WORKLOADS
    }


def _latency_chart(sweep: Sweep, statistic: str, note: str = "") -> str:
    return charts.lines(
        f"{sweep.workload}{note}",
        [Series(p, colour_of(p), sweep.by_rate(p, statistic)) for p in sweep.points],
        "programs per second",
        f"{statistic} ms per token",
        levels=sweep.levels_ms(statistic),
        is_log_y=True,
    )


def _fig12_cells(size: Size) -> list[Cell]:
    return [*_load_cells(size, DEVICE), *_load_cells(size, LARGE)]


def _fig12_find(size: Size, results: Results) -> Findings:
    small, large = (_sweeps(size, results, device) for device in (DEVICE, LARGE))
    rows: list[tuple[object, ...]] = []
    reached: list[bool] = []
    for workload, sweep in small.items():
        for baseline, told in PAPER_RATES[workload].items():
            ours = _best_attained(sweep, baseline)
            reached.append(ours is not None and ours.value >= 0.9 * told)
            at_70b = None if baseline == VLLM else _best_attained(large[workload], baseline)
            srpt, learned = (sweep.best(p, baseline) for p in ("srpt", LEARNING))
            rows.append(
                (PAPER_NAMES[workload], SHORT_NAMES.get(baseline, baseline), told,
                 str(_at_paper_level(sweep, baseline) or NOT_THERE), _with_level(ours),
                 _reached_at(sweep, baseline, told), str(learned or NOT_THERE),
                 str(srpt or NOT_THERE), str(at_70b or NOT_THERE))
            )  # fmt: skip
    mixed = _best_attained(small["mixed"], "fcfs")
    over_vllm = _best_attained(small["mixed"], VLLM)
    capacities = ", ".join(f"{w} {s.capacity:.2g}" for w, s in small.items())
    return Findings(
        answer=f"On the mix attained service sustains {mixed or 'no known multiple of'}"
        f"{' times' if mixed else ''} the rate of vLLM-opt at equal mean latency and"
        f" {over_vllm or 'an unknown multiple'} times that of vLLM without a prefix cache, where"
        f" the paper has 4 and 15; {sum(reached)} of its {len(reached)} ratios are reached.",
        verdict=verdict_of(reached),
        remark="The paper says 'up to', at a level that it does not name, so the largest ratio is"
        " that of the level where it is largest, and the paper's is marked with the lowest level at"
        " which ours is as large; '>' where our curve stays below the level at all loads. 300 ms is"
        " the tightest objective of its Fig. 15. The last columns are at most, too. An order can"
        f" only help while calls wait, and at {size.slots} slots they hardly wait below load 1,"
        f" which is in programs per second: {capacities}; the paper's axes end at 4, 0.8, 0.3 and"
        " 0.8. So its chat is measured deep in overload, where rates last only as long as"
        f" arrivals do (here {size.minutes:g} minutes). ReAct is bound by prefill, which every"
        " order does first; searches are all alike, and attained service only makes them take"
        " turns. Falcon-180B is left out: there is no preset for its 8 GPUs.",
        charts=(
            *(_latency_chart(sweep, "mean", ", 8B") for sweep in small.values()),
            *(_latency_chart(sweep, "mean", ", 70B") for sweep in large.values()),
        ),
        header=("workload", "rate over", "the paper's", "ours, 300 ms", "ours at most",
                "paper's reached at", "gittins", "srpt", "70B"),
        rows=tuple(rows),
        policies=POLICIES,
        data={
            device: {
                workload: {
                    "capacity": sweep.capacity,
                    "levels_ms": sweep.levels_ms(),
                    "mean_ms": {p: sweep.curve(p) for p in sweep.points},
                }
                for workload, sweep in sweeps.items()
            }
            for device, sweeps in ((DEVICE, small), (LARGE, large))
        },
    )  # fmt: skip


def _with_level(ratio: Ratio | None) -> str:
    return f"{ratio}, at {ratio.level_ms:.0f} ms" if ratio else NOT_THERE


def _at_paper_level(sweep: Sweep, baseline: str) -> Ratio | None:
    return best(sweep.at_paper_level(p, baseline) for p in ATTAINED if p in sweep.points)


def _reached_at(sweep: Sweep, baseline: str, told: float) -> str:
    """The lowest level at which attained service is as far ahead as the paper says."""
    found = [
        ratio.level_ms
        for policy in ATTAINED
        if policy in sweep.points
        for ratio in sweep.ratios(policy, baseline)
        if ratio.value >= told
    ]
    return f"{min(found):.0f} ms" if found else "nowhere"


def _best_attained(sweep: Sweep, baseline: str) -> Ratio | None:
    return best(sweep.best(p, baseline) for p in ATTAINED if p in sweep.points)


TAILS: Final = ("p95", "p99")
OTHERS: Final = ("fcfs", "mlfq")


def _fig13_cells(size: Size) -> list[Cell]:
    return _load_cells(size, DEVICE)


def _fig13_find(size: Size, results: Results) -> Findings:
    sweeps = _sweeps(size, results, DEVICE)
    rows: list[tuple[object, ...]] = []
    better: list[bool] = []
    found: list[float] = []
    for workload, sweep in sweeps.items():
        for tail in TAILS:
            slowest = {p: sweep.slowest(p, OTHERS, tail) for p in ATTAINED if p in sweep.points}
            policy = min(slowest, key=lambda p: slowest[p])
            better.append(slowest[policy] <= NO_WORSE)
            over = [sweep.spread(policy, other, tail) for other in OTHERS]
            found += [ratio.value for spread in over for ratio in spread or ()]
            rows.append(
                (workload, tail.upper(), policy, *map(shown_spread, over), slowest[policy],
                 "yes" if better[-1] else "no", "up to 1.7, in 7 of 8",
                 shown_spread(sweep.spread("srpt", "fcfs", tail)))
            )  # fmt: skip
    return Findings(
        answer=f"At every load from 1 up the tail of attained service is no longer than vLLM-opt's"
        f" and mlfq's in {sum(better)} of {len(better)} scenarios; at equal tails it sustains"
        f" {min(found):.2f} to {max(found):.2f} times their rate, by the level. The paper says"
        " better in 7 of 8, by up to 1.7.",
        verdict=verdict_of([sum(better) >= 7, max(found) >= 0.9 * 1.7]),
        remark="Rates at equal P95 or P99 of program token latency, from the level where they"
        " compare worst to that where they do best; 'slowest' is the largest latency over that of"
        " either at one load from 1 up. Of plas and atlas the one with the lower is shown."
        " Token latency favours long programs in its tail: a long program's delay is divided"
        " by many tokens. Docs on the simulator show response times, where long programs pay.",
        charts=tuple(
            _latency_chart(sweep, tail, f", {tail.upper()}")
            for sweep in sweeps.values()
            for tail in TAILS
        ),
        header=("workload", "tail", "policy", "rate over vLLM-opt", "over mlfq", "slowest",
                "no worse than both", "the paper's", "srpt over vLLM-opt"),
        rows=tuple(rows),
        policies=POLICIES,
        data={
            w: {tail: {p: s.curve(p, tail) for p in s.points} for tail in TAILS}
            for w, s in sweeps.items()
        },
    )  # fmt: skip


def _srpt_find(size: Size, results: Results) -> Findings:
    sweeps = _sweeps(size, results, DEVICE)
    load = min(size.loads, key=lambda at: abs(at - 1.2))
    policies = tuple(dict.fromkeys(("fcfs", "mlfq", "plas", LEARNING, OURS)))
    over: dict[str, dict[str, float]] = {
        w: {p: s.curve(p)[load] / s.curve("srpt")[load] for p in policies}
        for w, s in sweeps.items()
    }
    gaps = [row["plas"] for row in over.values()]
    beats = [row["plas"] <= min(row["fcfs"], row["mlfq"]) for row in over.values()]
    return Findings(
        answer=f"At load {load:g} plas is {min(gaps):.2f} to {max(gaps):.2f} times as slow per"
        f" token as SRPT, which knows the future, and beats fcfs and mlfq on {sum(beats)} of"
        f" {len(beats)} workloads.",
        verdict=verdict_of([*beats, max(gaps) > 1.05]),
        remark="The paper speaks of a 'noticeable gap' and names no number. SRPT ranks programs by"
        " the work they have still to receive, preemptively; it is not optimal for the mean"
        " latency per token, so a ratio below 1 is possible. Round robin, which the paper also"
        " draws, is no policy of ours and left out.",
        charts=(
            charts.bars(
                f"Mean token latency over SRPT's, load {load:g}",
                WORKLOADS,
                [
                    Series(p, colour_of(p), [(i, over[w][p]) for i, w in enumerate(WORKLOADS)])
                    for p in policies
                ],
                "times SRPT",
                width=960,
            ),
        ),
        header=("workload", *(name_of(p) for p in policies), "the paper's", "srpt"),
        rows=tuple(
            (w, *(row[p] for p in policies), "noticeable gap", 1.0) for w, row in over.items()
        ),
        policies=policies,
        data={"load": load, "over_srpt": over},
    )


FIGURES: Final = (
    Figure(
        "12",
        "Latency over arrival rate",
        "How many programs per second does an engine sustain at equal mean latency per token?",
        _fig12_cells,
        _fig12_find,
    ),
    Figure(
        "13",
        "The tails",
        "The same for the slowest programs: at equal P95 and P99 latency per token?",
        _fig13_cells,
        _fig13_find,
    ),
    Figure(
        "srpt",
        "The distance to clairvoyance (v1 Fig. 18)",
        "How far is attained service from the order that knows how long every program will be?",
        _fig13_cells,
        _srpt_find,
    ),
)
