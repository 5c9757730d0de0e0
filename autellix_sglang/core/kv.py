"""What becomes of a preempted call's KV cache, decided by arithmetic that every rank shares.

| fate | at once | when the call resumes |
|---|---|---|
| `keep` | stays in the radix tree, evictable | a prefix hit, as far as it is still there |
| `backup` | stays in the tree, and is copied to host memory | what it has lost is copied back |
| `swap` | copied to host memory, freed | it is copied back |
| `drop` | freed | recomputed |
"""

from __future__ import annotations

from enum import Enum
from typing import Final

HOST_SHARE: Final = 0.25  # of the host memory that is available at start
HOST_LIMIT_GIB: Final = 32.0
RESUMES_HEEDED: Final = 16  # about so many decide what `LossShare` says
AUTO: Final = "auto"
MIXED: Final = "mixed"


class Fate(Enum):
    """What becomes of one victim's KV."""

    KEEP = "keep"
    BACKUP = "backup"
    SWAP = "swap"
    DROP = "drop"

    @property
    def is_saved(self) -> bool:
        """Whether it is copied to host memory."""
        return self in (Fate.BACKUP, Fate.SWAP)


KV_CHOICES: Final = (*(fate.value for fate in Fate), AUTO, MIXED)
_MIXTURE: Final = (Fate.SWAP, Fate.KEEP, Fate.BACKUP, Fate.SWAP, Fate.DROP)


def may_save(mode: str) -> bool:
    """Whether any victim's KV may go to host memory."""
    return mode not in (Fate.KEEP.value, Fate.DROP.value)


def choose(mode: str, own_tokens: int, break_even_tokens: int | None, turn: int) -> Fate:
    """The fate of a victim with `own_tokens` of KV that no running call shares.

    `auto` leaves it in the tree, which gives rows up when they are needed and not before, and has
    a backup of calls of at least `break_even_tokens`, from where copying out and in takes less time
    than computing again (None: never). It need not guess what will be evicted.
    `mixed` is for tests: its fates take turns by `turn`, the number of victims so far.
    """
    if mode == MIXED:
        return _MIXTURE[turn % len(_MIXTURE)]
    if mode != AUTO:
        return Fate(mode)
    pays = break_even_tokens is not None and own_tokens >= break_even_tokens
    return Fate.BACKUP if pays else Fate.KEEP


class LossShare:
    """The share of preempted calls' KV that has been gone when they resumed, of late.

    A fact of all ranks alike: it follows from what was admitted with how many cached tokens.
    """

    def __init__(self) -> None:
        self.value = 0.0

    def note(self, num_lost: int, num_tokens: int) -> None:
        """A preempted call resumes, and has to compute again so many of its tokens."""
        if num_tokens > 0:
            self.value += (min(num_lost, num_tokens) / num_tokens - self.value) / RESUMES_HEEDED


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
