"""Does scheduling ever change a result?

    python -m bench.identity --quick

The same programs, all arriving at once, are replayed on a stock server (`off`) and under each
policy, with overlap scheduling on and off, in greedy float32. The KV pool is small enough that
what preempted calls leave there is evicted, and that SGLang retracts calls because it is full.
`--kv` says what becomes of preempted calls' KV. Outputs are compared by one hash over all token
ids. A program server runs all policies one after the other (PATCH /program_config); after each
run it has to be empty: no program, no call, no host memory in use, and every KV token free or
evictable. SGLang checks its pools for leaks whenever it is idle, and ends the server if it finds
one.

The exit status is 1 where an output differs, a call is lost or something is left behind, and also
where no call was preempted, or none was swapped that should have been: that proves nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from autellix_sglang.core.kv import KV_CHOICES, MIXED, Fate
from bench import stats, synthetic, trace
from bench.common import (
    Progress,
    format_table,
    from_one,
    new_parser,
    positive,
    print_result,
    provenance,
    say,
)
from bench.replay import ReplayOptions, replay
from bench.server import (
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

POLICIES = ("mlfq", "plas", "atlas", "gittins")
# A small quantum and no protection after a start: as many preemptions as there can be. Calls wait
# for one another's prefixes, short as these are.
SETTINGS = {
    "quantum": 4.0,
    "levels": 8,
    "min_run": 0.0,
    "beta": 2.0,
    "schedule_interval": 1,
    "prefix_wait": 8,
}
# SGLang admits calls as if they had one token to go, and runs out of KV in mid-decode. As calls are
# preempted before that most of the time, its own test switch retracts some every few steps, too.
OVERCOMMIT = {
    "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "1",
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "9",
}
SWAPS = ("swaps_out", "swaps_in", "prefetches", "prefetch_hits")
SWAPPING = (Fate.SWAP.value, MIXED)
SUMS = ("retractions", "prefix_waits", *SWAPS, *LEAKS)
OVERLAPS = {"both": (True, False), "on": (True,), "off": (False,)}


@dataclass(frozen=True, slots=True)
class Result:
    """One run. What is left behind counts after the server came to rest; `off` does not tell."""

    policy: str
    overlap: bool
    hash: str
    preemptions: int
    lost: int
    recomputed_tokens: int | None = None
    swaps_out: int = 0
    swaps_in: int = 0
    prefetches: int = 0
    prefetch_hits: int = 0
    retractions: int = 0
    prefix_waits: int = 0
    ranks_agree: bool = True
    leaked_programs: int = 0
    leaked_kv_tokens: int = 0
    leaked_host_bytes: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    started = time.perf_counter()
    num_programs = options.programs or (18 if options.quick else 60)
    programs = _workload(num_programs, options.scale, options.seed)
    flags = ["--dtype", "float32", "--max-running-requests", str(options.max_running_requests)]
    flags += ["--max-total-tokens", str(options.kv_tokens), "--tp", str(options.tp)]
    flags += options.server_args
    own = ["--program-kv", options.kv, "--program-host-memory", str(options.host_memory)]
    own += ["--program-kv-break-even", "1"]  # nothing to measure at start
    with _servers(flags, own, options) as servers:
        results = list(_run_all(servers, programs, options))
    summary = _summary(results, options.kv)
    print(_table(results))
    print_result({**summary, **provenance(started)})
    found = complaints(summary, options.kv)
    for complaint in found:
        say(f"error: {complaint}")
    return 1 if found else 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("bench.identity", __doc__)
    parser.add_argument("--quick", action="store_true", help="18 programs")
    parser.add_argument("--programs", type=from_one, help="default: 18 with --quick, else 60")
    parser.add_argument("--scale", type=positive, default=0.15, help="multiply all token counts")
    parser.add_argument("--max-running-requests", type=from_one, default=4, help="batch slots")
    parser.add_argument("--kv-tokens", type=from_one, default=640, help="KV pool of each engine")
    parser.add_argument("--kv", choices=KV_CHOICES, default="keep", help="what becomes of KV")
    parser.add_argument(
        "--host-memory", type=float, default=0.25, help="GiB of host pool on each engine"
    )
    parser.add_argument(
        "--tp", type=from_one, default=1, help="tensor-parallel ranks of each engine"
    )
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--overlap", choices=OVERLAPS, default="both", help="overlap scheduling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--server-args", type=shlex.split, default=[], help="more SGLang flags, in one string"
    )
    return parser


def _workload(num_programs: int, scale: float, seed: int) -> tuple[TraceProgram, ...]:
    corpora = synthetic.corpora("mixed", num_programs, seed)
    return trace.sample(
        corpora, num_programs, seed, factor=scale, max_calls=12, max_prompt_tokens=560
    ).programs


@contextmanager
def _servers(
    flags: Sequence[str], program_flags: Sequence[str], options: Any
) -> Iterator[dict[tuple[str, bool], Server]]:
    """Stock and program server, each with overlap scheduling on and off, started side by side."""
    directory = Path(mkdtemp(prefix="autellix-identity-"))
    env = OVERCOMMIT | _core_binding(options.tp)
    with ExitStack() as stack:
        servers = {}
        for kind in ("off", "plas"):
            for overlap in OVERLAPS[options.overlap]:
                port = free_port()
                own = [*flags, *([] if overlap else ["--disable-overlap-schedule"])]
                if kind != "off":
                    own += ["--program-prefill-weight", "0.02", *program_flags]
                name = f"{kind}-{'overlap' if overlap else 'normal'}"
                command = launch_command(kind, port, own)
                server = Server(name, command, port, directory, env)
                stack.callback(server.stop)
                server.start()
                servers[kind, overlap] = server
        say(f"starting {len(servers)} servers; logs in {directory}")
        for server in servers.values():
            server.wait_ready()
        yield servers


def _core_binding(num_ranks: int) -> dict[str, str]:
    """On a CPU, SGLang wants a NUMA node or a list of cores for each rank; a GPU ignores it."""
    if num_ranks == 1:
        return {}
    cores = sorted(os.sched_getaffinity(0))
    binding = (str(cores[rank % len(cores)]) for rank in range(num_ranks))
    return {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(binding)}


def _run_all(
    servers: dict[tuple[str, bool], Server], programs: Sequence[TraceProgram], options: Any
) -> Iterator[Result]:
    num_calls = sum(len(program.calls) for program in programs)
    for overlap in OVERLAPS[options.overlap]:
        for policy in ("off", *options.policies):
            server = servers["off" if policy == "off" else "plas", overlap]
            with Progress(f"{policy}, overlap {overlap}", num_calls) as progress:
                yield _run(server, policy, overlap, programs, options.seed, progress)


def _run(
    server: Server,
    policy: str,
    overlap: bool,
    programs: Sequence[TraceProgram],
    seed: int,
    progress: Progress,
) -> Result:
    flush_cache(server.base_url)
    if policy != "off":
        configure(server.base_url, policy=policy, **SETTINGS)
    before = None if policy == "off" else program_stats(server.base_url)
    replay_options = ReplayOptions(
        base_url=server.base_url, run_id=f"{policy}-{overlap}", gap_scale=0.0, seed=seed
    )
    run = asyncio.run(
        replay(
            policy, programs, [0.0] * len(programs), replay_options, lambda _: progress.advance()
        )
    )
    lost = sum(not call.is_ok for call in run.calls)
    if before is None:
        return Result(policy, overlap, run.output_hash, stats.preemptions(run) or 0, lost)
    after = wait_empty(server)
    return Result(
        policy,
        overlap,
        run.output_hash,
        after["num_preemptions"] - before["num_preemptions"],
        lost,
        recomputed_tokens=after["recomputed_tokens"] - before["recomputed_tokens"],
        **{key: after[key] - before[key] for key in SWAPS},
        retractions=after["retracted_calls"] - before["retracted_calls"],
        prefix_waits=after["prefix_waits"] - before["prefix_waits"],
        ranks_agree=all(state == after["ranks"][0] for state in after["ranks"]),
        **leaks(after),
    )


def _summary(results: Sequence[Result], kv: str) -> dict[str, Any]:
    own = [result for result in results if result.policy != "off"]
    return {
        "identical": len({result.hash for result in results}) == 1,
        **{key: sum(getattr(result, key) for result in own) for key in ("preemptions", *SUMS)},
        "lost": sum(result.lost for result in results),
        "ranks_agree": all(result.ranks_agree for result in results),
        "runs": [
            {
                "policy": result.policy,
                "overlap": result.overlap,
                "kv": kv,
                "hash": result.hash,
                "preemptions": result.preemptions,
                "retractions": result.retractions,
                "prefix_waits": result.prefix_waits,
                **{key: getattr(result, key) for key in SWAPS},
                "recomputed_tokens": result.recomputed_tokens,
            }
            for result in results
        ],
    }


def complaints(summary: Mapping[str, Any], kv: str) -> list[str]:
    """What is wrong with the runs, or why they prove nothing."""
    found = {
        "outputs differ between runs": not summary["identical"],
        "tensor-parallel ranks decided differently": not summary["ranks_agree"],
        "calls were lost": summary["lost"],
        "something was left behind": any(summary[key] for key in LEAKS),
        "no call was preempted, so nothing is proven": not summary["preemptions"],
        f"no call was swapped under --kv {kv}, so nothing is proven of swaps": kv in SWAPPING
        and not (summary["swaps_out"] and summary["swaps_in"]),
    }
    return [what for what, is_so in found.items() if is_so]


def _table(results: Sequence[Result]) -> str:
    header = (
        "policy", "overlap", "preemptions", "retractions", "waits", "swaps out", "swaps in",
        "prefetches", "recomputed tokens", "lost", "leaked", "hash",
    )  # fmt: skip
    rows = [
        (
            result.policy,
            "on" if result.overlap else "off",
            result.preemptions,
            result.retractions,
            result.prefix_waits,
            result.swaps_out,
            result.swaps_in,
            result.prefetches,
            result.recomputed_tokens,
            result.lost,
            sum(getattr(result, key) for key in LEAKS),
            result.hash[:12],
        )
        for result in results
    ]
    return format_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
