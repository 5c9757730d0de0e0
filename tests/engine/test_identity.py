"""The promise that matters most, against stock SGLang: scheduling changes no result."""

from __future__ import annotations

import json

import pytest

from bench import identity

pytestmark = pytest.mark.engine


def test_outputs_equal_those_of_stock_sglang(capsys: pytest.CaptureFixture[str]) -> None:
    """Every policy, overlap on and off, with preemptions and recomputation: the same tokens."""
    status = identity.main(["--quick", "--programs", "9"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["identical"] and status == 0
    assert {(run["policy"], run["overlap"]) for run in result["runs"]} == {
        (policy, overlap)
        for policy in ("off", "mlfq", "plas", "atlas")
        for overlap in (True, False)
    }
    assert result["preemptions"] >= 50
    assert (result["leaked_programs"], result["leaked_kv_tokens"], result["lost"]) == (0, 0, 0)
