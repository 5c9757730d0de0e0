"""Does `gittins` keep its promises? A policy that learns, against what it could know, simulated.

    python -m bench.gittins --quick
    python -m bench.gittins --traces sharegpt.jsonl.gz bfcl.jsonl.gz tot.jsonl.gz
    python -m bench.gittins --traces sharegpt.jsonl.gz --wide lats.jsonl.gz swe.jsonl.gz

The policy starts every run knowing nothing, and learns from that run's programs alone. Bars:

- on mixes (the built-in one; a recorded one with `--traces`, and one of more traces with `--wide`):
  mean program token latency at most
  1.10 of clairvoyant `srpt`, and p99 program response at most 1.0 of `fcfs`;
- on workloads of one kind: mean program token latency at most 1.03 of `plas`;
- when what was learned becomes wrong in mid-run: at most 1.10 of `plas`. `swap`: each kind of the
  mix goes on with the programs of another. `grow`: chats become tree searches, under one name.
  `cut`: tree searches of the recorded mix end with their second step, as wide as before.

`--kinds` says what the policy sees of a kind: the first prompt (default), an agent's name as well,
or nothing. A bar is judged by the median over `--seeds`; the worst seed is shown beside it. Where
calls hardly wait under `fcfs` there is nothing to order, and a bar that is met says little: such
cells are marked. `srpt` is clairvoyant, but no bound for this mean: it is best for the mean
response, and a clairvoyant order by size times work left has a better mean latency per token.

The last line of stdout is one JSON object. The exit status is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from autellix_sglang.errors import ConfigError
from bench.common import Progress, format_table, from_one, print_result, provenance
from bench.replay import poisson_arrivals
from bench.sim import (
    Setup,
    Summary,
    capacity,
    parser,
    recorded_plans,
    setup_of,
    simulate,
    summary,
    synthetic_plans,
)
from bench.sim_device import DeviceError
from bench.sim_engine import Blueprint, blueprint
from bench.stats import NO_QUEUE_WAIT_SHARE
from bench.trace import TraceError

POLICY: Final = "gittins"
POLICIES: Final = ("fcfs", "plas", POLICY, "srpt")
ALIKE: Final = ("chat", "react", "tree")
LOADS: Final = (0.8, 0.9, 1.0, 1.1)
QUICK_LOADS: Final = (1.1,)
QUICK_MINUTES: Final = 3.0
MINUTES: Final = 10.0
SEEDS: Final = 3

ROUNDING: Final = 1e-9  # where nothing queues, all policies are alike but for the last bits
LATENCY: Final = ("program_token_latency_ms", "mean")
TAIL: Final = ("program_response_s", "p99")

Plans = list[Blueprint]
Programs = Callable[[int], Plans]
"""As many programs as there are arrivals, in order."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A bar: `POLICY` over `against` in one measure, and the most it may be."""

    measure: tuple[str, str]
    against: str
    most: float

    def value(self, row: dict[str, Summary]) -> float:
        key, name = self.measure
        return float(row[POLICY][key][name] / row[self.against][key][name])


MIXED_LIMITS: Final = (Limit(LATENCY, "srpt", 1.10), Limit(TAIL, "fcfs", 1.0))
ALIKE_LIMITS: Final = (Limit(LATENCY, "plas", 1.03),)
SHIFT_LIMITS: Final = (Limit(LATENCY, "plas", 1.10),)


@dataclass(frozen=True, slots=True)
class Case:
    """One workload: its programs, the mean of whose work load 1 refers to, and its bars."""

    name: str
    limits: tuple[Limit, ...]
    programs: Programs
    reference: Plans


def steady(plans: Plans) -> Programs:
    return lambda count: [plans[i % len(plans)] for i in range(count)]


def swapped(plans: Plans) -> Programs:
    """From the middle on, programs of each corpus arrive as if they were of the next one."""
    by_corpus: dict[str, Plans] = {}
    for plan in plans:
        by_corpus.setdefault(plan.trace.corpus, []).append(plan)
    names = sorted(by_corpus)
    following = dict(zip(names, [*names[1:], names[0]], strict=True))

    def programs(count: int) -> Plans:
        drawn = steady(plans)(count)
        for i in range(count // 2, count):
            donors = by_corpus[following[drawn[i].trace.corpus]]
            drawn[i] = dataclasses.replace(drawn[i], ladder=donors[i % len(donors)].ladder)
        return drawn

    return programs


def grown(small: Plans, large: Plans) -> Programs:
    """Small programs, from the middle on large ones that look like them on arrival."""

    def programs(count: int) -> Plans:
        drawn = steady(small)(count)
        for i in range(count // 2, count):
            drawn[i] = dataclasses.replace(large[i % len(large)], ladder=drawn[i].ladder)
        return drawn

    return programs


def cut(plans: Plans) -> Programs:
    """From the middle on, tree searches end with the calls of their second step."""
    short = {plan.trace.id: shortened(plan) for plan in plans if plan.trace.kind == "tree"}

    def programs(count: int) -> Plans:
        drawn = steady(plans)(count)
        for i in range(count // 2, count):
            drawn[i] = short.get(drawn[i].trace.id, drawn[i])
        return drawn

    return programs


def shortened(plan: Blueprint, num_steps: int = 2) -> Blueprint:
    """The program's calls that wait for fewer than `num_steps` others, one after the other."""
    depth: dict[str, int] = {}
    for call in plan.trace.calls:
        depth[call.id] = 1 + max((depth[p] for p in plan.trace.waits_for(call)), default=-1)
    calls = tuple(call for call in plan.trace.calls if depth[call.id] < num_steps)
    short = blueprint(dataclasses.replace(plan.trace, calls=calls))
    return dataclasses.replace(short, ladder=plan.ladder)


def cases(options: argparse.Namespace, setup: Setup, largest_load: float) -> list[Case]:
    built_in = {name: synthetic_plans(name, setup, largest_load) for name in (*ALIKE, "mixed")}
    mixed, chat, tree = built_in["mixed"], built_in["chat"], built_in["tree"]
    out = [Case("mixed", MIXED_LIMITS, steady(mixed), mixed)]
    paths: list[Path] = []
    for name, more in (("recorded", options.traces), ("wide", options.wide)):
        if more:
            paths += more
            recorded = recorded_plans(paths, setup, options.scale, options.max_calls)
            out.append(Case(name, MIXED_LIMITS, steady(recorded), recorded))
            out.append(Case(f"{name} swap", SHIFT_LIMITS, swapped(recorded), recorded))
            if any(plan.trace.kind == "tree" for plan in recorded):
                out.append(Case(f"{name} cut", SHIFT_LIMITS, cut(recorded), recorded))
    out += [Case(n, ALIKE_LIMITS, steady(built_in[n]), built_in[n]) for n in ALIKE]
    out.append(Case("swap", SHIFT_LIMITS, swapped(mixed), mixed))
    few = min(len(chat), len(tree))
    out.append(Case("grow", SHIFT_LIMITS, grown(chat, tree), chat[:few] + tree[:few]))
    return out


def run_case(setup: Setup, case: Case, load: float) -> dict[str, Summary]:
    """The policies' summaries; the same programs and arrivals for all."""
    rate = load * capacity(setup, case.reference)
    count = math.ceil(2 * rate * setup.window_s) + 20
    arrivals = [t for t in poisson_arrivals(count, rate, setup.seed) if t < setup.window_s]
    drawn = case.programs(len(arrivals))
    runs = {name: simulate(setup, setup.scheduling(name), drawn, arrivals) for name in POLICIES}
    return {name: summary(run, runs["fcfs"]) for name, run in runs.items()}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bar at one load: its value by seed, and whether their median keeps it.

    `wait_share` is that of `fcfs`, the median over seeds, too.
    """

    case: str
    load: float
    limit: Limit
    values: tuple[float, ...]
    wait_share: float

    @property
    def value(self) -> float:
        return median(self.values)

    @property
    def worst(self) -> float:
        return max(self.values)

    @property
    def is_met(self) -> bool:
        return self.value <= self.limit.most + ROUNDING

    @property
    def has_queue(self) -> bool:
        return self.wait_share >= NO_QUEUE_WAIT_SHARE

    def row(self) -> list[object]:
        measure = " ".join(self.limit.measure)
        verdict = ("met" if self.is_met else "missed") + ("" if self.has_queue else ", no queue")
        bar = f"<= {self.limit.most:.2f} of {self.limit.against}"
        values = f"{self.value:.3f}", f"{self.worst:.3f}"
        return [self.case, f"{self.load:g}", measure, bar, *values, self.wait_share, verdict]

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "load": self.load,
            "measure": " ".join(self.limit.measure),
            "against": self.limit.against,
            "most": self.limit.most,
            "value": self.value,
            "worst": self.worst,
            "values": list(self.values),
            "wait_share": self.wait_share,
            "has_queue": self.has_queue,
            "verdict": "met" if self.is_met else "missed",
        }


def judge(
    options: argparse.Namespace, setup: Setup, loads: Sequence[float]
) -> tuple[list[Verdict], dict[str, Any]]:
    """Every bar, and every policy's numbers of the first seed."""
    seeds = [setup.seed + i for i in range(options.seeds)]
    by_seed = {}
    for seed in seeds:
        each = dataclasses.replace(setup, seed=seed)
        by_seed[seed] = (each, cases(options, each, max(loads)))
    first = by_seed[seeds[0]][1]
    verdicts: list[Verdict] = []
    numbers: dict[str, Any] = {}
    with Progress("runs", len(first) * len(loads) * len(seeds)) as progress:
        for i, case in enumerate(first):
            for load in loads:
                rows = []
                for each, found in by_seed.values():
                    rows.append(run_case(each, found[i], load))
                    progress.advance()
                numbers.setdefault(case.name, {})[f"{load:g}"] = rows[0]
                waiting = median(row["fcfs"]["wait_share"] for row in rows)
                verdicts += [
                    Verdict(case.name, load, limit, tuple(map(limit.value, rows)), waiting)
                    for limit in case.limits
                ]
    return verdicts, numbers


# --- command line -------------------------------------------------------------------------------

HEADER: Final = ("case", "load", "measure", "bar", "median", "worst", "waiting", "verdict")
COLUMNS: Final = ("case", "load", "policy", "mean ms", "p99 ms", "mean s", "p99 s", "preempted")


def number_rows(numbers: dict[str, Any]) -> list[list[object]]:
    return [
        [case, load, policy, found[LATENCY[0]]["mean"], found[LATENCY[0]]["p99"],
         found[TAIL[0]]["mean"], found[TAIL[0]]["p99"], found["preemptions"]]
        for case, by_load in numbers.items()
        for load, row in by_load.items()
        for policy, found in row.items()
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    arguments = parser()
    arguments.prog, arguments.description = "python -m bench.gittins", __doc__
    arguments.add_argument("--seeds", type=from_one, default=SEEDS, help="default: %(default)s")
    arguments.add_argument(
        "--wide", nargs="+", type=Path, default=[], help="more files, for a second recorded mix"
    )
    options = arguments.parse_args(argv)
    if options.quick:
        options.seeds = 1
    options.minutes = options.minutes or (QUICK_MINUTES if options.quick else MINUTES)
    loads = options.loads or (QUICK_LOADS if options.quick else LOADS)
    try:
        setup = setup_of(options)
        verdicts, numbers = judge(options, setup, loads)
    except (ConfigError, TraceError, DeviceError, OSError) as error:
        arguments.error(str(error))
    print(format_table(COLUMNS, number_rows(numbers)))
    print()
    print(format_table(HEADER, [verdict.row() for verdict in verdicts]))
    num_missed = sum(not verdict.is_met for verdict in verdicts)
    result = {
        "device": setup.device.name,
        "minutes": setup.window_s / 60,
        "kinds": setup.kinds.value,
        "bars": [verdict.as_json() for verdict in verdicts],
        "num_missed": num_missed,
        "num_without_queue": sum(not verdict.has_queue for verdict in verdicts),
        "numbers": numbers,
    }
    print_result(result | provenance(started))
    return 1 if num_missed else 0


if __name__ == "__main__":
    sys.exit(main())
