"""The scheduler's own parts, on a scheduler without a model, sockets or other ranks."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("sglang")

import torch

from autellix_sglang.engine.scheduler import ProgramScheduler
from autellix_sglang.errors import ConfigError


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
