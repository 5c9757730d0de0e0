"""SGLang is as we found it: each hook's signature and behaviour, so an upgrade fails here first.

The ledger of what we reach for beyond SGLang's public extension points is patches/README.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints import engine, http_server
from sglang.srt.managers import io_struct
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import PrefillAdder, SchedulePolicy
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.batch_result_processor import (
    SchedulerBatchResultProcessor,
)
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.mem_cache.common import (
    evict_from_tree_cache,
    match_kv_cache,
    release_kv_cache,
)
from sglang.srt.mem_cache.prefill_budget import PrefillBudget
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.sampling import penaltylib
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.utils import TypeBasedDispatcher

from autellix_sglang.engine.support import SGLANG_VERSION, check_version
from autellix_sglang.errors import ActivationError

ROOT = Path(__file__).parents[2]
SIGNATURES: list[tuple[Callable[..., Any], str]] = [
    (Scheduler.init_schedule_policy, "(self)"),
    (Scheduler.init_request_dispatcher, "(self)"),
    (Scheduler.get_init_info, "(self)"),
    (Scheduler.get_internal_state, "(self, recv_req)"),
    (Scheduler.get_output_streamer_class, "(self)"),
    (Scheduler._create_generation_req, "(self, recv_req, *args, **kwargs)"),
    (Scheduler._add_request_to_queue, "(self, req, is_retracted)"),
    (Scheduler._abort_on_queued_limit, "(self, recv_req)"),
    (Scheduler._poll_timeout_aborts, "(self)"),
    (Scheduler.send_abort_output, "(self, abort_req, req)"),
    (Scheduler.process_batch_result, "(self, batch, result)"),
    (Scheduler.get_new_batch_prefill, "(self, running_batch)"),
    (Scheduler.on_idle, "(self)"),
    (Scheduler.get_prefill_adder_class, "(self)"),
    (Scheduler.flush_cache, "(self, empty_cache)"),
    (PrefillAdder.add_one_req, "(self, req, has_chunked_req, truncation_align_size)"),
    (Req.init_next_round_input, "(self, tree_cache, cow_mamba)"),
    (Req.owned_kv_len, "(self)"),
    (Req.refresh_fill_ids, "(self)"),
    (evict_from_tree_cache, "(tree_cache, num_tokens)"),
    (Scheduler.is_fully_idle, "(self, for_health_check, ignore_waiting)"),
    (Scheduler.collect_inflight_reqs, "(self)"),
    (
        Scheduler.get_num_allocatable_reqs,
        "(self, running_bs, beam_width, running_batch, num_held_rows)",
    ),
    (release_kv_cache, "(req, tree_cache, checkpoint)"),
    (match_kv_cache, "(req, tree_cache, token_ids, cow_mamba, max_prefix_len)"),
    (Req.reset_for_retract, "(self)"),
    (ScheduleBatch.filter_batch, "(self, reqs_to_exclude, keep_indices)"),
    (ScheduleBatch.__dict__["_get_decode_retraction_order"].__func__, "(reqs)"),
    (SchedulerOutputStreamer.build_additional_customized_info, "(self, reqs)"),
    (SchedulerOutputStreamer.is_request_level_customized_info_key, "(self, key)"),
    (TokenizerManager._init_req_state, "(self, obj, request)"),
    (
        TokenizerManager._create_tokenized_object,
        "(self, obj, input_text, input_ids, input_embeds, mm_inputs, token_type_ids)",
    ),
    (
        TokenizerManager.update_request_meta_info,
        "(self, meta_info, state, customized_info, index, finish_reason)",
    ),
    (TokenizerManager.init_communicators, "(self)"),
    (TokenizerManager.auto_create_handle_loop, "(self)"),
    (io_struct.hook_custom_types, "(*new_types)"),
    (HookRegistry.register, "(target, hook, hook_type, source)"),
    (HookRegistry.apply_hooks, "()"),
    (
        engine.Engine._launch_subprocesses,
        "(server_args, init_tokenizer_manager_func, run_scheduler_process_func, "
        "run_detokenizer_process_func, port_args, placement_group)",
    ),
    (
        http_server._setup_and_run_http_server,
        "(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, "
        "subprocess_watchdog, execute_warmup_func, launch_callback)",
    ),
]


def _shape(function: Callable[..., Any]) -> str:
    """Parameter names, with stars and without defaults or annotations."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    return "(" + ", ".join(stars.get(p.kind, "") + p.name for p in parameters) + ")"


def test_sglang_is_the_version_we_verified() -> None:
    """The pin of pyproject.toml is what is installed."""
    assert metadata.version("sglang") == SGLANG_VERSION
    assert f'"sglang=={SGLANG_VERSION}"' in (ROOT / "pyproject.toml").read_text()
    assert f"sglang=={SGLANG_VERSION} " in (ROOT / "scripts/setup.sh").read_text()


def test_another_version_is_refused_before_a_model_is_loaded() -> None:
    """The error names both versions and what to do; a local build of the same one is taken."""
    check_version(SGLANG_VERSION + "+cpu")
    with pytest.raises(ActivationError, match=rf"0\.6\.0 is installed.*{SGLANG_VERSION}"):
        check_version("0.6.0")


@pytest.mark.parametrize(
    ("function", "shape"), SIGNATURES, ids=[function.__qualname__ for function, _ in SIGNATURES]
)
def test_a_hook_has_the_signature_we_rely_on(function: Callable[..., Any], shape: str) -> None:
    """Each function that we override, replace or call takes the parameters we found."""
    assert _shape(function) == shape


def test_fcfs_leaves_our_order_alone() -> None:
    """With SGLang's default policy the waiting queue stays as the plan sorted it."""
    cache = SimpleNamespace(
        supports_fast_match_prefix=lambda: True, supports_prefix_sharing=lambda: False, disable=True
    )
    policy = SchedulePolicy("fcfs", cache, False, False, False)
    policy.tree_cache.supports_fast_match_prefix = lambda: False
    policy._touch_waiting_prefixes = lambda *_: None
    queue = [SimpleNamespace(rid=str(i)) for i in (3, 1, 2)]
    policy.calc_priority(queue, None, processed_tokens=0)
    assert [req.rid for req in queue] == ["3", "1", "2"]


def test_a_result_in_flight_is_dropped_for_a_request_that_was_taken_off() -> None:
    """Overlap scheduling ignores the pending token of a preempted request; we recompute it."""
    decode = inspect.getsource(SchedulerBatchResultProcessor.process_batch_result_decode)
    prefill = inspect.getsource(SchedulerBatchResultProcessor.process_batch_result_prefill)
    assert "req.finished() or req.is_retracted" in decode
    assert "and not req.is_retracted" in prefill


def test_a_readmitted_request_counts_as_running_again_at_once() -> None:
    """`is_retracted` ends in prepare_for_extend: hence victims are queued after the pass."""
    assert "req.is_retracted = False" in inspect.getsource(ScheduleBatch.prepare_for_extend)


def test_no_sampling_looks_back_that_we_do_not_know_of() -> None:
    """`is_preemptible` names what each of SGLang's penalizers reads of a request's parameters."""
    penalizers = {name for name in vars(penaltylib) if name.endswith("Penalizer")}
    assert penalizers == {
        f"Batched{kind}Penalizer"
        for kind in ("Frequency", "Presence", "Repetition", "MinNewTokens")
    }
    source = inspect.getsource(SamplingBatchInfo.from_schedule_batch)
    assert source.count("penaltylib.Batched") == len(penalizers) + 1  # and their orchestrator


def test_timeouts_are_polled_by_one_rank_and_told_to_all() -> None:
    """So a rank's clock may decide there; and by which times SGLang judges."""
    ingest = inspect.getsource(Scheduler.ingest_requests)
    poll = ingest.index("local_reqs = self._poll_timeout_aborts()")
    assert "attn_tp_rank == 0" in ingest[:poll]
    assert "recv_requests(local_reqs=local_reqs)" in ingest[poll:]
    stats = SchedulerReqTimeStats()
    for ts, happens in enumerate(
        [stats.set_wait_queue_entry_time, stats.set_forward_entry_time] * 2, start=1
    ):
        happens(float(ts))
    assert (stats.forward_entry_time, stats.wait_queue_entry_time) == (2.0, 3.0)
    assert stats.last_forward_entry_time == 4.0  # resumed


def test_admission_asks_for_the_tokens_we_count() -> None:
    """A swapped call is restored right before SGLang admits it, by SGLang's own arithmetic."""
    loop = inspect.getsource(Scheduler._get_new_batch_prefill_raw)
    assert "adder = self.get_prefill_adder_class()(" in loop
    assert loop.index("req.init_next_round_input(self.tree_cache)") < loop.index("add_one_req(")
    # A call that we pass over goes the way of one that was admitted: on to the next.
    assert "if res != AddReqResult.CONTINUE:" in loop
    assert "if x not in can_run_set" in loop
    assert "match_kv_cache(" in inspect.getsource(Req.init_next_round_input)
    assert "req.num_matched_prefix_tokens = " in inspect.getsource(match_kv_cache)
    assert isinstance(PrefillAdder.rem_total_tokens, property)
    source = inspect.getsource(PrefillAdder.add_one_req)
    assert "cand_extend_input_len + max_new + self.per_req_token_overhead" in source
    budget = inspect.getsource(PrefillBudget.check_prefill)
    assert "if total_tokens < self.remaining_total" in budget
    assert "available_size() + evictable" in inspect.getsource(PrefillBudget)


def test_samples_are_preceded_by_a_warm_up_without_output() -> None:
    """Which we know by `n` and `max_new_tokens`: it has the samples' tag."""
    source = inspect.getsource(TokenizerManager._handle_batch_request)
    warm_up = source.index("tokenized_obj.sampling_params.max_new_tokens = 0")
    assert warm_up < source.index("for _ in range(obj.parallel_sample_num)")
    assert (SamplingParams().n, SamplingParams(n=3).n) == (1, 3)


def test_a_dispatcher_takes_more_types() -> None:
    """`+=` adds a handler to SGLang's dispatcher, which finds it by the message's type."""
    dispatcher = TypeBasedDispatcher([(int, lambda value: value + 1)])
    dispatcher += TypeBasedDispatcher([(str, str.upper)])
    assert (dispatcher(1), dispatcher("a")) == (2, "A")


def test_what_we_read_of_a_request_and_a_batch_is_there() -> None:
    """The attributes by which requests are judged and charged exist under their names."""
    source = inspect.getsource(Req.__init__)
    for name in (
        "origin_input_ids", "output_ids", "sampling_params", "to_finish", "return_logprob",
        "return_hidden_states", "return_routed_experts", "return_indexer_topk",
        "return_sampling_mask", "input_embeds", "multimodal_inputs", "session", "beam_group", "kv",
        "num_matched_prefix_tokens", "custom_logit_processor",
    ):  # fmt: skip
        assert f"self.{name}" in source, name
    params = SamplingParams()
    assert (params.frequency_penalty, params.presence_penalty) == (0.0, 0.0)
    assert (params.repetition_penalty, params.min_new_tokens) == (1.0, 0)
    fields = ScheduleBatch.__dataclass_fields__
    assert {"reqs", "prefix_lens", "extend_lens", "decoding_reqs", "batch_is_full"} <= set(fields)


def test_waiting_requests_are_aborted_without_their_tokens() -> None:
    """Hence `send_abort_output` ends preempted ones as SGLang ends running ones."""
    abort = inspect.getsource(Scheduler.abort_request)
    waiting = abort.index("req = self.waiting_queue.pop(i)")
    assert waiting < abort.index("self.send_abort_output(") < abort.index("req.to_finish = FINISH")
    assert "self.finished_reason = self.to_finish" in inspect.getsource(Req.update_finish_state)
    decode = inspect.getsource(SchedulerBatchResultProcessor.process_batch_result_decode)
    assert "stream_output(" in decode
    assert callable(SchedulerReqTimeStats.set_completion_time)


def test_the_streams_that_copies_are_ordered_against_have_these_names() -> None:
    """Nothing but a GPU would tell: on a CPU there is one stream, and copies are done at once."""
    overlap = inspect.getsource(Scheduler.init_overlap)
    assert "self.copy_stream: CudaStream = self.device_module.Stream()" in overlap
    assert "self.forward_stream" in overlap
    read_back = inspect.getsource(Scheduler._copy_result_to_cpu)
    assert "self.copy_stream.wait_stream(self.forward_stream)" in read_back
    loop = inspect.getsource(Scheduler.run_event_loop)
    assert "with self.device_module.StreamContext(self.schedule_stream)" in loop
