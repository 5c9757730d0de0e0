"""Lets the swap manager decide about the KV of a call that is retracted for lack of memory.

SGLang frees it, and its only other way, a copy to host memory, belongs to disaggregated decoding.
There is no hook, so the method that releases a retracted request is replaced. See the ledger in
README.md.
"""

from __future__ import annotations

from typing import Any, Protocol

from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.mem_cache.common import evict_from_tree_cache

from autellix_sglang.engine.tracking import call_of
from autellix_sglang.engine.view import is_preemptible

_stock = ScheduleBatch.release_req


class Releaser(Protocol):
    """The part of `engine.swap.SwapManager` that this patch calls."""

    def settle(self) -> None:
        """Let the next batch wait for the copies that none has waited for yet."""

    def retract(self, victim: Any, staying: list[Any]) -> None:
        """Take a running request's KV off the device, for lack of memory."""


def install(releaser: Releaser) -> None:
    """Replace the release in this process; a repeated call replaces the releaser."""

    def release_req(batch: Any, idx: int, remaing_req_count: int, offload_kv: bool = True) -> bool:
        req = batch.reqs[idx]
        releaser.settle()  # what is evicted below, by us or by SGLang, may be on its way back in
        if not offload_kv or call_of(req) is None or not is_preemptible(req):
            is_resumable: bool = _stock(batch, idx, remaing_req_count, offload_kv)
            return is_resumable
        staying = [other for other in batch.reqs if other is not req and other.kv.holds_kv]
        releaser.retract(req, staying)
        # As the stock release does: what has become evictable is wanted at once.
        num_tokens = remaing_req_count * envs.SGLANG_RETRACT_DECODE_STEPS.get()
        evict_from_tree_cache(batch.tree_cache, num_tokens)
        return True

    ScheduleBatch.release_req = release_req
