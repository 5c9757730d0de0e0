"""What does a router cost, and what is its placement worth?

    python -m bench.router --quick
    python -m bench.router --trace bfcl.jsonl.gz --trace sharegpt.jsonl.gz --replicas 4 16

Two parts. *Placement*: programs run in virtual time over fake engines (`bench/routing.py`), once
per policy; the same arrivals, so only placement differs. *Overhead*: real processes and sockets, a
replica that answers at once, and calls through nothing, through our router, and through the
published sglang-router where it is installed (`bench/routing_overhead.py`).

`load` is the arrival rate over what the replicas could serve in full batches with every program's
own prefixes cached; above 1 there are queues. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from autellix_sglang.router.testing import Timing
from bench import synthetic, trace
from bench.common import format_table, print_result, provenance, say
from bench.replay import poisson_arrivals
from bench.routing import POLICY_NAMES, Simulation, service_s
from bench.routing_overhead import measure
from bench.trace import TraceProgram

KINDS = ("chat", "react", "tree")  # built in, where no trace is given


def workloads(paths: Sequence[str], num_programs: int, seed: int) -> dict[str, list[TraceProgram]]:
    """A random sample of each trace, or the built-in kinds."""
    rng = random.Random(seed)
    if not paths:
        return {kind: list(synthetic.generate(kind, num_programs, seed)) for kind in KINDS}
    found = {}
    for path in paths:
        programs = trace.load(path)
        found[programs[0].corpus] = rng.sample(programs, min(num_programs, len(programs)))
    return found


def place(
    programs: Sequence[TraceProgram], num_replicas: int, load: float, timing: Timing, seed: int
) -> list[dict[str, Any]]:
    """One run per policy, with as many copies of the programs as keep the replicas busy as long."""
    copies = max(1, num_replicas // 4)
    many = list(programs) * copies
    rate = load * num_replicas / fmean(service_s(program, timing) for program in programs)
    arrivals = poisson_arrivals(len(many), rate, seed)
    return [Simulation(policy, num_replicas, timing).run(many, arrivals) for policy in POLICY_NAMES]


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs; each row says by how much `autellix` is quicker or slower than its policy."""
    results = []
    for name, programs in workloads(options.trace, options.programs, options.seed).items():
        for num_replicas in options.replicas:
            say(f"{name}: {len(programs)} programs on {num_replicas} replicas, every policy")
            rows = place(programs, num_replicas, options.load, Timing(), options.seed)
            ours = rows[0]["program_token_latency_ms"]["mean"]
            for row in rows:
                mean = row["program_token_latency_ms"]["mean"]
                results.append({"workload": name, "load": options.load, **row})
                results[-1]["autellix_over_this"] = ours / mean
    return results


def show(results: Sequence[dict[str, Any]]) -> str:
    header = [
        "workload", "replicas", "policy", "ms/token mean", "p99", "hit rate", "balance",
        "autellix / this",
    ]  # fmt: skip
    rows = [
        [
            r["workload"], r["replicas"], r["policy"], r["program_token_latency_ms"]["mean"],
            r["program_token_latency_ms"]["p99"], r["prefix_hit_rate"], r["balance"],
            r["autellix_over_this"],
        ]
        for r in results
    ]  # fmt: skip
    return format_table(header, rows)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.router", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--quick", action="store_true", help="fewer programs and calls")
    made.add_argument("--trace", action="append", default=[], help="a trace file; may be repeated")
    made.add_argument("--replicas", type=int, nargs="+", default=[4, 16])
    made.add_argument("--load", type=float, default=1.3, help="of capacity (%(default)s)")
    made.add_argument("--programs", type=int, default=300, help="per workload (%(default)s)")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--seconds", type=float, default=5.0, help="per overhead measurement")
    made.add_argument("--only", choices=["placement", "overhead"], help="one of the two parts")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    options = parser().parse_args(argv)
    if options.quick:
        options.programs, options.seconds = min(options.programs, 100), 2.0
    result: dict[str, Any] = {"results": [], "overhead": None, "peer": None}
    if options.only != "overhead":
        result["results"] = compare(options)
        print(show(result["results"]))
    if options.only != "placement":
        result |= measure(options.seconds)
        rows = [[name, *row.values()] for name, row in result["paths"].items() if row]
        print(format_table(["path", *next(iter(result["paths"].values()))], rows))
    print_result(result | provenance(started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
