"""What becomes of a victim's KV, by its own size and the mode."""

from __future__ import annotations

import pytest

from autellix_sglang.core.kv import (
    AUTO,
    HOST_LIMIT_GIB,
    KV_CHOICES,
    MIXED,
    Fate,
    LossShare,
    break_even,
    choose,
    default_host_gib,
)


@pytest.mark.parametrize(
    ("own", "break_even_tokens", "fate"),
    [
        (101, 101, Fate.BACKUP),
        (101, 102, Fate.KEEP),  # too short to pay: left to eviction
        (101, None, Fate.KEEP),  # never pays
    ],
)
def test_auto_backs_up_what_is_long_enough(
    own: int, break_even_tokens: int | None, fate: Fate
) -> None:
    """It stays in the tree in any case; a copy that costs more than it can save is not made."""
    assert choose(AUTO, own, break_even_tokens, 0) is fate


@pytest.mark.parametrize("fate", Fate)
def test_a_forced_mode_asks_nothing(fate: Fate) -> None:
    """`keep`, `backup`, `swap` and `drop` are what they say, whatever it costs."""
    assert choose(fate.value, 1, None, 7) is fate


def test_mixed_is_the_same_mixture_every_time() -> None:
    """Turn by turn, each fate has its share."""
    fates = [choose(MIXED, 10, None, turn) for turn in range(10)]
    assert fates[:5] == fates[5:] == [Fate.SWAP, Fate.KEEP, Fate.BACKUP, Fate.SWAP, Fate.DROP]


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


def test_loss_share_follows_what_resuming_calls_have_lost() -> None:
    """It goes to the share that is lost of late, and never beyond 0 and 1."""
    loss = LossShare()
    assert loss.value == 0
    loss.note(0, 0)  # nothing had been computed: nothing to learn
    for _ in range(100):
        loss.note(30, 40)
    assert loss.value == pytest.approx(0.75, abs=0.01)
    loss.note(50, 40)
    assert 0.75 < loss.value < 1
    for _ in range(100):
        loss.note(0, 40)
    assert loss.value == pytest.approx(0, abs=0.01)
