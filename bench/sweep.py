"""Which settings of the program scheduler are good, and who pays for them? A sweep in simulation.

    python -m bench.sweep --quick
    python -m bench.sweep --axes quantum factor --loads 0.8 1 1.2 --traces sharegpt.jsonl.gz
    python -m bench.sweep --axes quantum levels --grid --program-policy atlas

One axis is varied at a time, all else as the `--program-*` flags say (by default the product's
defaults); `--grid` takes every combination of the axes instead. Axes are the settings of
`config.py`, and three that are not settings:

- `last`: the service in steps at which the last, open level begins. It chooses the number of
  levels, with quantum (32 where it is learned) and factor as they are;
- `tie`: inside a level, by the program's arrival (the product) or by the call's own;
- `unit`: what service is counted in. `steps` (the product: a prefill token costs what the engine
  measures), `tokens` (a prefill token costs as much as a generated one), `outputs` (nothing).
  Seconds are no unit here: no wall clock enters a ranking decision of the product.

Numbers are ratios to stock order (fcfs) with the same programs and arrivals, geometric means over
the loads: mean program token latency, mean program response, and for who pays the p99 of the
response and the mean response of the tenth of programs with most tokens.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean
from typing import Any, Final

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.policy import FIRST_QUANTUM, POLICIES, Policy
from autellix_sglang.errors import ConfigError
from bench.common import Progress, format_table, print_result, provenance, say
from bench.sim import Setup, at_rate, capacity, parser, setup_of, summary, workloads_of
from bench.sim_device import DeviceError
from bench.sim_engine import Blueprint, Scheduling
from bench.trace import TraceError

UNITS: Final = {"steps": 0.0, "tokens": 1.0, "outputs": 1e-9}  # as prefill_weight; 0 measures
AXES: Final[dict[str, tuple[Any, ...]]] = {
    "levels": (2, 3, 4, 6, 8, 12),
    "quantum": (0.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0),
    "factor": (1.5, 2.0, 3.0, 4.0, 8.0),
    "last": (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536),
    "beta": (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    "min_run": (0.0, 8.0, 32.0, 64.0, 128.0, 512.0),
    "schedule_interval": (1, 4, 8, 16, 32),
    "tie": ("program", "call"),
    "unit": tuple(UNITS),
}
LOADS: Final = (0.5, 0.8, 1.0, 1.2)
QUICK_AXES: Final = ("quantum", "last")
QUICK_LOADS: Final = (1.2,)
QUICK_MINUTES: Final = 5.0
MEASURES: Final = ("latency", "response", "p99", "longest")

Values = dict[str, Any]  # by axis
Ratios = dict[str, float]  # by measure


@dataclass(frozen=True, slots=True)
class Row:
    """One choice of values, and its ratios to stock order by workload."""

    values: Values
    ratios: dict[str, Ratios]
    preempted_per_call: dict[str, float]


def scheduling(base: Scheduling, values: Values) -> Scheduling:
    """The settings with these values in place of the base's; raises `ConfigError`."""
    settings = {axis: v for axis, v in values.items() if axis not in ("last", "tie", "unit")}
    if "unit" in values:
        settings["prefill_weight"] = UNITS[values["unit"]]
    config = base.config.replace(**settings)
    if "last" in values:
        config = config.replace(quantum=config.quantum or FIRST_QUANTUM)
        config = config.replace(levels=num_levels(config, values["last"]))
    return replace(base, config=config, policy=_policy(config, values.get("tie", "program")))


def num_levels(config: ProgramConfig, last: float) -> int:
    """So many levels that the last one begins nearest to `last` steps; at least two."""
    return 2 + max(0, round(math.log(last / config.quantum, config.factor)))


def _policy(config: ProgramConfig, tie: str) -> Policy:
    policy = POLICIES[config.policy]
    return replace(policy, groups_programs=policy.groups_programs and tie == "program")


def choices(axes: Sequence[str], is_grid: bool) -> Iterator[Values]:
    """One axis after the other, or every combination."""
    if is_grid:
        for combination in itertools.product(*(AXES[axis] for axis in axes)):
            yield dict(zip(axes, combination, strict=True))
    else:
        yield from ({axis: value} for axis in axes for value in AXES[axis])


class Field:
    """One workload at several loads, with what stock order does there."""

    def __init__(self, setup: Setup, plans: Sequence[Blueprint], loads: Sequence[float]) -> None:
        self._setup = setup
        self._plans = plans
        full = capacity(setup, plans)
        stock = setup.scheduling("fcfs")
        self._stock = {share * full: at_rate(setup, stock, plans, share * full) for share in loads}

    def measure(self, chosen: Scheduling) -> tuple[Ratios, float]:
        """Ratios to stock order, and preemptions per call, over all loads."""
        found: list[Ratios] = []
        num_preemptions = num_calls = 0
        for rate, stock in self._stock.items():
            run = at_rate(self._setup, chosen, self._plans, rate)
            mine, theirs = summary(run, stock), summary(stock, stock)
            found.append(_ratios(mine, theirs))
            num_preemptions += mine["preemptions"]
            num_calls += mine["calls"]
        return (
            {key: geometric_mean(ratios[key] for ratios in found) for key in MEASURES},
            num_preemptions / num_calls,
        )


def _ratios(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Ratios:
    def over(key: str, name: str) -> float:
        return float(mine[key][name] / theirs[key][name])

    return {
        "latency": over("program_token_latency_ms", "mean"),
        "response": over("program_response_s", "mean"),
        "p99": over("program_response_s", "p99"),
        "longest": float(mine["longest_decile_ratio"]),
    }


def sweep(
    fields: Mapping[str, Field],
    base: Scheduling,
    chosen: Sequence[Values],
    note: Callable[[], None],
) -> list[Row]:
    rows = []
    for values in chosen:
        each = scheduling(base, values)
        measured = {}
        for name, field in fields.items():
            measured[name] = field.measure(each)
            note()
        rows.append(
            Row(
                values,
                {name: ratios for name, (ratios, _) in measured.items()},
                {name: preempted for name, (_, preempted) in measured.items()},
            )
        )
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    """A table per workload; `*` marks the best mean token latency of an axis."""
    for workload in rows[0].ratios:
        best = {axes: min(_latency(row, workload) for row in rows if tuple(row.values) == axes)
                for axes in {tuple(row.values) for row in rows}}  # fmt: skip
        print(f"\n{workload}: ratios to fcfs\n")
        print(
            format_table(
                ["setting", *MEASURES, "preempted/call"],
                [
                    [
                        _label(row, is_best=_latency(row, workload) == best[tuple(row.values)]),
                        *row.ratios[workload].values(),
                        row.preempted_per_call[workload],
                    ]
                    for row in rows
                ],
            )
        )


def _latency(row: Row, workload: str) -> float:
    return row.ratios[workload]["latency"]


def _label(row: Row, is_best: bool) -> str:
    text = " ".join(
        f"{axis} {value:g}" if isinstance(value, int | float) else f"{axis} {value}"
        for axis, value in row.values.items()
    )
    return f"{text} *" if is_best else text


# --- command line -------------------------------------------------------------------------------


def add_own_arguments(arguments: argparse.ArgumentParser) -> None:
    arguments.prog, arguments.description = "python -m bench.sweep", __doc__
    arguments.add_argument("--axes", nargs="+", choices=AXES, help="default: all")
    arguments.add_argument("--grid", action="store_true", help="every combination of the axes")


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    arguments = parser()
    add_own_arguments(arguments)
    options = arguments.parse_args(argv)
    if options.policies:
        arguments.error("a sweep is of one policy: choose it by --program-policy")
    if options.quick:
        options.minutes = options.minutes or QUICK_MINUTES
    try:
        return report(options, setup_of(options), started)
    except (ConfigError, TraceError, DeviceError, OSError) as error:
        arguments.error(str(error))


def report(options: argparse.Namespace, setup: Setup, started: float) -> int:
    """Sweep what was asked for and print it."""
    loads = options.loads or (QUICK_LOADS if options.quick else LOADS)
    axes = options.axes or (QUICK_AXES if options.quick else tuple(AXES))
    if options.workloads is None and not options.traces:
        options.workloads = ["mixed"]
    fields = {}
    for name, plans in workloads_of(options, setup, loads):
        say(f"{name}: stock order at loads {', '.join(f'{share:g}' for share in loads)}")
        fields[name] = Field(setup, plans, loads)
    chosen = list(choices(axes, options.grid))
    base = setup.scheduling(setup.config.policy)
    with Progress("settings x workloads", len(chosen) * len(fields)) as progress:
        rows = sweep(fields, base, chosen, progress.advance)
    print_rows(rows)
    result = {
        "policy": setup.config.policy,
        "device": setup.device.name,
        "loads": list(loads),
        "minutes": setup.window_s / 60,
        "rows": [
            {"values": r.values, "ratios": r.ratios, "preempted_per_call": r.preempted_per_call}
            for r in rows
        ],
    }
    print_result(result | provenance(started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
