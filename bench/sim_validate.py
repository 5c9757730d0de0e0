"""Does the simulator tell the truth? The same programs, arrivals and policy, live and simulated.

    python -m bench.sim_validate --quick
    python -m bench.sim_validate --trace chat.jsonl.gz --trace tree.jsonl.gz --policy plas

Starts one server, measures its batches and what a call costs outside them (`bench.sim_points`),
and fits a device to that. Each trace is then replayed by the machinery of `bench.serve` at `--load`
of the capacity that the simulator reckons. Because the speed of a shared machine drifts, batches
are measured again after every trace, and the device that simulates a trace fits what was measured
right before and right after it. The simulation has the server's own settings. An error is the
simulated number over the live one, less one. The drift is by how much longer batches took after a
trace than before it: where it is large, the machine was not the same, and the error says little.
With `--repeat` the traces take turns, and the median error of each number counts.
Beside each verdict stands how long calls waited and how many were preempted: where they hardly
waited, the step times are validated and the order of calls is not.
Nothing is fitted to the replays themselves. Without `--trace` the built-in chat, react and tree
workloads are used.

What the simulator is not told: how the engine overlaps its work with the client's on the same
cores, and the tokens themselves (prefixes are shared by length).

The last line of stdout is one JSON object; `bench.sim` shows `errors` of the file of results that
`--save` writes. The exit status is 1 where a trace is not within the bar.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.policy import POLICIES
from bench import serve, synthetic, trace
from bench.common import (
    CpuMeter,
    format_table,
    from_one,
    new_parser,
    positive,
    print_result,
    provenance,
    say,
)
from bench.replay import poisson_arrivals
from bench.serve import ServeOptions
from bench.server import Endpoint, Server, ServerError, policy_servers, server_info
from bench.sim import Setup, capacity, simulate
from bench.sim_device import Device
from bench.sim_engine import Blueprint, blueprint
from bench.sim_points import Points, Prober, medians, over_http
from bench.sim_points import errors as errors_of
from bench.stats import Run, combine, summarize
from bench.trace import Mix, TraceProgram

BAR: Final = 0.15
BUILT_IN: Final = ("chat", "react", "tree")
MEASURES: Final = ("program_token_latency_ms", "program_response_s")
STATISTICS: Final = ("mean", "p95")
CHUNK_TOKENS: Final = 8192  # where the server does not say
ROUNDS: Final = 2  # of measuring on either side of a trace
FIT_MAX_PROMPT: Final = 1280

Errors = dict[str, dict[str, float]]  # by measure and statistic


@dataclass(frozen=True, slots=True)
class Trial:
    """One trace, once live and once simulated, as summaries of `bench.stats`."""

    live: dict[str, Any]
    simulated: dict[str, Any]
    device: Device
    fit_errors: list[float]
    drift: float

    @property
    def errors(self) -> Errors:
        return {
            measure: {
                name: self.simulated[measure][name] / self.live[measure][name] - 1
                for name in STATISTICS
            }
            for measure in MEASURES
        }


def median_errors(trials: Sequence[Trial]) -> Errors:
    return {
        measure: {
            name: median(trial.errors[measure][name] for trial in trials) for name in STATISTICS
        }
        for measure in MEASURES
    }


def is_within(errors: Errors) -> bool:
    """The bar: mean and p95 of the program token latency."""
    return all(abs(error) <= BAR for error in errors[MEASURES[0]].values())


def setup_of(device: Device, options: argparse.Namespace, info: dict[str, Any]) -> Setup:
    """The server's slots, chunks and settings around the fitted device."""
    return Setup(
        device=device,
        num_slots=options.slots,
        chunk_tokens=max(1, int(info.get("chunked_prefill_size") or CHUNK_TOKENS)),
        gap_scale=0.0,
        config=ProgramConfig(policy=options.policy),
        seed=options.seed,
    )


class Gauge:
    """Measures the live engine now and then, and knows the device that fits some of it."""

    def __init__(self, server: Server, num_slots: int) -> None:
        self._prober = Prober(over_http(server.base_url), num_slots, FIT_MAX_PROMPT)
        self._rounds: list[Points] = []
        self._kv_tokens = int(server_info(server.base_url)["max_total_num_tokens"])

    def measure(self) -> None:
        """One more round."""
        say("measuring batches")
        self._rounds.append(self._prober.round())

    def drift(self) -> float:
        """All times of the last `ROUNDS` rounds over those of the ones before, less one."""
        before, after = self._rounds[-2 * ROUNDS : -ROUNDS], self._rounds[-ROUNDS:]
        return _total_s(after) / _total_s(before) - 1

    def latest(self, num_rounds: int) -> tuple[Device, list[float]]:
        """The device that fits the last rounds, and how far it is from their points."""
        points = medians(self._rounds[-num_rounds:])
        device = points.device("measured", self._kv_tokens)
        return device, errors_of(device, points)


def _total_s(rounds: Sequence[Points]) -> float:
    points = medians(rounds)
    return sum(point.seconds for point in (*points.decode, *points.lone))


@dataclass(frozen=True, slots=True)
class Replayed:
    """A trace as it was replayed on the live engine."""

    run: Run
    plans: list[Blueprint]
    arrivals_s: list[float]


def replayed(
    endpoint: Endpoint, setup: Setup, mix: Mix, options: argparse.Namespace, number: int
) -> Replayed:
    """Replay a mix on the server at the load asked for; raises `ServerError` if calls are lost."""
    assert endpoint.server is not None
    plans = [blueprint(program) for program in mix.programs]
    rate = options.load * capacity(setup, plans)
    arrivals = poisson_arrivals(len(plans), rate, options.seed)
    meter = CpuMeter([os.getpid(), endpoint.server.pid])
    run = serve.run_one(endpoint, mix, arrivals, serve_options(options), number)
    require_complete(run)
    run = dataclasses.replace(run, foreign_cores=meter.foreign_cores())
    return Replayed(run, plans, arrivals)


def serve_options(options: argparse.Namespace) -> ServeOptions:
    return ServeOptions(scale=options.scale, gaps="zero", seed=options.seed)


def require_complete(run: Run) -> None:
    num_lost = sum(not call.is_ok for call in run.calls)
    if num_lost:
        raise ServerError(f"{num_lost} calls were lost: nothing to compare")


def corpora_of(options: argparse.Namespace) -> dict[str, Sequence[TraceProgram]]:
    """The programs to draw from, by name."""
    if options.trace:
        loaded = (trace.load(path) for path in options.trace)
        return {programs[0].corpus: programs for programs in loaded}
    return {name: synthetic.generate(name, options.programs, options.seed) for name in BUILT_IN}


# --- command line -------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    out = new_parser("bench.sim_validate", __doc__)
    add = out.add_argument
    add("--quick", action="store_true", help="8 programs of 12 calls per trace")
    add("--trace", action="append", type=Path, default=[], help="each is validated by itself")
    add("--policy", choices=POLICIES, default=ProgramConfig().policy, help="default: %(default)s")
    add("--load", type=positive, default=1.2, help="share of the capacity (default: %(default)s)")
    add("--programs", type=from_one, default=24, help="per trace (default: %(default)s)")
    add("--max-calls", type=from_one, default=40, help="per program (default: %(default)s)")
    add("--scale", type=positive, default=0.25, help="factor on token counts (%(default)s)")
    add("--slots", type=from_one, default=8, help="calls in a batch (default: %(default)s)")
    add("--repeat", type=from_one, default=1, help="times each, in turn (default: %(default)s)")
    add("--seed", type=int, default=1, help="default: %(default)s")
    add("--save", type=Path, help="write the JSON object to this file as well")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    arguments = parser()
    options = arguments.parse_args(argv)
    if options.quick:
        options.programs, options.max_calls = 8, 12
    try:
        result = validate(options)
    except (ServerError, ValueError, OSError) as error:
        print(f"bench.sim_validate: {error}", file=sys.stderr)
        return 1
    result |= provenance(started)
    if options.save:
        options.save.write_text(json.dumps(result, indent=1) + "\n")
    print_result(result)
    return 0 if all(result["within"].values()) else 1


def validate(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, fit, replay and simulate; prints a table, returns the JSON object."""
    trials: dict[str, list[Trial]] = {}
    flags = ["--max-running-requests", str(options.slots)]
    with policy_servers([options.policy], flags) as endpoints:
        bench = Bench(endpoints[options.policy], options)
        mixes = {name: bench.mix(programs) for name, programs in corpora_of(options).items()}
        bench.warm_up(next(iter(mixes.values())))
        for repeat in range(options.repeat):
            for name, mix in mixes.items():
                say(f"{name}: {repeat + 1} of {options.repeat}")
                trials.setdefault(name, []).append(bench.trial(mix))
    errors = {name: median_errors(tried) for name, tried in trials.items()}
    print(format_table(HEADER, [row for name in trials for row in _rows(name, trials[name])]))
    live = {name: combine([t.live for t in tried]) for name, tried in trials.items()}
    simulated = {name: combine([t.simulated for t in tried]) for name, tried in trials.items()}
    within = {name: is_within(found) for name, found in errors.items()}
    print()
    print(format_table(QUEUE_HEADER, queue_rows(live, simulated, within)))
    return {
        "policy": options.policy,
        "load": options.load,
        "scale": options.scale,
        "slots": options.slots,
        "live": live,
        "simulated": simulated,
        "errors": errors,
        "trials": {
            name: [
                {
                    "errors": trial.errors,
                    "drift": trial.drift,
                    "foreign_cores": trial.live["foreign_cores"],
                    "device": dataclasses.asdict(trial.device),
                    "fit_errors": trial.fit_errors,
                }
                for trial in tried
            ]
            for name, tried in trials.items()
        },
        "bar": BAR,
        "within": within,
    }


class Bench:
    """The live engine, and all that is measured on it."""

    def __init__(self, endpoint: Endpoint, options: argparse.Namespace) -> None:
        assert endpoint.server is not None
        self._endpoint = endpoint
        self._options = options
        self._info = dict(server_info(endpoint.base_url))
        self._gauge = Gauge(endpoint.server, options.slots)
        self._num_replays = 0

    def mix(self, programs: Sequence[TraceProgram]) -> Mix:
        """A sample that the server's context takes."""
        options, live = self._options, serve_options(self._options)
        return trace.sample(
            [programs],
            options.programs,
            options.seed,
            factor=options.scale,
            max_calls=options.max_calls,
            max_prompt_tokens=serve.read_limits(self._endpoint.base_url, live).max_context_tokens,
        )

    def warm_up(self, mix: Mix) -> None:
        for _ in range(ROUNDS):
            self._gauge.measure()
        serve.warm_up([self._endpoint.base_url], mix, serve_options(self._options))

    def trial(self, mix: Mix) -> Trial:
        """Replay a mix, measure batches once more, and simulate the same arrivals."""
        options = self._options
        before, _ = self._gauge.latest(ROUNDS)
        setup = setup_of(before, options, self._info)
        live = replayed(self._endpoint, setup, mix, options, self._num_replays)
        self._num_replays += 1
        for _ in range(ROUNDS):
            self._gauge.measure()
        device, fit_errors = self._gauge.latest(2 * ROUNDS)
        setup = setup_of(device, options, self._info)
        run = simulate(setup, setup.scheduling(options.policy), live.plans, live.arrivals_s)
        return Trial(summarize(live.run), summarize(run), device, fit_errors, self._gauge.drift())


HEADER: Final = (
    "trace",
    "measure",
    "statistic",
    "live",
    "simulated",
    "error",
    "others' cores",
    "drift",
)


QUEUE_HEADER: Final = (
    "trace",
    "within",
    "wait share, live",
    "simulated",
    "preemptions, live",
    "simulated",
)


def queue_rows(
    live: Mapping[str, Mapping[str, Any]],
    simulated: Mapping[str, Mapping[str, Any]],
    within: Mapping[str, bool],
) -> list[list[object]]:
    """Per trace, how much there was to schedule: without a queue, only step times are validated."""
    return [
        [name, "yes" if ok else "no"]
        + [side[name][key] for key in ("wait_share", "preemptions") for side in (live, simulated)]
        for name, ok in within.items()
    ]


def _rows(name: str, trials: Sequence[Trial]) -> list[list[object]]:
    """One row per trial and number; where there are more, one with the median error as well."""
    rows: list[list[object]] = [
        [name, measure, statistic, trial.live[measure][statistic],
         trial.simulated[measure][statistic], trial.errors[measure][statistic],
         trial.live["foreign_cores"], trial.drift]
        for trial in trials
        for measure in MEASURES
        for statistic in STATISTICS
    ]  # fmt: skip
    if len(trials) > 1:
        errors = median_errors(trials)
        rows += [
            [f"{name}, median", measure, statistic, "", "", errors[measure][statistic], "", ""]
            for measure in MEASURES
            for statistic in STATISTICS
        ]
    return rows


if __name__ == "__main__":
    sys.exit(main())
