"""`bench.client`, run small."""

from __future__ import annotations

import json

import httpx
import pytest

from bench import client


def test_prints_the_promised_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line is one JSON object: overhead of the slowest library, and no cross-talk."""
    small = client.benchmark(3, 50, 3)
    monkeypatch.setattr(client, "benchmark", lambda *_: small)
    assert client.main(["--quick"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"command", "commit", "hardware", "versions", "seconds"} <= result.keys()
    medians = [row["median"] for row in result["libraries"].values()]
    assert result["overhead_us"]["median"] == max(medians)
    assert result["within_bar"] == (max(medians) <= client.BAR_US)
    assert (result["programs"], result["cross_talk"], result["wrong_parents"]) == (50, 0, 0)
    assert result["calls"] >= 50 * 3 * 2
    assert result["sessions"] == {"start": 50, "end": 50, "all_sent": True}
    small["cross_talk"] = 1
    assert client.main(["--quick"]) == 1


async def test_a_witness_sees_cross_talk() -> None:
    """Headers that contradict the body are counted, so none counted means none sent."""
    witness = client.Witness()
    body = {"program": "a", "label": "x", "parents": ["y"]}
    headers = {"x-program-id": "b", "x-call-id": "1"}
    await witness.answer(httpx.Request("POST", "http://x/", json=body, headers=headers))
    assert (witness.num_calls, witness.cross_talk, witness.wrong_parents) == (1, 1, 1)
