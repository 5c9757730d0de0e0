"""Moves KV rows between the engine's pool and host memory: `swap_out` and `swap_in`.

    pool = KVPool.of(allocator.get_kvcache())     # every layer's K and V, [num_slots, ...] each
    chunk = swap_out(pool, slots)                 # rows of these tokens, packed in host memory
    swap_in(chunk, pool, new_slots)               # the same bytes, in other slots

A token's rows of all buffers lie in one *record*, K of every layer, then V (or MLA's latent rows),
each aligned to 16 bytes. Any number of victims moves at once: concatenate their slots, and join
their chunks. Values are never interpreted, so every dtype and head layout goes by its byte width.

    buffer 0  [slot, row]  --+
    buffer 1  [slot, row]  --+-- record of slot s = row 0 | row 1 | ...  --> storage[records[i]]
    ...                      |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Final, Protocol

import torch

from autellix_sglang.errors import SwapError

ALIGNMENT: Final = 16  # bytes; rows within a record begin at multiples of it
INDEX_DTYPES: Final = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class KVPool:
    """The engine's KV buffers; all on one device, all with the same number of slots first.

    A slot's row has to be contiguous, the slots may be apart (`stride(0)` is free).
    """

    buffers: tuple[torch.Tensor, ...]

    def __post_init__(self) -> None:
        """Raise `SwapError` for buffers that cannot be one pool."""
        if not self.buffers:
            raise SwapError("a KV pool needs at least one buffer")
        for i, buffer in enumerate(self.buffers):
            self._check(i, buffer)

    def _check(self, i: int, buffer: torch.Tensor) -> None:
        first = self.buffers[0]
        if buffer.dim() < 2 or buffer.shape[0] == 0:
            raise SwapError(f"buffer {i}: shape {tuple(buffer.shape)} is not [num_slots, ...]")
        if buffer.device != first.device or buffer.shape[0] != first.shape[0]:
            raise SwapError(
                f"buffer {i}: {buffer.shape[0]} slots on {buffer.device}, "
                f"but buffer 0 has {first.shape[0]} on {first.device}"
            )
        if not buffer[0].is_contiguous():
            raise SwapError(
                f"buffer {i}: a slot's row is not contiguous, strides {buffer.stride()}"
            )

    @classmethod
    def of(cls, kv_cache: Any) -> KVPool | None:
        """The buffers of SGLang's `MHATokenToKVPool` or `MLATokenToKVPool`; None for others.

        Exactly these two classes: what others hold beside the plain rows (scales, indexes, sliding
        windows) would be lost.
        """
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

        if type(kv_cache) is MHATokenToKVPool and _is_plain_mha(kv_cache):
            return cls((*kv_cache.k_buffer, *kv_cache.v_buffer))
        if type(kv_cache) is MLATokenToKVPool:
            return cls(tuple(kv_cache.kv_buffer))
        return None

    @property
    def device(self) -> torch.device:
        return self.buffers[0].device

    @property
    def num_slots(self) -> int:
        return int(self.buffers[0].shape[0])

    @cached_property
    def row_bytes(self) -> tuple[int, ...]:
        """Length of a slot's row in each buffer."""
        return tuple(buffer[0].numel() * buffer.element_size() for buffer in self.buffers)

    @cached_property
    def record_offsets(self) -> tuple[int, ...]:
        """Where each buffer's row begins in a record; the last entry is the record's length."""
        padded = (-(-length // ALIGNMENT) * ALIGNMENT for length in self.row_bytes)
        return tuple(accumulate(padded, initial=0))

    @property
    def record_bytes(self) -> int:
        return self.record_offsets[-1]

    @cached_property
    def byte_rows(self) -> tuple[torch.Tensor, ...]:
        """Each buffer as uint8 [num_slots, row_bytes], sharing its memory."""
        return tuple(buffer.flatten(1).view(torch.uint8) for buffer in self.buffers)


def _is_plain_mha(kv_cache: Any) -> bool:
    """Rows are token slots, and nothing but K and V belongs to them."""
    num_slots = kv_cache.size + kv_cache.page_size
    is_by_token = all(len(buffer) == num_slots for buffer in kv_cache.k_buffer)
    return is_by_token and not kv_cache.is_quantized_kv_cache


@dataclass(frozen=True, eq=False)
class HostChunk:
    """Tokens in host memory: token i is `storage[records[i]]`.

    `storage` is uint8 [num_records, record_bytes] and may be shared with other chunks; `records`
    is int64 [num_tokens]. Both are on the CPU; `storage` is pinned where the pool is on a GPU.
    """

    storage: torch.Tensor
    records: torch.Tensor

    def __post_init__(self) -> None:
        """Raise `SwapError` unless every record is in bounds and the shapes are as promised."""
        storage, records = self.storage, self.records
        if storage.device.type != "cpu" or storage.dtype != torch.uint8 or storage.dim() != 2:
            raise SwapError("chunk: storage is not a uint8 CPU tensor [num_records, record_bytes]")
        if not storage.is_contiguous() or storage.data_ptr() % ALIGNMENT:
            raise SwapError(f"chunk: storage is not contiguous and aligned to {ALIGNMENT} bytes")
        if records.device.type != "cpu" or records.dtype != torch.int64 or records.dim() != 1:
            raise SwapError("chunk: records is not an int64 CPU tensor [num_tokens]")
        _check_bounds("record", records, len(storage))

    @classmethod
    def new(cls, pool: KVPool, num_tokens: int) -> HostChunk:
        """Memory of its own, for exactly `num_tokens` tokens of `pool`."""
        shape = (num_tokens, pool.record_bytes)
        storage = torch.empty(shape, dtype=torch.uint8, pin_memory=pool.device.type == "cuda")
        return cls(storage, torch.arange(num_tokens))

    @classmethod
    def joined(cls, chunks: Sequence[HostChunk]) -> HostChunk:
        """Chunks of one storage behind each other, to be moved together."""
        storages = {chunk.storage.data_ptr() for chunk in chunks}
        if len(storages) != 1:
            raise SwapError(f"chunks of {len(storages)} storages cannot be joined")
        return cls(chunks[0].storage, torch.cat([chunk.records for chunk in chunks]))

    def part(self, start: int, stop: int | None = None) -> HostChunk:
        """Tokens [start, stop) of this chunk, in the same memory."""
        return HostChunk(self.storage, self.records[start:stop])

    @property
    def num_tokens(self) -> int:
        return len(self.records)

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * int(self.storage.shape[1])

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(first token, first record, length) of each stretch of consecutive records."""
        if not len(self.records):
            return
        breaks = (torch.diff(self.records) != 1).nonzero().flatten() + 1
        edges = [0, *breaks.tolist(), len(self.records)]
        for start, stop in pairwise(edges):
            yield start, int(self.records[start]), stop - start


class Mover(Protocol):
    """Copies rows. Arguments are checked; `slots` is on the pool's device."""

    def gather(self, pool: KVPool, slots: torch.Tensor, chunk: HostChunk) -> None:
        """Pool to chunk, in the order of the current stream."""

    def scatter(self, chunk: HostChunk, pool: KVPool, slots: torch.Tensor) -> None:
        """Chunk to pool, in the order of the current stream."""


class ReferenceMover:
    """Plain torch: the specification of the kernel, and the implementation on a CPU."""

    def gather(self, pool: KVPool, slots: torch.Tensor, chunk: HostChunk) -> None:
        for token, record, length in chunk.runs():
            some = slots[token : token + length]
            for rows, columns in self._columns(pool, chunk, record, length):
                columns.copy_(rows.index_select(0, some))

    def scatter(self, chunk: HostChunk, pool: KVPool, slots: torch.Tensor) -> None:
        for token, record, length in chunk.runs():
            some = slots[token : token + length].long()
            for rows, columns in self._columns(pool, chunk, record, length):
                rows.index_copy_(0, some, columns.to(rows.device))

    @staticmethod
    def _columns(
        pool: KVPool, chunk: HostChunk, record: int, length: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each buffer's rows, and its bytes in records [record, record + length)."""
        records = chunk.storage[record : record + length]
        for rows, start in zip(pool.byte_rows, pool.record_offsets, strict=False):
            yield rows, records[:, start : start + rows.shape[1]]


def mover_for(pool: KVPool) -> Mover:
    """The kernel on CUDA devices (compiled now if need be), else the reference."""
    if pool.device.type != "cuda":
        return ReferenceMover()
    from autellix_sglang.engine.swap_kernel import kernel_mover

    return kernel_mover(pool.device)


def swap_out(
    pool: KVPool,
    slots: torch.Tensor,
    chunk: HostChunk | None = None,
    *,
    mover: Mover | None = None,
    is_checked: bool = False,
) -> HostChunk:
    """Copy the rows of `slots` (int32 or int64 [num_tokens], on the pool's device) to host memory.

    Goes into `chunk` if given, else into memory of its own. On a GPU it runs in the order of the
    current stream and returns at once: until that stream has passed, the rows must not be
    overwritten from another stream, nor the chunk read by the CPU. Bounds are checked on the
    device's data, which waits for it; `is_checked` says that the engine's allocator vouches for
    the slots. Raises `SwapError` before anything is moved.
    """
    if chunk is None:
        chunk = HostChunk.new(pool, len(slots))
    _check_move(pool, slots, chunk, is_checked)
    if len(slots):
        (mover or mover_for(pool)).gather(pool, slots, chunk)
    return chunk


def swap_in(
    chunk: HostChunk,
    pool: KVPool,
    slots: torch.Tensor,
    *,
    mover: Mover | None = None,
    is_checked: bool = False,
) -> None:
    """Copy a chunk's tokens into the rows of `slots`; the inverse of `swap_out`, with its rules."""
    _check_move(pool, slots, chunk, is_checked)
    if len(slots):
        (mover or mover_for(pool)).scatter(chunk, pool, slots)


def _check_move(pool: KVPool, slots: torch.Tensor, chunk: HostChunk, is_checked: bool) -> None:
    if slots.device != pool.device:
        raise SwapError(f"slots are on {slots.device}, the pool is on {pool.device}")
    if slots.dtype not in INDEX_DTYPES or slots.dim() != 1 or not slots.is_contiguous():
        raise SwapError(
            f"slots must be contiguous int32 or int64 [num_tokens], "
            f"not {slots.dtype} {tuple(slots.shape)}"
        )
    if len(slots) != chunk.num_tokens:
        raise SwapError(f"{len(slots)} slots, but the chunk has {chunk.num_tokens} tokens")
    if chunk.storage.shape[1] != pool.record_bytes:
        raise SwapError(
            f"the chunk's records have {chunk.storage.shape[1]} bytes, the pool's "
            f"{pool.record_bytes}"
        )
    # Empty storage has no address that could be pinned.
    if pool.device.type == "cuda" and len(slots) and not chunk.storage.is_pinned():
        raise SwapError("the chunk's storage is not pinned, so a GPU cannot reach it")
    if not is_checked:
        _check_bounds("slot", slots, pool.num_slots)


def _check_bounds(name: str, indices: torch.Tensor, limit: int) -> None:
    if not len(indices):
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= limit:
        raise SwapError(f"{name}s from {low} to {high} are not within 0..{limit - 1}")
