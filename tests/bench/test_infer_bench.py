"""`bench.infer`, run small."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench import infer
from bench.trace import TraceCall, TraceProgram


def setup(**changes: Any) -> infer.Setup:
    settings: dict[str, Any] = {
        "num_programs": 1000, "rate": 2.0, "token_s": 0.01, "twins": 0.0, "max_histories": 1000,
    }  # fmt: skip
    return infer.Setup(**(settings | changes))


def chat(name: str, *, shared: int = 0, gap_s: float = 0.0) -> TraceProgram:
    """Three turns that each continue the one before, and a fourth that starts afresh."""
    calls = (
        TraceCall("0", 60, 60, 20, shared_prefix_tokens=shared),
        TraceCall("1", 100, 20, 40, ("0",), gap_s=gap_s),
        TraceCall("2", 150, 10, 40, ("1",), gap_s=gap_s),
        TraceCall("3", 70, 70, 10, ("2",)),
    )
    return TraceProgram(name, "chats", "chat", calls)


def test_a_conversation_is_followed() -> None:
    """Two of three later calls continue a history, and both are found."""
    result = infer.benchmark({"chats": [chat("a"), chat("b")]}, setup())
    assert result["traces"]["chats"] == {
        "programs": 2, "calls": 8, "joins": 4, "right": 4,
        "precision": 1.0, "recall": round(4 / 6, 4), "findable": round(4 / 6, 4),
        "recall_of_findable": 1.0,
    }  # fmt: skip
    assert result["within_bar"]


def test_a_shared_prompt_joins_nobody() -> None:
    """Programs that begin alike are told apart by what they were answered."""
    result = infer.benchmark({"chats": [chat(str(i), shared=60) for i in range(20)]}, setup())
    assert (result["precision"], result["recall_of_findable"]) == (1.0, 1.0)


def test_twins_are_not_joined_to_each_other() -> None:
    """What two programs have in common answers nothing: that costs recall, not precision."""
    chats = [chat(str(i)) for i in range(50)]
    result = infer.benchmark({"chats": chats}, setup(twins=1.0))
    assert (result["programs"], result["precision"]) == (100, 1.0)
    assert 0 < result["recall_of_findable"] <= 0.5


def test_a_full_index_forgets() -> None:
    """With room for few histories the calls of long ago are not found any more."""
    chats = [chat(str(i), gap_s=5.0) for i in range(50)]
    roomy = infer.benchmark({"chats": chats}, setup(rate=50.0))
    tight = infer.benchmark({"chats": chats}, setup(rate=50.0, max_histories=5))
    assert roomy["recall_of_findable"] == 1.0
    assert tight["recall_of_findable"] < 0.5


def test_prints_the_promised_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The last line is one JSON object: precision and recall, per trace and over all."""
    assert infer.main(["--quick", "--programs", "10"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"command", "commit", "hardware", "versions", "seconds"} <= result.keys()
    assert result["traces"].keys() == {"chat", "react", "tree"}
    assert result["joins"] == sum(row["joins"] for row in result["traces"].values()) > 0
    assert result["within_bar"] == (result["precision"] >= infer.BAR)


def test_a_missing_trace_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not there is the user's mistake."""
    with pytest.raises(SystemExit):
        infer.main(["--trace", "nowhere.jsonl"])
    assert "nowhere.jsonl" in capsys.readouterr().err
