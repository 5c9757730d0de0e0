"""What `bench.swap` moves and concludes."""

from __future__ import annotations

import torch

from bench.swap import (
    SHAPES,
    Case,
    Shape,
    Workload,
    bars,
    break_even,
    cases,
    fits,
    measure,
    summary,
)

CPU = torch.device("cpu")
SMALL = Shape("small", 2, 2, 8)


def test_token_sizes_are_those_of_the_models() -> None:
    """128 KiB per token for Llama-3.1-8B in bfloat16, 80 KiB for a quarter of the 70B."""
    sizes = {shape.name: shape.token_bytes for shape in SHAPES}
    assert (sizes["llama-3.1-8b"], sizes["llama-3.1-70b/tp4"]) == (128 * 1024, 80 * 1024)


def test_cases_fit_into_memory() -> None:
    """Little memory leaves the small cases only, none leaves no case."""
    every = list(cases(False))
    assert not any(fits(case, False, 0) for case in every)
    some = [case for case in every if fits(case, False, 2**30)]
    assert some and max(case.num_bytes for case in some) <= 2**26


def test_every_variant_moves_the_same_rows() -> None:
    """Out, wiped, and in again: the pool is as before, whichever way was taken."""
    workload = Workload(Case(SMALL, 4, 2, 8), CPU)
    for rows in workload.pool.byte_rows:
        rows.copy_(torch.arange(rows.numel()).view(rows.shape) % 251)
    before = [rows.clone() for rows in workload.pool.byte_rows]
    variants = workload.variants()
    assert set(variants) == {"ceiling", "reference", "naive loop"}
    for name in ("reference", "naive loop"):
        with variants[name]() as (move_out, move_in):
            move_out()
            for rows in workload.pool.byte_rows:
                rows[workload.slots] = 0
            move_in()
        for rows, expected in zip(workload.pool.byte_rows, before, strict=True):
            assert torch.equal(rows, expected), name


def test_slots_come_in_whole_pages() -> None:
    """Pages are scattered, the slots of one are not."""
    slots = Workload(Case(SMALL, 4, 2, 8), CPU).slots.view(-1, 4)
    assert (slots[:, 0] % 4 == 0).all() and (slots.diff(dim=1) == 1).all()


def test_break_even_is_where_the_lines_cross() -> None:
    """1 ms fixed and 1 us per token against 11 us per token to compute: 100 tokens."""
    times = {tokens: 1e-3 + 1e-6 * tokens for tokens in (128, 512, 2048)}
    assert break_even(times, 1 / 11e-6) == 100
    assert break_even(times, 2e6) is None  # computing is cheaper at any length
    assert break_even({128: 1.0}, 100.0) is None
    assert break_even({100: 1e-3, 200: 2e-3}, 100.0) == 0


def test_summary_names_the_ceiling_and_says_that_there_is_no_gpu() -> None:
    """The keys of the contract, from rows that were measured here."""
    rows = [row for n in (4, 8) for row in measure(Case(SMALL, 1, 1, n), CPU, 1)]
    result = summary(rows, CPU, {"small": 1.0})
    assert result["device"] == "cpu" and "no GPU" in result["note"]
    assert result["ceiling_gb_per_s"] > 0
    assert result["break_even_tokens"].keys() == {"small"}
    assert {row["variant"] for row in result["results"]} == {"ceiling", "reference", "naive loop"}


def test_a_variant_that_fails_is_a_row_and_the_others_go_on(monkeypatch) -> None:
    """Somebody else's kernel may be missing: the run says so and has the other numbers."""

    def no_such_kernel(self: Workload) -> None:
        raise ImportError("no such kernel")

    monkeypatch.setattr(Workload, "_bulk", no_such_kernel)
    result = summary(measure(Case(SMALL, 1, 1, 4), CPU, 1), CPU, {})
    assert [row["variant"] for row in result["errors"]] == ["ceiling"]
    assert {row["variant"] for row in result["results"]} == {"reference", "naive loop"}
    assert result["ceiling_gb_per_s"] is None


def test_bars_are_ratios_to_the_others_for_large_chunks() -> None:
    """The smallest and the median over the cases of a page size and direction."""

    def rows(variant: str, *rates: float) -> list[dict]:
        return [
            {
                "variant": variant, "shape": "s", "page_size": 16, "victims": 1, "tokens": i,
                "direction": "out", "gb_per_s": rate, "bytes": 2**26 if i else 2**20,
            }
            for i, rate in enumerate(rates)
        ]  # fmt: skip

    found = bars([*rows("staged", 1.0, 45.0, 40.0, 35.0), *rows("ceiling", 50.0, 50.0, 50.0, 50.0)])
    assert found == [
        {
            "variant": "staged", "to": "ceiling", "page_size": 16, "direction": "out",
            "smallest": 0.7, "median": 0.8, "cases": 3,
        }
    ]  # fmt: skip
