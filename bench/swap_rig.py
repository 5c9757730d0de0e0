"""The swap manager on SGLang's own cache, with everything but a model.

Requests, radix tree, allocator, KV pool and admission are SGLang's; what is missing is the model,
the scheduler's loop and the clock. In the model's place, each token leaves numbers in its KV rows
and the next token is a sum over all rows of the call: a row that is lost, stale or in the wrong
place changes the output. `Chaos` throws seeded random events at it.

As with overlap scheduling, a batch is in flight while events happen and the next one is planned.
On a GPU it runs on a stream of its own, and both it and the copies of swapped rows are slowed down
at random: what is not ordered by the streams then happens in the wrong order. Without a GPU, fake
streams (`tests/engine/fake_streams.py`) can take the place of real ones: they queue the same work,
and do it in any order that real ones might.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import (
    checkpoint_kv_cache,
    evict_from_tree_cache,
    release_kv_cache,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_context
from sglang.srt.sampling.sampling_params import SamplingParams

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.kv import KV_CHOICES
from autellix_sglang.engine.admission import ProgramPrefillAdder
from autellix_sglang.engine.swap import CopyOrder, SwapManager
from autellix_sglang.engine.swap_op import HostChunk, KVPool, Mover

VOCABULARY = 50
NUM_LAYERS = 2
NEW_TOKEN_RATIO = 0.0  # SGLang counts on early ends, which never come: the pool overflows
MAX_DELAY_CYCLES = 400_000  # of a batch or a copy on a GPU: up to some 0.2 ms
STEP_S = 0.025  # what one step stands for, when steps are counted as time


@contextmanager
def sglang_settings() -> Iterator[None]:
    """SGLang's global settings, as in a scheduler process with default flags."""
    with get_context().override_server_args():
        yield


def answer(prompt: Sequence[int], num_output: int) -> list[int]:
    """What the rig must generate, computed without it."""
    tokens = list(prompt)
    for _ in range(num_output):
        tokens.append(_next_token([_row(token, i) for i, token in enumerate(tokens)]))
    return tokens[len(prompt) :]


def _row(token: int, position: int) -> int:
    return (token * 31 + position * 17) % 1021


def _next_token(rows: Sequence[int]) -> int:
    return sum(row * (i + 1) for i, row in enumerate(rows)) % VOCABULARY


def submit(streams: Any, work: Callable[[], None]) -> None:
    """Put work on the current stream: a fake one queues it, a GPU what it launches."""
    if hasattr(streams, "submit"):
        streams.submit(work)
    else:
        work()


def dawdle(streams: Any, rng: random.Random) -> None:
    """Keep the current stream of a GPU busy for a while; fake ones need no reason to be late."""
    if streams is torch.cuda:
        torch.cuda._sleep(rng.randrange(MAX_DELAY_CYCLES))


class LateMover:
    """A mover whose copies begin late, as far as the order of streams lets them."""

    def __init__(self, mover: Mover, streams: Any) -> None:
        self._mover = mover
        self._streams = streams
        self._rng = random.Random(0)

    def gather(self, pool: KVPool, slots: torch.Tensor, chunk: HostChunk) -> None:
        dawdle(self._streams, self._rng)
        submit(self._streams, partial(self._mover.gather, pool, slots, chunk))

    def scatter(self, chunk: HostChunk, pool: KVPool, slots: torch.Tensor) -> None:
        dawdle(self._streams, self._rng)
        submit(self._streams, partial(self._mover.scatter, chunk, pool, slots))


class ReusingAllocator(TokenToKVPoolAllocator):  # type: ignore[misc]  # SGLang is untyped
    """Lends first what was freed last, as SGLang's allocator of larger pages does.

    Copies and batches thus use the same rows one right after the other.
    """

    free_pages: torch.Tensor

    def free(self, free_index: torch.Tensor) -> None:
        num_free = len(self.free_pages)
        super().free(free_index)
        self.free_pages = self.free_pages.roll(-num_free)


class Rig:
    """A few batch slots and KV tokens; has what `SwapManager` and admission ask of a scheduler.

    `streams` has the interface of `torch.cuda`, which is the default on a GPU; elsewhere it is
    None, and whatever is launched is done at once. Without overlap the model works on the
    scheduler's own stream.
    """

    page_size = 1
    tp_size = 1

    def __init__(
        self,
        config: ProgramConfig,
        num_slots: int,
        num_kv_tokens: int,
        device: str = "cpu",
        streams: Any = None,
        has_overlap: bool = True,
    ) -> None:
        self.num_kv_tokens = num_kv_tokens
        self.pool = MHATokenToKVPool(
            size=num_kv_tokens, page_size=1, dtype=torch.float32, head_num=1, head_dim=4,
            layer_num=NUM_LAYERS, device=device, enable_memory_saver=False,
        )  # fmt: skip
        self.token_to_kv_pool_allocator = ReusingAllocator(
            num_kv_tokens, dtype=torch.float32, device=device, kvcache=self.pool, need_sort=False
        )
        self._table = ReqToTokenPool(num_slots, num_kv_tokens, device, enable_memory_saver=False)
        self.tree_cache = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self._table,
                token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
                page_size=1,
                tree_components=(ComponentType.FULL,),
            )
        )
        self._num_slots = num_slots
        self.program_config = config
        self.waiting: list[Req] = []
        self.running: list[Req] = []
        self.num_recomputed = 0
        self._computed: dict[Req, int] = {}
        self.num_retractions = 0
        self.must_retract = False  # one call, room or not, as with SGLANG_TEST_RETRACT
        self._in_flight: dict[Req, torch.Tensor] = {}  # see `_generate`
        self._prefilling: set[Req] = set()  # in the batch in flight
        self._held: list[torch.Tensor] = []  # used by the batch in flight
        self._rng = random.Random(0)
        is_gpu = torch.device(device).type == "cuda"
        self._streams = torch.cuda if streams is None and is_gpu else streams
        self.enable_overlap = has_overlap and self._streams is not None
        if self.enable_overlap:
            self.forward_stream, self.copy_stream = self._streams.Stream(), self._streams.Stream()
        elif self._streams is not None:
            self.forward_stream = self._streams.current_stream()
        self.swaps = SwapManager(self)
        self.swaps.configure(config)
        if self._streams is not None and self.swaps._mover is not None:
            self.swaps._mover = LateMover(self.swaps._mover, self._streams)
            self.swaps._copies = CopyOrder(self._streams, self)

    def reqs_prefilling_in_flight(self) -> set[Req]:
        return self._prefilling

    def prompts_in_flight(self) -> list[Req]:
        return []

    def get_num_allocatable_reqs(
        self, num_running: int, running_batch: Any = None, num_held_rows: int = 0
    ) -> int:
        return self._num_slots - num_running

    # -- what clients and the scheduler do -------------------------------------------------------

    def submit(self, rid: str, prompt: Sequence[int], num_output: int) -> Req:
        params = SamplingParams(max_new_tokens=num_output)
        params.normalize(None)
        req = Req(rid, "", array("q", prompt), params)
        self.waiting.append(req)
        return req

    def abort(self, req: Req) -> None:
        if req in self.waiting:
            self.waiting.remove(req)
            self.swaps.forget(req)
        else:
            req.finished_reason = FINISH_ABORT()
            self._finish(req)

    def preempt(self, victims: Sequence[Req]) -> None:
        """Take running requests off the batch; they wait again, first in line."""
        self.running = [req for req in self.running if req not in victims]
        for req in victims:  # a result that is in flight is nobody's
            self._in_flight.pop(req, None)
        self.swaps.release(victims, self.running)
        self.waiting[:0] = victims

    def step(self) -> list[Req]:
        """Admit, take the results of the batch in flight, launch the next; returns who ended.

        What `_prefetch` copies may run beside that next batch.
        """
        self.admit()
        self._prefetch()
        self._take_results()
        ended = self._end()
        self._make_room()
        self._begin_batch()
        for req in self.running:
            self._compute(req, req.output_ids[-1])
            self._generate(req)
        return ended

    def _prefetch(self) -> None:
        if self.waiting and self.swaps.can_prefetch(self.waiting[0]):
            free = self.token_to_kv_pool_allocator.available_size()
            free += self.tree_cache.evictable_size()
            self.swaps.prefetch(self.waiting[0], free, len(self.running))

    def _end(self) -> list[Req]:
        ended = [r for r in self.running if len(r.output_ids) == r.sampling_params.max_new_tokens]
        for req in ended:
            req.finished_reason = FINISH_LENGTH(len(req.output_ids))
            self._finish(req)
        return ended

    def flush(self) -> None:
        """SGLang's `flush_cache`, which it allows on an idle engine only."""
        assert not self.running
        self.tree_cache.reset()
        self._table.clear()
        self.token_to_kv_pool_allocator.clear()
        self.swaps.forget_all()

    # -- admission -------------------------------------------------------------------------------

    def admit(self) -> None:
        """Let in whoever fits: their prompts join the batch in flight."""
        self.swaps.settle()
        batch = SimpleNamespace(reqs=self.running)
        scheduler: Any = self
        adder = ProgramPrefillAdder(
            scheduler, 1, self.tree_cache, self.token_to_kv_pool_allocator, batch,
            NEW_TOKEN_RATIO, 1 << 20, None,
        )  # fmt: skip
        for req in self.waiting:
            if len(self.running) + len(adder.can_run_list) >= self._num_slots:
                break
            req.init_next_round_input(self.tree_cache)
            result = adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
            if result is not AddReqResult.CONTINUE:
                break
        for req in adder.can_run_list:
            self.waiting.remove(req)
            self.swaps.note_admission(req, req.prefix_len)
            self._prefill(req)
            self._prefilling.add(req)
            self.running.append(req)

    def _prefill(self, req: Req) -> None:
        tokens, num_cached = req.full_untruncated_fill_ids, req.prefix_len
        self._table.alloc([req])
        row = req.kv.req_pool_idx
        self._table.write(
            (row, slice(0, num_cached)),
            self.tree_cache.prefix_device_indices(req).to(torch.int32),
        )
        req.kv.kv_committed_len = req.kv.kv_allocated_len = num_cached
        self._begin_batch()
        for token in tokens[num_cached:]:
            self._compute(req, token)
        self.num_recomputed += max(0, self._computed.get(req, 0) - num_cached)
        req.is_retracted = False
        checkpoint_kv_cache(req, self.tree_cache)
        self._generate(req)

    def _compute(self, req: Req, token: int) -> None:
        """Write the KV of the next token of a running request."""
        evict_from_tree_cache(self.tree_cache, 1)
        slot = self.token_to_kv_pool_allocator.alloc(1)
        position = req.kv.kv_committed_len
        self._table.write((req.kv.req_pool_idx, position), slot[0].to(torch.int32))

        def compute() -> None:
            for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
                buffer.index_fill_(0, slot, float(_row(token, position)))

        self._launch(compute, slot)
        req.kv.kv_committed_len = req.kv.kv_allocated_len = position + 1

    def _generate(self, req: Req) -> None:
        """Leave the next token with the batch in flight; an impossible one for torn rows."""
        slots = self._table.req_to_token[req.kv.req_pool_idx, : req.kv.kv_committed_len].long()
        result = torch.full((), VOCABULARY, device=slots.device)

        def generate() -> None:
            rows = [
                buffer[slots].reshape(len(slots), -1)
                for buffer in (*self.pool.k_buffer, *self.pool.v_buffer)
            ]
            values = torch.cat(rows, dim=1).to(torch.int64)
            weights = torch.arange(1, len(slots) + 1, device=values.device)
            token = (values[:, 0] * weights).sum() % VOCABULARY
            is_whole = (values == values[:, :1]).all()
            result.copy_(torch.where(is_whole, token, VOCABULARY))

        self._launch(generate, slots, result)
        self._in_flight[req] = result

    def _launch(self, work: Callable[[], None], *tensors: torch.Tensor) -> None:
        """The model's work, behind what its stream and the current one have by now."""
        self._held += tensors
        if self._streams is None:
            work()
            return
        self.forward_stream.wait_stream(self._streams.current_stream())
        with self._streams.stream(self.forward_stream):
            submit(self._streams, work)

    def _begin_batch(self) -> None:
        self._launch(partial(dawdle, self._streams, self._rng))

    def _take_results(self) -> None:
        if self._streams is not None:
            self.forward_stream.synchronize()
        for req, token in self._in_flight.items():
            req.output_ids.append(int(token))
            self._computed[req] = req.kv.kv_committed_len
        self._in_flight.clear()
        self._prefilling.clear()
        self._held.clear()

    def _make_room(self) -> None:
        """Retract the youngest calls until every running one has a KV token to write."""
        while self.running:
            evict_from_tree_cache(self.tree_cache, len(self.running))
            has_room = self.token_to_kv_pool_allocator.available_size() >= len(self.running)
            if has_room and not self.must_retract:
                return
            self.must_retract = False
            self.swaps.settle()
            victim = self.running.pop()
            self.num_retractions += 1
            self.swaps.retract(victim, self.running)
            num_tokens = len(self.running) * envs.SGLANG_RETRACT_DECODE_STEPS.get()
            evict_from_tree_cache(self.tree_cache, num_tokens)
            self.waiting.insert(0, victim)

    def _finish(self, req: Req) -> None:
        self.running.remove(req)
        self._computed.pop(req, None)
        self._in_flight.pop(req, None)
        release_kv_cache(req, self.tree_cache, checkpoint=True)
        self.swaps.forget(req)

    # -- integrity -------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that every KV slot, row of the table and page of the host pool has one owner."""
        tree_size, _ = self.tree_cache.total_size()
        own = sum(r.kv.kv_allocated_len - r.kv.cache_protected_len for r in self.running)
        free = self.token_to_kv_pool_allocator.available_size()
        assert tree_size + own + free == self.num_kv_tokens, "KV slots lost or doubled"
        assert self._table.available_size() == self._num_slots - len(self.running)
        self.swaps.check_integrity(self.waiting)
        if not self.running:
            assert self.tree_cache.protected_size() == 0, "a lock without a request"


@dataclass(slots=True)
class _Sent:
    req: Req
    prompt: list[int]
    num_output: int


class Chaos:
    """Random events on a rig. `run` raises `AssertionError` for whatever must not happen."""

    def __init__(
        self,
        seed: int,
        num_kv_tokens: int = 100,
        num_host_tokens: int = 128,
        device: str = "cpu",
        streams: Any = None,
        has_overlap: bool = True,
    ) -> None:
        self._rng = random.Random(seed)
        record_bytes = 2 * NUM_LAYERS * 16
        host_gib = num_host_tokens * record_bytes / 2**30
        config = ProgramConfig(kv="mixed", kv_break_even=4, host_memory=host_gib, prefix_wait=8)
        self._config = config
        self._rig = Rig(
            config,
            num_slots=4,
            num_kv_tokens=num_kv_tokens,
            device=device,
            streams=streams,
            has_overlap=has_overlap,
        )
        self._beginnings = [[self._rng.randrange(VOCABULARY) for _ in range(12)] for _ in range(3)]
        self._live: dict[Req, _Sent] = {}
        self._num_sent = 0
        self.events: Counter[str] = Counter()

    def run(self, num_steps: int) -> dict[str, Any]:
        """So many steps with events, then as many as the calls left over need."""
        for _ in range(num_steps):
            for _ in range(self._rng.choice((1, 1, 4))):  # beside one and the same batch
                self._happen()
            self._step()
        for _ in range(10_000):
            if not self._live:
                break
            self._step()
        assert not self._live, "calls are stuck"
        totals = self._rig.swaps.totals()
        assert totals["host_pool_used_bytes"] == 0
        return {**self.events, **totals, "retractions": self._rig.num_retractions}

    def _step(self) -> None:
        for req in self._rig.step():
            sent = self._live.pop(req)
            expected = answer(sent.prompt, sent.num_output)
            assert list(req.output_ids) == expected, f"{req.rid}: a changed output"
            self.events["completed"] += 1
        self._rig.check_integrity()

    def _happen(self) -> None:
        rng, rig = self._rng, self._rig
        if len(self._live) < 12 and rng.random() < 0.3:
            self._submit()
        if rng.random() < 0.3:
            rig.admit()
        if rig.running and rng.random() < 0.25:
            victims = rng.sample(rig.running, rng.randint(1, len(rig.running)))
            rig.preempt(victims)
            self.events["preempted"] += len(victims)
        if rng.random() < 0.15:
            rig.must_retract = True
        if rng.random() < 0.2:
            rng.shuffle(rig.waiting)
        if self._live and rng.random() < 0.03:
            req = rng.choice(list(self._live))
            del self._live[req]
            rig.abort(req)
            self.events["aborted"] += 1
        if rng.random() < 0.02:
            self._config = self._config.replace(kv=rng.choice(KV_CHOICES))
            rig.swaps.configure(self._config)
        if not rig.running and rng.random() < 0.05:
            rig.flush()
            self.events["flushed"] += 1

    def _submit(self) -> None:
        rng = self._rng
        start = rng.choice(self._beginnings) if rng.random() < 0.6 else []
        prompt = [*start, *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 25)))]
        num_output = rng.randint(1, 40)
        self._num_sent += 1
        req = self._rig.submit(f"call-{self._num_sent}", prompt, num_output)
        self._live[req] = _Sent(req, prompt, num_output)
