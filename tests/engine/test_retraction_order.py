"""The one patch of SGLang's scheduler: who is retracted when the KV pool is full."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.sampling.sampling_params import SamplingParams

from autellix_sglang.core.policy import POLICIES, Levels
from autellix_sglang.core.program import ProgramTable
from autellix_sglang.engine import tracking
from autellix_sglang.patches import retraction_order


@pytest.fixture
def installed() -> Iterator[None]:
    """The patch, in this process and for one test."""
    stock = ScheduleBatch.__dict__["_get_decode_retraction_order"]
    retraction_order.install()
    yield
    ScheduleBatch._get_decode_retraction_order = stock


def _requests(services: list[float]) -> list[Any]:
    """Running requests of one program each, in order of arrival, with this much service."""
    table = ProgramTable(POLICIES["plas"], Levels(4, 10.0, 2.0), 0.0, 60.0)
    reqs = []
    for i, service in enumerate(services):
        req = SimpleNamespace(
            rid=str(i), output_ids=[], origin_input_ids=[], sampling_params=SamplingParams()
        )
        tracking.attach(req, None)
        call = tracking.open_call(table, req)
        table.start(call)
        table.charge(call, service)
        reqs.append(req)
    return reqs


@pytest.mark.usefixtures("installed")
def test_the_worst_level_goes_first_and_then_the_youngest() -> None:
    """SGLang pops victims from the end of what `_get_decode_retraction_order` returns."""
    order = ScheduleBatch._get_decode_retraction_order(_requests([5, 100, 5, 100]))
    assert order == [0, 2, 1, 3]


@pytest.mark.usefixtures("installed")
def test_a_request_we_do_not_know_leaves_the_order_to_sglang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One unknown request, and the stock order holds for the batch."""
    monkeypatch.setattr(retraction_order, "_stock", lambda reqs: ["stock", len(reqs)])
    reqs = _requests([5, 100])
    tracking.tracked(reqs[0]).call = None
    assert ScheduleBatch._get_decode_retraction_order(reqs) == ["stock", 2]


def test_sglang_still_asks_this_method_and_pops_from_the_end() -> None:
    """The seam as `ScheduleBatch.retract_decode` uses it; fails when SGLang changes it."""
    source = inspect.getsource(ScheduleBatch.retract_decode)
    assert "self._get_decode_retraction_order(self.reqs)" in source
    assert "idx = sorted_indices.pop()" in source
