"""Does the simulator tell the truth? The same programs, arrivals and policy, live and simulated.

    python -m bench.sim_validate --quick
    python -m bench.sim_validate --trace chat.jsonl.gz --trace tree.jsonl.gz --policy plas

Starts one server, measures its batches (`bench.sim_points`) and fits a device to them. Each trace
is then replayed by the machinery of `bench.serve` at `--load` of the capacity that the simulator
reckons, and simulated with the fitted device and the server's own settings. An error is the
simulated number over the live one, less one. Without `--trace` the built-in chat, react and
tree workloads are used.

What the simulator is not told: how long HTTP, the client and the tokenizer take; how the engine
overlaps its work. The fit contains the part of it that is there when a request runs alone.

The last line of stdout is one JSON object; `bench.sim` shows `errors` of the file of results that
`--save` writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.policy import POLICIES
from bench import serve, synthetic, trace
from bench.common import format_table, new_parser, print_result, provenance, say
from bench.replay import poisson_arrivals
from bench.serve import ServeOptions
from bench.server import Endpoint, ServerError, policy_servers, server_info
from bench.sim import Setup, capacity, simulate
from bench.sim_device import Device, fitted
from bench.sim_engine import blueprint
from bench.sim_points import errors as fit_errors
from bench.sim_points import measure, over_http
from bench.stats import Run, summarize
from bench.trace import Mix, TraceProgram

BAR: Final = 0.15
BUILT_IN: Final = ("chat", "react", "tree")
MEASURES: Final = ("program_token_latency_ms", "program_response_s")
STATISTICS: Final = ("mean", "p95")
CHUNK_TOKENS: Final = 8192  # where the server does not say
FIT_REPEATS: Final = 3
FIT_MAX_PROMPT: Final = 1024

Errors = dict[str, dict[str, float]]  # by measure and statistic


@dataclass(frozen=True, slots=True)
class Pair:
    """One trace, live and simulated, as summaries of `bench.stats`."""

    live: dict[str, Any]
    simulated: dict[str, Any]

    @property
    def errors(self) -> Errors:
        return {
            measure: {
                name: self.simulated[measure][name] / self.live[measure][name] - 1
                for name in STATISTICS
            }
            for measure in MEASURES
        }

    @property
    def is_within(self) -> bool:
        """The bar: mean and p95 of the program token latency."""
        return all(abs(error) <= BAR for error in self.errors[MEASURES[0]].values())


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


def compare(
    endpoint: Endpoint, setup: Setup, mix: Mix, options: argparse.Namespace, number: int
) -> Pair:
    """Replay a mix on the server, and simulate the same arrivals."""
    plans = [blueprint(program) for program in mix.programs]
    rate = options.load * capacity(setup, plans)
    arrivals = poisson_arrivals(len(plans), rate, options.seed)
    run = serve.run_one(endpoint, mix, arrivals, serve_options(options), number)
    simulated = simulate(setup, setup.scheduling(options.policy), plans, arrivals)
    require_complete(run)
    return Pair(summarize(run), summarize(simulated))


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
    add("--load", type=float, default=1.2, help="share of the capacity (default: %(default)s)")
    add("--programs", type=int, default=24, help="per trace (default: %(default)s)")
    add("--max-calls", type=int, default=40, help="per program (default: %(default)s)")
    add("--scale", type=float, default=0.25, help="factor on token counts (default: %(default)s)")
    add("--slots", type=int, default=8, help="calls in a batch (default: %(default)s)")
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
    return 0


def validate(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, fit, replay and simulate; prints a table, returns the JSON object."""
    live = serve_options(options)
    flags = ["--max-running-requests", str(options.slots)]
    pairs: dict[str, Pair] = {}
    with policy_servers([options.policy], flags) as endpoints:
        endpoint = endpoints[options.policy]
        base_url = endpoint.base_url
        info = dict(server_info(base_url))
        say("measuring batches")
        decode, prefill = measure(over_http(base_url), FIT_REPEATS, options.slots, FIT_MAX_PROMPT)
        device = fitted("measured", decode, prefill, int(info["max_total_num_tokens"]))
        setup = setup_of(device, options, info)
        for number, (name, programs) in enumerate(corpora_of(options).items()):
            mix = trace.sample(
                [programs],
                options.programs,
                options.seed,
                factor=options.scale,
                max_calls=options.max_calls,
                max_prompt_tokens=serve.read_limits(base_url, live).max_context_tokens,
            )
            if not pairs:
                serve.warm_up([base_url], mix, live)
            pairs[name] = compare(endpoint, setup, mix, options, number)
    print(format_table(HEADER, [row for name in pairs for row in _rows(name, pairs[name])]))
    return {
        "policy": options.policy,
        "load": options.load,
        "scale": options.scale,
        "slots": options.slots,
        "device": dataclasses.asdict(device),
        "fit_errors": fit_errors(device, decode, prefill),
        "live": {name: pair.live for name, pair in pairs.items()},
        "simulated": {name: pair.simulated for name, pair in pairs.items()},
        "errors": {name: pair.errors for name, pair in pairs.items()},
        "bar": BAR,
        "within": {name: pair.is_within for name, pair in pairs.items()},
    }


HEADER: Final = ("trace", "measure", "statistic", "live", "simulated", "error")


def _rows(name: str, pair: Pair) -> list[list[object]]:
    return [
        [name, measure, statistic, pair.live[measure][statistic],
         pair.simulated[measure][statistic], pair.errors[measure][statistic]]
        for measure in MEASURES
        for statistic in STATISTICS
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
