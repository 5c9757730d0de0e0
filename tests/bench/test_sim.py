"""The simulation benchmark: capacity, crossings, and one small run from command line to JSON."""

import json
import math

import pytest

from bench.sim import Curves, Setup, bars, capacity, compare, main, rate_at, synthetic_plans
from bench.sim_device import PRESETS

SETUP = Setup(device=PRESETS["a100-8b"], num_slots=8, window_s=60.0)


def curves_of(**latencies):
    """Curves with these mean latencies in ms, per policy a value for load 1, 2, 3, ..."""
    loads = range(1, 1 + len(next(iter(latencies.values()))))
    return Curves(
        2.0,
        {
            float(load): {
                name: {"program_token_latency_ms": {"mean": values[load - 1]}}
                for name, values in latencies.items()
            }
            for load in loads
        },
    )


def test_a_crossing_is_interpolated_on_the_logarithm():
    """Between 10 ms at load 1 and 40 ms at load 2, 20 ms is half way."""
    assert rate_at({1.0: 10.0, 2.0: 40.0}, 20.0) == pytest.approx(1.5)


def test_a_curve_may_start_above_a_level_or_never_reach_it():
    """Neither is a number: there is no rate for the one, and every rate for the other."""
    assert rate_at({1.0: 10.0, 2.0: 40.0}, 5.0) is None
    assert rate_at({1.0: 10.0, 2.0: 40.0}, 50.0) == math.inf


def test_bars_name_the_best_policy_at_each_level():
    """Levels are 2x and 4x the unloaded latency; what is not crossed by both has no ratio."""
    fcfs, plas, atlas = [10, 20, 40, 80], [10, 15, 20, 40], [10, 20, 30, 35]
    curves = curves_of(fcfs=fcfs, plas=plas, atlas=atlas)
    (bar,) = bars({"chat": curves}, ["plas", "atlas"])

    assert bar.by_level["2x"] == (pytest.approx(1.5), False, 20.0)
    assert str(bar.by_level["4x"]) == "> 1.33"
    assert bar.by_level["300 ms"] is None
    assert bar.verdict == "open"


def test_a_policy_that_never_crosses_a_level_has_a_least_ratio():
    """Stock order crosses 20 ms at load 2, the policy not by load 4: at least twice the rate."""
    curves = curves_of(fcfs=[10, 20, 40, 80], plas=[10, 11, 12, 13])
    (bar,) = bars({"mixed": curves}, ["plas"])

    assert bar.by_level["2x"] == (pytest.approx(2.0), True, 20.0)
    assert bar.row() == ["mixed", "fcfs", 4.0, "> 2", "> 1.33", None, "open", "> 2.52 at 15 ms",
                         "nowhere"]  # fmt: skip


def test_a_bar_says_at_which_level_it_is_reached():
    """At 39 ms stock order is just below load 1.5 and the policy at 3: twice the rate."""
    curves = curves_of(fcfs=[10, 160, 640, 640], plas=[10, 20, 39, 320])
    (bar,) = bars({"chat": curves}, ["plas"])

    assert bar.reached.value >= 2.0
    assert bar.reached.level_ms == pytest.approx(39, rel=0.05)
    assert bar.largest.value >= bar.reached.value


def test_load_one_is_where_stock_order_begins_to_queue():
    """Well below it calls hardly wait; well above it they wait most of the time."""
    plans = synthetic_plans("tree", SETUP, 2.0)
    curves = compare(SETUP, plans, ["fcfs"], [0.4, 2.0])

    assert curves.capacity == capacity(SETUP, plans)
    assert curves.by_load[0.4]["fcfs"]["wait_share"] < 0.2
    assert curves.by_load[2.0]["fcfs"]["wait_share"] > 0.4


def test_the_command_prints_a_table_and_the_json_of_the_design(capsys):
    """The last line has the contract's keys, and repeats exactly."""
    command = "--workloads mixed --minutes 2 --slots 4 --loads 0.5 1.5 --policies plas srpt"
    lines = []
    for _ in range(2):
        assert main(command.split()) == 0
        lines.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    first, second = lines

    assert {"rate_at_equal_latency", "program_token_latency_ms", "validation"} <= first.keys()
    assert set(first["program_token_latency_ms"]["mixed"]["1.5"]) == {"fcfs", "plas", "srpt"}
    assert first["program_token_latency_ms"] == second["program_token_latency_ms"]
