"""What does a scheduling policy do to the latency of programs on a live engine?

    python -m bench.serve --quick
    python -m bench.serve --policies off,mlfq,plas --trace F --trace G --programs 40 --load 0.9

Servers are started with identical flags and kept alive; idle ones sleep. One serves all of our
policies, switched between runs (`PATCH /program_config`); each of SGLang's own orders has its own:
`off` (SGLang untouched: first come, first served), `lpm` and `hrrn`. The same programs are replayed
under each policy in turn (A B C, A B C, ... with `--repeat`), with the prefix cache emptied before
each run, and for a policy that learns (`gittins`) the server started anew. Medians over repeats are
reported, and ratios to the first policy.

Load: `--rate` sets programs per second; `--load L` sets it relative to what the engine can do. For
that the server of policy `off` (else the first) is first kept saturated for a few seconds by a
closed loop over the same programs without gaps, twice as many at a time as the batch has slots.
Tokens finished per second in the last two thirds of that time are the capacity, and the rate is
L * capacity / (mean generated tokens of a program): at L = 1 work arrives as fast as it is done.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.policy import POLICIES
from bench import report, stats, synthetic, trace
from bench.common import (
    CpuMeter,
    Progress,
    format_table,
    print_result,
    provenance,
    say,
    write_result,
)
from bench.replay import ReplayOptions, poisson_arrivals, recorded_arrivals, replay
from bench.server import Endpoint, ServerError, flush_cache, policy_servers, server_info
from bench.stats import Run
from bench.trace import Mix, TraceProgram

# --- options ------------------------------------------------------------------------------------


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _words(text: str) -> tuple[str, ...]:
    return tuple(shlex.split(text))


def _endpoint(text: str) -> tuple[str, str]:
    policy, equals, url = text.partition("=")
    if not equals or "://" not in url:
        raise argparse.ArgumentTypeError(f"expected POLICY=URL, got {text!r}")
    return policy, url.rstrip("/")


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return value


def _option(default: Any, text: str, **argument: Any) -> Any:
    return field(default=default, metadata={"help": text, **argument})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Every option of `bench.serve`; field X is `--X` on the command line, which reads this."""

    policies: tuple[str, ...] = _option(
        ("off", ProgramConfig().policy),
        "policies to compare, comma separated (off, lpm and hrrn are SGLang's own orders); ratios"
        " are to the first",
        type=_names,
        metavar="P,P",
    )
    trace: tuple[str, ...] = _option(
        (),
        "recorded workload (.jsonl, .jsonl.gz); repeat it for a mix in equal parts",
        action="append",
        metavar="FILE",
    )
    workload: str = _option(
        "mixed", "built-in workload where no --trace is given", choices=tuple(synthetic.WORKLOADS)
    )
    programs: int = _option(40, "programs per run", type=_count, metavar="N")
    rate: float | None = _option(
        None, "programs per second, in place of --load", type=_positive, metavar="R"
    )
    load: float = _option(
        0.9, "offered load relative to the measured capacity", type=_positive, metavar="L"
    )
    scale: float = _option(0.25, "multiply all token counts", type=_positive, metavar="X")
    max_calls: int | None = _option(
        None, "cut programs off after this many calls", type=_count, metavar="N"
    )
    max_prompt_tokens: int | None = _option(
        None,
        "skip programs with a call of more tokens, prompt and output (default: the engine's limit)",
        type=_count,
        metavar="N",
    )
    arrivals: str = _option(
        "poisson",
        "arrival process; 'recorded' keeps the trace's bursts at the asked rate",
        choices=("poisson", "recorded"),
    )
    gaps: str = _option(
        "recorded", "time between calls; null gaps are zero", choices=("recorded", "zero")
    )
    gap_scale: float = _option(1.0, "multiply recorded gaps", type=_positive, metavar="X")
    max_running_requests: int = _option(12, "batch slots of each engine", type=_count, metavar="N")
    repeat: int = _option(1, "runs per policy, alternating", type=_count, metavar="N")
    seed: int = _option(0, "of sample, prompts and arrivals", type=int, metavar="N")
    calibration_s: float = _option(
        20.0, "length of the saturated burst that measures capacity", type=_positive, metavar="S"
    )
    base_url: tuple[tuple[str, str], ...] = _option(
        (), "use a running server for policy P", action="append", type=_endpoint, metavar="P=URL"
    )
    server_args: tuple[str, ...] = _option(
        (), "more flags for every server, in one string", type=_words, metavar="ARGS"
    )
    identify: bool = _option(
        True, "send the identity headers", action=argparse.BooleanOptionalAction
    )
    stream: bool = _option(
        False, "stream answers, for the time to first token", action=argparse.BooleanOptionalAction
    )
    html: str | None = _option(None, "write a page with charts", metavar="FILE")
    progress: bool = _option(
        False, "show a progress bar also without a terminal", action="store_true"
    )

    @property
    def server_flags(self) -> tuple[str, ...]:
        """The flags every server gets, whatever it serves."""
        return ("--max-running-requests", str(self.max_running_requests), *self.server_args)

    @property
    def trace_name(self) -> str:
        names = [Path(path).name.removesuffix(".gz").removesuffix(".jsonl") for path in self.trace]
        return " + ".join(names) or f"built-in {self.workload}"


# Few batch slots and more work than the engine can do, so that a short run has a queue at all.
QUICK: Mapping[str, Any] = {
    "programs": 24,
    "scale": 0.1,
    "max_calls": 40,
    "max_running_requests": 4,
    "load": 1.5,
    "calibration_s": 6.0,
}
DEMO: Mapping[str, Any] = {
    "programs": 32,
    "scale": 0.12,
    "max_calls": 80,
    "max_running_requests": 6,
    "load": 1.5,
    "calibration_s": 10.0,
    "html": "bench/out/demo.html",
}


def parse_options(argv: Sequence[str]) -> ServeOptions:
    """The options of a command line; exits with a message where they make no sense."""
    parser = _parser()
    presets = parser.parse_args(argv)
    # A preset changes defaults, so whatever else is on the command line wins over it.
    parser.set_defaults(**(QUICK if presets.quick else DEMO if presets.demo else {}))
    values = vars(parser.parse_args(argv))
    chosen: dict[str, Any] = {name: _frozen(values[name]) for name in _option_names()}
    options = ServeOptions(**chosen)
    if len(set(options.policies)) != len(options.policies) or not options.policies:
        parser.error("--policies: name one or more policies, each once")
    return options


def _option_names() -> list[str]:
    return [option.name for option in dataclasses.fields(ServeOptions)]


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for option in dataclasses.fields(ServeOptions):
        argument = dict(option.metadata)
        # argparse appends to its default in place, which a tuple does not offer.
        default: Any = option.default
        if argument.get("action") == "append":
            default = list(default)
        if default not in (None, [], ()) and not isinstance(default, bool):
            shown = ",".join(default) if isinstance(default, tuple) else default
            argument["help"] += f" (default: {shown})"
        parser.add_argument(f"--{option.name.replace('_', '-')}", default=default, **argument)
    presets = parser.add_mutually_exclusive_group()
    presets.add_argument("--quick", action="store_true", help=f"small: {_told(QUICK)}")
    presets.add_argument("--demo", action="store_true", help=f"with a page: {_told(DEMO)}")
    return parser


def _told(preset: Mapping[str, Any]) -> str:
    return ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in preset.items())


# --- workload -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine can take: calls in its batch, tokens of one call."""

    max_running_requests: int
    max_context_tokens: int | None


def read_limits(base_url: str, options: ServeOptions) -> Limits:
    """The limits a server reports; the option where it reports no batch limit."""
    info = server_info(base_url)
    slots = info.get("max_running_requests")
    context = info.get("max_req_input_len")
    return Limits(
        slots if isinstance(slots, int) else options.max_running_requests,
        context if isinstance(context, int) else None,
    )


def load_corpora(options: ServeOptions) -> list[tuple[TraceProgram, ...]]:
    """The programs to sample from, one sequence per source."""
    if options.trace:
        return [trace.load(path) for path in options.trace]
    return synthetic.corpora(options.workload, options.programs, options.seed)


def sample_workload(
    corpora: Sequence[Sequence[TraceProgram]], options: ServeOptions, limits: Limits
) -> Mix:
    """The programs to replay; what the engine's context cannot hold is skipped, and counted."""
    mix = trace.sample(
        corpora,
        options.programs,
        options.seed,
        factor=options.scale,
        max_calls=options.max_calls,
        max_prompt_tokens=options.max_prompt_tokens or limits.max_context_tokens,
    )
    if mix.skipped:
        say(f"skipped {mix.skipped} of {mix.candidates} programs: too long for the engine")
    return mix


def describe_workload(mix: Mix) -> dict[str, object]:
    """The size of a workload, for the result."""
    calls = [call for program in mix.programs for call in program.calls]
    kinds = [program.kind for program in mix.programs]
    return {
        "programs": len(mix.programs),
        "kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "calls": len(calls),
        "prompt_tokens": sum(call.prompt_tokens for call in calls),
        "new_tokens": sum(call.new_tokens for call in calls),
        "output_tokens": sum(call.output_tokens for call in calls),
        "skipped": mix.skipped,
    }


# --- capacity and rate --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offered:
    """The arrival rate, and how it compares with the engine's capacity where that was measured."""

    rate: float
    load: float | None
    capacity_tokens_per_s: float | None


def offered_load(base_url: str, mix: Mix, options: ServeOptions, limits: Limits) -> Offered:
    """The rate asked for, or the one that makes the asked load; measures capacity if it must."""
    if options.rate is not None:
        return Offered(options.rate, None, None)
    capacity = measure_capacity(base_url, mix.programs, options, limits)
    tokens = sum(program.output_tokens for program in mix.programs) / len(mix.programs)
    return Offered(options.load * capacity / tokens, options.load, capacity)


def measure_capacity(
    base_url: str, programs: Sequence[TraceProgram], options: ServeOptions, limits: Limits
) -> float:
    """Tokens per second of a saturated engine; see the module's docstring for how."""
    width = 2 * limits.max_running_requests
    copies = max(2, -(-8 * width // len(programs)))
    endless = [program for _ in range(copies) for program in programs]
    replay_options = dataclasses.replace(
        _replay_options(base_url, "capacity", options),
        gap_scale=0.0,
        max_programs=width,
        deadline_s=options.calibration_s,
    )
    run = asyncio.run(replay("capacity", endless, [0.0] * len(endless), replay_options))
    return saturated_tokens_per_s(run, options.calibration_s)


def saturated_tokens_per_s(run: Run, deadline_s: float) -> float:
    """Tokens of calls that finished in the last two thirds of the time the batch was kept full."""
    has_more = any(program.calls[0].issue_s is None for program in run.programs)
    last_start = max(program.start_s for program in run.programs)
    end = deadline_s if has_more else min(deadline_s, last_start)
    begin = end / 3
    finished = [c.num_output for c in run.calls if c.is_ok and begin < c.span[1] <= end]
    if not finished or end <= begin:
        raise ServerError(
            f"no call finished in {end:.0f} s: use a longer --calibration-s or --rate"
        )
    return sum(finished) / (end - begin)


# --- runs ---------------------------------------------------------------------------------------


def _replay_options(base_url: str, run_id: str, options: ServeOptions) -> ReplayOptions:
    return ReplayOptions(
        base_url=base_url,
        run_id=run_id,
        identify=options.identify,
        stream=options.stream,
        gap_scale=options.gap_scale if options.gaps == "recorded" else 0.0,
        seed=options.seed,
    )


def make_arrivals(
    programs: Sequence[TraceProgram], options: ServeOptions, rate: float, repeat: int
) -> list[float]:
    """Arrival times for one repeat: the same for every policy, other Poisson draws each repeat."""
    if options.arrivals == "recorded":
        return recorded_arrivals(programs, rate=rate)
    return poisson_arrivals(len(programs), rate, options.seed + repeat)


def run_all(
    endpoints: Mapping[str, Endpoint], mix: Mix, options: ServeOptions, rate: float
) -> dict[str, list[Run]]:
    """Every repeat of every policy, alternating, so that a drift of the machine hits all alike.

    A policy that learns has its server started anew before each run, unless it is not ours: else it
    would know these very programs from the runs before.
    """
    runs: dict[str, list[Run]] = {policy: [] for policy in endpoints}
    for repeat in range(options.repeat):
        arrivals = make_arrivals(mix.programs, options, rate, repeat)
        for policy, endpoint in endpoints.items():
            server = endpoint.server
            if server and policy in POLICIES and POLICIES[policy].is_learned:
                server.restart()
                warm_up([endpoint.base_url], mix, options)
            meter = CpuMeter([os.getpid(), server.pid]) if server else None
            run = run_one(endpoint, mix, arrivals, options, repeat)
            if server and meter:
                server.check_alive()
                run = dataclasses.replace(run, foreign_cores=meter.foreign_cores())
            runs[policy].append(run)
    return runs


def run_one(
    endpoint: Endpoint, mix: Mix, arrivals: Sequence[float], options: ServeOptions, repeat: int
) -> Run:
    """One replay under one policy, from an empty prefix cache."""
    policy = endpoint.policy
    flush_cache(endpoint.base_url)
    endpoint.select()
    label = f"{policy} {repeat + 1}/{options.repeat}"
    num_calls = sum(len(program.calls) for program in mix.programs)
    # Policies may share a server, on which program ids must not return.
    replay_options = _replay_options(endpoint.base_url, f"{policy}-r{repeat}", options)
    with Progress(label, num_calls, bar=options.progress or None) as progress:
        run = asyncio.run(
            replay(policy, mix.programs, arrivals, replay_options, lambda call: progress.advance())
        )
    latency = stats.distribution(program.token_latency_ms for program in run.complete)["mean"]
    lost = len(run.calls) - sum(call.is_ok for call in run.calls)
    mean = "no program completed" if latency is None else f"{latency:.1f} ms per token"
    say(f"{label}: {mean}{f', {lost} calls lost' if lost else ''}")
    return run


def warm_up(base_urls: Iterable[str], mix: Mix, options: ServeOptions) -> None:
    """A few calls to every server, so that no policy pays for what happens only once."""
    programs = [trace.truncate(program, 3) for program in mix.programs[:4]]
    for base_url in base_urls:
        warm = dataclasses.replace(_replay_options(base_url, "warm", options), gap_scale=0.0)
        asyncio.run(replay("warm-up", programs, [0.0] * len(programs), warm))


# --- results ------------------------------------------------------------------------------------


def make_result(
    runs: Mapping[str, Sequence[Run]], mix: Mix, options: ServeOptions, offered: Offered
) -> dict[str, Any]:
    """The JSON object that `bench.serve` prints, without provenance."""
    summaries = {
        policy: [stats.summarize(run) for run in repeats] for policy, repeats in runs.items()
    }
    every = [summary for repeats in summaries.values() for summary in repeats]
    hashes = {run.output_hash for repeats in runs.values() for run in repeats}
    return {
        "benchmark": "serve",
        "trace": options.trace_name,
        "load": offered.load,
        "rate_programs_per_s": offered.rate,
        "capacity_tokens_per_s": offered.capacity_tokens_per_s,
        "arrivals": options.arrivals,
        "gaps": options.gaps,
        "scale": options.scale,
        "seed": options.seed,
        "server_flags": list(options.server_flags),
        "workload": describe_workload(mix),
        "baseline": options.policies[0],
        "identical_outputs": len(hashes) == 1,
        "is_queueing": stats.has_queue(every),
        "caveats": stats.caveats(every),
        "results": compare(runs, summaries),
        "runs": [
            {"repeat": i, **summary}
            for repeats in summaries.values()
            for i, summary in enumerate(repeats)
        ],
    }


def compare(
    runs: Mapping[str, Sequence[Run]], summaries: Mapping[str, Sequence[dict[str, object]]]
) -> list[dict[str, object]]:
    """One entry per policy: medians over its repeats, and what it does to the first policy's."""
    combined = {policy: stats.combine(repeats) for policy, repeats in summaries.items()}
    first = next(iter(runs))
    return [
        {
            **summary,
            "ratio": stats.ratios(summary, combined[first]),
            "ratio_range": stats.ratio_range(summaries[policy], summaries[first]),
            "longest_decile_response_ratio": stats.longest_decile_ratio(runs[policy], runs[first]),
            "response_ratio_by_size": stats.by_size(runs[policy], runs[first]),
        }
        for policy, summary in combined.items()
    ]


HEADER = (
    "policy",
    *("ms/tok mean", "p50", "p95", "p99"),
    *("resp s mean", "p50", "p95", "p99"),
    *("tok/s", "preempt", "hit", "wait", "lost"),
)


def result_table(result: Mapping[str, Any]) -> str:
    """The results as text: one row per policy, then its ratios to the first."""
    entries = result["results"]
    rows = [_absolute_row(entry) for entry in entries]
    rows += [_ratio_row(entry, result["baseline"]) for entry in entries[1:]]
    return format_table(HEADER, rows)


def _absolute_row(entry: Mapping[str, Any]) -> list[object]:
    latency, response = entry["program_token_latency_ms"], entry["program_response_s"]
    tail = ("engine_tokens_per_s", "preemptions", "prefix_hit_rate", "wait_share", "lost")
    return [
        entry["policy"],
        *latency.values(),
        *response.values(),
        *(entry[key] for key in tail),
    ]


def _ratio_row(entry: Mapping[str, Any], baseline: str) -> list[object]:
    ratio = entry["ratio"]
    latency, response = ratio["program_token_latency_ms"], ratio["program_response_s"]
    name = f"{entry['policy']} / {baseline}"
    return [name, *latency.values(), *response.values(), ratio["engine_tokens_per_s"], *[""] * 4]


# --- main ---------------------------------------------------------------------------------------


@contextmanager
def open_endpoints(options: ServeOptions) -> Iterator[dict[str, Endpoint]]:
    """Where each policy is served: as told, else by servers of ours, stopped at the end."""
    given = {policy: Endpoint(policy, url) for policy, url in options.base_url}
    wanted = [policy for policy in options.policies if policy not in given]
    if wanted:
        say(f"starting servers for: {', '.join(wanted)}")
    with policy_servers(wanted, options.server_flags) as started:
        known = given | started
        yield {policy: known[policy] for policy in options.policies}


def benchmark(options: ServeOptions) -> tuple[dict[str, Any], dict[str, list[Run]]]:
    """Run everything; returns the result and the runs it was made of."""
    corpora = load_corpora(options)
    with open_endpoints(options) as endpoints:
        baseline = endpoints.get("off", endpoints[options.policies[0]])
        limits = read_limits(baseline.base_url, options)
        mix = sample_workload(corpora, options, limits)
        warm_up({endpoint.base_url for endpoint in endpoints.values()}, mix, options)
        baseline.select()
        offered = offered_load(baseline.base_url, mix, options, limits)
        say(_announcement(mix, offered))
        runs = run_all(endpoints, mix, options, offered.rate)
    return make_result(runs, mix, options, offered), runs


def _announcement(mix: Mix, offered: Offered) -> str:
    calls = sum(len(program.calls) for program in mix.programs)
    text = f"{len(mix.programs)} programs, {calls} calls, {offered.rate:.2f} programs/s"
    if offered.load is None:
        return text
    return f"{text} (load {offered.load:g} of {offered.capacity_tokens_per_s:.0f} tokens/s)"


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    # Without this, SIGTERM would end us and leave the servers running.
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 where the benchmark could not be done."""
    started = time.perf_counter()
    options = parse_options(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        result, runs = benchmark(options)
    except (ServerError, ValueError, OSError) as error:
        print(f"bench.serve: {error}", file=sys.stderr)
        return 1
    result |= provenance(started)
    if options.html is not None:
        write_result(Path(options.html), report.render(result, runs))
    for caveat in result["caveats"]:
        say(f"note: {caveat}")
    print(result_table(result))
    print_result(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
