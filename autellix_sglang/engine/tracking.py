"""What the scheduler process remembers on each SGLang request, and how work becomes service."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_MATCHED_TOKEN

from autellix_sglang.core.infer import History, HistoryIndex, Origin
from autellix_sglang.core.program import Call, Phase, ProgramTable
from autellix_sglang.core.sizes import ladder_of
from autellix_sglang.identity import WIRE_KEY, CallTag

_ATTRIBUTE = "autellix_tracked"


@dataclass(slots=True)
class Tracked:
    """The scheduling side of one `Req`; `call` is None until it is queued the first time."""

    tag: CallTag
    call: Call | None = None
    num_charged_outputs: int = 0
    num_computed_tokens: int = 0  # longest prefix whose computation was charged
    preempted_s: float = 0.0  # off the batch, by this rank's clock: for rank 0's timeouts only
    waited_at: int | None = None  # tokens cached when it last waited for more of its prefix
    history: History | None = None  # of the prompt, where calls are joined by their tokens


def attach(req: Any, custom_params: dict[str, Any] | None) -> None:
    """Remember the tag that the HTTP process sent with a request.

    A request that did not come through it (SGLang's own health checks, an `Engine` in process)
    has none, or a client's own idea of one: it is a program of its own.
    """
    try:
        tag = CallTag.from_wire((custom_params or {})[WIRE_KEY])
    except (KeyError, TypeError, AttributeError):
        tag = CallTag.anonymous_call(req.rid)
    setattr(req, _ATTRIBUTE, Tracked(tag))


def tracked(req: Any) -> Tracked:
    if not hasattr(req, _ATTRIBUTE):
        attach(req, None)  # SGLang has made it by another way than `_create_generation_req`
    found: Tracked = getattr(req, _ATTRIBUTE)
    return found


def call_of(req: Any) -> Call | None:
    """The live call of a request, or None (never queued, or over)."""
    call = tracked(req).call
    return None if call is None or call.phase is Phase.FINISHED else call


def open_call(table: ProgramTable, req: Any, index: HistoryIndex | None = None) -> Call:
    """Enter a request that SGLang has queued for the first time.

    With an `index` a call that names no program may find one there.
    """
    entry = tracked(req)
    tag = entry.tag
    if index is not None:
        entry.history = History(tag.tenant, req.origin_input_ids)
        if tag.anonymous and entry.history.heads:
            tag = _inferred(tag, index.find(entry.history, req.origin_input_ids))
    table.now_s = max(table.now_s, tag.now_s)
    entry.call = table.open_call(
        req.rid,
        tenant=tag.tenant,
        program_id=tag.program_id,
        is_anonymous=tag.anonymous,
        call_id=tag.call_id,
        thread_id=tag.thread_id,
        parent_call_ids=tag.parent_call_ids,
        ends_program=tag.ends_program,
        kinds=ladder_of(tag.tenant, tag.agent_name, req.origin_input_ids),
        handle=req,
        is_warm_up=_is_warm_up(req.sampling_params),
    )
    return entry.call


def _is_warm_up(params: Any) -> bool:
    """Whether it only puts a prompt into the cache, before SGLang sends `n` samples of it."""
    return bool(params.n > 1 and params.max_new_tokens == 0)


def _inferred(tag: CallTag, origin: Origin | None) -> CallTag:
    """The tag of a call that names no program, once the call that it continues was looked for."""
    if origin is None:
        return replace(tag, anonymous=False)  # the first of a program that later calls may join
    parents = (origin.call_id,) if tag.parent_call_ids is None else tag.parent_call_ids
    program_id = origin.program_id
    return replace(tag, program_id=program_id, anonymous=False, parent_call_ids=parents)


def close_call(table: ProgramTable, req: Any, index: HistoryIndex | None = None) -> None:
    """A request is over, by whatever end; its tokens go into the `index`, if there is one."""
    call = call_of(req)
    if call is None:
        return
    history = tracked(req).history
    output_ids = req.output_ids
    if isinstance(req.finished_reason, FINISH_MATCHED_TOKEN):
        output_ids = output_ids[:-1]  # chat templates may write another token, or none
    if index is not None and history is not None and output_ids:
        history.extend(output_ids)
        tenant, program_id = call.program.key
        index.add(history, Origin(tenant, program_id, call.call_id))
    table.finish(call)


def charge_outputs(table: ProgramTable, req: Any) -> None:
    """Charge the tokens generated since the last time: one step each. Safe to repeat."""
    entry = tracked(req)
    num_new = len(req.output_ids) - entry.num_charged_outputs
    if num_new > 0 and entry.call is not None and entry.call.phase is Phase.RUNNING:
        entry.num_charged_outputs += num_new
        entry.num_computed_tokens = len(req.origin_input_ids) + len(req.output_ids)
        table.charge(entry.call, float(num_new))


def charge_prefill(
    table: ProgramTable, req: Any, prefix_len: int, extend_len: int, weight: float
) -> int:
    """Charge prefilled tokens; returns how many of them had been computed before.

    Tokens that are computed again after a preemption are our doing: they are counted for
    operators, and not held against the program.
    """
    entry = tracked(req)
    end = prefix_len + extend_len
    num_again = max(0, min(end, entry.num_computed_tokens) - prefix_len)
    num_new = extend_len - num_again
    entry.num_computed_tokens = max(end, entry.num_computed_tokens)
    if entry.call is not None and entry.call.phase is Phase.RUNNING and num_new > 0:
        table.charge(entry.call, num_new * weight)
    return num_again
