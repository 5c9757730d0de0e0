"""SGLang's tokenizer manager, which tags every call and talks to the program scheduler.

It lives in the HTTP process. Per request: `_init_req_state` settles the ids, once for all of a
batch's prompts and samples; `_create_tokenized_object` attaches the tag; `update_request_meta_info`
takes the scheduler's summary of a finished call. Beside that: control messages, the ticks by which
the scheduler forgets idle programs, and the calibration of `prefill_weight`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
import uuid
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from sglang.srt.managers.io_struct import GenerateReqInput, hook_custom_types
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.utils import TypeBasedDispatcher

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.kv import AUTO, break_even
from autellix_sglang.engine.calibration import Calibration, measure
from autellix_sglang.engine.http import RequestContext, current_request
from autellix_sglang.errors import ControlError, IdentityError
from autellix_sglang.identity import WIRE_KEY, BodyIdentity, CallTag, HeaderIdentity
from autellix_sglang.messages import (
    CALIBRATE,
    CONFIGURE,
    MESSAGES,
    OPEN,
    STATS,
    TICK,
    ProgramControl,
    ProgramReply,
)

logger = logging.getLogger(__name__)

CONTROL_TIMEOUT_S: Final = 10.0
CONFIGURE_TIMEOUT_S: Final = 120.0  # a host pool may have to be pinned, and the kernel compiled
CALIBRATION_TIMEOUT_S: Final = 60.0
OUTCOME_KEY: Final = "program"  # in meta_info


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a call came from: its HTTP request, if any, and the id of the request it is part of."""

    context: RequestContext | None
    request_id: str

    def tag(self, obj: Any, params: Any) -> CallTag:
        """The tag of one prompt of `obj` by its sampling parameters; raises `IdentityError`."""
        header = HeaderIdentity() if self.context is None else self.context.identity
        custom_params = params.get("custom_params") if isinstance(params, dict) else None
        body = BodyIdentity.from_body(custom_params, obj.session_id)
        return CallTag.resolve(header, body, self.request_id, time.monotonic())


class ProgramTokenizerManager(TokenizerManager):  # type: ignore[misc]  # SGLang is untyped
    """`TokenizerManager` with program ids on every call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.program_config = ProgramConfig.from_env()
        self._replies: deque[asyncio.Future[ProgramReply]] = deque()
        self._num_activities = 0
        self._ttl_s = self.program_config.ttl  # as the last tick found it
        self._ticker: asyncio.Task[None] | None = None
        self._has_changed = asyncio.Event()  # settings have, and perhaps the TTL
        self._calibration: concurrent.futures.Future[None] | None = None
        super().__init__(*args, **kwargs)

    # -- tags ------------------------------------------------------------------------------------

    def _init_req_state(self, obj: Any, request: Any = None) -> None:
        origin = _origin_of(obj)
        super()._init_req_state(obj, request)
        for rid in _rids(obj):
            self.rid_to_state[rid].program_origin = origin

    def _create_tokenized_object(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        tokenized = super()._create_tokenized_object(obj, *args, **kwargs)
        if isinstance(obj, GenerateReqInput):
            if tokenized.input_embeds is None and tokenized.mm_inputs is None:
                check_prompt(tokenized.input_ids, self.model_config.vocab_size)
            tag = self.rid_to_state[obj.rid].program_origin.tag(obj, obj.sampling_params)
            params = tokenized.sampling_params
            params.custom_params = {**(params.custom_params or {}), WIRE_KEY: tag.to_wire()}
            self._note_activity()
        return tokenized

    def update_request_meta_info(
        self, meta_info: dict[str, Any], state: Any, customized_info: dict[str, Any],
        index: int, finish_reason: Any,
    ) -> None:  # fmt: skip
        others = {key: values for key, values in customized_info.items() if key != OUTCOME_KEY}
        super().update_request_meta_info(meta_info, state, others, index, finish_reason)
        outcomes = customized_info.get(OUTCOME_KEY)
        if outcomes is not None and outcomes[index] and outcomes[index][-1]:
            meta_info[OUTCOME_KEY] = outcome = outcomes[index][-1]
            if state.program_origin.context is not None:
                state.program_origin.context.outcomes.append(outcome)

    # -- control messages ------------------------------------------------------------------------

    def init_communicators(self) -> None:
        super().init_communicators()
        hook_custom_types(*MESSAGES)
        self._result_dispatcher += TypeBasedDispatcher([(ProgramReply, self._take_reply)])

    async def program_control(
        self, control: ProgramControl, timeout_s: float | None = None
    ) -> ProgramReply:
        """Ask the scheduler; raises `ControlError` when it does not answer in time.

        The scheduler answers each message once and in order, so the oldest question owns the next
        reply. A question that timed out stays in line for its reply: with SGLang's own
        `FanOutCommunicator`, a late reply would be handed to whoever asks next.
        """
        self.auto_create_handle_loop()
        if timeout_s is None:
            timeout_s = CONFIGURE_TIMEOUT_S if control.op == CONFIGURE else CONTROL_TIMEOUT_S
        if control.op == OPEN:
            self._note_activity()
        reply: asyncio.Future[ProgramReply] = asyncio.get_running_loop().create_future()
        self._dispatch_to_scheduler(control)
        self._replies.append(reply)
        if control.op == CONFIGURE:
            reply.add_done_callback(lambda _: self._has_changed.set())
        try:
            return await asyncio.wait_for(reply, timeout_s)
        except TimeoutError:
            raise ControlError(
                f"the scheduler did not answer {control.op!r} within {timeout_s:g} s"
            ) from None

    def _take_reply(self, reply: ProgramReply) -> None:
        waiter = self._replies.popleft()
        if not waiter.done():
            waiter.set_result(reply)

    # -- ticks -----------------------------------------------------------------------------------

    def _note_activity(self) -> None:
        """There may be a program to forget later on: tick until there is none."""
        self._num_activities += 1
        if self._ticker is None or self._ticker.done():
            self._ticker = asyncio.get_running_loop().create_task(self._tick_until_empty())
            self.asyncio_tasks.add(self._ticker)
            self._ticker.add_done_callback(self.asyncio_tasks.discard)

    async def _tick_until_empty(self) -> None:
        """Every eighth of the TTL, and when settings have changed."""
        num_programs, num_seen = 1, -1
        while num_programs > 0 or num_seen != self._num_activities:
            num_seen = self._num_activities
            with suppress(TimeoutError):
                await asyncio.wait_for(self._has_changed.wait(), max(0.25, self._ttl_s / 8))
            self._has_changed.clear()
            try:
                reply = await self.program_control(ProgramControl(op=TICK, now_s=time.monotonic()))
                num_programs, self._ttl_s = reply.body["programs"], reply.body["ttl_s"]
            except ControlError as error:
                logger.debug("tick: %s", error)

    # -- calibration -----------------------------------------------------------------------------

    def calibrate_once_from_thread(self) -> None:
        """Run `calibrate` on the event loop and wait for it, unless that was done before."""
        if self._calibration is None:
            assert self.event_loop is not None
            self._calibration = asyncio.run_coroutine_threadsafe(self.calibrate(), self.event_loop)
            deadline_s = time.monotonic() + CALIBRATION_TIMEOUT_S
            while not (self._calibration.done() or self.gracefully_exit):
                if time.monotonic() > deadline_s:
                    logger.warning("prefill_weight is still being measured; serving meanwhile")
                    return
                time.sleep(0.05)

    async def calibrate(self) -> None:
        """Measure on the live engine what the user left open, and tell the scheduler. Never raises.

        That is `prefill_weight`, and with `--program-kv auto` the break-even length. Meant for the
        time before the server is ready; it stops at the first sign of other traffic, whose work it
        would measure instead.
        """
        config = self.program_config
        is_link_wanted = config.kv == AUTO and not config.kv_break_even
        if config.prefill_weight > 0 and not is_link_wanted:
            return
        try:
            found = await measure(self)
            if found is not None:
                weight = None if config.prefill_weight > 0 else found.prefill_weight
                tokens = await self._break_even(found) if is_link_wanted else None
                await self.program_control(
                    ProgramControl(
                        op=CALIBRATE,
                        now_s=time.monotonic(),
                        prefill_weight=weight,
                        kv_break_even=tokens,
                    )
                )
        except Exception as error:  # best effort, and whatever it is, serving must go on
            logger.warning("prefill_weight: %s: %s", type(error).__name__, error)
            found = None
        if found is None:
            logger.warning("prefill_weight could not be measured; the default stays")
        else:
            logger.info(
                "prefill_weight = %.5f (prefill %.4f ms per token, decode %.3f ms per step)",
                found.prefill_weight, found.prefill_token_s * 1e3, found.decode_step_s * 1e3,
            )  # fmt: skip

    async def _break_even(self, found: Calibration) -> int | None:
        """Tokens from which swapping pays, by rank 0's copies; None: never, or nothing to swap."""
        reply = await self.program_control(ProgramControl(op=STATS, now_s=time.monotonic()))
        token_s, fixed_s = reply.body["swap_token_s"], reply.body["swap_fixed_s"]
        if token_s is None or fixed_s is None:
            return None
        tokens = break_even(found.prefill_token_s, token_s, fixed_s)
        logger.info(
            "swapping KV takes %.5f ms per token and %.3f ms per call; it pays from %s tokens",
            token_s * 1e3, fixed_s * 1e3, tokens,
        )  # fmt: skip
        return tokens


def check_prompt(input_ids: array[int] | None, vocab_size: int) -> None:
    """Raise `ValueError`, which is an HTTP 400, for token ids that end SGLang's scheduler process.

    `input_ids` is int64 [num_tokens]; None, of a prompt by other means, is not for us to judge.
    """
    if input_ids is None:
        return
    tokens = np.frombuffer(input_ids, dtype=np.int64)
    if not len(tokens):
        raise ValueError("the prompt has no tokens; it must have at least one")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"input_ids: {wrong} is not a token; allowed are 0 to {vocab_size - 1}")


def _origin_of(obj: Any) -> _Origin:
    """The origin of a normalised request; raises `IdentityError` for any bad id in it."""
    context = current_request()
    origin = _Origin(context, next(_rids(obj), uuid.uuid4().hex))
    if isinstance(obj, GenerateReqInput):
        try:
            tags = [origin.tag(obj, params) for params in _distinct_params(obj)]
        except IdentityError as error:
            if context is not None:
                context.reject(error)
            raise
        if context is not None and tags:
            context.settle(tags[0])
    return origin


def _rids(obj: Any) -> Iterator[str]:
    return iter([obj.rid] if getattr(obj, "is_single", True) else obj.rid)


def _distinct_params(obj: Any) -> list[Any]:
    """The sampling parameters of each prompt, those that prompts share once."""
    if isinstance(obj.sampling_params, list):
        return list({id(params): params for params in obj.sampling_params}.values())
    return [obj.sampling_params]
