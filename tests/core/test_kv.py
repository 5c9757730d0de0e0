"""What becomes of a victim's KV, by its own size, the memory to spare and the mode."""

from __future__ import annotations

import pytest

from autellix_sglang.core.kv import (
    AUTO,
    HOST_LIMIT_GIB,
    KV_CHOICES,
    MIXED,
    Fate,
    break_even,
    choose,
    default_host_gib,
)


@pytest.mark.parametrize(
    ("own", "spare", "break_even_tokens", "fate"),
    [
        (100, 100, 1, Fate.KEEP),  # fits into memory that nobody claims
        (101, 100, 1, Fate.SWAP),
        (101, 0, 101, Fate.SWAP),
        (101, 0, 102, Fate.KEEP),  # too short to pay: left to eviction
        (101, 0, None, Fate.KEEP),  # never pays
    ],
)
def test_auto_swaps_what_cannot_stay_and_is_long_enough(
    own: int, spare: int, break_even_tokens: int | None, fate: Fate
) -> None:
    """`keep` wherever memory allows, else by cost."""
    assert choose(AUTO, own, spare, break_even_tokens, 0) is fate


@pytest.mark.parametrize("fate", Fate)
def test_a_forced_mode_asks_nothing(fate: Fate) -> None:
    """`keep`, `swap` and `drop` are what they say, whatever it costs."""
    assert choose(fate.value, 1, 1_000_000, None, 7) is fate


def test_mixed_is_the_same_mixture_every_time() -> None:
    """Turn by turn, half of the victims are swapped, and each fate has its share."""
    fates = [choose(MIXED, 10, 0, None, turn) for turn in range(8)]
    assert fates[:4] == fates[4:] == [Fate.SWAP, Fate.KEEP, Fate.SWAP, Fate.DROP]


def test_every_fate_can_be_forced() -> None:
    """The modes on the command line are the fates and the two ways to choose among them."""
    assert set(KV_CHOICES) == {fate.value for fate in Fate} | {AUTO, MIXED}


@pytest.mark.parametrize(
    ("prefill_token_s", "swap_token_s", "swap_fixed_s", "tokens"),
    [
        (0.75, 0.25, 25.0, 50),
        (0.75, 0.25, 25.25, 51),
        (0.75, 0.25, 0.0, 1),
        (0.25, 0.25, 25.0, None),
        (0.25, 0.75, 0.0, None),
    ],
)
def test_break_even_is_where_both_ways_take_as_long(
    prefill_token_s: float, swap_token_s: float, swap_fixed_s: float, tokens: int | None
) -> None:
    """The fixed cost over what each token gains, rounded up; None if tokens gain nothing."""
    assert break_even(prefill_token_s, swap_token_s, swap_fixed_s) == tokens


def test_default_host_memory_is_a_share_of_what_is_available() -> None:
    """A quarter, at most 32 GiB, divided between the engines of a machine."""
    assert default_host_gib(8 * 2**30) == 2.0
    assert default_host_gib(2**40) == HOST_LIMIT_GIB
    assert default_host_gib(8 * 2**30, num_engines=4) == 0.5
