"""The scheduler's own parts, on a scheduler without a model, sockets or other ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.environ import envs
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.sampling.sampling_params import SamplingParams

from autellix_sglang.core.policy import POLICIES, Levels
from autellix_sglang.core.program import ProgramTable
from autellix_sglang.engine import tracking
from autellix_sglang.engine.scheduler import ProgramScheduler
from autellix_sglang.errors import ConfigError, UnsupportedModeError


class Bare(ProgramScheduler):
    """What a test sets, and nothing that SGLang would start."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def test_an_error_of_one_rank_is_an_error_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank raises the first error that any has met, and goes on where none has."""
    others: list[Any] = [None, ("--program-kv", "no kernel")]

    def gather(found: list[Any], own: Any, group: Any) -> None:
        found[:] = [own, *others]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    rank = Bare(tp_size=3, tp_cpu_group=None)
    with pytest.raises(ConfigError, match="--program-kv: no kernel"):
        rank.agree(None)
    with pytest.raises(ConfigError, match="--program-host-memory: too large"):
        rank.agree(ConfigError("--program-host-memory", "too large"))
    others[:] = [None, None]
    rank.agree(None)


def test_a_model_that_does_not_generate_is_refused_at_start() -> None:
    """Known only once the model's configuration is read: there need be no flag."""
    with pytest.raises(UnsupportedModeError, match=r"--model-path: .*--program-policy off"):
        Bare(is_generation=False).init_schedule_policy()


def test_a_request_made_by_another_way_is_a_program_of_its_own() -> None:
    """What `_create_generation_req` has not seen is scheduled all the same."""
    table = ProgramTable(POLICIES["plas"], Levels(4, 10.0, 2.0), 0.0, 60.0)
    req = SimpleNamespace(
        rid="r", origin_input_ids=[], output_ids=[], sampling_params=SamplingParams(),
        finished_reason=None,
    )  # fmt: skip
    assert tracking.call_of(req) is None
    assert tracking.open_call(table, req).program.is_anonymous
    tracking.close_call(table, req)
    assert table.num_programs == 0


# -- timeouts ------------------------------------------------------------------------------------

TIMEOUT_S = 10.0


@pytest.fixture
def _timeouts() -> Iterator[None]:
    with (
        envs.SGLANG_REQ_WAITING_TIMEOUT.override(TIMEOUT_S),
        envs.SGLANG_REQ_RUNNING_TIMEOUT.override(TIMEOUT_S),
    ):
        yield


def _timed_out(
    monkeypatch: pytest.MonkeyPatch, num_preemptions: int, is_waiting: bool, preempted_s: float = 0
) -> bool:
    """Whether a call is aborted that was queued, or else put in a batch, 15 s ago."""
    table = ProgramTable(POLICIES["plas"], Levels(4, 10.0, 2.0), 0.0, 60.0)
    then_s = time.perf_counter() - 15.0
    stats = SimpleNamespace(wait_queue_entry_time=then_s, forward_entry_time=then_s)
    req: Any = SimpleNamespace(
        rid="r", origin_input_ids=[], output_ids=[], time_stats=stats, to_finish=None,
        finished=lambda: False, sampling_params=SamplingParams(),
    )  # fmt: skip
    call = tracking.open_call(table, req)
    tracking.tracked(req).preempted_s = preempted_s
    for _ in range(num_preemptions):
        table.start(call)
        table.preempt(call)
    if not is_waiting:
        table.start(call)
    running = [] if is_waiting else [SimpleNamespace(reqs=[req])]
    monkeypatch.setattr(Scheduler, "_collect_inflight_batches", lambda self: running)
    rank = Bare(program_table=table, waiting_queue=[req] if is_waiting else [])
    return [abort.rid for abort in rank._poll_timeout_aborts()] == ["r"]


@pytest.mark.usefixtures("_timeouts")
def test_a_preempted_call_is_not_aborted_for_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLANG_REQ_WAITING_TIMEOUT is for calls that have not begun."""
    assert _timed_out(monkeypatch, num_preemptions=0, is_waiting=True)
    assert not _timed_out(monkeypatch, num_preemptions=1, is_waiting=True)


@pytest.mark.usefixtures("_timeouts")
@pytest.mark.parametrize(("preempted_s", "is_aborted"), [(0.0, True), (3.0, True), (8.0, False)])
def test_only_time_on_the_batch_counts_as_running(
    monkeypatch: pytest.MonkeyPatch, preempted_s: float, is_aborted: bool
) -> None:
    """SGLANG_REQ_RUNNING_TIMEOUT of 10 s, 15 s after the start, less the time preempted."""
    assert _timed_out(monkeypatch, 1, False, preempted_s) == is_aborted
