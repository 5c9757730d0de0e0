"""Host memory for the KV of preempted calls, handed out in pages of a fixed number of tokens.

Pages of a chunk need not be neighbours, so a chunk fits whenever enough pages are free: nothing
fragments into failure. Low pages go out first, which keeps most chunks in one piece all the same.
"""

from __future__ import annotations

import heapq
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import torch

from autellix_sglang.engine.swap_op import HostChunk, KVPool
from autellix_sglang.errors import ConfigError

PAGE_TOKENS: Final = 64


@dataclass(frozen=True, eq=False)
class PooledChunk(HostChunk):
    """A chunk on pages of a `HostPool`, which gets them back by `free`."""

    pages: tuple[int, ...]


class HostPool:
    """Owner of one pinned block of memory; `num_pages` may be 0.

    Raises `ConfigError` if the system does not have or does not pin so much.
    """

    def __init__(self, pool: KVPool, num_pages: int, page_tokens: int = PAGE_TOKENS) -> None:
        self._page_tokens = page_tokens
        self._num_pages = num_pages
        self._storage = _allocate(num_pages * page_tokens, pool.record_bytes)
        if pool.device.type == "cuda" and num_pages:
            _pin(self._storage)
        self._free = list(range(num_pages))  # a heap: sorted to begin with
        self._lent: set[PooledChunk] = set()

    @classmethod
    def sized(cls, pool: KVPool, num_bytes: int, page_tokens: int = PAGE_TOKENS) -> HostPool:
        """As many whole pages as fit in `num_bytes`."""
        return cls(pool, num_bytes // (page_tokens * pool.record_bytes), page_tokens)

    @property
    def total_bytes(self) -> int:
        return int(self._storage.numel())

    @property
    def num_lent_pages(self) -> int:
        return self._num_pages - len(self._free)

    @property
    def used_bytes(self) -> int:
        """Bytes of pages that are lent, their unused ends included."""
        return self.num_lent_pages * self._page_bytes

    @property
    def _page_bytes(self) -> int:
        return self._page_tokens * int(self._storage.shape[1])

    def can_allocate(self, num_tokens: int) -> bool:
        return self._num_pages_for(num_tokens) <= len(self._free)

    def allocate(self, num_tokens: int) -> PooledChunk | None:
        """A chunk for so many tokens, or None when the pool is too full for it."""
        if not self.can_allocate(num_tokens):
            return None
        pages = tuple(heapq.heappop(self._free) for _ in range(self._num_pages_for(num_tokens)))
        starts = torch.tensor(pages, dtype=torch.int64)[:, None] * self._page_tokens
        records = (starts + torch.arange(self._page_tokens)).flatten()[:num_tokens]
        chunk = PooledChunk(self._storage, records, pages)
        self._lent.add(chunk)
        return chunk

    def free(self, chunk: PooledChunk) -> None:
        """Take back a chunk that `allocate` gave out, once."""
        assert chunk in self._lent, "a chunk was freed twice, or is of another pool"
        self._lent.remove(chunk)
        for page in chunk.pages:
            heapq.heappush(self._free, page)

    def check_integrity(self) -> None:
        """Assert that every page is either free or lent to exactly one chunk."""
        lent = [page for chunk in self._lent for page in chunk.pages]
        assert sorted(self._free + lent) == list(range(self._num_pages)), "pages lost or doubled"
        for chunk in self._lent:
            assert len(chunk.pages) == self._num_pages_for(chunk.num_tokens)

    def _num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_tokens)


def _allocate(num_records: int, record_bytes: int) -> torch.Tensor:
    try:
        return torch.empty((num_records, record_bytes), dtype=torch.uint8)
    except (RuntimeError, MemoryError, TypeError) as error:  # the last for numbers beyond 64 bits
        raise ConfigError(
            "--program-host-memory",
            f"{num_records * record_bytes} bytes cannot be allocated",
        ) from error


def _pin(storage: torch.Tensor) -> None:
    """Page-lock memory until it is freed; PyTorch's own would be rounded up to a power of two."""
    runtime, address = torch.cuda.cudart(), storage.data_ptr()
    status = int(runtime.cudaHostRegister(address, storage.numel(), 0))
    if status:
        with suppress(RuntimeError):  # the runtime keeps the error for the next launch to report
            torch.zeros(1, device="cuda")
        raise ConfigError(
            "--program-host-memory",
            f"{storage.numel()} bytes cannot be pinned: CUDA error {status}",
        )
    weakref.finalize(storage, runtime.cudaHostUnregister, address).atexit = False
