"""What does a router cost, and what is its placement worth?

    python -m bench.router --quick
    python -m bench.router --trace bfcl.jsonl.gz --trace sharegpt.jsonl.gz --replicas 4 16
    python -m bench.router --mix --trace bfcl.jsonl.gz --trace sharegpt.jsonl.gz --out mix.json
    python -m bench.router --only placement --policies autellix --replicas 1000 --minutes 0.05
    python -m bench.router --only overhead --peer-python peer/bin/python
    python -m bench.router --only live --trace bfcl.jsonl.gz --peer-python peer/bin/python

*Placement*: programs arrive in a Poisson process at simulated engines (`bench/sim_fleet.py`), once
per policy; the same arrivals, so only placement differs. `--policies pooled` is a bound: one engine
as wide as all replicas, with one queue and one cache. *Scaling*: the rate that 1, 2, 4 and 8
replicas sustain under `autellix`, which is where the mean program token latency has doubled from
that of one replica at the lowest load. *Overhead*: real processes and sockets, a replica that
answers at once, and calls through nothing, through our router, and through the published
sglang-router where it is installed (`bench/routing_overhead.py`). *Live*, only if asked for: the
first workload through both routers before replicas that sleep (`bench/routing_live.py`).

Every trace is a workload, or with `--mix` all of them are one, in equal numbers of programs.
Programs arrive for `--minutes`, or five times what the programs of a trace spend in recorded gaps
if that is longer: before that there is no steady state. Load 1 is the rate that would keep every
replica in full batches all the time with all that programs share with their own history cached, as
in `bench.sim`. That is more than any placement reaches, so there are queues at 1 and, for
placements that lose the cache, well below it. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.policy import POLICIES as ENGINE_POLICIES
from bench import routing_live, trace
from bench.common import (
    Progress,
    format_table,
    from_one,
    new_parser,
    positive,
    print_result,
    provenance,
    say,
    write_json,
)
from bench.replay import poisson_arrivals
from bench.routing_overhead import Overhead
from bench.sim import FEW_PROGRAMS, SLOTS, Setup, capacity, rate_at, simulate
from bench.sim_device import PRESETS, pooled
from bench.sim_engine import Blueprint, blueprint
from bench.sim_fleet import POLICY_NAMES, SimFleet
from bench.stats import ratio, summarize
from bench.synthetic import corpora

PARTS: Final = ("placement", "scaling", "overhead")
LIVE: Final = "live"  # only if asked for
MIX: Final = "mix"
POOLED: Final = "pooled"  # no policy, but a bound for all of them; only if asked for
KINDS: Final = ("react", "chat", "tree")  # built in, where no trace is given
QUICK_KINDS: Final = ("react", "chat")
OURS: Final = "autellix"
MORE_POLICIES: Final = (OURS, "least-used", "round-robin")  # on more than the first fleet
SCALING_LOADS: Final = (0.5, 0.8, 0.95, 1.1, 1.25)
MORE_SCALING_LOADS: Final = (1.5, 2.0, 3.0)  # while one replica's latency has not doubled
SCALING_REPLICAS: Final = (1, 2, 4, 8)
SETTLING: Final = 5  # arrivals last at least so many times the mean gaps of a program
LIVE_MINUTES: Final = 1.0  # at most, of arrivals
# What issue 4 asks for: mean program token latency of `autellix` over that of another policy.
BARS: Final = {"round-robin": 0.72, "least-used": 0.72, "sticky": 1.0, "cache-aware": 1.0}


Sources = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run. `sources` are built-in kinds or trace files, whose programs come in equal parts."""

    sources: Sources
    num_replicas: int = 4
    load: float = 1.0
    policy: str = OURS
    engine_policy: str = ProgramConfig().policy
    device: str = "a100-8b"
    minutes: float = 10.0
    seed: int = 1

    @property
    def name(self) -> str:
        return name_of(self.sources)

    @property
    def setup(self) -> Setup:
        config = ProgramConfig(policy=self.engine_policy)
        return Setup(device=PRESETS[self.device], config=config, seed=self.seed)


def name_of(sources: Sources) -> str:
    """What tables call a workload: its only source, without folders and endings, or "mix"."""
    return Path(sources[0]).name.partition(".")[0] if len(sources) == 1 else MIX


def programs_of(
    sources: Sources, count: int, seed: int, max_tokens: int
) -> tuple[trace.TraceProgram, ...]:
    """So many programs, evenly from all sources, each call within `max_tokens`."""
    drawn = [
        corpus
        for source in sources
        for corpus in ([trace.load(source)] if "." in source else corpora(source, count, seed))
    ]
    return trace.sample(drawn, count, seed, max_prompt_tokens=max_tokens).programs


@lru_cache(maxsize=4)
def _plans(sources: Sources, count: int, seed: int, max_tokens: int) -> tuple[Blueprint, ...]:
    return tuple(map(blueprint, programs_of(sources, count, seed, max_tokens)))


def _settled_s(minutes: float, plans: Sequence[Blueprint]) -> float:
    """For how long programs arrive."""
    gaps_s: dict[str, list[float]] = {}
    for plan in plans:
        gap_s = sum(max(0.0, call.gap_s or 0.0) for call in plan.trace.calls)
        gaps_s.setdefault(plan.trace.corpus, []).append(gap_s)
    return max(60 * minutes, SETTLING * max(map(fmean, gaps_s.values())))


def run(task: Task) -> dict[str, Any]:
    """The results of one run; raises `AssertionError` if a call was lost."""
    setup = task.setup
    max_tokens = setup.device.kv_tokens // 4
    few = _plans(task.sources, 3 * FEW_PROGRAMS, task.seed, max_tokens)
    rate = task.load * task.num_replicas * capacity(setup, few)
    count = math.ceil(_settled_s(task.minutes, few) * rate)
    plans = _plans(task.sources, count, task.seed, max_tokens)
    arrivals_s = poisson_arrivals(count, rate, task.seed)
    if task.policy == POOLED:
        wide = _pooled(setup, task.num_replicas)
        made = simulate(wide, wide.scheduling(task.engine_policy), plans, arrivals_s)
        balance = 1.0
    else:
        scheduling = setup.scheduling(task.engine_policy)
        size = task.num_replicas
        fleet = SimFleet(task.policy, size, setup.device, scheduling, num_slots=SLOTS)
        made = fleet.run(plans, arrivals_s)
        balance = fleet.balance
    summary = summarize(made)
    assert summary["lost"] == 0, "a call was lost"
    kept = ("program_token_latency_ms", "prefix_hit_rate", "wait_share", "programs", "calls")
    return {
        "workload": task.name,
        "policy": task.policy,
        "replicas": task.num_replicas,
        "load": task.load,
        "rate": rate,
        **{key: summary[key] for key in kept},
        "balance": balance,
    }


def _pooled(setup: Setup, num_replicas: int) -> Setup:
    """All replicas as one engine, in which a step still weighs as much."""
    weight = setup.config.prefill_weight or setup.device.prefill_weight
    return replace(
        setup,
        device=pooled(setup.device, num_replicas),
        num_slots=num_replicas * setup.num_slots,
        chunk_tokens=num_replicas * setup.chunk_tokens,
        config=setup.config.replace(prefill_weight=weight),
    )


def placement_tasks(options: argparse.Namespace, workloads: Sequence[Sources]) -> list[Task]:
    """All policies on the first size of fleet; those that the paper compares on the others."""
    return [
        Task(
            sources=sources,
            num_replicas=num_replicas,
            load=load,
            policy=policy,
            engine_policy=options.engine_policy,
            device=options.device,
            minutes=options.minutes,
            seed=options.seed,
        )
        for sources in workloads
        for i, num_replicas in enumerate(options.replicas)
        for load in options.loads
        for policy in (*(MORE_POLICIES if i else POLICY_NAMES), POOLED)
        if policy in (OURS, *options.policies)
    ]


def measure_scaling(options: argparse.Namespace, sources: Sources) -> list[dict[str, Any]]:
    """Every size at `SCALING_LOADS`, and at higher ones until one replica's latency has doubled."""
    base = Task(
        sources=sources,
        engine_policy=options.engine_policy,
        device=options.device,
        minutes=options.minutes,
        seed=options.seed,
    )
    sizes = (1, 8) if options.quick else SCALING_REPLICAS
    results: list[dict[str, Any]] = []
    for loads in (SCALING_LOADS, *((load,) for load in MORE_SCALING_LOADS)):
        results += run_all([replace(base, num_replicas=n, load=at) for n in sizes for at in loads])
        if sustained(results)[1] is not None:
            break
    return results


def run_all(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Every run, on all cores of this machine."""
    done = []
    with (
        ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        Progress("runs", len(tasks)) as progress,
    ):
        for result in pool.map(run, tasks):
            done.append(result)
            progress.advance()
    return done


def compare(results: list[dict[str, Any]]) -> None:
    """Tell each row how quick `autellix` was in the same setting, over this policy."""
    key = ("workload", "replicas", "load")
    ours = {tuple(r[k] for k in key): _mean(r) for r in results if r["policy"] == OURS}
    for row in results:
        row["autellix_over_this"] = ratio(ours[tuple(row[k] for k in key)], _mean(row))


def sustained(results: Sequence[dict[str, Any]]) -> dict[int, float | None]:
    """Programs per second by number of replicas, at twice the latency of one without load.

    Of a fleet at most the largest rate that was tried; None where the smallest is too much already.
    Nothing is known of any where one replica does not get there: rates that were merely tried
    are in proportion by design.
    """
    curves: dict[int, dict[float, float]] = {}
    for row in results:
        curves.setdefault(row["replicas"], {})[row["rate"]] = _mean(row)
    alone = curves[min(curves)]
    level_ms = 2 * alone[min(alone)]
    rates = {size: rate_at(curve, level_ms) for size, curve in curves.items()}
    if rates[min(curves)] == math.inf:
        return dict.fromkeys(curves)
    return {s: None if rate is None else min(rate, max(curves[s])) for s, rate in rates.items()}


def _mean(row: dict[str, Any]) -> float:
    mean: float = row["program_token_latency_ms"]["mean"]
    return mean


def bars(
    results: Sequence[dict[str, Any]],
    rates: dict[int, float | None],
    overhead: Overhead | None,
    live: Sequence[dict[str, Any]],
) -> list[list[object]]:
    """Rows of (what, measured, wanted, whether it is reached)."""
    rows: list[list[object]] = []
    for row in live:
        wanted = BARS.get(row["policy"].replace("_", "-"))
        if wanted is not None:
            what = f"live, load {row['load']:g}: autellix / {row['router']} {row['policy']}"
            rows.append(_bar(what, row["autellix_over_this"], wanted))
    first = results[0]["replicas"] if results else 0
    for row in results:
        wanted = BARS.get(row["policy"])
        if wanted is not None and row["replicas"] == first:
            what = f"{row['workload']}, load {row['load']:g}: autellix / {row['policy']}"
            rows.append(_bar(what, row["autellix_over_this"], wanted))
    rows += _growth_bars(results)
    largest = max(rates, default=1)
    if largest > 1:
        growth = ratio(ratio(rates[largest], rates[1]), largest)
        rows.append(_bar(f"sustained rate, 1 to {largest} replicas: linear", growth, 0.95, True))
    if overhead is not None:
        router = overhead.over_direct("router")
        rows.append(_bar("added time to first byte, p50 ms", router["ttft_p50_ms"], 2.0))
        rows.append(_bar("added time to first byte, p99 ms", router["ttft_p99_ms"], 10.0))
        rows.append(_bar("short calls per second", router["calls_per_s"], 3_000, True))
        rows.append(_bar("streamed frames per second", router["frames_per_s"], 30_000, True))
        rows.append(_bar("median read beside slow readers", router["slow_readers_ratio"], 1.05))
    return rows


def _growth_bars(results: Sequence[dict[str, Any]]) -> list[list[object]]:
    """That the advantage over what the paper compares with does not shrink in a larger fleet."""
    small: dict[tuple[object, ...], dict[str, Any]] = {}
    rows = []
    for row in results:
        first = small.setdefault((row["workload"], row["load"], row["policy"]), row)
        if row is not first and row["policy"] in MORE_POLICIES[1:]:
            change = row["autellix_over_this"] / first["autellix_over_this"]
            sizes = f"{row['replicas']} against {first['replicas']} replicas"
            what = f"{row['workload']}, load {row['load']:g}: autellix / {row['policy']}, {sizes}"
            rows.append(_bar(what, change, 1.0))
    return rows


def _bar(what: str, value: float | None, wanted: float, is_floor: bool = False) -> list[object]:
    sign = ">=" if is_floor else "<="
    if value is None:
        return [what, value, f"{sign} {wanted:g}", "open"]
    is_met = value >= wanted if is_floor else value <= wanted
    return [what, value, f"{sign} {wanted:g}", "met" if is_met else "missed"]


def measure_live(options: argparse.Namespace, sources: Sources) -> list[dict[str, Any]]:
    """The workload through every door, at the first of the sizes and loads."""
    num_replicas, load = options.replicas[0], options.loads[0]
    max_tokens = routing_live.TIMING.kv_tokens // 4
    few = programs_of(sources, 3 * FEW_PROGRAMS, options.seed, max_tokens)
    rate = load * num_replicas * routing_live.SPEED * routing_live.capacity(few)
    count = math.ceil(60 * min(options.minutes, LIVE_MINUTES) * rate)
    programs = programs_of(sources, count, options.seed, max_tokens)
    rows = routing_live.measure(
        programs,
        rate,
        num_replicas=num_replicas,
        repeats=options.repeats,
        seed=options.seed,
        peer_python=options.peer_python,
    )
    for row in rows:
        row["workload"], row["load"] = name_of(sources), load
        row["autellix_over_this"] = ratio(_mean(rows[0]), _mean(row))
    return rows


LIVE_COLUMNS: Final = (
    *("router", "policy", "ms/token mean", "p99", "hit rate", "lost", "autellix / this"),
)


def live_rows(live: Sequence[dict[str, Any]]) -> list[list[object]]:
    return [
        [
            r["router"], r["policy"], _mean(r), r["program_token_latency_ms"]["p99"],
            r["prefix_hit_rate"], r["lost"], r["autellix_over_this"],
        ]
        for r in live
    ]  # fmt: skip


PLACEMENT_COLUMNS: Final = (
    *("workload", "replicas", "load", "policy", "ms/token mean", "p99"),
    *("hit rate", "waiting", "balance", "autellix / this"),
)


def placement_rows(results: Sequence[dict[str, Any]]) -> list[list[object]]:
    return [
        [
            r["workload"], r["replicas"], f"{r['load']:g}", r["policy"], _mean(r),
            r["program_token_latency_ms"]["p99"], r["prefix_hit_rate"], r["wait_share"],
            r["balance"], r["autellix_over_this"],
        ]
        for r in results
    ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = new_parser("bench.router", __doc__)
    add = made.add_argument
    add("--quick", action="store_true", help="3 minutes of arrivals, two workloads, short overhead")
    add("--trace", action="append", default=[], help="a trace file; may be repeated")
    add("--mix", action="store_true", help="all of them as one workload, in equal parts")
    add("--replicas", type=from_one, nargs="+", default=[4, 16], help="default: 4 16")
    add("--loads", type=positive, nargs="+", default=[1.0], help="shares of capacity (default: 1)")
    add("--minutes", type=positive, default=10.0, help="of arrivals in a run (%(default)s)")
    add("--device", choices=PRESETS, default="a100-8b", help="default: %(default)s")
    add("--engine-policy", choices=ENGINE_POLICIES, default=ProgramConfig().policy,
        help="order of calls inside a replica (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=1)
    add("--seconds", type=positive, default=5.0, help="per overhead measurement (%(default)s)")
    add("--peer-python", help="a Python with sglang-router, if it is not this one")
    add("--repeats", type=from_one, default=2, help="of each live run (%(default)s)")
    add("--policies", nargs="+", choices=[*POLICY_NAMES, POOLED], default=POLICY_NAMES,
        help=f"of placement, besides {OURS} (default: all but {POOLED})")  # fmt: skip
    add("--only", nargs="+", choices=[*PARTS, LIVE], default=PARTS,
        help=f"the parts to run (default: all but {LIVE})")  # fmt: skip
    add("--out", type=Path, help="also write the result to this file")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    options = parser().parse_args(argv)
    if options.quick:
        options.minutes, options.seconds = min(options.minutes, 3.0), 1.0
    sources = options.trace or (QUICK_KINDS if options.quick else KINDS)
    workloads = [tuple(sources)] if options.mix else [(source,) for source in sources]
    results: list[dict[str, Any]] = []
    rates: dict[int, float | None] = {}
    live: list[dict[str, Any]] = []
    overhead = None
    tasks = placement_tasks(options, workloads) if "placement" in options.only else []
    if tasks:
        say(f"placement: {options.minutes:g} minutes of arrivals on simulated {options.device}")
        results = run_all(tasks)
        compare(results)
        print(format_table(PLACEMENT_COLUMNS, placement_rows(results)), end="\n\n")
    if "scaling" in options.only:
        say(f"scaling: {options.minutes:g} minutes of arrivals on simulated {options.device}")
        rates = sustained(measure_scaling(options, workloads[0]))
        rows = [[size, rate, ratio(rate, rates[1])] for size, rate in rates.items()]
        print(format_table(["replicas", "programs/s sustained", "over one"], rows), end="\n\n")
    if "overhead" in options.only:
        overhead = Overhead.measure(options.seconds, options.peer_python)
        print(format_table(overhead.columns, overhead.rows), end="\n\n")
    if LIVE in options.only:
        live = measure_live(options, workloads[0])
        print(format_table(LIVE_COLUMNS, live_rows(live)), end="\n\n")
    checked = bars(results, rates, overhead, live)
    print(format_table(["bar", "measured", "wanted", ""], checked))
    result = {
        "results": results,
        "sustained_rate": rates,
        "overhead": overhead and overhead.over_direct("router"),
        "peer": overhead and overhead.over_direct("peer"),
        "paths": overhead and overhead.paths,
        "live": live,
        "bars": checked,
    }
    result |= provenance(started)
    if options.out:
        write_json(options.out, result)
    print_result(result)
    return 1 if "missed" in [verdict for *_, verdict in checked] else 0


if __name__ == "__main__":
    sys.exit(main())
