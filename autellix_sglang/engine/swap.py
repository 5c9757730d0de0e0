"""The swap manager: what becomes of a victim's KV, and how it comes back.

    release(victims)                     restore(req), as SGLang is about to admit it
    ----------------                     ------------
    keep   -> radix tree, evictable      match_prefix: what the tree still has
    swap   -> host pool (gather)         allocate the missing rows, scatter, insert into the tree
    backup -> both                       then SGLang's own prefix hit: one token is computed
    drop   -> freed

`prefetch` does the same for the call next in line, while the batch runs, if a batch slot is all
that it waits for. What it brings back is cache like any other: evictable, so that no running call
ever has to leave for it, and nothing is to undo when the call ends in another way.

Both of SGLang's ways to take a running call off the batch end in `release`: a planned preemption
(`ProgramScheduler`) and the retraction when the KV pool is full (`patches.retraction_swap`).

Who owns a swapped call's rows:

    device rows --gather--> chunk (host) ------------------------> freed by `forget`, when the call
         |                    |                                    runs again or is over
         +--> allocator       +--scatter--> rows of the radix tree, which may evict them again

A chunk begins where the rows that running calls share end: those stay in the tree. Should they be
gone when the call resumes, the chunk does not join on to anything, and is freed.

No clock and no measurement of this process enters a decision, so all tensor-parallel ranks decide
alike: the break-even length comes from the settings or, by message, from rank 0.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, PrefillAdder
from sglang.srt.managers.utils import allocate_distinct_stream
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache, release_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixKey

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.kv import Fate, choose, may_save
from autellix_sglang.engine.host_pool import HostPool, PooledChunk
from autellix_sglang.engine.swap_op import (
    HostChunk,
    KVPool,
    Mover,
    mover_for,
    swap_in,
    swap_out,
)
from autellix_sglang.errors import ConfigError, KernelError, SwapError

logger = logging.getLogger(__name__)

GIB: Final = 2**30
MEASURED_TOKENS: Final = (64, 1024)  # lengths of the two copies that are timed
NUM_ROUNDS: Final = 3


Agreement = Callable[[ConfigError | None], None]  # see `ProgramScheduler.agree`


def raise_own(error: ConfigError | None) -> None:
    """The agreement of one rank with itself."""
    if error is not None:
        raise error


@dataclass(slots=True)
class SwapCounters:
    """Since the start; tokens are tokens of one call, over all layers."""

    swaps_out: int = 0
    swaps_in: int = 0
    swapped_out_tokens: int = 0
    swapped_in_tokens: int = 0
    dropped_for_full_pool: int = 0  # victims the host pool had no room for, left to eviction
    swaps_lost: int = 0  # chunks whose shared beginning was evicted meanwhile
    prefetches: int = 0  # of `swaps_in`, those for a call that had no batch slot yet
    prefetch_hits: int = 0  # of these, calls that found all of it when they were admitted


@dataclass(frozen=True, slots=True)
class LinkCost:
    """Seconds to copy KV out and in again: per token, and per call."""

    token_s: float
    fixed_s: float


@dataclass(frozen=True, slots=True)
class _Saved:
    """Tokens [start, end) of a waiting call, in host memory."""

    chunk: PooledChunk
    start: int

    @property
    def end(self) -> int:
        return self.start + self.chunk.num_tokens


class SwapManager:
    """Owner of the host pool and of every chunk in it, for one scheduler process."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._tree = scheduler.tree_cache
        self._allocator = scheduler.token_to_kv_pool_allocator
        self._page_size: int = scheduler.page_size
        self._kv = KVPool.of(self._allocator.get_kvcache())
        self._host: HostPool | None = None  # made when the settings first ask for it
        self._mover: Mover | None = None
        self._copies: CopyOrder | None = None
        self._saved: dict[Req, _Saved] = {}
        self._prefetched: Req | None = None  # the last one
        self._num_chosen = 0
        self.counters = SwapCounters()
        self.link: LinkCost | None = None  # measured on this rank; never read by a decision
        self.break_even_tokens: int | None = None

    def configure(self, config: ProgramConfig, agree: Agreement = raise_own) -> None:
        """Take over settings; makes the host pool if they need it.

        Raises `ConfigError`, and then nothing has changed. What may fail on one rank alone comes
        before `agree`, which raises on every rank what any of them has met.
        """
        if self._host is not None and config.host_memory != self._host_gib:
            raise ConfigError("--program-host-memory", "the pool exists and keeps its size")
        if may_save(config.kv) and self._host is None:
            self._open(config, agree)
        self._mode = config.kv
        if config.kv_break_even:
            self.break_even_tokens = config.kv_break_even

    def _open(self, config: ProgramConfig, agree: Agreement) -> None:
        error = made = None
        try:
            made = self._make_store(config)
        except ConfigError as caught:
            error = caught
        agree(error)
        assert made is not None and self._kv is not None
        self._mover, self._host, self.link = made
        self._host_gib = config.host_memory
        streams = torch.cuda if self._kv.device.type == "cuda" else None
        self._copies = CopyOrder(streams, self._scheduler)
        logger.info(
            "host pool for swapped KV: %.2f GiB on this rank, %d bytes per token",
            self._host.total_bytes / GIB, self._kv.record_bytes,
        )  # fmt: skip

    def _make_store(self, config: ProgramConfig) -> tuple[Mover, HostPool, LinkCost]:
        if self._kv is None or self._tree.supports_mamba() or self._tree.supports_swa():
            kind = type(self._allocator.get_kvcache()).__name__
            raise ConfigError("--program-kv", f"{config.kv!r} cannot move the rows of a {kind}")
        if config.host_memory < 0:
            raise ConfigError("--program-host-memory", "-1 has to be resolved before it gets here")
        num_bytes = int(config.host_memory * GIB) // self._scheduler.tp_size
        try:
            mover = mover_for(self._kv)
            return mover, HostPool.sized(self._kv, num_bytes), measure_link(self._kv, mover)
        except (KernelError, SwapError, RuntimeError) as error:  # the last is torch out of memory
            raise ConfigError("--program-kv", f"{config.kv!r}: {error}") from error

    # -- out -------------------------------------------------------------------------------------

    def release(self, victims: Sequence[Req], staying: Sequence[Req]) -> None:
        """Take running requests' KV off the device, each to the fate that is chosen for it.

        `staying` are the requests that go on running. The victims are as after SGLang's own
        retraction: not in the waiting queue yet.
        """
        saving: list[tuple[Req, _Saved]] = []
        keeping: set[Req] = set()
        for req in victims:
            start, end = self._own_span(req, staying)
            fate = self._choose(req, end - start)
            saved = self._reserve(start, end) if fate.is_saved else None
            if saved is not None:
                saving.append((req, saved))
            if fate is not Fate.DROP and (saved is None or fate is Fate.BACKUP):
                keeping.add(req)
        self._gather(saving)
        for req in victims:
            release_kv_cache(req, self._tree, checkpoint=req in keeping)
            req.reset_for_retract()

    def retract(self, victim: Req, staying: Sequence[Req]) -> None:
        """`release` one request because the KV pool is full."""
        self.release([victim], staying)

    def _choose(self, req: Req, own_tokens: int) -> Fate:
        self._num_chosen += 1
        if self._tree.supports_mamba():
            return Fate.DROP  # SGLang does not put an unfinished request's state into the tree
        if not own_tokens or not may_share(req):
            return Fate.KEEP
        return choose(self._mode, own_tokens, self.break_even_tokens, self._num_chosen)

    def _own_span(self, req: Req, staying: Iterable[Req]) -> tuple[int, int]:
        """Tokens [start, end) of a running request that no request in `staying` has, in pages.

        The last token is computed again on resumption in any case. Its row may not even be
        written: with overlap scheduling its batch is in flight. All rows before it are.
        """
        req.refresh_fill_ids()
        end = min(req.owned_kv_len(), len(req.full_untruncated_fill_ids) - 1)
        start = shared_rows(req, staying)
        pages = end // self._page_size
        return min(start // self._page_size, pages) * self._page_size, pages * self._page_size

    def _reserve(self, start: int, end: int) -> _Saved | None:
        """Room in the host pool, or None, counted, when there is not enough."""
        assert self._host is not None
        chunk = self._host.allocate(end - start)
        if chunk is None:
            self.counters.dropped_for_full_pool += 1
            return None
        return _Saved(chunk, start)

    def _gather(self, saving: Sequence[tuple[Req, _Saved]]) -> None:
        """Copy the rows of all victims in one launch."""
        if not saving:
            return
        assert self._kv is not None and self._copies is not None
        table = self._tree.req_to_token_pool.req_to_token
        rows = [table[req.kv.req_pool_idx, saved.start : saved.end] for req, saved in saving]
        slots = torch.cat(rows)  # a copy: the table's rows are about to be used anew
        chunk = HostChunk.joined([saved.chunk for _, saved in saving])
        prefilling = self._scheduler.reqs_prefilling_in_flight()
        is_written = not any(req in prefilling for req, _ in saving)
        order = self._copies.after_results if is_written else self._copies.after_forward
        with order(slots):
            swap_out(self._kv, slots, chunk, mover=self._mover, is_checked=True)
        self._saved.update(saving)
        self.counters.swaps_out += len(saving)
        self.counters.swapped_out_tokens += chunk.num_tokens

    # -- in --------------------------------------------------------------------------------------

    def cached_tokens(self, req: Req, num_matched: int) -> int:
        """Tokens of a waiting request that need no computing, if the tree has `num_matched`."""
        saved = self._saved.get(req)
        if saved is None or num_matched < saved.start:
            return num_matched
        return max(num_matched, saved.end)

    def restore(self, req: Req, adder: PrefillAdder) -> None:
        """Bring a swapped request's rows back into the radix tree, if SGLang would admit it then.

        The chunk stays until the request runs (`forget`): until then the tree may evict the rows
        again.
        """
        if req in self._saved:
            self._fetch(req, adder.rem_total_tokens)
            req.init_next_round_input(self._tree)

    def has_saved(self, req: Req) -> bool:
        return req in self._saved

    def can_prefetch(self, req: Req) -> bool:
        """Whether there is something to bring back that `prefetch` has not brought already."""
        return req in self._saved and req is not self._prefetched

    def prefetch(self, req: Req, free_tokens: int, num_running: int) -> None:
        """`restore` for the request next in line, beside the batch that is about to run.

        `free_tokens` is what SGLang's budget has left after all reservations: with less than the
        request needs nothing is moved. Call `settle` before the batch after that one.
        """
        req.refresh_fill_ids()
        # The coming batch must not need rows that are being written: leave it enough of others.
        num_others = (num_running + 1) * self._page_size
        if self._fetch(req, free_tokens, num_others, is_awaited=False):
            self.counters.prefetches += 1
            self._prefetched = req

    def settle(self) -> None:
        """Let the next batch wait for the copies that none has waited for yet."""
        if self._copies is not None:
            self._copies.settle()

    def _fetch(
        self, req: Req, free_tokens: int, num_others: int = 0, is_awaited: bool = True
    ) -> bool:
        """Fill in what the tree lacks of a saved request; False where nothing was copied."""
        saved = self._saved[req]
        tokens = req.full_untruncated_fill_ids[: saved.end]
        key = RadixKey(tokens, req.extra_key, cache_salt=req.cache_salt)
        match = self._tree.match_prefix(MatchPrefixParams(key=key))
        num_matched = match.device_prefix_len
        if num_matched < saved.start or len(req.full_untruncated_fill_ids) <= saved.end:
            self.counters.swaps_lost += 1
            self.forget(req)
            return False
        if num_matched >= saved.end:
            return False
        node, num_missing = match.last_device_node, saved.end - num_matched
        num_evictable = self._tree.evictable_size()
        lock = self._tree.lock(node)
        try:
            free_tokens -= num_evictable - self._tree.evictable_size()
            if kv_demand(req, num_matched) + self._page_size >= free_tokens:
                return False
            evict_from_tree_cache(self._tree, num_missing + num_others)
            if self._allocator.available_size() < num_missing + num_others:
                return False  # it will be computed, or wait for another pass
            self._scatter(saved, key, num_matched, node, is_awaited)
        finally:
            self._tree.unlock(lock)
        return True

    def _scatter(
        self, saved: _Saved, key: RadixKey, num_matched: int, node: Any, is_awaited: bool
    ) -> None:
        """Fill tokens [num_matched, saved.end) from the chunk, below the locked tree node."""
        assert self._kv is not None and self._copies is not None
        num_missing = saved.end - num_matched
        slots = self._allocator.alloc(num_missing)
        part = saved.chunk.part(num_matched - saved.start)
        with self._copies.after_forward(slots, is_awaited):
            swap_in(part, self._kv, slots, mover=self._mover, is_checked=True)
        path = self._tree.path_device_indices(node)[:num_matched]
        value = torch.cat([path, slots.to(path.dtype)])
        self._tree.insert(InsertParams(key=key, value=value, prev_prefix_len=num_matched))
        self.counters.swaps_in += 1
        self.counters.swapped_in_tokens += num_missing

    # -- over ------------------------------------------------------------------------------------

    def note_admission(self, req: Req, num_cached: int) -> None:
        """The request is about to run, with so many tokens from the tree."""
        saved = self._saved.get(req)
        if saved is not None and req is self._prefetched:
            self.counters.prefetch_hits += num_cached >= saved.end
        self.forget(req)

    def forget(self, req: Req) -> None:
        """The request runs again or is over: its host memory is free. Safe to repeat."""
        if req is self._prefetched:
            self._prefetched = None
        saved = self._saved.pop(req, None)
        if saved is not None:
            assert self._host is not None
            self._host.free(saved.chunk)

    def forget_all(self) -> None:
        """The radix tree was flushed, perhaps for new weights: no saved KV is worth anything."""
        for req in list(self._saved):
            self.forget(req)

    # -- introspection ---------------------------------------------------------------------------

    def totals(self) -> dict[str, Any]:
        """Counters and sizes, in JSON types."""
        return {
            **asdict(self.counters),
            "swapped_calls": len(self._saved),
            "host_pool_bytes": 0 if self._host is None else self._host.total_bytes,
            "host_pool_used_bytes": 0 if self._host is None else self._host.used_bytes,
            "kv_break_even_tokens": self.break_even_tokens,
            "swap_token_s": None if self.link is None else self.link.token_s,
            "swap_fixed_s": None if self.link is None else self.link.fixed_s,
        }

    def check_integrity(self, waiting: Iterable[Req]) -> None:
        """Assert that the pool's pages add up and that only waiting requests have some."""
        assert self._saved.keys() <= set(waiting), "a chunk without a call"
        if self._host is not None:
            self._host.check_integrity()
            lent = sum(len(saved.chunk.pages) for saved in self._saved.values())
            assert lent == self._host.num_lent_pages, "a chunk without an owner"


def kv_demand(req: Req, num_matched: int) -> int:
    """The KV tokens, but for a page, that SGLang's `add_one_req` asks for with so many matched."""
    return len(req.full_untruncated_fill_ids) - num_matched + max_new_tokens(req)


def max_new_tokens(req: Req) -> int:
    """The tokens that SGLang counts on a request to generate yet, at most."""
    left = req.sampling_params.max_new_tokens - len(req.output_ids)
    return int(max(0, min(left, CLIP_MAX_NEW_TOKENS)))


def may_share(req: Req) -> bool:
    """Whether SGLang lets the request's rows into the radix tree and finds them again there."""
    return not req.skip_radix_cache_insert and req.positional_embed_overrides is None


def shared_rows(req: Req, others: Iterable[Req]) -> int:
    """Leading tokens of `req` whose rows are in the tree and locked by one of the others too."""
    tokens, limit = req.full_untruncated_fill_ids, req.kv.cache_protected_len
    longest = 0
    for other in others:
        if longest >= limit:
            break
        theirs, end = other.full_untruncated_fill_ids, min(limit, other.kv.cache_protected_len)
        # Most of many that share something share the same: one look tells that it is no more.
        if longest >= end or tokens[longest] != theirs[longest]:
            continue
        if (req.extra_key, req.cache_salt) == (other.extra_key, other.cache_salt):
            longest = max(longest, common_prefix(tokens, theirs, end))
    return longest


def common_prefix(a: array[int], b: array[int], limit: int) -> int:
    """Length of the longest common beginning, at most `limit`."""
    limit = min(limit, len(a), len(b))
    if not limit or a[0] != b[0]:
        return 0
    left, right = (np.frombuffer(tokens, dtype=np.int64, count=limit) for tokens in (a, b))
    differs = left != right
    return int(differs.argmax()) if differs.any() else limit


# --- in which order copies run ------------------------------------------------------------------


class CopyOrder:
    """Runs copies where they delay nothing: at once on a CPU, on a stream of their own on a GPU.

    That stream keeps copies in order among themselves: a chunk's memory that is freed and lent
    anew is written after it was read. The next forward pass waits for the copies before it, so
    rows that were freed are not overwritten before they were read, and restored rows are not read
    before they were written. The scheduler's thread never waits.
    """

    def __init__(self, streams: Any, scheduler: Any) -> None:
        self._streams = streams  # the module `torch.cuda`; None where there are none
        self._scheduler = scheduler
        # With overlap scheduling a batch is in flight on a stream of its own.
        has_own = streams is not None and scheduler.enable_overlap
        self._forward = scheduler.forward_stream if has_own else None
        self._is_settled = True

    @cached_property
    def _stream(self) -> Any:
        """A stream that is none of SGLang's: PyTorch hands out a few of them in turn.

        Made at the first copy, when SGLang has all of its own.
        """
        taken = [self._streams.current_stream()]
        if self._forward is not None:
            taken += [self._forward, self._scheduler.copy_stream]
        return allocate_distinct_stream(self._streams, taken)

    def settle(self) -> None:
        """Let the next batch wait for all copies so far."""
        if not self._is_settled:
            (self._forward or self._streams.current_stream()).wait_stream(self._stream)
            self._is_settled = True

    @contextmanager
    def after_results(self, slots: torch.Tensor, is_awaited: bool = True) -> Iterator[None]:
        """For reading rows that are older than the last result: the batch in flight writes none."""
        if self._streams is None:
            yield
            return
        self._stream.wait_stream(self._streams.current_stream())  # which has made `slots`
        if slots.is_cuda:
            slots.record_stream(self._stream)
        with self._streams.stream(self._stream):
            yield
        self._is_settled = False
        if is_awaited:
            self.settle()

    @contextmanager
    def after_forward(self, slots: torch.Tensor, is_awaited: bool = True) -> Iterator[None]:
        """For writing rows: the batch in flight may still use what was freed under it.

        If it is not awaited, nothing may use the rows before `settle`.
        """
        if self._forward is not None:
            self._stream.wait_stream(self._forward)
        with self.after_results(slots, is_awaited):
            yield


def measure_link(pool: KVPool, mover: Mover) -> LinkCost:
    """Time copies of two lengths out and in again; waits for the device, so only at start."""
    short, long = (min(num, pool.num_slots) for num in MEASURED_TOKENS)
    short_s, long_s = (_round_trip_s(pool, mover, num) for num in (short, long))
    token_s = max(0.0, (long_s - short_s) / max(1, long - short))
    return LinkCost(token_s, max(0.0, short_s - short * token_s))


def _round_trip_s(pool: KVPool, mover: Mover, num_tokens: int) -> float:
    """Seconds, the best of some rounds after a first one that warms up. Leaves the rows as is."""
    slots = torch.arange(num_tokens, device=pool.device)
    chunk = HostChunk.new(pool, num_tokens)
    times = []
    for _ in range(NUM_ROUNDS + 1):
        _synchronize(pool.device)
        started = time.perf_counter()
        swap_out(pool, slots, chunk, mover=mover, is_checked=True)
        swap_in(chunk, pool, slots, mover=mover, is_checked=True)
        _synchronize(pool.device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
