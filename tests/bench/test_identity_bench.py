"""What `bench.identity` concludes from its runs."""

from __future__ import annotations

import pytest

from bench.identity import Result, _summary, complaints


def test_one_different_hash_is_not_identical() -> None:
    """All runs must agree; preemptions of stock SGLang are not counted as ours."""
    same = [Result("off", True, "a", 3, 0), Result("plas", True, "a", 5, 0, 10)]
    summary = _summary(same, "keep")
    assert (summary["identical"], summary["preemptions"]) == (True, 5)
    assert not _summary([*same, Result("atlas", True, "b", 5, 0)], "keep")["identical"]


@pytest.mark.parametrize(
    ("kv", "preemptions", "swaps", "complaint"),
    [
        ("keep", 3, 0, []),
        ("swap", 3, 2, []),
        ("keep", 0, 0, ["no call was preempted, so nothing is proven"]),
        ("swap", 3, 0, ["no call was swapped under --kv swap, so nothing is proven of swaps"]),
    ],
)
def test_identity_of_nothing_is_no_success(
    kv: str, preemptions: int, swaps: int, complaint: list[str]
) -> None:
    """Without a preemption, or without a swap under `swap`, equal outputs prove nothing."""
    runs = [
        Result("off", True, "a", 0, 0),
        Result("plas", True, "a", preemptions, 0, swaps_out=swaps, swaps_in=swaps),
    ]
    assert complaints(_summary(runs, kv), kv) == complaint


def test_leaks_and_losses_add_up() -> None:
    """A leak in any run shows in the total."""
    runs = [
        Result("off", True, "a", 0, 1),
        Result("plas", True, "a", 0, 2, leaked_programs=3, leaked_kv_tokens=4, swaps_out=5),
    ]
    summary = _summary(runs, "swap")
    assert (summary["lost"], summary["leaked_programs"], summary["leaked_kv_tokens"]) == (3, 3, 4)
    assert (summary["swaps_out"], summary["runs"][1]["kv"]) == (5, "swap")


def test_ranks_that_disagree_once_do_not_agree() -> None:
    """One run in which two ranks decided differently is enough."""
    runs = [Result("off", True, "a", 0, 0), Result("plas", True, "a", 0, 0)]
    assert _summary(runs, "swap")["ranks_agree"]
    runs.append(Result("mlfq", True, "a", 0, 0, ranks_agree=False))
    assert not _summary(runs, "swap")["ranks_agree"]
