"""Which of the waiting calls SGLang admits in a pass, beside what its own budget says.

Calls that begin with the same tokens often arrive together: the samples of one prompt, the
children of a node in a tree search, the rollouts of a group. SGLang computes a prompt for each of
them that it admits before the first is in the radix tree. Here the others wait for that, a pass or
two, and then find it cached. Their place is kept: meanwhile nobody else gets the slots and the KV
that they will need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from autellix_sglang.core.planner import MAX_HELD
from autellix_sglang.engine.swap import common_prefix, kv_demand, may_share
from autellix_sglang.engine.tracking import tracked

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from autellix_sglang.engine.scheduler import ProgramScheduler


class ProgramPrefillAdder(PrefillAdder):  # type: ignore[misc]  # SGLang is untyped
    """SGLang's admission in one pass, for a `ProgramScheduler`.

    The KV of a swapped request is brought back into the tree just before SGLang looks at it.
    """

    def __init__(self, scheduler: ProgramScheduler, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_held = 0
        self._scheduler = scheduler
        self._prefilling = scheduler.reqs_prefilling_in_flight()
        self._held_tokens = 0  # KV that the held ones will ask for
        self._wait_tokens = _least_wait(scheduler)

    def add_one_req(self, req: Req, *args: Any, **kwargs: Any) -> AddReqResult:
        num_awaited = self._num_awaited(req)
        if num_awaited:
            self.num_held += 1
            self._held_tokens += kv_demand(req, num_awaited) + self.page_size
            tracked(req).was_held = True
            return AddReqResult.CONTINUE
        if self.num_held and not self._leaves_room(req):
            return AddReqResult.OTHER
        self._scheduler.swaps.restore(req, self)
        return super().add_one_req(req, *args, **kwargs)

    def _num_awaited(self, req: Req) -> int:
        """Leading tokens that will be cached once what runs now is, if that is worth waiting for.

        0 where it is not.
        """
        if not self._wait_tokens or self.num_held >= MAX_HELD or not may_share(req):
            return 0
        if self._scheduler.swaps.has_saved(req):
            return 0
        end = req.num_matched_prefix_tokens + self._wait_tokens
        tokens = req.full_untruncated_fill_ids
        if end >= len(tokens):  # the last token is computed in any case
            return 0
        for other in (*self.can_run_list, *self._prefilling):
            theirs = other.full_untruncated_fill_ids
            if (
                len(theirs) >= end
                and theirs[end - 1] == tokens[end - 1]
                and _is_same_tree(req, other)
                and common_prefix(tokens, theirs, end) == end
            ):
                return common_prefix(tokens, theirs, len(tokens) - 1)
        return 0

    def _leaves_room(self, req: Req) -> bool:
        """Whether the held ones would still fit if this one were admitted."""
        batch = self.running_batch
        num_slots = self._scheduler.get_num_allocatable_reqs(len(batch.reqs), running_batch=batch)
        num_tokens = kv_demand(req, req.num_matched_prefix_tokens) + self.page_size
        return bool(
            len(self.can_run_list) + self.num_held < num_slots
            and num_tokens + self._held_tokens < self.rem_total_tokens
        )


def _least_wait(scheduler: ProgramScheduler) -> int:
    """Tokens that are worth waiting for; 0 where prefixes are not found again."""
    tree, least = scheduler.tree_cache, scheduler.program_config.prefix_wait
    # SGLang stages a recurrent state for each request that it looks at.
    if not least or getattr(tree, "disable", False) or tree.supports_mamba():
        return 0
    return max(least, int(scheduler.page_size))


def _is_same_tree(req: Req, other: Req) -> bool:
    """Whether one finds the other's rows in the radix tree."""
    keys = (req.extra_key, req.cache_salt), (other.extra_key, other.cache_salt)
    return keys[0] == keys[1] and may_share(other)
