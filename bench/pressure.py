"""What does preemption cost when memory is short?

    python -m bench.pressure --quick

The same programs, all arriving at once, are replayed on one program server whose KV pool cannot
hold what preempted calls leave behind. In turns, preempted KV is kept in the radix tree (and
evicted), dropped, swapped to host memory, kept with a backup there, or treated by cost (`auto`).
The cost of preemption is the tokens that are computed a second time, and the time that the whole
run takes. How short memory is, the run with `keep` says: `share_evicted` is what it recomputes, of
what `drop` does.

Rounds alternate: each has every mode once, in an order that turns, after one run that is not
counted. Times are compared with `drop` of the same round; the median ratio is given with the
smallest and the largest. `cpu` is the time that the scheduler's process was on a core, which other
work on the machine disturbs less. Quanta are short, so that calls are preempted far more often than
in service.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from tempfile import mkdtemp
from typing import Any

import psutil

from bench import synthetic, trace
from bench.common import Progress, format_table, new_parser, print_result, provenance, say
from bench.identity import SETTINGS
from bench.replay import ReplayOptions, replay
from bench.server import (
    COUNTED,
    LEAKS,
    Server,
    configure,
    flush_cache,
    free_port,
    launch_command,
    leaks,
    program_stats,
    wait_empty,
)
from bench.trace import TraceProgram

BASELINE = "drop"
MODES = ("keep", BASELINE, "swap", "backup", "auto")
SCHEDULER = "sglang::schedul"  # its process's name, as far as Linux keeps it


@dataclass(frozen=True, slots=True)
class Result:
    """One run; `counts` are differences of the server's counters, by the names in `COUNTED`."""

    kv: str
    seconds: float
    cpu_s: float
    hash: str
    lost: int
    counts: dict[str, int]
    leaked: dict[str, int]


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if BASELINE not in options.modes:
        raise SystemExit(f"bench.pressure: --modes needs {BASELINE!r}, which the others go by")
    started = time.perf_counter()
    num_programs = options.programs or (12 if options.quick else 24)
    num_rounds = options.rounds or (2 if options.quick else 5)
    programs = _workload(num_programs, options.scale, options.seed)
    with _server(options) as server:
        results = list(_run_all(server, programs, options.modes, num_rounds, options.seed))
        settings = program_stats(server.base_url)
    summary = summarize(results)
    summary["break_even_tokens"] = settings["kv_break_even_tokens"]
    print(_table(summary["results"]))
    print_result({**summary, **provenance(started)})
    return 0 if summary["identical"] and not (summary["lost"] or summary["leaked"]) else 1


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("bench.pressure", __doc__)
    parser.add_argument("--quick", action="store_true", help="12 programs, 2 rounds")
    parser.add_argument("--programs", type=int, default=0, help="default: 12 with --quick, else 24")
    parser.add_argument("--rounds", type=int, default=0, help="default: 2 with --quick, else 5")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="with `drop`")
    parser.add_argument("--scale", type=float, default=0.2, help="multiply all token counts")
    parser.add_argument("--max-running-requests", type=int, default=4, help="batch slots")
    parser.add_argument("--kv-tokens", type=int, default=1250, help="KV pool of the engine")
    parser.add_argument("--host-memory", type=float, default=1.0, help="GiB of host pool")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--server-args", type=shlex.split, default=[], help="more SGLang flags, in one string"
    )
    return parser


def _workload(num_programs: int, scale: float, seed: int) -> tuple[TraceProgram, ...]:
    """Chats: of the built-in workloads the one with answers long enough to be preempted in."""
    corpora = synthetic.corpora("chat", num_programs, seed)
    return trace.sample(
        corpora, num_programs, seed, factor=scale, max_calls=6, max_prompt_tokens=500
    ).programs


def _server(options: Any) -> Server:
    """One server for all modes; it measures what `auto` goes by when it starts."""
    port = free_port()
    directory = Path(mkdtemp(prefix="autellix-pressure-"))
    flags = [
        "--dtype", "float32", "--max-running-requests", str(options.max_running_requests),
        "--max-total-tokens", str(options.kv_tokens), "--program-kv", "auto",
        "--program-host-memory", str(options.host_memory), *options.server_args,
    ]  # fmt: skip
    say(f"starting a server; log in {directory}")
    return Server("pressure", launch_command("plas", port, flags), port, directory)


def _run_all(
    server: Server,
    programs: Sequence[TraceProgram],
    modes: Sequence[str],
    num_rounds: int,
    seed: int,
) -> Iterator[Result]:
    _run(server, BASELINE, programs, seed, "warm-up")
    for i in range(num_rounds):
        for j in range(len(modes)):
            kv = modes[(i + j) % len(modes)]
            yield _run(server, kv, programs, seed, f"{kv}-{i}")


def _run(
    server: Server, kv: str, programs: Sequence[TraceProgram], seed: int, run_id: str
) -> Result:
    flush_cache(server.base_url)
    configure(server.base_url, kv=kv, **SETTINGS)
    scheduler = _scheduler(server)
    before = program_stats(server.base_url)
    options = ReplayOptions(base_url=server.base_url, run_id=run_id, gap_scale=0.0, seed=seed)
    with Progress(run_id, sum(len(program.calls) for program in programs)) as progress:
        started, cpu_started = time.perf_counter(), _cpu_s(scheduler)
        run = asyncio.run(
            replay(kv, programs, [0.0] * len(programs), options, lambda _: progress.advance())
        )
        seconds, cpu_s = time.perf_counter() - started, _cpu_s(scheduler) - cpu_started
    after = wait_empty(server)
    return Result(
        kv,
        seconds,
        cpu_s,
        run.output_hash,
        sum(not call.is_ok for call in run.calls),
        {key: after[key] - before[key] for key in COUNTED},
        leaks(after),
    )


def _scheduler(server: Server) -> psutil.Process:
    """The server's scheduler process, which also runs the model."""
    family = psutil.Process(server.pid).children(recursive=True)
    return next(process for process in family if process.name().startswith(SCHEDULER))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """One entry per mode, its ratios to `drop`, and whether anything changed or was left behind."""
    modes: dict[str, list[Result]] = {}
    for result in results:
        modes.setdefault(result.kv, []).append(result)
    recomputed = {
        kv: sum(result.counts["recomputed_tokens"] for result in runs)
        / max(1, sum(result.counts["num_preemptions"] for result in runs))
        for kv, runs in modes.items()
    }
    baseline = modes[BASELINE]
    entries = [
        {
            "kv": kv,
            "seconds": [round(result.seconds, 2) for result in runs],
            "cpu_s": [round(result.cpu_s, 2) for result in runs],
            "recomputed_tokens_per_preemption": round(recomputed[kv], 2),
            "recomputed_to_drop": round(recomputed[kv] / recomputed[BASELINE], 4),
            **_ratios("time", [a.seconds / b.seconds for a, b in zip(runs, baseline, strict=True)]),
            **_ratios("cpu", [a.cpu_s / b.cpu_s for a, b in zip(runs, baseline, strict=True)]),
            **{key: round(fmean(run.counts[key] for run in runs), 1) for key in COUNTED},
        }
        for kv, runs in modes.items()
    ]
    evicted = recomputed.get("keep")
    return {
        "results": sorted(entries, key=lambda entry: MODES.index(entry["kv"])),
        "share_evicted": None if evicted is None else round(evicted / recomputed[BASELINE], 3),
        "identical": len({result.hash for result in results}) == 1,
        "lost": sum(result.lost for result in results),
        "leaked": sum(result.leaked[key] for result in results for key in LEAKS),
    }


def _ratios(name: str, ratios: Sequence[float]) -> dict[str, Any]:
    """The median of the rounds' ratios to `drop`, and the smallest and the largest."""
    return {
        f"{name}_to_drop": round(median(ratios), 3),
        f"{name}_to_drop_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def _table(entries: Sequence[dict[str, Any]]) -> str:
    header = (
        "kv", "seconds, median", "to drop", "range", "cpu to drop", "range", "preemptions",
        "recomputed per preemption", "to drop", "swaps out", "swaps in", "prefetches", "hits",
    )  # fmt: skip
    rows = [
        (
            entry["kv"],
            median(entry["seconds"]),
            entry["time_to_drop"],
            "{} - {}".format(*entry["time_to_drop_range"]),
            entry["cpu_to_drop"],
            "{} - {}".format(*entry["cpu_to_drop_range"]),
            entry["num_preemptions"],
            entry["recomputed_tokens_per_preemption"],
            entry["recomputed_to_drop"],
            entry["swaps_out"],
            entry["swaps_in"],
            entry["prefetches"],
            entry["prefetch_hits"],
        )
        for entry in entries
    ]
    return format_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
