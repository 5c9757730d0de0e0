"""SGLang's scheduler, told about programs.

`ProgramScheduler` reports to the process table what SGLang does with its requests (queued, put in
a batch, worked on, taken off, over), orders the waiting queue by the plan and preempts calls in
mid-decode. Everything else is SGLang's. How a call lives:

    _add_request_to_queue --> waiting --> get_new_batch_prefill --> running --> process_batch_result
          ^                                                            |          | finished
          +---- preempted (this pass) or retracted (KV pool full) -----+          v
                                          send_abort_output ------------------> closed
"""

from __future__ import annotations

import dataclasses
import logging
import time
import zlib
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.utils import TypeBasedDispatcher

from autellix_sglang import __version__
from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.infer import HistoryIndex, Origin
from autellix_sglang.core.kv import LossShare
from autellix_sglang.core.planner import Planner
from autellix_sglang.core.policy import POLICIES, Levels
from autellix_sglang.core.program import Call, Phase, ProgramTable
from autellix_sglang.engine import control
from autellix_sglang.engine.admission import ProgramPrefillAdder
from autellix_sglang.engine.metrics import ProgramMetrics
from autellix_sglang.engine.swap import SwapManager
from autellix_sglang.engine.tracking import (
    attach,
    call_of,
    charge_outputs,
    charge_prefill,
    close_call,
    open_call,
    tracked,
)
from autellix_sglang.engine.view import SchedulerView, is_preemptible
from autellix_sglang.errors import ConfigError, UnsupportedModeError
from autellix_sglang.messages import ProgramControl, ProgramReply
from autellix_sglang.patches import retraction_order, retraction_swap

logger = logging.getLogger(__name__)
Own = TypeVar("Own")

DEFAULT_PREFILL_WEIGHT = 0.01  # until it is measured
_MAX_CALLS_CHECKED = 2000  # integrity is asserted when idle, if that is quick


class ProgramScheduler(Scheduler):  # type: ignore[misc]  # SGLang is untyped
    """`Scheduler` with program-aware order, preemption and victims."""

    def init_schedule_policy(self) -> None:
        if not self.is_generation:
            raise UnsupportedModeError(
                "--model-path", "the model pools or embeds (--program-policy off serves it)"
            )
        super().init_schedule_policy()
        self.program_table = ProgramTable(POLICIES["fcfs"], Levels(1, 1.0, 2.0), 0.0, 0.0)
        self.prefill_weight = DEFAULT_PREFILL_WEIGHT
        self.history_index: HistoryIndex | None = None
        self.swaps = SwapManager(self)
        self.configure(ProgramConfig.from_env())
        self.is_kv_blocked = False  # SGLang refused, for lack of KV, a call that the plan let in
        self.num_recomputed_tokens = 0
        self.num_prefix_waits = 0
        self.num_retractions = 0
        self.num_orphans = 0
        self._adder: ProgramPrefillAdder | None = None  # of the pass at hand
        self._num_checked_events = -1
        self._decisions = 0  # a digest of all that were made so far
        retraction_order.install()
        retraction_swap.install(self.swaps)

    def init_metrics_reporter(self) -> None:
        super().init_metrics_reporter()
        context = self.metrics_collector_context
        is_wanted = context.current_scheduler_metrics_enabled
        self.program_metrics = ProgramMetrics(context.collector.labels) if is_wanted else None

    def configure(self, config: ProgramConfig) -> None:
        """Take over settings, at start or while serving; live calls are placed anew.

        Raises `ConfigError`, on all ranks or on none, and then nothing has changed.
        """
        if not config.is_enabled:
            raise ConfigError("policy", "a running program scheduler cannot be switched to 'off'")
        self.swaps.configure(config, self.agree)
        self.program_config = config
        self.kv_loss = LossShare()
        levels = Levels(config.levels, config.quantum, config.factor)
        self.program_table.configure(POLICIES[config.policy], levels, config.beta, config.ttl)
        self.planner = Planner(self.program_table, config.min_run, config.schedule_interval)
        if config.prefill_weight:
            self.prefill_weight = config.prefill_weight
        if config.infer != (self.history_index is not None):
            self.history_index = HistoryIndex(self._is_open) if config.infer else None

    def _is_open(self, origin: Origin) -> bool:
        return self.program_table.is_open(origin.tenant, origin.program_id)

    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        own = TypeBasedDispatcher([(ProgramControl, self.handle_program_control)])
        self._request_dispatcher += own

    def get_init_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super().get_init_info()
        info["program_scheduler"] = {"version": __version__, "policy": self.program_config.policy}
        return info

    def get_internal_state(self, recv_req: Any) -> Any:
        output = super().get_internal_state(recv_req)
        output.internal_state["program_scheduler"] = control.totals(self)
        return output

    def get_prefill_adder_class(self) -> Any:
        return self._new_adder

    def _new_adder(self, *args: Any, **kwargs: Any) -> ProgramPrefillAdder:
        self._adder = ProgramPrefillAdder(self, *args, **kwargs)
        return self._adder

    def get_output_streamer_class(self) -> type[SchedulerOutputStreamer]:
        return _ProgramOutputStreamer

    def handle_program_control(self, request: ProgramControl) -> ProgramReply:
        return control.handle(self, request)

    # -- a call's life ---------------------------------------------------------------------------

    def _create_generation_req(self, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
        req = super()._create_generation_req(recv_req, *args, **kwargs)
        attach(req, recv_req.sampling_params.custom_params)
        return req

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        self.num_retractions += is_retracted  # by SGLang: the planner's victims come to `_queue`
        self._queue(req, is_retracted)

    def _queue(self, req: Any, is_retracted: bool) -> None:
        call = call_of(req)
        super()._add_request_to_queue(req, is_retracted=is_retracted)
        if not self.waiting_queue or self.waiting_queue[-1] is not req:
            return  # SGLang has refused it, and told the client
        if call is None:
            open_call(self.program_table, req, self.history_index)
        elif call.phase is Phase.RUNNING:
            self.program_table.preempt(call)

    def _abort_on_queued_limit(self, recv_req: Any) -> bool:
        if call_of(recv_req) is not None:
            return False  # a call that was admitted once is never turned away
        return bool(super()._abort_on_queued_limit(recv_req))

    def _poll_timeout_aborts(self) -> list[Any]:
        """SGLang's timeouts, less those that a preemption would cause.

        Rank 0 asks, and tells all others whom to abort.
        """
        return [abort for abort in super()._poll_timeout_aborts() if not self._is_excused(abort)]

    def _is_excused(self, abort: Any) -> bool:
        """Whether the call was preempted, and waits, or has not run so long as it seems."""
        call = self.program_table.live_call(abort.rid)
        if call is None or not call.num_preemptions:
            return False
        if call.phase is Phase.WAITING:
            return True
        started_s = call.handle.time_stats.forward_entry_time + tracked(call.handle).preempted_s
        return bool(time.perf_counter() - started_s < envs.SGLANG_REQ_RUNNING_TIMEOUT.get())

    def send_abort_output(self, abort_req: Any, req: Any) -> None:
        if call_of(req) is not None and is_preemptible(req):
            self._send_aborted(abort_req, req)
        else:
            super().send_abort_output(abort_req, req)
        self._close(req)

    def _send_aborted(self, abort_req: Any, req: Any) -> None:
        """End a preempted call as SGLang does one that it aborts as it runs: with all its tokens.

        Its own way with waiting requests is for those that have none.
        """
        reason = abort_req.finished_reason or {}
        given = (reason.get(key) for key in ("message", "status_code", "err_type"))
        req.to_finish = FINISH_ABORT(*given)
        req.update_finish_state()
        req.time_stats.set_completion_time()
        self.output_streamer.stream_output([req], req.return_logprob)

    def process_batch_result(self, batch: Any, result: Any) -> None:
        table = self.program_table
        prefill_steps = 0.0
        if batch.forward_mode.is_extend():
            prefill_steps = self._charge_prefill(batch)
        super().process_batch_result(batch, result)
        for req in batch.reqs:
            charge_outputs(table, req)
            if req.finished():
                self._close(req)
        decodes = batch.forward_mode.is_decode() or bool(batch.decoding_reqs)
        table.advance(prefill_steps + (1.0 if decodes else 0.0))
        if self.program_metrics is not None:
            self.program_metrics.update(self)

    def _charge_prefill(self, batch: Any) -> float:
        """Charge the prefilled tokens of a batch; returns their steps on the virtual clock."""
        decoding = set(batch.decoding_reqs or ())
        num_tokens = 0
        for req, prefix, extend in zip(
            batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True
        ):
            if req in decoding:
                continue  # one token of a mixed batch, charged as output
            num_tokens += extend
            self.num_recomputed_tokens += charge_prefill(
                self.program_table, req, prefix, extend, self.prefill_weight
            )
        return num_tokens * self.prefill_weight

    def _close(self, req: Any) -> None:
        self.swaps.forget(req)
        close_call(self.program_table, req, self.history_index)

    def flush_cache(self, empty_cache: bool = True) -> Any:
        success = super().flush_cache(empty_cache)
        if success:
            self.swaps.forget_all()
        return success

    # -- one pass --------------------------------------------------------------------------------

    def get_next_batch_to_run(self, *args: Any, **kwargs: Any) -> Any:
        self.swaps.settle()
        return super().get_next_batch_to_run(*args, **kwargs)

    def get_new_batch_prefill(self, running_batch: Any) -> Any:
        if len(self.waiting_queue) != len(self.program_table.queue):
            self._reconcile()
        plan = self.planner.plan(SchedulerView(self, running_batch))
        if plan.order is not None:
            self._order_waiting_queue([call.handle for call in plan.order])
        victims = [call.handle for call in plan.preempt]
        self._take_off(running_batch, victims)
        self._adder = None
        next_plan = super().get_new_batch_prefill(running_batch)
        if self._adder is not None and self._adder.num_held:
            next_plan.running_batch.batch_is_full = False  # they are due before anybody leaves
        for req in victims:
            # Only now: readmitted in the same pass, a victim would meet its own result in flight.
            self._queue(req, is_retracted=True)
        admitted = _with_prefix_lens(next_plan.batch_to_run)
        self._note_admission(next_plan, admitted)
        self._digest(victims, admitted)
        if not victims and next_plan.batch_to_run is None:
            self._prefetch(next_plan.running_batch)
        return next_plan

    def _order_waiting_queue(self, order: list[Any]) -> None:
        """Adopt an order, of exactly the requests that SGLang has waiting."""
        if set(order) != set(self.waiting_queue):
            self._reconcile()
            order = [call.handle for call in self.program_table.queue]
        self.waiting_queue[:] = order

    def _take_off(self, running_batch: Any, victims: list[Any]) -> None:
        """Remove victims from the batch; the swap manager decides about their KV."""
        if not victims:
            return
        leaving = set(victims)
        staying = [i for i, req in enumerate(running_batch.reqs) if req not in leaving]
        self.swaps.release(victims, [running_batch.reqs[i] for i in staying])
        running_batch.filter_batch(keep_indices=staying)
        running_batch.batch_is_full = False

    def _note_admission(self, next_plan: Any, admitted: list[tuple[Any, int]]) -> None:
        for req, num_cached in admitted:
            self.swaps.note_admission(req, num_cached)
            call = call_of(req)
            if call is not None and call.phase is Phase.WAITING:
                self.num_prefix_waits += tracked(req).waited_at is not None
                tracked(req).waited_at = None
                num_computed = tracked(req).num_computed_tokens
                if call.num_preemptions:
                    stats = req.time_stats
                    waited_s = stats.last_forward_entry_time - stats.wait_queue_entry_time
                    tracked(req).preempted_s += waited_s
                    self.kv_loss.note(max(0, num_computed - num_cached - 1), num_computed)
                self.program_table.start(call)
        self.is_kv_blocked = not admitted and self._is_refused_for_kv(next_plan.running_batch)
        if self.is_kv_blocked:
            self.planner.reconsider()

    def _prefetch(self, running_batch: Any) -> None:
        """Copy swapped KV of the call next in line back while the batch runs, if KV is to spare."""
        first = self.program_table.queue.first()
        if first is None or not self.swaps.can_prefetch(first.handle):
            return
        if any(req.beam_group is not None for req in running_batch.reqs):
            return  # SGLang may take rows beyond the usual for beams
        free_tokens = SchedulerView(self, running_batch).free_kv_tokens
        self.swaps.prefetch(first.handle, free_tokens, len(running_batch.reqs))

    def _digest(self, victims: list[Any], admitted: list[tuple[Any, int]]) -> None:
        """Take a pass's decisions into the digest; a difference in one shows in all later ones."""
        if not victims and not admitted:
            return
        reqs = [(req.rid, num_cached) for req, num_cached in admitted]
        taken = [req.rid for req in victims], reqs, dataclasses.astuple(self.swaps.counters)
        self._decisions = zlib.crc32(repr(taken).encode(), self._decisions)

    def rank_states(self) -> list[dict[str, int]]:
        """What each tensor-parallel rank decided and holds; entries differ if they do not agree.

        A collective: every rank has to call it, on the same message.
        """
        allocator = self.token_to_kv_pool_allocator
        own = {
            "decisions": self._decisions,
            "kv_free_tokens": allocator.available_size() + self.tree_cache.evictable_size(),
            "host_pool_used_bytes": self.swaps.totals()["host_pool_used_bytes"],
        }
        return self._of_all_ranks(own)

    def agree(self, error: ConfigError | None) -> None:
        """Raise on every rank the first error that any has met; a collective, as `rank_states`."""
        own = None if error is None else (error.field, error.reason)
        for found in self._of_all_ranks(own):
            if found is not None:
                raise ConfigError(*found)

    def _of_all_ranks(self, own: Own) -> list[Own]:
        found = [own] * self.tp_size
        if self.tp_size > 1:
            torch.distributed.all_gather_object(found, own, group=self.tp_cpu_group)
        return found

    def _is_refused_for_kv(self, running_batch: Any) -> bool:
        """Calls wait and slots are free, yet SGLang admitted none and calls the batch full."""
        return (
            bool(self.waiting_queue)
            and running_batch.batch_is_full
            and self.get_num_allocatable_reqs(len(running_batch.reqs), running_batch=running_batch)
            > 0
        )

    def prompts_in_flight(self) -> list[Any]:
        """Requests whose prompt is being computed, in order (overlap scheduling).

        Not those that a mixed batch decodes beside them.
        """
        found: list[Any] = []
        for batch in self._prefills_in_flight():
            decoding = set(batch.decoding_reqs or ())
            found += [req for req in batch.reqs if req not in decoding]
        return found

    def reqs_prefilling_in_flight(self) -> set[Any]:
        """Requests whose prefill result is not processed yet (overlap scheduling)."""
        return {req for batch in self._prefills_in_flight() for req in batch.reqs}

    def _prefills_in_flight(self) -> list[Any]:
        queue = getattr(self, "result_queue", ())
        return [batch for batch, _ in queue if batch.forward_mode.is_extend()]

    # -- safety net ------------------------------------------------------------------------------

    def on_idle(self) -> None:
        super().on_idle()
        if self.program_metrics is not None:
            self.program_metrics.update(self)
        table = self.program_table
        if self._num_checked_events != table.num_events and self.is_fully_idle():
            self._num_checked_events = table.num_events
            self._reconcile()
            is_small = table.num_programs <= _MAX_CALLS_CHECKED
            if is_small and table.num_calls_kept <= _MAX_CALLS_CHECKED:
                table.check_integrity()
            self.swaps.check_integrity(self.waiting_queue)

    def _reconcile(self) -> None:
        """Bring the table in line with SGLang's queues; they are the truth.

        Every path that moves a request is hooked, so a difference is a path that we do not know
        of: it is mended, counted and logged, and the engine goes on.
        """
        waiting = set(self.waiting_queue)
        held = self._held_requests()
        for call in self.program_table.live_calls():
            self._mend(call, call.handle in waiting, call.handle in held)
        for req in self.waiting_queue:
            if call_of(req) is None:
                open_call(self.program_table, req, self.history_index)

    def _held_requests(self) -> set[Any]:
        held: set[Any] = set(self.collect_inflight_reqs())
        held.update(self.grammar_manager.grammar_queue)
        if self.chunked_req is not None:
            held.add(self.chunked_req)
        return held

    def _mend(self, call: Call, is_waiting: bool, is_held: bool) -> None:
        table = self.program_table
        if is_waiting and call.phase is Phase.RUNNING:
            table.preempt(call)
        elif not is_waiting and is_held and call.phase is Phase.WAITING:
            table.start(call)
        elif not is_waiting and not is_held:
            self.num_orphans += 1
            logger.warning("call %s left the engine unseen; closed", call.rid)
            self.swaps.forget(call.handle)
            table.finish(call)


def _with_prefix_lens(batch: Any) -> list[tuple[Any, int]]:
    """The requests of a prefill batch, or of none, each with the tokens that were cached."""
    return [] if batch is None else list(zip(batch.reqs, batch.prefix_lens, strict=True))


class _ProgramOutputStreamer(SchedulerOutputStreamer):  # type: ignore[misc]
    """Adds a finished call's summary to its output, as `meta_info["program"]`."""

    has_additional_customized_info = True

    def build_additional_customized_info(self, reqs: Iterable[Any]) -> dict[str, list[Any]]:
        if not any(req.finished() for req in reqs):
            return {}  # most steps: nothing to pickle and send
        return {"program": [[_summary(req)] if req.finished() else [] for req in reqs]}

    def is_request_level_customized_info_key(self, key: str) -> bool:
        return key == "program"


def _summary(req: Any) -> dict[str, Any]:
    """What a client is told; tokens of the step at hand are not charged yet."""
    entry = tracked(req)
    if entry.call is None:
        return {}
    num_uncharged = len(req.output_ids) - entry.num_charged_outputs
    summary = entry.call.summary()
    summary["state"] = Phase.FINISHED.value
    summary["service_steps"] += num_uncharged
    summary["program_id"] = entry.call.program.program_id
    return summary
