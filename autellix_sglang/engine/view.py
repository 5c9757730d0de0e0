"""The planner's questions, answered from SGLang's live scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.common import match_kv_cache

from autellix_sglang.core.planner import Demand
from autellix_sglang.core.program import Call
from autellix_sglang.engine.admission import prefix_under_way
from autellix_sglang.engine.swap import max_new_tokens, shared_rows
from autellix_sglang.engine.tracking import call_of

if TYPE_CHECKING:
    from autellix_sglang.engine.scheduler import ProgramScheduler


class SchedulerView:
    """`core.planner.EngineView` of one pass. Reads; reserves nothing.

    The token arithmetic follows SGLang's `PrefillAdder`, which has the last word: where it refuses
    a call that this view let in, the scheduler says so through `is_kv_blocked`.
    """

    def __init__(self, scheduler: ProgramScheduler, running_batch: Any) -> None:
        self._scheduler = scheduler
        self._batch = running_batch

    @property
    def free_slots(self) -> int:
        batch = self._batch
        slots: int = self._scheduler.get_num_allocatable_reqs(len(batch.reqs), running_batch=batch)
        return slots

    @property
    def free_kv_tokens(self) -> int:
        if self._scheduler.is_kv_blocked:
            return 0
        scheduler = self._scheduler
        cached = scheduler.tree_cache.evictable_size()
        available = scheduler.token_to_kv_pool_allocator.available_size()
        return int(available + cached - sum(self._reserved(req) for req in self._batch.reqs))

    @property
    def prefill_tokens(self) -> int:
        scheduler = self._scheduler
        if scheduler.chunked_req is not None:
            return 0  # the chunk in progress takes the whole pass
        limits = (scheduler.max_prefill_tokens, scheduler.chunked_prefill_size)
        return int(min(limit for limit in limits if limit is not None))

    @cached_property
    def _prompts_in_flight(self) -> list[Any]:
        return self._scheduler.prompts_in_flight()

    def preemptible(self) -> list[Call]:
        in_flight = self._scheduler.reqs_prefilling_in_flight()
        calls = [
            call_of(req)
            for req in self._batch.reqs
            # A call's last token may be on its way: it would come back for nothing else.
            if is_preemptible(req)
            and req not in in_flight
            and not req.next_output_finishes_by_length()
        ]
        return [call for call in calls if call is not None]

    def demand(self, call: Call, ahead: Sequence[Call]) -> Demand:
        scheduler, req = self._scheduler, call.handle
        req.refresh_fill_ids()
        match_kv_cache(req, scheduler.tree_cache)
        num_tokens = len(req.full_untruncated_fill_ids)
        before = [other.handle for other in ahead]
        awaited = prefix_under_way(scheduler, req, [*before, *self._prompts_in_flight])
        num_matched = max(awaited, req.num_matched_prefix_tokens)
        missing = max(1, num_tokens - num_matched)
        uncached = max(1, num_tokens - scheduler.swaps.cached_tokens(req, num_matched))
        num_locked = self._newly_locked(req, before)
        num_new = missing + max_new_tokens(req) + scheduler.page_size
        return Demand(num_new + num_locked, uncached)

    def _newly_locked(self, req: Any, before: Sequence[Any]) -> int:
        """Cached tokens of a waiting request that count as free, and will not once it runs."""
        tree = self._scheduler.tree_cache
        locks = [tree.lock(other.last_node) for other in before]
        num_free = tree.evictable_size()
        locks.append(tree.lock(req.last_node))
        num_left = tree.evictable_size()
        for lock in reversed(locks):
            tree.unlock(lock)
        return int(num_free - num_left)

    def holding(self, call: Call) -> int:
        req = call.handle
        num_shared = shared_rows(req, (other for other in self._batch.reqs if other is not req))
        return int(req.kv.kv_committed_len - num_shared + self._reserved(req))

    def resume_steps(self, call: Call) -> float:
        scheduler, req = self._scheduler, call.handle
        num_tokens = len(req.origin_input_ids) + len(req.output_ids)
        return float(scheduler.kv_loss.value * num_tokens * scheduler.prefill_weight)

    def _reserved(self, req: Any) -> int:
        """KV tokens that SGLang sets aside for what a running request may still generate."""
        is_fixed = req.sampling_params.ignore_eos  # no early end to count on
        ratio = 1.0 if is_fixed else self._scheduler.new_token_ratio_tracker.current
        return int(max_new_tokens(req) * ratio)


def is_preemptible(req: Any) -> bool:
    """Whether taking a running request off the batch cannot change its result.

    Excluded are requests whose sampling looks back at their output, which SGLang forgets, and
    whose per-token extras it rebuilds on resumption (log-probabilities, hidden states, routed
    experts, sampling masks), whose prompt is not its token ids (embeddings, images), whose KV
    belongs to a session, and beams. They are ordered, and run to their end.
    """
    return not (
        req.finished()
        or _looks_back(req)
        or req.to_finish is not None
        or not req.output_ids
        or req.return_logprob
        or req.return_hidden_states
        or req.return_routed_experts
        or req.return_indexer_topk
        or req.return_sampling_mask
        or req.input_embeds is not None
        or req.multimodal_inputs is not None
        or req.session is not None
        or req.beam_group is not None
    )


def _looks_back(req: Any) -> bool:
    """Whether the next token depends on earlier ones by more than the model.

    SGLang counts penalties, and output up to `min_new_tokens`, from the token after a resumption.
    """
    params = req.sampling_params
    return (
        params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.repetition_penalty != 1.0
        or params.min_new_tokens > 0
        or req.custom_logit_processor is not None
    )
