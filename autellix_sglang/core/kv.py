"""What becomes of a preempted call's KV cache, decided by arithmetic that every rank shares.

| fate | at once | when the call resumes |
|---|---|---|
| `keep` | stays in the radix tree, evictable | a prefix hit, as far as it is still there |
| `swap` | copied to host memory, freed | what the tree has lost is copied back |
| `drop` | freed | recomputed |
"""

from __future__ import annotations

from enum import Enum
from typing import Final

HOST_SHARE: Final = 0.25  # of the host memory that is available at start
HOST_LIMIT_GIB: Final = 32.0
AUTO: Final = "auto"
MIXED: Final = "mixed"


class Fate(Enum):
    """What becomes of one victim's KV."""

    KEEP = "keep"
    SWAP = "swap"
    DROP = "drop"


KV_CHOICES: Final = (*(fate.value for fate in Fate), AUTO, MIXED)
_MIXTURE: Final = (Fate.SWAP, Fate.KEEP, Fate.SWAP, Fate.DROP)


def choose(
    mode: str, own_tokens: int, spare_tokens: int, break_even_tokens: int | None, turn: int
) -> Fate:
    """The fate of a victim with `own_tokens` of KV that no running call shares.

    `auto` keeps what fits into `spare_tokens`, memory that nobody has a claim on. Where memory is
    short it swaps calls of at least `break_even_tokens`, from where copying out and in takes less
    time than computing again (None: never), and leaves the others to eviction: dropping them
    would be no gain, as the tree gives their rows up when they are needed, and not before.
    `mixed` is for tests: its fates take turns by `turn`, the number of victims so far.
    """
    if mode == MIXED:
        return _MIXTURE[turn % len(_MIXTURE)]
    if mode != AUTO:
        return Fate(mode)
    pays = break_even_tokens is not None and own_tokens >= break_even_tokens
    return Fate.SWAP if pays and own_tokens > spare_tokens else Fate.KEEP


def break_even(prefill_token_s: float, swap_token_s: float, swap_fixed_s: float) -> int | None:
    """The fewest tokens for which a swap out and in is faster than prefilling them again.

    `swap_token_s` and `swap_fixed_s` are the time of both copies together, per token and per
    call. None where copying a token takes no less time than computing it.
    """
    gain_s = prefill_token_s - swap_token_s
    if gain_s <= 0:
        return None
    return max(1, -int(-max(0.0, swap_fixed_s) // gain_s))


def default_host_gib(available_bytes: int, num_engines: int = 1) -> float:
    """A safe host pool for each of `num_engines` on a machine with so much memory free."""
    return round(min(available_bytes / 2**30 * HOST_SHARE, HOST_LIMIT_GIB) / num_engines, 3)
