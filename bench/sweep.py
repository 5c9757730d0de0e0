"""Which settings of the program scheduler are good, and who pays for them? A sweep in simulation.

    python -m bench.sweep --quick
    python -m bench.sweep --store sweep.json --slice 10 --traces TRACES
    python -m bench.sweep --show bench/results/sweep.json
    python -m bench.sweep --axes quantum levels --grid --program-policy atlas

One axis is varied at a time, all else as the `--program-*` flags say (by default the product's
defaults); `--grid` takes every combination of the axes instead. Axes are the settings of
`config.py`, and three that are not settings:

- `last`: the service in steps at which the last, open level begins. It chooses the number of
  levels, with quantum (32 where it is learned) and factor as they are;
- `tie`: inside a level, as the policy has it, by the program's arrival plus so many times its rank
  (which only `gittins` has; there the policy's is 1), by its arrival or by the call's own;
- `unit`: what service is counted in. `steps` (the product: a prefill token costs what the engine
  measures), `tokens` (a prefill token costs as much as a generated one), `outputs` (nothing).
  Seconds are no unit here: no wall clock enters a ranking decision of the product.

Numbers are ratios to stock order (fcfs) with the same programs and arrivals, geometric means over
the loads: mean program token latency, mean program response, and for who pays the p99 of the
response and the mean response of the tenth of programs with most tokens.

`--store` keeps what is done in a file and goes on from there; `--slice` ends after so many minutes
of CPU. `--show` prints the tables of such a file in Markdown, for `docs/defaults.md`.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Final

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.policy import (
    FIRST_QUANTUM,
    POLICIES,
    Policy,
    call_turn,
    program_turn,
)
from autellix_sglang.core.program import Call
from autellix_sglang.errors import ConfigError
from bench.common import Progress, print_result, provenance, say
from bench.sim import Setup, at_rate, capacity, parser, setup_of, summary, workloads_of
from bench.sim_device import DeviceError
from bench.sim_engine import Blueprint, Scheduling
from bench.stats import Run
from bench.trace import TraceError

Turn = Callable[[Call], float]


def _due(weight: float) -> Turn:
    return lambda call: call.program.arrived + weight * call.program.rank


TIES: Final[dict[str, Turn | None]] = {
    "policy": None,
    "rank / 4": _due(0.25),
    "rank / 2": _due(0.5),
    "2 * rank": _due(2.0),
    "program": program_turn,
    "call": call_turn,
}
UNITS: Final = {"steps": 0.0, "tokens": 1.0, "outputs": 1e-9}  # as prefill_weight; 0 measures
AXES: Final[dict[str, tuple[Any, ...]]] = {
    "policy": ("mlfq", "plas", "atlas", "gittins"),
    "levels": (2, 4, 6, 7, 8, 9, 10, 12),
    "quantum": (0.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0),
    "factor": (1.5, 2.0, 3.0, 4.0, 8.0),
    "last": (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536),
    "beta": (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    "min_run": (0.0, 8.0, 32.0, 64.0, 128.0, 512.0),
    "schedule_interval": (1, 4, 8, 16, 32),
    "prefix_wait": (0, 16, 32, 64, 128, 256, 512),
    "tie": tuple(TIES),
    "unit": tuple(UNITS),
}
SETTINGS: Final = tuple(axis for axis in AXES if axis != "last")  # `levels` says the same
PRODUCT: Final[dict[str, str]] = {"tie": "policy", "unit": "steps"}  # what is not in config.py
LOADS: Final = (0.5, 0.8, 1.0, 1.2)
QUICK_AXES: Final = ("quantum", "last")
QUICK_LOADS: Final = (1.2,)
QUICK_MINUTES: Final = 5.0
MEASURES: Final = ("latency", "response", "p99", "longest")

Values = dict[str, Any]  # by axis
Ratios = dict[str, float]  # by measure


@dataclass(frozen=True, slots=True)
class Row:
    """One choice of values in one workload: ratios to stock order, preemptions per call."""

    values: Values
    workload: str
    ratios: Ratios
    preempted_per_call: float

    @property
    def measured(self) -> tuple[Ratios, float]:
        return self.ratios, self.preempted_per_call


def scheduling(base: Scheduling, values: Values) -> Scheduling:
    """The settings with these values in place of the base's; raises `ConfigError`."""
    settings = {axis: v for axis, v in values.items() if axis not in ("last", "tie", "unit")}
    if "unit" in values:
        settings["prefill_weight"] = UNITS[values["unit"]]
    config = base.config.replace(**settings)
    if "last" in values:
        config = config.replace(quantum=config.quantum or FIRST_QUANTUM)
        config = config.replace(levels=num_levels(config, values["last"]))
    return replace(base, config=config, policy=_policy(config, values.get("tie", "policy")))


def num_levels(config: ProgramConfig, last: float) -> int:
    """So many levels that the last one begins nearest to `last` steps; at least two."""
    return 2 + max(0, round(math.log(last / config.quantum, config.factor)))


def _policy(config: ProgramConfig, tie: str) -> Policy:
    policy = POLICIES[config.policy]
    return replace(policy, turn=TIES[tie] or policy.turn)


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
        self._loads = loads

    @cached_property
    def _stock(self) -> dict[float, Run]:
        """Stock order's run at each rate in programs per second."""
        full = capacity(self._setup, self._plans)
        stock = self._setup.scheduling("fcfs")
        return {
            share * full: at_rate(self._setup, stock, self._plans, share * full)
            for share in self._loads
        }

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


class Store:
    """Rows by what they measured, in a file if there is one, so that a sweep can go on later.

    `terms` is what all rows have in common; a file of other terms is refused. `about` says where
    they come from, as of the last run.
    """

    def __init__(
        self, path: Path | None, terms: Mapping[str, Any], about: Mapping[str, Any]
    ) -> None:
        self._path = path
        self.terms = dict(terms)
        self.about = dict(about)
        self.cpu_s = 0.0
        self.rows: list[Row] = []
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            if found["terms"] != json.loads(json.dumps(self.terms)):
                raise ConfigError("--store", f"{path} holds another sweep: {found['terms']}")
            self.cpu_s = found["cpu_s"]
            self.rows = [Row(**row) for row in found["rows"]]

    def has(self, values: Values, workload: str) -> bool:
        return any(row.values == values and row.workload == workload for row in self.rows)

    def add(self, row: Row, cpu_s: float) -> None:
        self.rows.append(row)
        self.cpu_s += cpu_s
        if self._path is not None:
            text = json.dumps(self.as_json(), indent=1)
            self._path.write_text(text + "\n")

    def as_json(self) -> dict[str, Any]:
        return {
            "terms": self.terms,
            "cpu_s": self.cpu_s,
            "rows": [asdict(row) for row in self.rows],
            **self.about,
        }


def sweep(
    fields: Mapping[str, Field],
    base: Scheduling,
    chosen: Sequence[Values],
    store: Store,
    slice_s: float = math.inf,
) -> None:
    """Measure what the store lacks, for at most about `slice_s` seconds of CPU."""
    known = {(row.workload, scheduling(base, row.values)): row for row in store.rows}
    started = time.process_time()
    with Progress("settings x workloads", len(chosen) * len(fields)) as progress:
        for values, (workload, field) in itertools.product(chosen, fields.items()):
            if time.process_time() - started > slice_s:
                return
            if not store.has(values, workload):
                before = time.process_time()
                each = scheduling(base, values)
                same = known.get((workload, each))
                measured = same.measured if same else field.measure(each)
                row = known[workload, each] = Row(values, workload, *measured)
                store.add(row, time.process_time() - before)
            progress.advance()


# --- tables -------------------------------------------------------------------------------------


def default_of(axis: str) -> Any:
    """What the product does, None for an axis that is no setting of its own."""
    return PRODUCT.get(axis, getattr(ProgramConfig(), axis, None))


def axis_rows(rows: Sequence[Row], axes: Sequence[str]) -> list[tuple[Values, list[Row]]]:
    """The rows of these axes by values, those that every workload has."""
    workloads = list(dict.fromkeys(row.workload for row in rows))
    found: list[tuple[Values, list[Row]]] = []
    for row in rows:
        if list(row.values) == list(axes) and all(row.values != values for values, _ in found):
            same = [r for w in workloads for r in rows if (r.values, r.workload) == (row.values, w)]
            if len(same) == len(workloads):
                found.append((row.values, same))
    return found


def over_workloads(rows: Sequence[Row], measure: str) -> float:
    return geometric_mean(row.ratios[measure] for row in rows)


def print_axis(rows: Sequence[Row], axes: Sequence[str]) -> None:
    """One Markdown table: each value in each workload; the product's own in bold."""
    found = axis_rows(rows, axes)
    if not found:
        return
    workloads = [row.workload for row in found[0][1]]
    default = {axis: default_of(axis) for axis in axes}
    print(f"\n### `{' x '.join(axes)}`\n")
    print("| " + " | ".join(["value", *workloads, "all: latency", "all: p99 response"]) + " |")
    print("|" + "---|" * (len(workloads) + 3))
    for values, same in found:
        text = ", ".join(_text(value) for value in values.values())
        cells = [f"**{text}**" if values == default else text]
        for row in same:
            ratios = " / ".join(f"{row.ratios[m]:.2f}" for m in ("latency", "p99", "longest"))
            cells.append(f"{ratios} ({row.preempted_per_call:.2f})")
        cells += [f"{over_workloads(same, measure):.3f}" for measure in ("latency", "p99")]
        print("| " + " | ".join(cells) + " |")
    mine = next((same for values, same in found if values == default), None)
    if mine is not None:
        print(f"\n{_distance(found, mine, 'latency')}; {_distance(found, mine, 'p99')}.")


def _distance(found: Sequence[tuple[Values, list[Row]]], mine: Sequence[Row], measure: str) -> str:
    """How far the default is from the best value, in one measure over all workloads."""
    values, best = min(found, key=lambda each: over_workloads(each[1], measure))
    name = {"latency": "mean latency", "p99": "p99 response"}[measure]
    ratio = over_workloads(mine, measure) / over_workloads(best, measure)
    text = ", ".join(_text(value) for value in values.values())
    return f"{name}: {ratio:.3f} of the best ({text})"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def print_tables(rows: Sequence[Row]) -> None:
    print("latency / p99 response / longest tenth as ratios to fcfs (preemptions per call)")
    for axes in dict.fromkeys(tuple(row.values) for row in rows):
        print_axis(rows, axes)


# --- command line -------------------------------------------------------------------------------


def add_own_arguments(arguments: argparse.ArgumentParser) -> None:
    arguments.prog, arguments.description = "python -m bench.sweep", __doc__
    add = arguments.add_argument
    add("--axes", nargs="+", choices=AXES, help="default: all but `last`")
    add("--grid", action="store_true", help="every combination of the axes")
    add("--store", type=Path, help="file to keep results in, and to go on from")
    add("--slice", type=float, default=math.inf, help="end after so many minutes of CPU")
    add("--show", type=Path, help="print the tables of such a file, and end")


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
        if options.show:
            print_tables([Row(**row) for row in json.loads(options.show.read_text())["rows"]])
            return 0
        return report(options, setup_of(options), started)
    except (ConfigError, TraceError, DeviceError, OSError) as error:
        arguments.error(str(error))


def report(options: argparse.Namespace, setup: Setup, started: float) -> int:
    """Sweep what was asked for and print it."""
    loads = options.loads or (QUICK_LOADS if options.quick else LOADS)
    axes = options.axes or (QUICK_AXES if options.quick else SETTINGS)
    if options.workloads is None and not options.traces:
        options.workloads = ["mixed"]
    fields = {
        name: Field(setup, plans, loads) for name, plans in workloads_of(options, setup, loads)
    }
    terms = {
        "config": asdict(setup.config),
        "device": setup.device.name,
        "loads": list(loads),
        "minutes": setup.window_s / 60,
        "seed": setup.seed,
        "traces": sorted(path.name.split(".")[0] for path in options.traces),
    }
    store = Store(options.store, terms, provenance(started))
    chosen = list(choices(axes, options.grid))
    base = setup.scheduling(setup.config.policy)
    sweep(fields, base, chosen, store, 60 * options.slice)
    print_tables(store.rows)
    num_left = sum(not store.has(v, w) for v, w in itertools.product(chosen, fields))
    if num_left:
        say(f"{num_left} settings x workloads are left: run the same command again")
    print_result(store.as_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
