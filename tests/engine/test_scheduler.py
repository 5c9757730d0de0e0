"""The scheduler's own parts, on a scheduler without a model, sockets or other ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch

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
    req = SimpleNamespace(rid="r", origin_input_ids=[], output_ids=[])
    assert tracking.call_of(req) is None
    assert tracking.open_call(table, req).program.is_anonymous
    tracking.close_call(table, req)
    assert table.num_programs == 0
