"""Which of the waiting calls SGLang admits in a pass, beside what its own budget says.

Calls that begin with the same tokens often arrive together: the samples of one prompt, the
children of a node in a tree search, the rollouts of a group. SGLang computes a prompt for each of
them that it admits before the first is in the radix tree. Here the others wait for that, a pass or
two, and then find it cached. Their place is kept: meanwhile nobody else gets the slots and the KV
that they will need.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from autellix_sglang.engine.swap import common_prefix, kv_demand, may_share
from autellix_sglang.engine.tracking import tracked

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from autellix_sglang.engine.scheduler import ProgramScheduler

MAX_HELD: Final = 64  # calls that wait in a pass: each is matched with the tree anew


class ProgramPrefillAdder(PrefillAdder):  # type: ignore[misc]  # SGLang is untyped
    """SGLang's admission in one pass, for a `ProgramScheduler`.

    The KV of a swapped request is brought back into the tree just before SGLang looks at it.
    """

    def __init__(self, scheduler: ProgramScheduler, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_held = 0
        self._scheduler = scheduler
        self._in_flight = scheduler.prompts_in_flight()
        self._held_tokens = 0  # KV that the held ones will ask for

    def add_one_req(self, req: Req, *args: Any, **kwargs: Any) -> AddReqResult:
        awaited = prefix_under_way(self._scheduler, req, (*self.can_run_list, *self._in_flight))
        if awaited and not self._was_in_vain(req):
            if self.num_held >= MAX_HELD:
                return AddReqResult.OTHER
            self.num_held += 1
            self._held_tokens += kv_demand(req, awaited) + self.page_size
            tracked(req).waited_at = req.num_matched_prefix_tokens
            return AddReqResult.CONTINUE
        if self.num_held and not self._leaves_room(req):
            return AddReqResult.OTHER
        self._scheduler.swaps.restore(req, self)
        return super().add_one_req(req, *args, **kwargs)

    def _was_in_vain(self, req: Req) -> bool:
        """Whether it waited before, nobody computes on what it waited for, and it has no more.

        SGLang may leave a prefix out of the tree, or find less of it than is there.
        """
        waited_at = tracked(req).waited_at
        if waited_at is None or req.num_matched_prefix_tokens > waited_at:
            return False
        return not prefix_under_way(self._scheduler, req, self._in_flight)

    def _leaves_room(self, req: Req) -> bool:
        """Whether the held ones would still fit if this one were admitted."""
        batch = self.running_batch
        num_slots = self._scheduler.get_num_allocatable_reqs(
            len(batch.reqs),
            running_batch=batch,
            num_held_rows=sum(r.kv.holds_kv for r in self.can_run_list),
        )
        if len(self.can_run_list) + self.num_held >= num_slots:
            return False
        num_tokens = kv_demand(req, req.num_matched_prefix_tokens) + self.page_size
        with self._lock_node(req.last_node):  # what it has cached is not to be evicted then
            return bool(num_tokens + self._held_tokens < self.rem_total_tokens)


def prefix_under_way(scheduler: ProgramScheduler, req: Req, others: Iterable[Req]) -> int:
    """Leading tokens of a waiting request that `others`, once computed, bring into the tree.

    0 where that is not worth waiting for: fewer than `--program-prefix-wait` tokens more than what
    is there, which the request was matched with just now; or where they would not be found.
    """
    tree, least = scheduler.tree_cache, scheduler.program_config.prefix_wait
    # Of models with a recurrent state SGLang stages one for each request that it looks at.
    if not least or getattr(tree, "disable", False) or tree.supports_mamba():
        return 0
    if not may_share(req) or scheduler.swaps.has_saved(req):
        return 0
    tokens, start = req.full_untruncated_fill_ids, req.num_matched_prefix_tokens
    page = scheduler.page_size
    end, limit = start + max(least, page), req._compute_max_prefix_len(len(tokens))
    if end > limit:
        return 0
    wanted = tokens[start:end]
    longest = 0
    for other in others:
        theirs = other.full_untruncated_fill_ids
        if (
            theirs[start:end] == wanted
            and (other.extra_key, other.cache_salt) == (req.extra_key, req.cache_salt)
            and may_share(other)
        ):
            longest = max(longest, common_prefix(tokens, theirs, limit))
    return longest // page * page if longest >= end else 0
