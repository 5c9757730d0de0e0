"""What is the critical path worth? ATLAS by parents, by the scalar, and inside of programs only.

    python -m bench.atlas --quick
    python -m bench.atlas --workloads tree --loads 1.2 --minutes 10

Simulates (`bench.sim_engine`) workloads with fan-outs, alone and mixed with chats and ReAct agents,
under the server's policies and under variants of them that exist here only:

| name | between programs | inside a program |
|---|---|---|
| `fcfs`, `plas`, `atlas` | the server's; `atlas` is told each call's parents | arrival |
| `atlas-scalar` | as `atlas`, told of no parents: the program's longest chain so far | arrival |
| `plas-short` | work, as `plas` | the shortest path so far first |
| `plas-long` | work, as `plas` | the longest path so far first |

The last two are "work between programs with the critical path inside one"; a path is known up to
a call and not beyond, so either end of it may be the better guess. All are compared on the same
programs and arrivals, as ratios to `plas`; below 1 is better.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from autellix_sglang.core.planner import Planner
from autellix_sglang.core.policy import POLICIES, Levels
from autellix_sglang.core.program import Call
from bench.common import Progress, format_table, new_parser, run_benchmark
from bench.replay import poisson_arrivals
from bench.sim import SEED, Setup, capacity
from bench.sim_device import PRESETS
from bench.sim_engine import Blueprint, SimEngine, blueprint
from bench.sim_engine import _Table as SimTable
from bench.stats import ProgramRecord, Run, summarize
from bench.synthetic import generate
from bench.trace import sample

WORKLOADS: Final[Mapping[str, tuple[str, ...]]] = {
    "tree": ("tree",),
    "tree+chat+react": ("tree", "chat", "react"),
    "map_reduce": ("map_reduce",),
    "map_reduce+chat+react": ("map_reduce", "chat", "react"),
}
BASELINE: Final = "plas"
QUICK_MINUTES: Final = 4.0
QUICK_LOADS: Final = (1.2,)
NUM_DRAWN: Final = 60  # enough to estimate the capacity from


class UntoldTable(SimTable):
    """A table whose clients say nothing of parents."""

    def open_call(self, rid: str, **tag: Any) -> Call:
        return super().open_call(rid, **{**tag, "parent_call_ids": None})


class PathTable(SimTable):
    """A table that orders a program's calls of one level by their paths; `sign` 1: shortest first.

    The path up to a call is fixed when it arrives, so its place in the order of arrival, which
    decides inside a program, can stand for it.
    """

    sign = 1

    def _place(self, call: Call) -> None:
        if call.order_key == (0, 0, 0):  # placed for the first time
            call.seq += self.sign * round(call.base_path) * 10**9
        super()._place(call)


class LongestFirstTable(PathTable):
    sign = -1


@dataclass(frozen=True, slots=True)
class Variant:
    """A policy of the server, and the table that it runs on."""

    policy: str
    table: type[SimTable] = SimTable


VARIANTS: Final[Mapping[str, Variant]] = {
    "fcfs": Variant("fcfs"),
    "plas": Variant("plas"),
    "atlas": Variant("atlas"),
    "atlas-scalar": Variant("atlas", UntoldTable),
    "plas-short": Variant("plas", PathTable),
    "plas-long": Variant("plas", LongestFirstTable),
}


class VariantEngine(SimEngine):
    """A simulated engine on a variant's table."""

    def __init__(self, setup: Setup, variant: Variant) -> None:
        scheduling = setup.scheduling(variant.policy)
        super().__init__(
            setup.device, scheduling, num_slots=setup.num_slots, chunk_tokens=setup.chunk_tokens
        )
        config = scheduling.config
        levels = Levels(config.levels, config.quantum, config.factor)
        self.table = variant.table(POLICIES[variant.policy], levels, config.beta, config.ttl)
        self.planner = Planner(self.table, config.min_run, config.schedule_interval)


def plans_of(workload: str, num_programs: int, seed: int) -> list[Blueprint]:
    corpora = [generate(kind, num_programs, seed) for kind in WORKLOADS[workload]]
    return [blueprint(program) for program in sample(corpora, num_programs, seed).programs]


def compare(workload: str, setup: Setup, load: float) -> dict[str, dict[str, Any]]:
    """A summary for each variant, of the same programs and arrivals."""
    rate = load * capacity(setup, plans_of(workload, NUM_DRAWN, setup.seed))
    expected = math.ceil(rate * setup.window_s)
    arrivals = poisson_arrivals(2 * expected + 20, rate, setup.seed)
    arrivals = [at_s for at_s in arrivals if at_s < setup.window_s]
    plans = plans_of(workload, len(arrivals), setup.seed)
    rows = {}
    with Progress(workload, len(VARIANTS)) as progress:
        for name, variant in VARIANTS.items():
            rows[name] = row(VariantEngine(setup, variant).run(plans, arrivals))
            progress.advance()
    return rows


def row(run: Run) -> dict[str, Any]:
    """Means and tails of all programs, and the mean latency of each kind."""
    whole: dict[str, Any] = summarize(run)
    by_kind: dict[str, list[ProgramRecord]] = {}
    for program in run.programs:
        by_kind.setdefault(program.kind, []).append(program)
    return {
        "program_token_latency_ms": whole["program_token_latency_ms"],
        "program_response_s": whole["program_response_s"],
        "preemptions": whole["preemptions"],
        "mean_response_s_by_kind": {
            kind: _mean_response_s(replace(run, programs=tuple(programs)))
            for kind, programs in sorted(by_kind.items())
        },
    }


def _mean_response_s(run: Run) -> float:
    numbers: dict[str, Any] = summarize(run)
    mean: float = numbers["program_response_s"]["mean"]
    return mean


def benchmark(workloads: Sequence[str], setup: Setup, loads: Sequence[float]) -> dict[str, Any]:
    """The result without its provenance."""
    return {
        "device": setup.device.name,
        "slots": setup.num_slots,
        "minutes": setup.window_s / 60,
        "results": {
            workload: {f"{load:g}": compare(workload, setup, load) for load in loads}
            for workload in workloads
        },
    }


def table(result: Mapping[str, Any]) -> str:
    rows: list[list[object]] = []
    for workload, by_load in result["results"].items():
        for load, by_name in by_load.items():
            base = by_name[BASELINE]
            for name, numbers in by_name.items():
                rows.append([workload, load, name, *_ratios(numbers, base), *_kinds(numbers, base)])
    header = ["workload", "load", "policy", "latency", "mean resp", "p99 resp", "by kind"]
    return "as ratios to plas\n\n" + format_table(header, rows)


def _ratios(numbers: Mapping[str, Any], base: Mapping[str, Any]) -> list[float]:
    keys = [("program_token_latency_ms", "mean"), ("program_response_s", "mean"),
            ("program_response_s", "p99")]  # fmt: skip
    return [numbers[key][part] / base[key][part] for key, part in keys]


def _kinds(numbers: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    by_kind = base["mean_response_s_by_kind"]
    found = numbers["mean_response_s_by_kind"]
    return [" ".join(f"{kind} {found[kind] / by_kind[kind]:.2f}" for kind in found)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = new_parser("bench.atlas", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="one load, 4 minutes of arrivals")
    add("--device", choices=PRESETS, default="a100-8b", help="default: %(default)s")
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="default: all")
    add("--loads", nargs="+", type=float, help="shares of the capacity (default: 0.9 1.2 1.5)")
    add("--minutes", type=float, help="how long programs arrive (default: 10)")
    add("--seed", type=int, default=SEED, help="default: %(default)s")

    def run(options: argparse.Namespace) -> dict[str, Any]:
        minutes = options.minutes or (QUICK_MINUTES if options.quick else 10.0)
        loads = options.loads or (QUICK_LOADS if options.quick else (0.9, 1.2, 1.5))
        setup = Setup(device=PRESETS[options.device], seed=options.seed, window_s=60 * minutes)
        return benchmark(options.workloads, setup, loads)

    return run_benchmark(parser, argv, run, table)


if __name__ == "__main__":
    sys.exit(main())
