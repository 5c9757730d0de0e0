"""The sweep: which choices it makes, how it applies them, and one small run to its JSON."""

import json

import pytest

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.policy import call_turn
from autellix_sglang.errors import ConfigError
from bench.sim_engine import Scheduling
from bench.sweep import AXES, Row, Store, choices, main, num_levels, print_tables, scheduling

BASE = Scheduling(config=ProgramConfig(policy="plas", beta=5.0))


def test_one_axis_is_varied_at_a_time():
    """Two axes give the sum of their values, each choice naming a single setting."""
    found = list(choices(["tie", "beta"], is_grid=False))

    assert len(found) == len(AXES["tie"]) + len(AXES["beta"])
    assert all(len(values) == 1 for values in found)


def test_a_grid_is_every_combination():
    """Two axes give the product of their values."""
    found = list(choices(["tie", "beta"], is_grid=True))

    assert len(found) == len(AXES["tie"]) * len(AXES["beta"])
    assert {"tie": "call", "beta": 2.0} in found


def test_what_is_not_varied_stays_as_it_was():
    """A quantum of 64 changes the quantum and nothing else."""
    assert scheduling(BASE, {"quantum": 64.0}).config == BASE.config.replace(quantum=64.0)


def test_ties_and_units_become_policy_and_weight():
    """`call` orders a level by the call's own arrival; `tokens` charges prefill like output."""
    chosen = scheduling(BASE, {"tie": "call", "unit": "tokens"})

    assert chosen.policy.turn is call_turn
    assert chosen.policy.is_shared
    assert chosen.config.prefill_weight == 1.0


def test_the_policy_is_an_axis_too():
    """Another policy keeps the settings; none of them is stock order, which all are compared to."""
    chosen = scheduling(BASE, {"policy": "gittins"})

    assert chosen.policy.is_learned
    assert chosen.config.beta == BASE.config.beta
    assert "fcfs" not in AXES["policy"]


def test_the_last_level_begins_where_it_is_put():
    """From 32 steps in factors of 2, a last level from 2048 on is the eighth; never below two."""
    default = ProgramConfig(quantum=32.0, factor=2.0)

    assert [num_levels(default, last) for last in (8, 32, 2048, 4096)] == [2, 2, 8, 9]
    assert scheduling(BASE, {"quantum": 512.0, "factor": 4.0, "last": 2048}).config.levels == 3


def test_a_learned_quantum_makes_way_for_a_given_last_level():
    """Where the last level begins cannot be both learned and swept."""
    base = Scheduling(config=ProgramConfig(quantum=0.0))

    assert scheduling(base, {"last": 2048}).config.quantum > 0


def test_a_value_that_no_server_accepts_is_refused():
    """The sweep goes through the product's own checks."""
    with pytest.raises(ConfigError, match="--program-factor"):
        scheduling(BASE, {"factor": 1.0})


COMMAND = "--axes tie unit --minutes 1 --slots 4 --loads 1.2 --workloads chat"


def result_of(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_prints_ratios_to_stock_order(capsys):
    """Every choice has its ratios; with fcfs as the policy all that is not the order is 1."""
    assert main([*COMMAND.split(), "--program-policy", "fcfs"]) == 0
    result = result_of(capsys)

    assert [row["values"] for row in result["rows"]] == [
        {axis: value} for axis in ("tie", "unit") for value in AXES[axis]
    ]
    for row in result["rows"]:
        assert row["workload"] == "chat"
        is_stock = all(ratio == pytest.approx(1.0) for ratio in row["ratios"].values())
        assert is_stock == (row["values"].get("tie", "policy") in ("policy", "call"))


def test_a_sweep_in_slices_is_the_sweep_in_one_go(capsys, tmp_path):
    """A slice without time does nothing, the next run all, one after that nothing again."""
    whole_path, path = tmp_path / "whole.json", tmp_path / "slices.json"
    assert main([*COMMAND.split(), "--store", str(whole_path)]) == 0
    whole = result_of(capsys)
    assert main([*COMMAND.split(), "--store", str(path), "--slice", "0"]) == 0
    first = result_of(capsys)
    for _ in range(2):
        assert main([*COMMAND.split(), "--store", str(path)]) == 0
    last = result_of(capsys)

    assert len(first["rows"]) < len(whole["rows"]) == 9
    assert last["rows"] == whole["rows"] == json.loads(path.read_text())["rows"]
    assert last["cpu_s"] == pytest.approx(json.loads(path.read_text())["cpu_s"])


def test_a_store_of_another_sweep_is_refused(tmp_path):
    """Results of different loads do not mix in one file."""
    path = tmp_path / "sweep.json"
    ratios = dict.fromkeys(["latency", "response", "p99", "longest"], 1.0)
    Store(path, {"loads": [1.0]}, {}).add(Row({"tie": "call"}, "chat", ratios, 0.0), 1.0)

    with pytest.raises(ConfigError, match="another sweep"):
        Store(path, {"loads": [1.2]}, {})


def test_a_table_says_how_far_the_default_is_from_the_best(capsys):
    """Over two workloads the geometric mean counts; the product's own value is in bold."""

    def row(value, workload, latency):
        ratios = {"latency": latency, "response": 1.0, "p99": 1.0, "longest": 1.0}
        return Row({"min_run": value}, workload, ratios, 0.1)

    default = ProgramConfig().min_run
    print_tables([row(default, "a", 0.6), row(default, "b", 0.6), row(8.0, "a", 0.4),
                  row(8.0, "b", 0.4), row(1.0, "a", 0.1)])  # fmt: skip
    out = capsys.readouterr().out

    assert f"| **{default:g}** | 0.60 / 1.00 / 1.00 (0.10) |" in out
    assert "mean latency: 1.500 of the best (8); p99 response: 1.000 of the best" in out
    assert "| 1 |" not in out  # not measured in every workload
