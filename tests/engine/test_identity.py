"""The promise that matters most, against stock SGLang: scheduling changes no result."""

from __future__ import annotations

import json
import os

import pytest

from bench import identity

pytestmark = pytest.mark.engine


LEFT_OVERS = ("leaked_programs", "leaked_kv_tokens", "leaked_host_bytes", "lost")


def test_outputs_equal_those_of_stock_sglang(capsys: pytest.CaptureFixture[str]) -> None:
    """Every policy, overlap on and off, KV kept, swapped and dropped in turn: the same tokens."""
    status = identity.main(["--quick", "--programs", "9", "--kv", "mixed"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["identical"] and status == 0
    assert {(run["policy"], run["overlap"]) for run in result["runs"]} == {
        (policy, overlap) for policy in ("off", *identity.POLICIES) for overlap in (True, False)
    }
    assert result["preemptions"] >= 50 and result["retractions"] >= 10
    assert result["swaps_out"] >= 50 and result["swaps_in"] >= 25
    assert not any(result[key] for key in LEFT_OVERS)


@pytest.mark.skipif(
    not os.environ.get("AUTELLIX_TEST_TP"),
    reason="two servers of two ranks each: minutes on two cores; AUTELLIX_TEST_TP=1 runs it",
)
def test_two_ranks_decide_alike_and_move_their_own_shards(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tensor parallelism over gloo: each rank swaps its heads' rows, and no token changes."""
    command = "--programs 6 --kv swap --tp 2 --policies plas --overlap on"
    status = identity.main(command.split())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["identical"] and result["ranks_agree"] and status == 0
    assert result["preemptions"] >= 15
    assert result["swaps_out"] >= 15 and result["swaps_in"] >= 8
    assert not any(result[key] for key in LEFT_OVERS)
