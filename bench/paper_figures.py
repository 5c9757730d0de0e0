"""The figures of the Autellix paper: what to simulate for each, and what to say of it.

A figure names its cells (`bench.paper_runs`), and makes of their results charts, a table (ours,
the paper's, SRPT), one sentence of answer, and a verdict. Every sentence with a number in it is
made from the results. What the paper reports is written here once, in `PAPER_*`; it gives few
numbers and no constants (batch size, queue bounds, quanta), so most comparisons are of direction
and size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple

from autellix_sglang.config import ProgramConfig
from autellix_sglang.testing import FakeEngine, Job
from bench import charts
from bench.charts import Block, Points, Series
from bench.common import format_number
from bench.paper_runs import BLOCK_TOKENS, DEVICE, VLLM, Cell, Result, cell
from bench.sim import rate_at

Results = Mapping[Cell, Result]

OURS: Final = ProgramConfig().policy
POLICIES: Final = tuple(dict.fromkeys((VLLM, "fcfs", "mlfq", "plas", "atlas", OURS, "srpt")))
ATTAINED: Final = tuple(dict.fromkeys(("plas", "atlas", OURS)))
WORKLOADS: Final = ("chat", "react", "tree", "mixed")
PAPER_NAMES: Final = {"chat": "ShareGPT", "react": "BFCL", "tree": "LATS", "mixed": "Mixed"}
NAMES: Final = {VLLM: "vLLM (no prefix cache)", "fcfs": "fcfs (vLLM-opt)"}
COLOURS: Final = {
    "fcfs": "p0", "plas": "p1", "atlas": "p2", "mlfq": "p3", "srpt": "p4", VLLM: "p5",
    "gittins": "p6",
}  # fmt: skip
THE_PAPER: Final = "p8"
OBJECTIVES_MS: Final = (300.0, 500.0, 1000.0)  # the paper's Fig. 15
MULTIPLES: Final = (2.0, 4.0)  # of the unloaded latency
NOT_THERE: Final = "-"

# What the paper (arXiv 2502.13965v1 and its NSDI'26 version) says, figure by figure.
PAPER_WAITS: Final = {"fcfs": 18, "mlfq": 18, "plas": 12}
PAPER_WAIT_SHARE: Final = {
    "chat": {0.5: 0.566, 0.9: 0.804},
    "react": {0.5: 0.386, 0.9: 0.870},
    "tree": {0.5: 0.635, 0.9: 0.913},
}
PAPER_RATES: Final = {
    "chat": {VLLM: 8.0, "fcfs": 2.0, "mlfq": 1.5},
    "react": {VLLM: 8.0, "fcfs": 2.0, "mlfq": 1.5},
    "tree": {VLLM: 5.0, "fcfs": 2.0, "mlfq": 2.5},
    "mixed": {VLLM: 15.0, "fcfs": 4.0, "mlfq": 5.5},
}
PAPER_AXES: Final = {"chat": (0, 4), "react": (0.2, 0.8), "tree": (0.1, 0.3), "mixed": (0.2, 0.8)}
PAPER_TRANSFERS: Final = {3.0: (84, 8), 3.5: (120, 10), 4.0: (254, 14)}  # thousands, vLLM and ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is simulated."""

    minutes: float = 6.0
    loads: tuple[float, ...] = (*(0.2, 0.5, 0.7, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 2.0, 2.5, 3.0),)
    large_minutes: float = 8.0  # of the 70B model, whose rates are half as high
    large_loads: tuple[float, ...] = (0.5, 1.0, 1.2, 1.5, 2.0, 3.0)
    wait_loads: tuple[float, ...] = (0.5, 0.9, 1.1, 1.5, 2.0)
    steady_minutes: float = 60.0
    steady_load: float = 1.1
    size_minutes: float = 20.0
    hit_programs: int = 400
    offline: tuple[int, ...] = (1000, 2000, 4000)
    swap_minutes: float = 6.0
    swap_loads: tuple[float, ...] = (1.2, 1.5, 2.0)
    passes: int = 20
    chats: int = 40  # per replica
    searches: int = 10  # per replica
    replicas: tuple[int, ...] = (1, 2, 4, 8)
    replica_loads: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0)
    slots: int = 64


FULL: Final = Size()
QUICK: Final = Size(
    minutes=2.0,
    loads=(0.5, 1.0, 1.5, 2.5),
    large_minutes=2.0,
    large_loads=(0.5, 1.2, 2.0),
    wait_loads=(0.5, 0.9, 2.5),
    steady_minutes=10.0,
    size_minutes=5.0,
    hit_programs=60,
    offline=(200, 400),
    swap_minutes=2.0,
    swap_loads=(1.5, 2.0),
    passes=3,
    chats=10,
    searches=4,
    replicas=(1, 2, 4),
    replica_loads=(0.5, 1.5, 3.0),
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


def _verdict(shares: Sequence[bool]) -> str:
    """All, some or none of the paper's statements hold here."""
    if not shares:
        return VERDICTS[3]
    return VERDICTS[0] if all(shares) else VERDICTS[1] if any(shares) else VERDICTS[2]


def _text(value: float | None, digits: int = 3) -> str:
    return NOT_THERE if value is None else format_number(value, digits)


# --- Fig. 2: four small programs ----------------------------------------------------------------

FIG2: Final = {"A": (4, 3, 1, 1), "B": (3, 3, 4), "C": (1, 2), "D": (4,)}
FIG2_SLOTS: Final = 2
FIG2_LEVELS: Final = {"levels": 3, "quantum": 1.0, "factor": 4.0}
Ran = list[set[str]]  # by step: the calls that got a token, named like A0


def _fig2_timeline(policy: str) -> tuple[Ran, float]:
    """What runs in each step under a policy of the server, and the units that calls wait."""
    settings: Any = FIG2_LEVELS
    engine = FakeEngine(
        ProgramConfig(policy=policy, beta=0, min_run=0, schedule_interval=1, **settings),
        num_slots=FIG2_SLOTS,
    )
    for program, outputs in FIG2.items():
        for i, count in enumerate(outputs):
            parents = (f"{program}{i - 1}",) if i else ()
            engine.submit(
                Job(rid=f"{program}{i}", program_id=program, num_output=count, parents=parents)
            )
    steps: Ran = []
    done: dict[str, int] = {}
    while not engine.is_idle:
        engine.step()
        known = [*engine.running, *engine.waiting, *engine.ended.values()]
        now = {request.job.rid: request.num_generated for request in known}
        steps.append({rid for rid, count in now.items() if count > done.get(rid, 0)})
        done = now
    return steps, sum(request.call.queue_steps for request in engine.ended.values())


def _fig2_srpt() -> tuple[Ran, float]:
    """Least remaining program first, knowing everything: the bound."""
    left = {program: list(outputs) for program, outputs in FIG2.items()}
    steps: Ran = []
    waited = 0
    while any(left.values()):
        live = [program for program, outputs in left.items() if outputs]
        chosen = sorted(live, key=lambda program: sum(left[program]))[:FIG2_SLOTS]
        steps.append({f"{p}{len(FIG2[p]) - len(left[p])}" for p in chosen})
        waited += len(live) - len(chosen)
        for program in chosen:
            left[program][0] -= 1
            if left[program][0] == 0:
                del left[program][0]
    return steps, waited


def _fig2_find(size: Size, results: Results) -> Findings:
    policies = tuple(dict.fromkeys(("fcfs", "mlfq", "plas", OURS)))
    timelines = {policy: _fig2_timeline(policy) for policy in policies} | {"srpt": _fig2_srpt()}
    end = max(len(steps) for steps, _ in timelines.values())
    waits = {policy: waited for policy, (_, waited) in timelines.items()}
    same = [waits[policy] == PAPER_WAITS[policy] for policy in PAPER_WAITS]
    return Findings(
        answer=f"Calls wait {_text(waits['fcfs'])} units under fcfs, {_text(waits['mlfq'])} under"
        f" mlfq and {_text(waits['plas'])} under plas; the paper counts 18, 18 and 12.",
        verdict=_verdict(same),
        remark="The paper gives no level bounds. With levels that end at 1 and 4 units our plas"
        " waits the paper's 12. With the same levels our mlfq waits less than plas, not more: of"
        " so few programs, each at work at once, it happens to serve the short calls first. Least"
        " remaining program first, which knows the future, is the bound.",
        charts=tuple(
            charts.gantt(
                f"{policy}: {_text(waited)} units of waiting",
                tuple(FIG2),
                _fig2_blocks(steps),
                end,
                "decode steps",
            )
            for policy, (steps, waited) in timelines.items()
        ),
        header=("policy", "ours, units", "the paper's", "srpt"),
        rows=tuple(
            (policy, waits[policy], PAPER_WAITS.get(policy, NOT_THERE), waits["srpt"])
            for policy in policies
        ),
        data={"waiting_units": waits},
    )


def _fig2_blocks(steps: Ran) -> list[Block]:
    rows = list(FIG2)
    return [
        Block(rows.index(rid[0]), at, at + 1, f"p{rows.index(rid[0]) + 1}", rid[1:])
        for at, ran in enumerate(steps)
        for rid in sorted(ran)
    ]


# --- Fig. 4: calls at a time --------------------------------------------------------------------


def _fig4_cell(size: Size, policy: str) -> Cell:
    minutes = size.steady_minutes
    return cell("steady", policy=policy, load=size.steady_load, minutes=minutes, slots=size.slots)


FIG4_POLICIES: Final = tuple(dict.fromkeys((VLLM, "fcfs", "plas", OURS, "srpt")))


def _fig4_cells(size: Size) -> list[Cell]:
    return [_fig4_cell(size, policy) for policy in FIG4_POLICIES]


def _fig4_find(size: Size, results: Results) -> Findings:
    found = {policy: results[_fig4_cell(size, policy)] for policy in FIG4_POLICIES}
    more = {base: found[OURS]["running"] - found[base]["running"] for base in (VLLM, "fcfs")}
    waiting = {p: r["live"] - r["running"] for p, r in found.items()}

    def curves(column: int) -> list[Series]:
        return [
            Series(p, colour_of(p), [(row[0], row[column]) for row in r["curve"]])
            for p, r in found.items()
        ]

    return Findings(
        answer=f"{OURS} keeps {_text(found[OURS]['running'])} calls in the batch on average,"
        f" {more[VLLM]:+.1f} against vLLM and {more['fcfs']:+.1f} against vLLM-opt; the paper"
        " reads about 10 more than vLLM off its plot.",
        verdict=_verdict([more[VLLM] >= 5]),
        remark=f"The paper names neither rate nor batch size; here {size.slots} slots and load"
        f" {size.steady_load:g}. A full batch is full under every order: what differs is how many"
        f" calls wait beside it, on average {_text(waiting['fcfs'])} under fcfs and"
        f" {_text(waiting[OURS])} under {OURS}.",
        charts=(
            charts.lines("In the batch", curves(1), "minutes", "calls"),
            charts.lines("In the engine, waiting or running", curves(2), "minutes", "calls"),
        ),
        header=("policy", "in the batch, mean", "waiting, mean", "the paper's", "srpt, batch"),
        rows=tuple(
            (
                name_of(policy),
                one["running"],
                waiting[policy],
                "about 10 above vLLM" if policy == "plas" else NOT_THERE,
                found["srpt"]["running"],
            )
            for policy, one in found.items()
        ),
        policies=FIG4_POLICIES,
        data={p: {"running": r["running"], "waiting": waiting[p]} for p, r in found.items()},
    )


# --- Fig. 5: the share of time spent waiting ----------------------------------------------------

FIG5_POLICIES: Final = tuple(dict.fromkeys((VLLM, "fcfs", OURS, "srpt")))


def _fig5_cell(size: Size, workload: str, policy: str, load: float) -> Cell:
    return cell(
        "wait_run",
        workload=workload,
        policy=policy,
        load=load,
        minutes=size.minutes,
        slots=size.slots,
        largest=max(size.loads),
    )


def _fig5_cells(size: Size) -> list[Cell]:
    return [
        _fig5_cell(size, workload, policy, load)
        for workload in PAPER_WAIT_SHARE
        for policy in FIG5_POLICIES
        for load in size.wait_loads
    ]


def _fig5_find(size: Size, results: Results) -> Findings:
    share = {
        (w, p, load): 100 * results[_fig5_cell(size, w, p, load)]["wait_share"]
        for w in PAPER_WAIT_SHARE
        for p in FIG5_POLICIES
        for load in size.wait_loads
    }
    low, high = 0.5, 0.9
    rises = [share[w, VLLM, high] > share[w, VLLM, low] for w in PAPER_WAIT_SHARE]
    near = [
        share[w, VLLM, load] >= 100 * told / 2
        for w, by_load in PAPER_WAIT_SHARE.items()
        for load, told in by_load.items()
    ]
    largest = {load: max(share[w, VLLM, load] for w in PAPER_WAIT_SHARE) for load in (low, high)}
    over = max(size.wait_loads)
    beyond = [share[w, VLLM, over] for w in PAPER_WAIT_SHARE]
    return Findings(
        answer=f"Under vLLM's order calls wait for at most {largest[low]:.0f} % of their time at"
        f" load 0.5 and {largest[high]:.0f} % at load 0.9, where the paper measures 39 to 64 % and"
        f" 80 to 91 %; at load {over:g} it is {min(beyond):.0f} to {max(beyond):.0f} %.",
        verdict=_verdict([*near, *rises]),
        remark="A load of 1 here is what a full batch of this baseline can do, so below it calls"
        " hardly wait; the paper does not define its load, and its shares are those of an engine in"
        " lasting overload. ReAct is bound by prefill, which runs first: its calls wait in the"
        " batch, which is not counted.",
        charts=tuple(
            charts.lines(
                f"{workload} ({PAPER_NAMES[workload]})",
                [
                    *(
                        Series(
                            policy,
                            colour_of(policy),
                            [(load, share[workload, policy, load]) for load in size.wait_loads],
                        )
                        for policy in FIG5_POLICIES
                    ),
                    Series(
                        "the paper",
                        THE_PAPER,
                        [(load, 100 * v) for load, v in PAPER_WAIT_SHARE[workload].items()],
                    ),
                ],
                "load",
                "% of time waiting",
            )
            for workload in PAPER_WAIT_SHARE
        ),
        header=("workload", "load", "vLLM, ours %", "the paper's %", f"{OURS} %", "srpt %"),
        rows=tuple(
            (
                workload,
                f"{load:g}",
                share[workload, VLLM, load],
                100 * told if told is not None else NOT_THERE,
                share[workload, OURS, load],
                share[workload, "srpt", load],
            )
            for workload, by_load in PAPER_WAIT_SHARE.items()
            for load in size.wait_loads
            for told in [by_load.get(load)]
        ),
        policies=FIG5_POLICIES,
        keys=((THE_PAPER, "the paper"),),
        data={f"{w}/{p}/{load:g}": value for (w, p, load), value in share.items()},
    )


# --- Fig. 6: who waits --------------------------------------------------------------------------

FIG6_POLICIES: Final = tuple(dict.fromkeys(("fcfs", "mlfq", "plas", OURS, "srpt")))
FIG6_LOAD: Final = 1.2


def _fig6_cell(size: Size, policy: str) -> Cell:
    minutes = size.size_minutes
    return cell("waits", policy=policy, load=FIG6_LOAD, minutes=minutes, slots=size.slots)


def _fig6_cells(size: Size) -> list[Cell]:
    return [_fig6_cell(size, policy) for policy in FIG6_POLICIES]


def _fig6_find(size: Size, results: Results) -> Findings:
    found = {policy: results[_fig6_cell(size, policy)] for policy in FIG6_POLICIES}
    short = {p: _half(r["by_steps"], is_upper=False) for p, r in found.items()}
    long = {p: _half(r["by_steps"], is_upper=True) for p, r in found.items()}
    lowest = short["plas"] < min(short["fcfs"], short["mlfq"])
    unfair = short["fcfs"] > long["fcfs"]
    return Findings(
        answer=f"Short programs wait {_text(short['fcfs'])} times as long as they run under fcfs,"
        f" {_text(short['mlfq'])} under mlfq and {_text(short['plas'])} under plas.",
        verdict=_verdict([lowest, unfair]),
        remark=f"Chat at load {FIG6_LOAD:g}; the paper does not name its own and its curves cannot"
        " be read from the text: fcfs and mlfq make short programs wait most, Autellix least."
        f" The long half waits {_text(long['fcfs'])} under fcfs and {_text(long['plas'])} under"
        " plas: that is who pays.",
        charts=tuple(
            charts.lines(
                title,
                [Series(p, colour_of(p), [(x, y) for x, y in r[key]]) for p, r in found.items()],
                x_label,
                "waiting / executing",
                is_log_x=True,
            )
            for title, key, x_label in (
                ("By decode steps", "by_steps", "decode steps of the program"),
                ("By number of calls", "by_calls", "calls of the program"),
            )
        ),
        header=("policy", "shorter programs", "longer programs", "the paper's", "srpt, shorter"),
        rows=tuple(
            (
                name_of(policy),
                short[policy],
                long[policy],
                {"fcfs": "high for short", "mlfq": "high for short", "plas": "lowest"}.get(
                    policy, NOT_THERE
                ),
                short["srpt"],
            )
            for policy in FIG6_POLICIES
        ),
        policies=FIG6_POLICIES,
        data={p: {"by_steps": r["by_steps"], "by_calls": r["by_calls"]} for p, r in found.items()},
    )


def _half(rows: Sequence[Sequence[float]], *, is_upper: bool) -> float:
    """The mean of the ratios of the lower or the upper half of the size classes."""
    middle = len(rows) // 2
    part = rows[middle:] if is_upper else rows[: max(1, middle)]
    return sum(ratio for _, ratio in part) / len(part)


# --- Fig. 7: what is in the cache already -------------------------------------------------------

FIG7_WORKLOADS: Final = ("chat", "react", "tree")
FIG7_CUT: Final = 2048


def _fig7_cell(size: Size, workload: str) -> Cell:
    return cell("hits", workload=workload, programs=size.hit_programs)


def _fig7_cells(size: Size) -> list[Cell]:
    return [_fig7_cell(size, workload) for workload in FIG7_WORKLOADS]


def _fig7_find(size: Size, results: Results) -> Findings:
    rows = {w: results[_fig7_cell(size, w)]["rows"] for w in FIG7_WORKLOADS}

    def mean(workload: str, column: int, is_short: bool) -> float | None:
        chosen = [row for row in rows[workload] if (row[0] < FIG7_CUT) == is_short]
        total = sum(row[3] for row in chosen)
        return 100 * sum(row[column] * row[3] for row in chosen) / total if total else None

    table = [
        (
            workload,
            "below" if is_short else "above",
            _text(mean(workload, 1, is_short)),
            "above 90",
            _text(mean(workload, 2, is_short)),
            "75 or more" if is_short else "decays",
            "same",
        )
        for workload in FIG7_WORKLOADS
        for is_short in (True, False)
        if mean(workload, 1, is_short) is not None
    ]
    chat = mean("chat", 1, False)
    within = [
        (mean(w, 1, is_short) or 0) > 90 for w in FIG7_WORKLOADS for is_short in (True, False)
    ]
    decays = [
        (mean(w, 2, False) or 0) < (mean(w, 2, True) or 0) for w in ("react", "tree")
    ]  # fmt: skip
    return Findings(
        answer=f"A long chat prompt finds {_text(chat)} % of itself in the cache of its own"
        f" program, a ReAct prompt {_text(mean('react', 1, False))} %; other programs bring"
        f" {_text(mean('react', 2, True))} % of a short ReAct prompt and"
        f" {_text(mean('react', 2, False))} % of a long one.",
        verdict=_verdict([*within, *decays]),
        remark="A property of the workload, whatever the scheduler. Our programs are drawn from the"
        " paper's means: its tokens added per call leave no room for 90 % inside a program,"
        " chat has no system prompt to share here, and a tree search's prompts are fresh but for"
        " their instructions and for samples of one prompt. The paper's chats reach 150k tokens,"
        " ours end at 8k.",
        charts=tuple(
            charts.lines(
                workload,
                [
                    Series("own program", "p1", [(row[0], 100 * row[1]) for row in rows[workload]]),
                    Series(
                        "other programs", "p3", [(row[0], 100 * row[2]) for row in rows[workload]]
                    ),
                ],
                "prompt tokens",
                "% of the prompt in the cache",
                is_log_x=True,
            )
            for workload in FIG7_WORKLOADS
        ),
        header=(
            "workload", f"prompts, {FIG7_CUT} tokens", "own program %", "the paper's",
            "other programs %", "the paper's", "srpt",
        ),
        rows=tuple(table),
        keys=(("p1", "from its own program"), ("p3", "from other programs")),
        data=dict(rows),
    )  # fmt: skip


# --- Figs. 12, 13 and the SRPT figure: latency over rate ----------------------------------------


class Ratio(NamedTuple):
    """A rate over another at a latency level; `is_least` where only the other one crosses it."""

    value: float
    is_least: bool
    level: str

    def __str__(self) -> str:
        return f"{'> ' if self.is_least else ''}{self.value:.2f}"


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

    def ratio(
        self, policy: str, baseline: str, level: str, statistic: str = "mean"
    ) -> Ratio | None:
        """None where the baseline does not cross the level within the loads."""
        at_ms = self.levels_ms(statistic)[level]
        mine = rate_at(self.curve(policy, statistic), at_ms)
        theirs = rate_at(self.curve(baseline, statistic), at_ms)
        if mine is None or theirs is None or theirs == math.inf:
            return None
        if mine == math.inf:
            return Ratio(max(self.points[policy]) / theirs, True, level)
        return Ratio(mine / theirs, False, level)

    def best(self, policy: str, baseline: str, statistic: str = "mean") -> Ratio | None:
        """The largest ratio over all levels: the paper's "up to"."""
        found = (self.ratio(policy, baseline, lv, statistic) for lv in self.levels_ms(statistic))
        return max((r for r in found if r is not None), default=None)


def _load_cell(size: Size, workload: str, policy: str, load: float, device: str) -> Cell:
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
        _load_cell(size, workload, policy, load, device)
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
                    load: results[_load_cell(size, workload, policy, load, device)]
                    for load in loads
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
            srpt = sweep.best("srpt", baseline)
            level = ours.level if ours else NOT_THERE
            rows.append(
                (workload, name_of(baseline), str(ours or NOT_THERE), level,
                 str(at_70b or NOT_THERE), told, str(srpt or NOT_THERE))
            )  # fmt: skip
    mixed = _best_attained(small["mixed"], "fcfs")
    over_vllm = _best_attained(small["mixed"], VLLM)
    capacities = ", ".join(f"{w} {s.capacity:.2g}" for w, s in small.items())
    return Findings(
        answer=f"On the mix attained service sustains {mixed or 'no known multiple of'}"
        f"{' times' if mixed else ''} the rate of vLLM-opt at equal mean latency and"
        f" {over_vllm or 'an unknown multiple'} times that of vLLM without a prefix cache, where"
        f" the paper has 4 and 15; {sum(reached)} of its {len(reached)} ratios are reached.",
        verdict=_verdict(reached),
        remark="Ratios are the largest over the levels drawn (the paper: 'up to', at a level it"
        " does not name); '>' where our curve stays below the level at all loads. Load 1, in"
        f" programs per second: {capacities}; the paper's axes end at 4, 0.8, 0.3 and 0.8. So its"
        " chat is measured deep in overload, where rates last only as long as arrivals do (here"
        f" {size.minutes:g} minutes). Falcon-180B is left out: there is no preset for its 8 GPUs.",
        charts=(
            *(_latency_chart(sweep, "mean", ", 8B") for sweep in small.values()),
            *(_latency_chart(sweep, "mean", ", 70B") for sweep in large.values()),
        ),
        header=("workload", "rate over", "ours, 8B", "at", "ours, 70B", "the paper's", "srpt, 8B"),
        rows=tuple(
            (*row[:2], str(row[2]), row[3], str(row[4]), row[5], str(row[6])) for row in rows
        ),
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
    )


def _best_attained(sweep: Sweep, baseline: str, statistic: str = "mean") -> Ratio | None:
    known = (sweep.best(p, baseline, statistic) for p in ATTAINED if p in sweep.points)
    return max((r for r in known if r is not None), default=None)


TAILS: Final = ("p95", "p99")


def _fig13_cells(size: Size) -> list[Cell]:
    return _load_cells(size, DEVICE)


def _fig13_find(size: Size, results: Results) -> Findings:
    sweeps = _sweeps(size, results, DEVICE)
    rows: list[tuple[object, ...]] = []
    better: list[bool] = []
    largest = 0.0
    for workload, sweep in sweeps.items():
        for tail in TAILS:
            over = {b: _best_attained(sweep, b, tail) for b in ("fcfs", "mlfq")}
            better.append(all(r is not None and r.value > 1.0 for r in over.values()))
            largest = max([largest, *(r.value for r in over.values() if r is not None)])
            srpt = sweep.best("srpt", "fcfs", tail)
            rows.append(
                (workload, tail.upper(), *(str(over[b] or NOT_THERE) for b in over),
                 "yes" if better[-1] else "no", "up to 1.7, in 7 of 8", str(srpt or NOT_THERE))
            )  # fmt: skip
    return Findings(
        answer=f"Attained service has the better tail than both vLLM-opt and mlfq in {sum(better)}"
        f" of {len(better)} scenarios, by up to {largest:.2f} times the rate; the paper says 7 of"
        " 8, by up to 1.7.",
        verdict=_verdict([sum(better) >= 7, largest >= 0.9 * 1.7]),
        remark="Rates at equal P95 or P99 of program token latency, largest over the levels drawn."
        " Token latency favours long programs in its tail: a long program's delay is divided"
        " by many tokens. Docs on the simulator show response times, where long programs pay.",
        charts=tuple(
            _latency_chart(sweep, tail, f", {tail.upper()}")
            for sweep in sweeps.values()
            for tail in TAILS
        ),
        header=("workload", "tail", "over vLLM-opt", "over mlfq", "better than both",
                "the paper's", "srpt over vLLM-opt"),
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
    policies = tuple(dict.fromkeys(("fcfs", "mlfq", "plas", OURS)))
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
        verdict=_verdict([*beats, max(gaps) > 1.05]),
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


# --- Figs. 14 and 15: many replicas -------------------------------------------------------------

ROUTERS: Final = {
    "round-robin": "p0", "least-used": "p3", "sticky": "p1", "autellix": "p2",
}  # fmt: skip
FIG14_WORKLOADS: Final = ("chat", "tree")
FIG14_REPLICAS: Final = 4


def _placement(size: Size, policy: str, workload: str, replicas: int, load: float) -> Cell:
    return cell(
        "placement",
        policy=policy,
        workload=workload,
        replicas=replicas,
        load=load,
        programs=size.searches if workload == "tree" else size.chats,
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
    values: dict[str, list[float]] = {"sticky": [], "autellix": []}
    for workload, sweep in sweeps.items():
        for baseline in ("round-robin", "least-used"):
            found = {policy: sweep.best(policy, baseline) for policy in values}
            for policy, one in found.items():
                values[policy] += [one.value] if one else []
            paper = "up to 1.4"
            texts = [str(one or NOT_THERE) for one in found.values()]
            rows.append((workload, baseline, *texts, paper, NOT_THERE))
    best = max(values["sticky"], default=None)
    ours = max(values["autellix"], default=None)
    return Findings(
        answer=f"The paper's sticky placement sustains up to {_text(best)} times the rate of round"
        f" robin and least used on 4 replicas, our `autellix` placement up to {_text(ours)} times.",
        verdict=_verdict([(best or 0) >= 0.9 * 1.4, min(values["sticky"], default=0.0) >= 1.0]),
        remark="The router's own placement functions over `bench.routing`'s replicas, at the"
        " preset's rates; calls inside a replica run first come, first served (the paper: PLAS"
        " and ATLAS everywhere), so SRPT has no column. Calls with prompts of up to 2,048 tokens"
        " are not sticky in the paper's rule. The 70B half of the figure is left out.",
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
        header=("workload", "rate over", "sticky (Algorithm 2)", "autellix", "the paper's", "srpt"),
        rows=tuple(rows),
        keys=tuple((css, router) for router, css in ROUTERS.items()),
        data={
            w: {p: [list(point) for point in s.by_rate(p)] for p in ROUTERS}
            for w, s in sweeps.items()
        },
    )


FIG15_ROUTERS: Final = ("sticky", "autellix")
FIG15_LEVEL: Final = "4x"


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
    one, many = rates["autellix"][first], rates["autellix"][last]
    scaling = many / one / (last / first) if one and many else None
    told = "-" if scaling is None else f"{100 * scaling:.0f}"
    return Findings(
        answer=f"{last} replicas sustain {_text(many)} chat programs per second at"
        f" {at_ms:.0f} ms per token, {told} % of {last} times what one does; the paper scales"
        " linearly to 8 replicas and about 30 programs per second.",
        verdict=_verdict([scaling is not None and scaling >= 0.9]),
        remark="Its objectives of 0.3, 0.5 and 1 s per token are reached only in long overload, so"
        f" the level here is {FIG15_LEVEL} the unloaded latency of one replica. Calls inside a"
        " replica run first come, first served, so SRPT has no column.",
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
        header=("replicas", "sticky, programs/s", "autellix, programs/s", "the paper's", "srpt"),
        rows=tuple(
            (str(n), *(_text(rates[p][n]) for p in FIG15_ROUTERS), "linear", NOT_THERE)
            for n in size.replicas
        ),
        keys=(*((ROUTERS[p], p) for p in FIG15_ROUTERS), ("p0", "linear")),
        data={"level_ms": at_ms, "rates": rates},
    )


def _sustained(sweep: Sweep, policy: str, at_ms: float) -> float | None:
    load = rate_at(sweep.curve(policy), at_ms)
    return None if load is None or load == math.inf else load * sweep.capacity


# --- Fig. 16: everything at once ----------------------------------------------------------------

FIG16_POLICIES: Final = tuple(dict.fromkeys((VLLM, "fcfs", "mlfq", "plas", OURS, "srpt")))


def _fig16_cell(size: Size, policy: str, programs: int) -> Cell:
    return cell("offline", policy=policy, programs=programs, slots=size.slots)


def _fig16_cells(size: Size) -> list[Cell]:
    return [_fig16_cell(size, p, count) for count in size.offline for p in FIG16_POLICIES]


def _fig16_find(size: Size, results: Results) -> Findings:
    found = {
        count: {p: results[_fig16_cell(size, p, count)] for p in FIG16_POLICIES}
        for count in size.offline
    }
    saved = {
        (count, base): 1 - by["plas"]["makespan_s"] / by[base]["makespan_s"]
        for count, by in found.items()
        for base in (VLLM, "fcfs", "mlfq")
    }
    against = {b: [100 * v for (_, base), v in saved.items() if base == b] for b in (VLLM, "fcfs")}
    most = max(size.offline)
    return Findings(
        answer=f"plas ends {_span(against[VLLM])} % sooner than vLLM and {_span(against['fcfs'])} %"
        " sooner than vLLM-opt (minus: later); the paper has 10 to 40 % shorter makespans.",
        verdict=_verdict([max(against[VLLM]) >= 10, max(against["fcfs"]) >= 10]),
        remark="With everything there at once, no order can do more than keep the batch full to"
        " the end; what is saved is recomputation. The paper does not say against which baseline"
        f" its numbers are. Its mlfq runs out of 1.2 TB of host memory at 4,000 programs; ours"
        f" holds {_text(found[most]['mlfq']['host_gb'])} GB of swapped KV at {most:,}"
        f" ({_text(found[most]['plas']['host_gb'])} under plas), as a preempted call keeps its"
        " shared prefix on the device.",
        charts=(
            charts.bars(
                "Makespan",
                [f"{count:,}" for count in size.offline],
                [
                    Series(
                        p,
                        colour_of(p),
                        [(i, by[p]["makespan_s"] / 60) for i, by in enumerate(found.values())],
                    )
                    for p in FIG16_POLICIES
                ],
                "minutes",
                width=960,
            ),
        ),
        header=("programs", "policy", "makespan, s", "over vLLM-opt", "the paper's",
                "over srpt", "mean response, s", "preemptions", "KV on host, GB"),
        rows=tuple(
            (
                f"{count:,}",
                name_of(p),
                one["makespan_s"],
                one["makespan_s"] / by["fcfs"]["makespan_s"],
                "0.6 to 0.9" if p == "plas" else NOT_THERE,
                one["makespan_s"] / by["srpt"]["makespan_s"],
                one["response_s"],
                one["preemptions"],
                one["host_gb"],
            )
            for count, by in found.items()
            for p, one in by.items()
        ),
        policies=FIG16_POLICIES,
        data={str(count): by for count, by in found.items()},
    )  # fmt: skip


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"


# --- Fig. 17 and the swap figure ----------------------------------------------------------------

FIG17_POLICIES: Final = tuple(dict.fromkeys(("fcfs", "mlfq", "plas", OURS, "srpt")))
PASS_POLICIES: Final = tuple(dict.fromkeys(("fcfs", "mlfq", "plas", OURS)))
PASS_WAITING: Final = 512


def _swap_cell(size: Size, policy: str, load: float) -> Cell:
    return cell("swap", policy=policy, load=load, minutes=size.swap_minutes, slots=size.slots)


def _pass_cell(size: Size, policy: str) -> Cell:
    return cell(
        "scheduler_pass",
        policy=policy,
        waiting=PASS_WAITING,
        running=size.slots,
        repeats=size.passes,
    )


def _fig17_cells(size: Size) -> list[Cell]:
    load = size.swap_loads[0]
    return [
        *(_swap_cell(size, policy, load) for policy in FIG17_POLICIES),
        *(_pass_cell(size, policy) for policy in PASS_POLICIES),
    ]


def _fig17_find(size: Size, results: Results) -> Findings:
    load = size.swap_loads[0]
    found = {p: results[_swap_cell(size, p, load)] for p in FIG17_POLICIES}
    passes = {p: results[_pass_cell(size, p)]["all_changed_ms"] for p in PASS_POLICIES}
    parts = ("waiting_s", "executing_s", "copying_s")
    less_wait = found["plas"]["waiting_s"] < min(found[p]["waiting_s"] for p in ("fcfs", "mlfq"))
    less_swap = found["plas"]["copying_s"] < found["mlfq"]["copying_s"]
    between = passes["fcfs"] <= passes["plas"] <= passes["mlfq"]
    return Findings(
        answer=f"A program's calls wait {_text(found['fcfs']['waiting_s'])} s in all under fcfs,"
        f" {_text(found['mlfq']['waiting_s'])} s under mlfq and"
        f" {_text(found['plas']['waiting_s'])} s under plas; copying KV takes"
        f" {_text(found['mlfq']['copying_s'])} s per program under mlfq and"
        f" {_text(found['plas']['copying_s'])} s under plas.",
        verdict=_verdict([less_wait, less_swap, between]),
        remark=f"Mixed programs at load {load:g}, all KV of preempted calls going to the host (the"
        " paper's machine; ours keeps it on the device while it can). The paper gives no times:"
        " wait and swap shrink, the scheduler costs more than vLLM-opt's and less than mlfq's."
        f" A scheduler pass here, {PASS_WAITING} calls waiting and each of their keys changed, is"
        " measured on the machine that ran this, so it is the one number that does not repeat.",
        charts=tuple(
            charts.bars(
                words,
                [name_of(p) for p in FIG17_POLICIES],
                [Series(words, css, [(i, found[p][key]) for i, p in enumerate(FIG17_POLICIES)])],
                "seconds per program, summed over its calls",
            )
            for key, words, css in zip(
                parts, ("Waiting", "Executing", "Copying KV"), ("wait", "run", "p3"), strict=True
            )
        ),
        header=("policy", "waiting, s", "executing, s", "copying, s", "pass, ms", "the paper's",
                "srpt, waiting s"),
        rows=tuple(
            (
                name_of(p),
                *(found[p][part] for part in parts),
                _text(passes.get(p)),
                "less wait and swap" if p == "plas" else NOT_THERE,
                found["srpt"]["waiting_s"],
            )
            for p in FIG17_POLICIES
        ),
        data={"seconds": found, "scheduler_pass_ms": passes},
    )  # fmt: skip


def _swap_cells(size: Size) -> list[Cell]:
    return [
        _swap_cell(size, policy, load)
        for load in size.swap_loads
        for policy in ("fcfs", "mlfq", "plas", "srpt")
    ]


def _swap_find(size: Size, results: Results) -> Findings:
    found = {
        load: {p: results[_swap_cell(size, p, load)] for p in ("fcfs", "mlfq", "plas", "srpt")}
        for load in size.swap_loads
    }
    fewer = {
        load: by["plas"]["blocks"] / by["plas"]["transfers"]
        for load, by in found.items()
        if by["plas"]["transfers"]
    }
    told = [vllm / ours for vllm, ours in PAPER_TRANSFERS.values()]
    shown = f"{_span(list(fewer.values()))} times" if fewer else "no"
    return Findings(
        answer=f"One transfer per swapped call in place of one per KV block makes {shown} fewer"
        f" transfers; the paper has {min(told):.0f} to {max(told):.0f} times fewer.",
        verdict=_verdict([bool(fewer) and max(fewer.values()) >= 0.9 * min(told)]),
        remark=f"Blocks of {BLOCK_TOKENS} tokens, as in vLLM; the paper's 18 times is what calls of"
        " about 290 private tokens give. Its rates of 3 to 4 programs/s have no load attached, so"
        " these are mixed programs at the loads in the table. The seconds are the tokens over the"
        " host link's bandwidth; what each small transfer adds, and so the paper's 3 to 7 times"
        " shorter swap times and 1.3 times the throughput, needs a GPU: `make gpu-check` measures"
        " our kernel against copies block by block.",
        charts=(
            charts.bars(
                "Transfers under plas",
                [f"load {load:g}" for load in size.swap_loads],
                [
                    Series(
                        "block by block",
                        "p5",
                        [(i, by["plas"]["blocks"]) for i, by in enumerate(found.values())],
                    ),
                    Series(
                        "one per call",
                        "p1",
                        [(i, by["plas"]["transfers"]) for i, by in enumerate(found.values())],
                    ),
                ],
                "transfers",
                is_log_y=True,
                width=960,
            ),
        ),
        header=("load", "policy", "block by block", "one per call", "ratio", "the paper's",
                "copying, s", "tokens/s", "srpt, tokens/s"),
        rows=tuple(
            (
                f"{load:g}",
                name_of(p),
                one["blocks"],
                one["transfers"],
                one["blocks"] / one["transfers"] if one["transfers"] else NOT_THERE,
                "10.5 to 18" if p == "plas" else NOT_THERE,
                one["copied_s"],
                one["tokens_per_s"],
                by["srpt"]["tokens_per_s"],
            )
            for load, by in found.items()
            for p, one in by.items()
        ),
        keys=(("p5", "block by block"), ("p1", "one per call")),
        data={f"{load:g}": by for load, by in found.items()},
    )  # fmt: skip


# --- all of them --------------------------------------------------------------------------------


def _no_cells(size: Size) -> list[Cell]:
    return []


FIGURES: Final[dict[str, Figure]] = {
    figure.number: figure
    for figure in (
        Figure(
            "2",
            "Four programs, two slots",
            "Four programs of short calls start at once on an engine with room for two calls. How"
            " long do their calls wait?",
            _no_cells,
            _fig2_find,
        ),
        Figure(
            "4",
            "Calls at a time",
            "An hour of chat on one A100: how many calls does the engine work on at a time?",
            _fig4_cells,
            _fig4_find,
        ),
        Figure(
            "5",
            "The share of time spent waiting",
            "Which part of a program's time in the engine is spent waiting in its queue?",
            _fig5_cells,
            _fig5_find,
        ),
        Figure(
            "6",
            "Who waits",
            "Do short programs wait longer, for what they run, than long ones?",
            _fig6_cells,
            _fig6_find,
        ),
        Figure(
            "7",
            "What is in the cache already",
            "How much of a prompt has the engine seen before, from its program and from others?",
            _fig7_cells,
            _fig7_find,
        ),
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
        Figure(
            "16",
            "Everything at once",
            "Thousands of chats are there from the start: when is the last one done?",
            _fig16_cells,
            _fig16_find,
        ),
        Figure(
            "17",
            "Where the time goes",
            "How much of a program's time is waiting, executing, copying KV and scheduling?",
            _fig17_cells,
            _fig17_find,
        ),
        Figure(
            "srpt",
            "The distance to clairvoyance (v1 Fig. 18)",
            "How far is attained service from the order that knows how long every program will be?",
            _fig13_cells,
            _srpt_find,
        ),
        Figure(
            "swap",
            "Moving KV in one piece (v1 Fig. 19)",
            "How many transfers does it take to move preempted calls to the host and back?",
            _swap_cells,
            _swap_find,
        ),
    )
}
