"""`bench.planner`, run small."""

from __future__ import annotations

import json
import random

import pytest

from autellix_sglang.core.policy import POLICIES
from bench import planner


def test_prints_the_promised_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line is one JSON object with the contract's keys, the worst policy on top."""
    argv = ["--quick", "--waiting", "60", "--running", "12", "--step-ms", "10"]
    monkeypatch.setattr("sys.argv", ["bench/planner.py", *argv])
    assert planner.main(argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["waiting"], result["running"]) == (60, 12)
    assert result["command"] == "python -m bench.planner " + " ".join(argv)
    assert {"commit", "hardware", "versions", "seconds"} <= result.keys()
    assert result["policies"].keys() == POLICIES.keys()
    for key in ("unchanged_ms", "all_changed_ms", "accounting_ms"):
        assert result[key] == max(row[key] for row in result["policies"].values()) > 0
        assert result["share_of_step"][key] == pytest.approx(result[key] / 10, abs=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_measures_what_it_says(policy: str) -> None:
    """The changed pass builds a new order and finds victims; the unchanged one builds none."""
    engine = planner.FullEngine(policy, 400, 40)
    assert engine.run_pass().order is not None
    before = list(engine.waiting_queue)
    engine.change_every_key(random.Random(0))
    engine.table.advance(1)
    plan = engine.run_pass()
    assert engine.waiting_queue == [call.handle for call in engine.table.queue]
    assert sorted(map(id, engine.waiting_queue)) == sorted(map(id, before))
    assert (engine.waiting_queue == before) == (policy == "fcfs")
    assert plan.order is not None
    assert bool(plan.preempt) == (policy != "fcfs")
    engine.table.advance(1)
    assert engine.run_pass().order is None
    engine.account_step()
    engine.table.check_integrity()
