"""What `bench.pressure` concludes from its runs."""

from __future__ import annotations

from bench.pressure import MODES, Result, summarize
from bench.server import COUNTED, LEAKS


def _result(kv: str, seconds: float, recomputed: int, answer: str = "a", leaked: int = 0) -> Result:
    counts = dict.fromkeys(COUNTED, 0) | {"num_preemptions": 10, "recomputed_tokens": recomputed}
    return Result(kv, seconds, seconds / 2, answer, 0, counts, dict.fromkeys(LEAKS, leaked))


RECOMPUTED = {"keep": 50, "drop": 100, "swap": 5, "backup": 4, "auto": 10}


def test_modes_are_compared_with_drop() -> None:
    """Tokens by preemption, seconds by the median, each as a ratio to `drop`."""
    runs = [_result(kv, s, RECOMPUTED[kv]) for kv in MODES for s in (2.0, 3.0, 10.0)]
    summary = summarize(runs)
    entries = {entry["kv"]: entry for entry in summary["results"]}
    assert entries["swap"]["recomputed_tokens_per_preemption"] == 0.5
    assert {kv: entry["recomputed_to_drop"] for kv, entry in entries.items()} == {
        "keep": 0.5, "drop": 1.0, "swap": 0.05, "backup": 0.04, "auto": 0.1,
    }  # fmt: skip
    assert {entry["time_to_drop"] for entry in entries.values()} == {1.0}
    assert summary["share_evicted"] == 0.5
    assert summary["identical"] and not summary["leaked"]


def test_times_are_compared_within_a_round() -> None:
    """A slow round slows both: the median of the rounds' ratios, and their range."""
    times = {"drop": (1.0, 10.0, 2.0), "swap": (1.1, 9.0, 2.4)}
    runs = [_result(kv, times[kv][i], RECOMPUTED[kv]) for i in range(3) for kv in times]
    drop, swap = summarize(runs)["results"]
    assert (drop["time_to_drop"], drop["time_to_drop_range"]) == (1.0, [1.0, 1.0])
    assert (swap["time_to_drop"], swap["time_to_drop_range"]) == (1.1, [0.9, 1.2])
    assert (swap["cpu_to_drop"], swap["cpu_to_drop_range"]) == (1.1, [0.9, 1.2])
    assert summarize(runs)["share_evicted"] is None


def test_a_changed_answer_and_a_leak_show() -> None:
    """One run that differs, or leaves something behind, is enough."""
    fine = _result("drop", 1.0, 1)
    assert summarize([fine, _result("swap", 1.0, 1)])["identical"]
    assert not summarize([fine, _result("swap", 1.0, 1, answer="b")])["identical"]
    assert summarize([fine, _result("swap", 1.0, 1, leaked=2)])["leaked"] == 2 * len(LEAKS)
