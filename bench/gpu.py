"""Which order serves programs best on a real GPU? One command, under 20 minutes.

    make gpu-bench
    python -m bench.gpu --trace sharegpt.jsonl.gz --trace bfcl.jsonl.gz --trace tot.jsonl.gz
    python -m bench.gpu --device cpu --quick     # the same on the CPU with the tiny model

The engine is real, at the shapes of Llama-3.1-8B with dummy weights (nothing is downloaded). The
programs are `bench.serve`'s: recorded ones, or the built-in mix where no `--trace` is given.
SGLang's own orders (`off` is its fcfs, then `lpm` and `hrrn`) get a server each, our policies share
one, whose policy is switched live; servers run one after the other, as a GPU holds one at a time.

Capacity is measured once, on the first server, and every policy sees the same programs and the
same arrivals at each load. Programs arrive for so long that all runs fit `--minutes`, given how
long the first server took to start (its kernels may be compiled then; later ones find them done).
That is half a minute, so batch slots are few, token counts a quarter and programs cut off after 40
calls: a program has to be over much sooner than arrivals are, or there is no queue to order. Where
there is none at a load from 1 up all the same, the result says so. A call that is lost makes the
exit status 1.

The result goes to `--json` and as a page with charts to `--html`, anew after each server, so that
one that fails costs only its own policies. The last line of stdout is one
JSON object: `loads` holds what `bench.serve` prints, for each load.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, Final

import torch

from autellix_sglang.config import ProgramConfig
from autellix_sglang.platform.tiny_model import cache_directory, write_tokenizer
from bench import charts, report, serve
from bench.charts import Series
from bench.common import ROOT, new_parser, print_result, provenance, say, write_json, write_result
from bench.replay import poisson_arrivals
from bench.serve import Offered, ServeOptions
from bench.server import STOCK, Endpoint, ServerError, policy_servers
from bench.stats import Run
from bench.trace import Mix, TraceProgram

# Published configuration of Llama-3.1-8B; nothing but the shapes matters here.
LLAMA_8B: Final[Mapping[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
CONTEXT_TOKENS: Final = 32768
DRAIN_SHARE: Final = 0.6  # of the window, reserved for what is not done when arrivals end
MIN_PROGRAMS: Final = 4
POLICIES: Final = tuple(dict.fromkeys((*STOCK, "mlfq", "plas", ProgramConfig().policy)))

# --- options ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What is served where, and how long it takes to start."""

    flags: tuple[str, ...]
    slots: int
    scale: float
    start_s: float  # of one server, about; measured on the first


def cuda_device() -> Device:
    """Llama-3.1-8B's shapes; writes the model's directory if it is not there.

    Raises `ValueError` where torch finds no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device; --device cpu runs it with the tiny model")
    flags = (
        *("--model-path", str(ensure_dummy_8b()), "--load-format", "dummy"),
        *("--dtype", "bfloat16", "--context-length", str(CONTEXT_TOKENS)),
    )
    return Device(flags=flags, slots=16, scale=0.25, start_s=90.0)


def cpu_device() -> Device:
    """The tiny model, which the launcher serves where it is given none."""
    return Device(flags=(), slots=4, scale=0.1, start_s=20.0)


DEVICES: Final = {"cuda": cuda_device, "cpu": cpu_device}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOptions:
    """What is compared, and within how much time."""

    device: str = "cuda"
    policies: tuple[str, ...] = POLICIES
    loads: tuple[float, ...] = (0.8, 1.0, 1.3)
    minutes: float = 18.0
    calibration_s: float = 20.0
    trace: tuple[str, ...] = ()
    workload: str = "mixed"
    max_calls: int = 40
    seed: int = 0
    server_args: tuple[str, ...] = ()


QUICK: Final[Mapping[str, Any]] = {
    "loads": (0.8, 1.2, 1.5),
    "minutes": 3.7,
    "calibration_s": 6.0,
    "max_calls": 20,
}


def ensure_dummy_8b(parent: Path | None = None) -> Path:
    """A directory with the 8B configuration and the byte-level tokenizer, and no weights."""
    directory = (parent or cache_directory()) / "dummy-llama-3.1-8b"
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(LLAMA_8B, indent=2) + "\n")
    return directory


# --- planning -----------------------------------------------------------------------------------


def stages(policies: Sequence[str]) -> list[tuple[str, ...]]:
    """Which policies are served together: each stock order alone, ours on one server."""
    stock: list[tuple[str, ...]] = [(policy,) for policy in policies if policy in STOCK]
    ours = tuple(policy for policy in policies if policy not in STOCK)
    return [*stock, ours] if ours else stock


def window_s(options: GpuOptions, spent_s: float, starts_s: float) -> float:
    """How long programs may arrive in each run, so that all of it fits into the minutes.

    `spent_s` is gone, and `starts_s` will go into the starts of servers. Raises `ValueError` where
    less than a second is left.
    """
    left = 60 * options.minutes - spent_s - starts_s
    longest = (1 + DRAIN_SHARE) * max(1.0, max(options.loads))
    window = left / (len(options.policies) * len(options.loads)) / longest
    if window < 1:
        raise ValueError(
            f"{options.minutes:g} minutes are too few for {len(options.policies)} policies at"
            f" {len(options.loads)} loads: give more --minutes, or fewer policies or loads"
        )
    return window


def num_programs(rate: float, window: float, available: int) -> int:
    """How many programs arrive in a window; at least a few, at most what there is."""
    return min(available, max(MIN_PROGRAMS, math.ceil(rate * window)))


@dataclass(slots=True)
class Plan:
    """What every server is given: programs by load, and when they arrive."""

    options: ServeOptions
    capacity: float
    mixes: dict[float, Mix] = field(default_factory=dict)
    offered: dict[float, Offered] = field(default_factory=dict)
    arrivals: dict[float, list[float]] = field(default_factory=dict)


def make_plan(
    candidates: Mix, capacity: float, loads: Sequence[float], window: float, options: ServeOptions
) -> Plan:
    """The same programs from the front at every load, faster and more of them at higher ones."""
    programs = candidates.programs
    tokens = sum(program.output_tokens for program in programs) / len(programs)
    plan = Plan(options, capacity)
    for load in loads:
        rate = load * capacity / tokens
        count = num_programs(rate, window, len(programs))
        plan.mixes[load] = replace(candidates, programs=programs[:count])
        plan.offered[load] = Offered(rate, load, capacity)
        plan.arrivals[load] = poisson_arrivals(count, rate, options.seed)
    return plan


# --- running ------------------------------------------------------------------------------------

Runs = dict[float, dict[str, list[Run]]]  # by load and policy
NUM_CANDIDATES: Final = 600


def serve_options(options: GpuOptions, device: Device) -> ServeOptions:
    """The same choices in `bench.serve`'s words; gaps are zero, so that a short run has a queue."""
    return ServeOptions(
        policies=options.policies,
        trace=options.trace,
        workload=options.workload,
        programs=NUM_CANDIDATES,
        scale=device.scale,
        max_calls=options.max_calls,
        gaps="zero",
        max_running_requests=device.slots,
        calibration_s=options.calibration_s,
        seed=options.seed,
        server_args=(*device.flags, *options.server_args),
    )


def benchmark(options: GpuOptions, device: Device, save: Callable[[Plan, Runs], None]) -> None:
    """Every stage's servers in turn; the first also tells how much the engine can do.

    Calls `save` with what there is after each stage.
    """
    started = time.perf_counter()
    stages_left = len(stages(options.policies))
    window_s(options, options.calibration_s, stages_left * device.start_s)
    common = serve_options(options, device)
    corpora = serve.load_corpora(common)
    runs: Runs = {load: {} for load in options.loads}
    plan: Plan | None = None
    for policies in stages(options.policies):
        say(f"starting a server for: {', '.join(policies)}")
        begun = time.perf_counter()
        with policy_servers(policies, common.server_flags) as endpoints:
            if plan is None:
                start_s = time.perf_counter() - begun
                candidates, capacity = _calibrate(endpoints[policies[0]], corpora, common)
                spent_s = time.perf_counter() - started
                window = window_s(options, spent_s, (stages_left - 1) * start_s)
                plan = make_plan(candidates, capacity, options.loads, window, common)
                say(f"capacity {capacity:.0f} tokens/s; each run takes programs for {window:.0f} s")
            serve.warm_up([endpoints[policies[0]].base_url], plan.mixes[options.loads[0]], common)
            for load in options.loads:
                say(f"load {load:g}: {len(plan.mixes[load].programs)} programs")
                for policy, endpoint in endpoints.items():
                    run = serve.run_one(endpoint, plan.mixes[load], plan.arrivals[load], common, 0)
                    runs[load][policy] = [run]
        save(plan, runs)


def _calibrate(
    endpoint: Endpoint, corpora: Sequence[Sequence[TraceProgram]], options: ServeOptions
) -> tuple[Mix, float]:
    """The programs to draw from, and the capacity in generated tokens per second."""
    limits = serve.read_limits(endpoint.base_url, options)
    candidates = serve.sample_workload(corpora, options, limits)
    serve.warm_up([endpoint.base_url], candidates, options)
    capacity = serve.measure_capacity(endpoint.base_url, candidates.programs, options, limits)
    return candidates, capacity


# --- results ------------------------------------------------------------------------------------


def make_result(options: GpuOptions, plan: Plan, runs: Runs) -> dict[str, Any]:
    """What `bench.serve` makes of each load, in the order of `--policies`, and what was lost.

    Policies that have not run are `missing`.
    """
    done = [policy for policy in options.policies if policy in runs[options.loads[0]]]
    loads = {
        f"{load:g}": serve.make_result(
            {policy: by_policy[policy] for policy in done},
            plan.mixes[load],
            replace(plan.options, policies=tuple(done)),
            plan.offered[load],
        )
        for load, by_policy in runs.items()
    }
    return {
        "benchmark": "gpu",
        "device": options.device,
        "capacity_tokens_per_s": plan.capacity,
        "baseline": done[0],
        "missing": [policy for policy in options.policies if policy not in done],
        "lost": sum(entry["lost"] for load in loads.values() for entry in load["results"]),
        "caveats": [
            f"At load {name} calls hardly waited, though they should: nothing is compared there."
            " Give more --minutes, fewer --policies or --loads, or fewer --max-calls."
            for name, one in loads.items()
            if float(name) >= 1 and one["is_queueing"] is False
        ],
        "loads": loads,
    }


def render(result: Mapping[str, Any], runs: Runs) -> str:
    """The page: mean latency over load, then each load with its bars, sizes and numbers."""
    chart = _latency_over_load(result)
    sections = [report.section("Latency over load", "loads", _notes(result) + chart)]
    for (name, one), by_policy in zip(result["loads"].items(), runs.values(), strict=True):
        content = (
            _notes(one)
            + report.latency_bars(one)
            + report.latency_curves(by_policy)
            + report.size_bars(one)
            + report.results_table(one)
        )
        sections.append(report.section(f"Load {name}", f"load-{name}", content))
    first = next(iter(result["loads"].values()))
    facts = report.definitions({
        "capacity": f"{result['capacity_tokens_per_s']:.0f} generated tokens/s, all loads relative",
        "lost calls": result["lost"],
        "server flags": " ".join(first["server_flags"]),
        **report.provenance_facts(result),
    })  # fmt: skip
    sections.append(report.section("How this was measured", "method", facts))
    header = (
        f'<header><p class="kicker">{escape(first["trace"])}, on {escape(result["device"])}</p>'
        "<h1>Orders of calls on a real engine</h1></header>"
    )
    return report.page("bench.gpu", header + "".join(sections))


def _notes(result: Mapping[str, Any]) -> str:
    return "".join(f'<p class="note">{escape(caveat)}</p>' for caveat in result["caveats"])


def _latency_over_load(result: Mapping[str, Any]) -> str:
    points: dict[str, list[tuple[float, float]]] = {}
    for load, one in result["loads"].items():
        for entry in one["results"]:
            mean = entry["program_token_latency_ms"]["mean"]
            if mean is not None:
                points.setdefault(entry["policy"], []).append((float(load), mean))
    series = [Series(policy, f"p{i}", known) for i, (policy, known) in enumerate(points.items())]
    chart = charts.lines(
        "Mean over programs", series, "load", "ms per generated token", width=report.WIDTH
    )
    return report.legend([(one.css, one.name) for one in series]) + chart


# --- command line -------------------------------------------------------------------------------


def parse_options(argv: Sequence[str]) -> tuple[GpuOptions, argparse.Namespace]:
    """The options, and where the results go; exits with a message where they make no sense."""
    out = new_parser("bench.gpu", __doc__)
    default = GpuOptions()
    add = out.add_argument
    add("--device", choices=DEVICES, default=default.device, help="default: %(default)s")
    add("--policies", type=_names, default=default.policies, metavar="P,P",
        help=f"default: {','.join(default.policies)}; ratios are to the first")  # fmt: skip
    add("--loads", type=_loads, default=default.loads, metavar="L,L",
        help="relative to the measured capacity; default: 0.8,1,1.3")  # fmt: skip
    add("--minutes", type=float, default=default.minutes, help="for all of it (%(default)s)")
    add("--calibration-s", type=float, default=default.calibration_s, help="(%(default)s)")
    add("--trace", action="append", default=[], metavar="FILE", help="repeat it for a mix")
    add("--workload", default=default.workload, help="built-in, without --trace (%(default)s)")
    add("--max-calls", type=int, default=default.max_calls,
        help="cut programs off after this many calls (%(default)s)")  # fmt: skip
    add("--seed", type=int, default=default.seed)
    add("--server-args", type=shlex.split, default=[], metavar="ARGS", help="more server flags")
    add("--quick", action="store_true", help="four minutes, for trying it out")
    add("--json", type=Path, help="default: bench/results/gpu.json, with --quick bench/out/")
    add("--html", type=Path, default=ROOT / "bench/out/gpu.html", help="bench/out/gpu.html")
    presets = out.parse_args(argv)
    out.set_defaults(**(QUICK if presets.quick else {}))
    values = out.parse_args(argv)
    folder = "out" if values.quick else "results"
    values.json = values.json or ROOT / "bench" / folder / "gpu.json"
    names = GpuOptions.__dataclass_fields__
    chosen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(values).items()
        if name in names
    }
    return GpuOptions(**chosen), values


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if len(set(names)) != len(names) or not names:
        raise argparse.ArgumentTypeError("name one or more policies, each once")
    return names


def _loads(text: str) -> tuple[float, ...]:
    loads = tuple(float(load) for load in text.split(","))
    if min(loads) <= 0:
        raise argparse.ArgumentTypeError(f"loads are above 0, got {text}")
    return tuple(sorted(loads))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 where it could not be done, or where a call was lost."""
    started = time.perf_counter()
    options, places = parse_options(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, serve.exit_on_signal)
    result: dict[str, Any] = {}

    def save(plan: Plan, runs: Runs) -> None:
        result.update(make_result(options, plan, runs) | provenance(started))
        write_json(places.json, result)
        write_result(places.html, render(result, runs))

    is_whole = True
    try:
        benchmark(options, DEVICES[options.device](), save)
    except (ServerError, ValueError, OSError) as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        if not result:
            return 1
        is_whole = False
    for load, one in result["loads"].items():
        print(f"\nload {load}\n{serve.result_table(one)}")
    for caveat in result["caveats"]:
        say(f"note: {caveat}")
    if result["lost"]:
        say(f"error: {result['lost']} calls were lost")
    print_result(result)
    return 0 if is_whole and not result["lost"] else 1


if __name__ == "__main__":
    sys.exit(main())
