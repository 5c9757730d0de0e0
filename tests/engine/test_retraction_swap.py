"""The patch of SGLang's retraction: what becomes of the KV when the pool is full."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import schedule_batch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.sampling.sampling_params import SamplingParams

from autellix_sglang.core.policy import POLICIES, Levels
from autellix_sglang.core.program import ProgramTable
from autellix_sglang.engine import tracking
from autellix_sglang.patches import retraction_swap


class Recorder:
    """A releaser that only takes note."""

    def __init__(self) -> None:
        self.released: list[tuple[Any, list[Any]]] = []
        self.num_settled = 0

    def settle(self) -> None:
        self.num_settled += 1

    def retract(self, victim: Any, staying: list[Any]) -> None:
        self.released.append((victim, staying))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """The patch in this process, for one test, with stock SGLang reduced to an answer."""
    stock = ScheduleBatch.release_req
    monkeypatch.setattr(retraction_swap, "_stock", lambda *args: ("stock", *args[1:]))
    monkeypatch.setattr(retraction_swap, "evict_from_tree_cache", lambda tree, num: None)
    made = Recorder()
    retraction_swap.install(made)
    yield made
    ScheduleBatch.release_req = stock


def _batch(num_reqs: int) -> Any:
    table = ProgramTable(POLICIES["plas"], Levels(4, 10.0, 2.0), 0.0, 60.0)
    reqs = []
    for i in range(num_reqs):
        req: Any = SimpleNamespace(
            rid=str(i), origin_input_ids=[], output_ids=[1], to_finish=None, finished=lambda: False,
            return_logprob=False, return_hidden_states=False, return_routed_experts=False,
            return_indexer_topk=False, return_sampling_mask=False, input_embeds=None,
            multimodal_inputs=None, session=None, beam_group=None, custom_logit_processor=None,
            sampling_params=SamplingParams(), kv=SimpleNamespace(holds_kv=True),
        )  # fmt: skip
        tracking.attach(req, None)
        table.start(tracking.open_call(table, req))
        reqs.append(req)
    return SimpleNamespace(reqs=reqs, tree_cache=None)


def test_the_manager_gets_the_victim_and_those_who_stay(recorder: Recorder) -> None:
    """Requests of the batch that were retracted before hold no KV, and share none."""
    batch = _batch(3)
    batch.reqs[2].kv.holds_kv = False
    assert ScheduleBatch.release_req(batch, 1, 1) is True
    assert recorder.released == [(batch.reqs[1], [batch.reqs[0]])]


@pytest.mark.parametrize("offload", [True, False])
def test_copies_under_way_are_settled_first(recorder: Recorder, offload: bool) -> None:
    """Either release evicts, perhaps what a prefetch is writing at this moment."""
    ScheduleBatch.release_req(_batch(2), 0, 1, offload_kv=offload)
    assert recorder.num_settled == 1


@pytest.mark.parametrize(
    "case",
    ["no copy wanted", "unknown", "with log-probabilities", "penalized", "with a processor"],
)
def test_the_rest_is_released_as_sglang_does(recorder: Recorder, case: str) -> None:
    """A request that is aborted, that is none of ours, or whose state SGLang rebuilds or loses."""
    batch = _batch(2)
    if case == "unknown":
        tracking.tracked(batch.reqs[0]).call = None
    if case == "with log-probabilities":
        batch.reqs[0].return_logprob = True
    if case == "penalized":
        batch.reqs[0].sampling_params.presence_penalty = 0.5
    if case == "with a processor":
        batch.reqs[0].custom_logit_processor = "{}"
    offload = case != "no copy wanted"
    assert ScheduleBatch.release_req(batch, 0, 1, offload_kv=offload) == ("stock", 0, 1, offload)
    assert recorder.released == []


def test_sglang_still_releases_by_this_method_and_does_no_more() -> None:
    """The seam in `retract_decode`, and what the stock release does besides freeing KV."""
    loop = inspect.getsource(ScheduleBatch.retract_decode)
    assert "if self.release_req(idx, len(sorted_indices)):" in loop
    assert "self.release_req(last_idx, 0, offload_kv=False)" in loop
    parameters = inspect.signature(ScheduleBatch.release_req).parameters
    assert list(parameters) == ["self", "idx", "remaing_req_count", "offload_kv"]
    stock = inspect.getsource(schedule_batch.release_req)
    body = stock[stock.index("backup_saved = True") :]
    for line in (
        'if get_disagg().disaggregation_mode == "decode" and offload_kv:',
        "release_kv_cache(req, tree_cache, checkpoint=False)",
        "num_tokens = remaing_req_count * envs.SGLANG_RETRACT_DECODE_STEPS.get()",
        "evict_from_tree_cache(tree_cache, num_tokens)",
        "req.reset_for_retract()",
    ):
        assert line in body
