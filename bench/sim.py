"""What would a policy do on a GPU that we do not have? A simulation with the server's own core.

    python -m bench.sim --quick
    python -m bench.sim --device h200-8b --workloads mixed --policies plas srpt --loads 0.8 1 1.2
    python -m bench.sim --traces sharegpt.jsonl.gz bfcl.jsonl.gz --loads 0.9

`bench.sim_engine` says what is simulated and what is not, `bench.sim_device` where step times
come from. Programs arrive open loop, in a Poisson process, for `--minutes`; the run ends when all
are done. A load is a share of the capacity, the rate that would keep a full batch busy all the
time. Every policy sees the same programs and the same arrivals, scaled to the rate.

"Rate at equal latency" is the largest rate at which the mean program token latency stays below a
level, over that of fcfs: the paper's throughput. The paper names no level for it. We show two that
are multiples of the unloaded latency (fcfs at the lowest load), and 300 ms per token, the tightest
objective of its Fig. 15. Beside them stands the largest ratio at any level that the baseline
crosses, and the lowest level at which the asked one is reached, if any. A load above 1 is sustained
only as long as arrivals last: the longer they do, the earlier every policy crosses a level there.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from autellix_sglang.config import ProgramConfig, add_arguments, from_arguments
from autellix_sglang.core.policy import POLICIES
from autellix_sglang.errors import ConfigError
from bench.common import (
    ROOT,
    Progress,
    format_table,
    from_one,
    new_parser,
    positive,
    print_result,
    provenance,
    say,
)
from bench.replay import poisson_arrivals
from bench.sim_device import PRESETS, Device, DeviceError, attention_pairs, load_device
from bench.sim_engine import BASELINES, Blueprint, Kinds, Kv, Scheduling, SimEngine, blueprint
from bench.stats import Run, longest_decile_ratio, summarize
from bench.synthetic import WORKLOADS, corpora
from bench.trace import TraceError, load, sample

SEED: Final = 1
SLOTS: Final = (
    64  # the concurrency that the paper's Fig. 4 shows for one A100 (its axis ends at 80)
)
MULTIPLES: Final = (2.0, 4.0)  # levels, as multiples of the unloaded latency
PAPER_LEVEL_MS: Final = 300.0
HEADLINE: Final = "4x"
MINUTES: Final = 20.0
QUICK_MINUTES: Final = 5.0
LOADS: Final = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0)
QUICK_LOADS: Final = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
LOWEST_LEVEL: Final = 1.5  # times the unloaded latency: below it curves are flat, ratios luck
NUM_LEVELS: Final = 200  # latency levels that are tried for the largest ratio
QUICK_POLICIES: Final = ("fcfs", "mlfq", "plas", "gittins")
# What issue 6 asks for: workload -> least ratio of rates against fcfs, against mlfq.
BARS: Final = {
    "chat": (2.0, 1.5),
    "react": (2.0, 1.5),
    "tree": (2.0, 2.5),
    "mixed": (4.0, 5.5),
}

VALIDATION: Final = ROOT / "bench/results/sim_validate.json"
ATTAINED: Final = ("plas", "atlas")
FEW_PROGRAMS: Final = 60  # enough to estimate the capacity from
RECORDED_PROGRAMS: Final = 1200

Summary = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What stays the same over all runs of a comparison."""

    device: Device
    num_slots: int = SLOTS
    chunk_tokens: int = 8192
    gap_scale: float = 1.0
    kv: Kv = Kv.KEEP
    kinds: Kinds = Kinds.PROMPT
    config: ProgramConfig = ProgramConfig()
    seed: int = SEED
    window_s: float = MINUTES * 60

    def scheduling(self, name: str) -> Scheduling:
        """The server's policy of this name, or a baseline that only the simulator has."""
        if name in BASELINES:
            return Scheduling(config=self.config, baseline=name, kv=self.kv)
        return Scheduling(config=self.config.replace(policy=name), kv=self.kv)


def simulate(
    setup: Setup, scheduling: Scheduling, plans: Sequence[Blueprint], arrivals_s: Sequence[float]
) -> Run:
    engine = SimEngine(
        setup.device,
        scheduling,
        num_slots=setup.num_slots,
        chunk_tokens=setup.chunk_tokens,
        gap_scale=setup.gap_scale,
    )
    return engine.run(plans, arrivals_s)


def capacity(setup: Setup, plans: Sequence[Blueprint]) -> float:
    """Programs per second that would keep a full batch busy all the time: load 1.

    Reckoned, not simulated: each call's share of full decode steps, and the prefill of what no
    other call brings into the cache. Prefill batches that are not full, and cache that is lost,
    cost extra.
    """
    return len(plans) / sum(_busy_s(setup, plan) for plan in plans)


def _busy_s(setup: Setup, plan: Blueprint) -> float:
    device, total = setup.device, 0.0
    for call, fresh in zip(plan.trace.calls, plan.fresh_tokens, strict=True):
        context = call.prompt_tokens + call.output_tokens // 2
        decode = device.decode_s / setup.num_slots + device.decode_call_s
        total += call.output_tokens * (decode + device.decode_kv_s * context)
        total += device.prefill_token_s * fresh
        num_cached = call.prompt_tokens - fresh
        total += device.prefill_pair_s * attention_pairs(num_cached, fresh)
        total += device.prefill_cached_pair_s * attention_pairs(0, num_cached)
    return total


def rate_at(curve: Mapping[float, float], level: float) -> float | None:
    """The first load at which a curve of latencies by load crosses `level`.

    Interpolated between neighbours, on the logarithm of the latency. None if the curve starts
    above the level; infinite if it never reaches it.
    """
    points = sorted(curve.items())
    if points[0][1] > level:
        return None
    for (low, below), (high, above) in pairwise(points):
        if above > level:
            share = math.log(level / below) / math.log(above / below)
            return low + share * (high - low)
    return math.inf


class Ratio(NamedTuple):
    """A rate over another at a latency level; `is_least` where only the other one crosses it."""

    value: float
    is_least: bool
    level_ms: float

    def __str__(self) -> str:
        return f"{'> ' if self.is_least else ''}{self.value:.3g}"


def ratio_at(
    mine: Mapping[float, float], theirs: Mapping[float, float], level_ms: float
) -> Ratio | None:
    """None where the other curve does not cross the level within the loads."""
    at, other = rate_at(mine, level_ms), rate_at(theirs, level_ms)
    if at is None or other is None or other == math.inf:
        return None
    if at == math.inf:
        return Ratio(max(mine) / other, True, level_ms)
    return Ratio(at / other, False, level_ms)


def ratios(mine: Mapping[float, float], theirs: Mapping[float, float]) -> list[Ratio]:
    """At every level that the other curve crosses, from `LOWEST_LEVEL` up."""
    low, high = LOWEST_LEVEL * min(theirs.values()), max(theirs.values())
    if low >= high:
        return []
    levels = (low * (high / low) ** (i / NUM_LEVELS) for i in range(NUM_LEVELS + 1))
    found = (ratio_at(mine, theirs, level_ms) for level_ms in levels)
    return [ratio for ratio in found if ratio is not None]


# --- one workload -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Curves:
    """Summaries of one workload by load and policy, and the rate that load 1 stands for."""

    capacity: float
    by_load: dict[float, dict[str, Summary]]

    @property
    def policies(self) -> list[str]:
        return list(next(iter(self.by_load.values())))

    def latency_curve(self, policy: str) -> dict[float, float]:
        """Mean program token latency in ms by load."""
        return {
            share: row[policy]["program_token_latency_ms"]["mean"]
            for share, row in self.by_load.items()
        }

    @property
    def levels_ms(self) -> dict[str, float]:
        """The latency levels at which rates are compared, by name."""
        curve = self.latency_curve("fcfs")
        unloaded = curve[min(curve)]
        multiples = {f"{multiple:g}x": multiple * unloaded for multiple in MULTIPLES}
        return {**multiples, f"{PAPER_LEVEL_MS:g} ms": PAPER_LEVEL_MS}

    def ratio_at(self, policy: str, baseline: str, level: str) -> Ratio | None:
        """Rate over the baseline's at a level; None where the baseline does not cross it."""
        mine, theirs = self.latency_curve(policy), self.latency_curve(baseline)
        return ratio_at(mine, theirs, self.levels_ms[level])

    def ratio(self, policy: str, baseline: str, level: str) -> float | None:
        """The same; None where one of the curves does not cross the level."""
        found = self.ratio_at(policy, baseline, level)
        return None if found is None or found.is_least else found.value

    def ratios(self, policy: str, baseline: str) -> list[Ratio]:
        """At every level that the baseline crosses, from the lowest up."""
        return ratios(self.latency_curve(policy), self.latency_curve(baseline))


def compare(
    setup: Setup, plans: Sequence[Blueprint], policies: Sequence[str], loads: Sequence[float]
) -> Curves:
    """Simulate every policy at every load; fcfs is always among them.

    `plans` are used from the front, over and over if they are too few.
    """
    names = list(dict.fromkeys(["fcfs", *policies]))
    full = capacity(setup, plans)
    by_load: dict[float, dict[str, Summary]] = {}
    with Progress("runs", len(names) * len(loads)) as progress:
        for share in sorted(loads):
            runs: dict[str, Run] = {}
            for name in names:
                runs[name] = at_rate(setup, setup.scheduling(name), plans, share * full)
                progress.advance()
            by_load[share] = {name: summary(run, runs["fcfs"]) for name, run in runs.items()}
    return Curves(full, by_load)


def at_rate(setup: Setup, scheduling: Scheduling, plans: Sequence[Blueprint], rate: float) -> Run:
    """One run of `setup.window_s` seconds of arrivals at `rate` programs per second."""
    count = math.ceil(2 * rate * setup.window_s) + 20
    arrivals = [t for t in poisson_arrivals(count, rate, setup.seed) if t < setup.window_s]
    drawn = [plans[i % len(plans)] for i in range(len(arrivals))]
    return simulate(setup, scheduling, drawn, arrivals)


def summary(run: Run, stock: Run) -> Summary:
    """The numbers of a run, and those of who pays against stock order."""
    return summarize(run) | {"longest_decile_ratio": longest_decile_ratio([run], [stock])}


def synthetic_plans(workload: str, setup: Setup, largest_load: float) -> list[Blueprint]:
    """As many programs of a built-in workload as its longest run needs."""
    few = _drawn(workload, FEW_PROGRAMS, setup)
    count = math.ceil(capacity(setup, few) * largest_load * setup.window_s * 1.1) + 20
    return _drawn(workload, max(count, FEW_PROGRAMS), setup)


def _drawn(workload: str, num_programs: int, setup: Setup) -> list[Blueprint]:
    mix = sample(corpora(workload, num_programs, setup.seed), num_programs, setup.seed)
    return [blueprint(program, setup.kinds) for program in mix.programs]


def recorded_plans(
    paths: Sequence[Path], setup: Setup, scale: float, max_calls: int | None
) -> list[Blueprint]:
    """A mix of recorded programs; those that exceed the device's KV are left out, and counted."""
    mix = sample(
        [load(path) for path in paths],
        RECORDED_PROGRAMS,
        setup.seed,
        factor=scale,
        max_calls=max_calls,
        max_prompt_tokens=setup.device.kv_tokens,
    )
    if mix.skipped:
        say(f"{mix.skipped} of {mix.candidates} programs do not fit the device and are left out")
    return [blueprint(program, setup.kinds) for program in mix.programs]


# --- what is printed ----------------------------------------------------------------------------

COLUMNS: Final = (
    *("load", "policy", "mean", "p95", "p99", "mean-s", "p99-s"),
    *("tokens/s", "preempted", "waiting", "longest-tenth"),
)


def curve_rows(curves: Curves) -> list[list[object]]:
    rows: list[list[object]] = []
    for share, by_policy in curves.by_load.items():
        for policy, numbers in by_policy.items():
            latency, response = numbers["program_token_latency_ms"], numbers["program_response_s"]
            rows.append([
                f"{share:g}", policy, latency["mean"], latency["p95"], latency["p99"],
                response["mean"], response["p99"], numbers["engine_tokens_per_s"],
                numbers["preemptions"], numbers["wait_share"], numbers["longest_decile_ratio"],
            ])  # fmt: skip
    return rows


def crossing_rows(curves: Curves) -> list[list[object]]:
    """Per level and policy: the load where it is crossed, and the rate over each baseline's."""
    rows: list[list[object]] = []
    for level, at_ms in curves.levels_ms.items():
        for policy in curves.policies:
            share = rate_at(curves.latency_curve(policy), at_ms)
            crossed = "never" if share == math.inf else share
            over = [curves.ratio_at(policy, other, level) for other in _baselines(curves)]
            cells = [None if ratio is None else str(ratio) for ratio in over]
            rows.append([f"{level} = {at_ms:.0f} ms", policy, crossed, *cells])
    return rows


def _baselines(curves: Curves) -> list[str]:
    return [name for name in ("fcfs", "mlfq") if name in curves.policies]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of issue 6, and the best attained-service policy's ratio at each level.

    `largest` is its largest ratio at any level that the baseline crosses, `reached` the one at the
    lowest level where it is what the bar asks for.
    """

    workload: str
    against: str
    asked: float
    by_level: dict[str, Ratio | None]
    largest: Ratio | None
    reached: Ratio | None

    @property
    def verdict(self) -> str:
        """Of the named levels: `open` where a crossing beyond the loads could still reach it."""
        known = [ratio for ratio in self.by_level.values() if ratio is not None]
        if any(ratio.value >= self.asked for ratio in known):
            return "met"
        is_open = not known or any(ratio.is_least for ratio in known)
        return "open" if is_open else "missed"

    def row(self) -> list[object]:
        cells = [None if ratio is None else str(ratio) for ratio in self.by_level.values()]
        largest = f"{self.largest} at {self.largest.level_ms:.0f} ms" if self.largest else None
        reached = f"{self.reached.level_ms:.0f} ms" if self.reached else "nowhere"
        return [
            self.workload, self.against, self.asked, *cells, self.verdict, largest, reached
        ]  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        return {
            "workload": self.workload,
            "against": self.against,
            "asked": self.asked,
            "by_level": {name: _json(ratio) for name, ratio in self.by_level.items()},
            "largest": _json(self.largest),
            "reached": _json(self.reached),
            "verdict": self.verdict,
        }


def _json(ratio: Ratio | None) -> dict[str, Any] | None:
    return None if ratio is None else ratio._asdict()


def bars(by_workload: Mapping[str, Curves], policies: Sequence[str]) -> list[Bar]:
    found = []
    for workload, curves in by_workload.items():
        for against, asked in zip(_baselines(curves), BARS.get(workload, ()), strict=False):
            by_level = {
                level: best(curves.ratio_at(policy, against, level) for policy in policies)
                for level in curves.levels_ms
            }
            everywhere = [r for policy in policies for r in curves.ratios(policy, against)]
            reached = [ratio for ratio in everywhere if ratio.value >= asked]
            lowest = min(reached, key=lambda ratio: ratio.level_ms, default=None)
            found.append(Bar(workload, against, asked, by_level, best(everywhere), lowest))
    return found


def best(found: Iterable[Ratio | None]) -> Ratio | None:
    return max((ratio for ratio in found if ratio is not None), default=None)


def print_workload(name: str, curves: Curves) -> None:
    print(f"\n{name}: load 1 is {curves.capacity:.3g} programs/s")
    print("program token latency in ms, program response in s\n")
    print(format_table(COLUMNS, curve_rows(curves)))
    over = [f"rate / {baseline}" for baseline in _baselines(curves)]
    print()
    print(format_table(["level", "policy", "crossed at load", *over], crossing_rows(curves)))


def print_bars(found: Sequence[Bar]) -> None:
    levels = list(found[0].by_level)
    rows = [bar.row() for bar in found]
    print("\nbest attained-service policy: rate over the baseline's at each level\n")
    header = ["workload", "against", "bar", *levels, "verdict", "largest", "bar reached at"]
    print(format_table(header, rows))


def as_json(by_workload: Mapping[str, Curves], found: Sequence[Bar]) -> dict[str, Any]:
    """The keys that every benchmark shares, and what is needed to read them."""
    return {
        "rate_at_equal_latency": {w: _ratios(c, HEADLINE) for w, c in by_workload.items()},
        "rate_at_equal_latency_by_level": {
            w: {level: _ratios(c, level) for level in c.levels_ms} for w, c in by_workload.items()
        },
        "level": HEADLINE,
        "levels_ms": {w: c.levels_ms for w, c in by_workload.items()},
        "capacity_programs_per_s": {w: c.capacity for w, c in by_workload.items()},
        **{
            key: {
                w: {f"{s:g}": {p: v[key] for p, v in row.items()} for s, row in c.by_load.items()}
                for w, c in by_workload.items()
            }
            for key in ("program_token_latency_ms", "program_response_s", "longest_decile_ratio")
        },
        "bars": [bar.as_json() for bar in found],
        "validation": validation(),
    }


def validation() -> dict[str, Any]:
    """By trace, how far the simulator was from the live engine: the last `bench.sim_validate`."""
    if not VALIDATION.exists():
        return {}
    errors: dict[str, Any] = json.loads(VALIDATION.read_text())["errors"]
    return errors


def _ratios(curves: Curves, level: str) -> dict[str, float | None]:
    return {policy: curves.ratio(policy, "fcfs", level) for policy in curves.policies}


# --- command line -------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    known = [*POLICIES, *BASELINES]
    out = new_parser("bench.sim", __doc__)
    add = out.add_argument
    add("--quick", action="store_true", help="four policies, few loads, 5 minutes of arrivals")
    add("--device", choices=PRESETS, default="a100-8b", help="default: %(default)s")
    add(
        "--workloads",
        nargs="*",
        choices=WORKLOADS,
        help="default: the paper's four, or none with --traces",
    )
    add("--traces", nargs="+", type=Path, default=[], help="recorded files, mixed in equal parts")
    add("--policies", nargs="+", choices=known, help="default: all")
    add("--loads", nargs="+", type=positive, help="shares of the capacity (default: 0.5 to 3)")
    add("--minutes", type=positive, help="how long programs arrive (default: 20)")
    add("--points", type=Path, help="measured batches of another device, in place of --device")
    add("--slots", type=from_one, default=SLOTS, help="calls in a batch (default: %(default)s)")
    add("--chunk", type=from_one, default=8192, help="prefill tokens per pass (%(default)s)")
    add("--kv", type=Kv, choices=Kv, default=Kv.KEEP, metavar="{keep,swap,drop}",
        help="what becomes of a preempted call's KV (default: keep)")  # fmt: skip
    add("--kinds", type=Kinds, choices=Kinds, default=Kinds.PROMPT, metavar="{prompt,name,none}",
        help="what the server sees of a program's kind (default: prompt)")  # fmt: skip
    add("--scale", type=positive, default=1.0, help="factor on recorded token counts")
    add("--max-calls", type=from_one, help="cut recorded programs off after this many calls")
    add("--gap-scale", type=float, default=1.0, help="factor on recorded tool and user times")
    add("--seed", type=int, default=SEED, help="default: %(default)s")
    add_arguments(out)
    return out


def setup_of(options: argparse.Namespace) -> Setup:
    minutes = options.minutes or (QUICK_MINUTES if options.quick else MINUTES)
    return Setup(
        device=load_device(options.points) if options.points else PRESETS[options.device],
        num_slots=options.slots,
        chunk_tokens=options.chunk,
        gap_scale=options.gap_scale,
        kv=options.kv,
        kinds=options.kinds,
        config=from_arguments(options),
        seed=options.seed,
        window_s=60 * minutes,
    )


def workloads_of(
    options: argparse.Namespace, setup: Setup, loads: Sequence[float]
) -> Iterator[tuple[str, list[Blueprint]]]:
    """Every workload asked for, by name; the paper's where nothing was said."""
    names = options.workloads
    if names is None:
        names = [] if options.traces else list(BARS)
    for name in names:
        yield name, synthetic_plans(name, setup, max(loads))
    if options.traces:
        yield "recorded", recorded_plans(options.traces, setup, options.scale, options.max_calls)


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    arguments = parser()
    options = arguments.parse_args(argv)
    try:
        return report(options, setup_of(options), started)
    except (ConfigError, TraceError, DeviceError, OSError) as error:
        arguments.error(str(error))


def report(options: argparse.Namespace, setup: Setup, started: float) -> int:
    """Simulate what was asked for and print it."""
    default = QUICK_POLICIES if options.quick else (*POLICIES, *BASELINES)
    policies = options.policies or default
    loads = options.loads or (QUICK_LOADS if options.quick else LOADS)
    by_workload: dict[str, Curves] = {}
    for name, plans in workloads_of(options, setup, loads):
        say(f"{name}: {setup.window_s / 60:g} minutes of arrivals on {setup.device.name}")
        by_workload[name] = compare(setup, plans, policies, loads)
        print_workload(name, by_workload[name])
    found = bars(by_workload, [name for name in policies if name in ATTAINED])
    if found:
        print_bars(found)
    result = as_json(by_workload, found) | {
        "device": setup.device.name,
        "slots": setup.num_slots,
        "kv": setup.kv.value,
        "minutes": setup.window_s / 60,
    }
    print_result(result | provenance(started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
