"""Calls that begin alike: who waits for whose prefix, on SGLang's own parts and on the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.schedule_batch import Req

from autellix_sglang.config import ProgramConfig
from autellix_sglang.engine.admission import prefix_under_way
from bench.swap_rig import Rig, answer, sglang_settings
from tests.engine.conftest import Engine

PROMPT = list(range(1, 31))
WAIT = 8


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with sglang_settings():
        yield


def _rig(num_slots: int = 4, num_kv_tokens: int = 300, prefix_wait: int = WAIT) -> Rig:
    return Rig(ProgramConfig(prefix_wait=prefix_wait), num_slots, num_kv_tokens)


def _running(rig: Rig) -> list[str]:
    return [req.rid for req in rig.running]


def _submit(rig: Rig, *prompts: list[int], num_output: int = 5) -> list[Req]:
    return [rig.submit(str(i), prompt, num_output) for i, prompt in enumerate(prompts)]


def test_samples_of_a_prompt_wait_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One computes the prompt, the others find it cached a pass later; all answers are right."""
    rig = _rig()
    cached: list[int] = []
    monkeypatch.setattr(rig.swaps, "note_admission", lambda req, num: cached.append(num))
    reqs = _submit(rig, *([[*PROMPT, i] for i in range(4)]))
    rig.step()
    assert _running(rig) == ["0"]
    rig.step()
    assert _running(rig) == ["0", "1", "2", "3"]
    assert cached == [0, 30, 30, 30]
    for _ in range(10):
        rig.step()
    assert [list(req.output_ids) for req in reqs] == [answer([*PROMPT, i], 5) for i in range(4)]


def test_nobody_waits_for_less_than_it_is_worth() -> None:
    """What is cached already does not count, nor do the tokens after which two prompts differ."""
    rig = _rig()
    _submit(rig, PROMPT, [*PROMPT[: WAIT - 1], *[40] * 20])
    rig.step()
    assert _running(rig) == ["0", "1"]
    again = rig.submit("2", [*PROMPT, *[41] * (WAIT - 1), 1], 5)
    last = rig.submit("3", [*PROMPT, *[41] * (WAIT - 1), 2], 5)
    rig.step()
    assert again in rig.running and last in rig.running


@pytest.mark.parametrize("how", ["setting", "key", "salt", "logprobs"])
def test_nobody_waits_where_nothing_is_found(how: str) -> None:
    """Waiting is off, what the other computes is in another tree, or all has to be computed."""
    rig = _rig(prefix_wait=0 if how == "setting" else WAIT)
    _, second = _submit(rig, PROMPT, PROMPT)
    if how == "key":
        second.extra_key = "adapter"
    elif how == "salt":
        second.cache_salt = "tenant"
    elif how == "logprobs":
        second.return_logprob, second.logprob_start_len = True, 0
    rig.step()
    assert _running(rig) == ["0", "1"]


def test_a_call_that_waits_keeps_its_slot() -> None:
    """Those behind it get what is left over, and not what it is about to need."""
    rig = _rig(num_slots=3)
    _submit(rig, PROMPT, PROMPT, [50] * 5, [51] * 5)
    rig.step()
    assert _running(rig) == ["0", "2"]
    rig.step()
    assert _running(rig) == ["0", "2", "1"]


def test_what_a_later_call_has_cached_is_not_free() -> None:
    """Its own history, 40 of 120 tokens, would be locked and is not to be had for the one held."""
    rig = _rig(num_kv_tokens=120)
    history = [60 + i % 7 for i in range(40)]
    rig.submit("before", history, 1)
    rig.step()
    assert not rig.running and rig.tree_cache.evictable_size() == 40
    _submit(rig, PROMPT, PROMPT, [*history, 3], num_output=20)
    rig.step()
    assert _running(rig) == ["0"]


def test_who_waited_in_vain_goes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix that never comes into the tree holds nobody up twice."""
    rig = _rig()
    first, second = _submit(rig, PROMPT, PROMPT)
    monkeypatch.setattr("bench.swap_rig.checkpoint_kv_cache", lambda req, tree: None)
    rig.step()
    assert second in rig.waiting
    third = rig.submit("2", PROMPT, 5)
    rig.waiting[:] = [third, second]
    rig.step()
    assert first in rig.running and second in rig.running and third in rig.running


def test_the_longest_common_prefix_counts_in_whatever_order() -> None:
    """Ranks see the same requests under way, and reckon the same."""
    rig = _rig(num_kv_tokens=400)
    under_way = _submit(rig, [*PROMPT, *[2] * 30], [*PROMPT, *[3] * 30])
    waiting = rig.submit("w", [*PROMPT, *[2] * 20, *[4] * 10], 5)
    for req in (*under_way, waiting):
        req.init_next_round_input(rig.tree_cache)
    scheduler: Any = rig
    found = [prefix_under_way(scheduler, waiting, o) for o in (under_way, under_way[::-1])]
    assert found == [50, 50]


def test_nobody_waits_beside_a_recurrent_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang stages one for each request that it looks at, admitted or not."""
    rig = _rig()
    first, second = _submit(rig, PROMPT, PROMPT)
    for req in (first, second):
        req.init_next_round_input(rig.tree_cache)
    scheduler: Any = rig
    assert prefix_under_way(scheduler, second, [first]) == len(PROMPT) - 1
    monkeypatch.setattr(rig.tree_cache, "supports_mamba", lambda: True)
    assert prefix_under_way(scheduler, second, [first]) == 0


def test_no_more_wait_than_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those behind neither pass them nor compute the prompt themselves."""
    monkeypatch.setattr("autellix_sglang.engine.admission.MAX_HELD", 2)
    rig = _rig(num_slots=8)
    _submit(rig, *[PROMPT] * 5, [50] * 5)
    rig.step()
    assert _running(rig) == ["0"]
    rig.step()
    assert _running(rig) == ["0", "1", "2", "3", "4", "5"]


def test_a_call_that_waits_keeps_its_kv() -> None:
    """The first takes 36 tokens, the second will need 6 more and a page; the third 40 of 80."""
    rig = _rig(num_kv_tokens=80)
    _submit(rig, PROMPT, PROMPT, [50] * 34)
    rig.step()
    assert _running(rig) == ["0"]
    rig = _rig(num_kv_tokens=80)
    _submit(rig, PROMPT, [50] * 34)
    rig.step()
    assert _running(rig) == ["0", "1"]


def test_a_swapped_call_waits_for_nobody() -> None:
    """Its KV comes from host memory: there is nothing to compute again."""
    config = ProgramConfig(prefix_wait=WAIT, kv="swap", host_memory=1e-3)
    rig = Rig(config, num_slots=2, num_kv_tokens=200)
    req = rig.submit("a", PROMPT, 20)
    for _ in range(3):
        rig.step()
    rig.preempt([req])
    rig.waiting[:] = [rig.submit("crowd", [7] * 195, 2)]
    for _ in range(4):
        rig.step()
    rig.waiting[:] = [rig.submit("b", PROMPT, 20), req]
    rig.step()
    assert _running(rig) == ["b", "a"]
    assert rig.num_recomputed == 0


@pytest.mark.parametrize("num_calls", [4, 9])
def test_the_engine_computes_a_common_prompt_once(engine: Engine, num_calls: int) -> None:
    """Calls sent at once: all but the first find the prompt cached, and all say the same."""
    prompt = f"{num_calls} tell me once more, from the beginning " * 12
    waits = engine.stats()["prefix_waits"]
    params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    status, _, replies = engine.request(
        "/generate", {"text": [prompt] * num_calls, "sampling_params": params}
    )
    assert status == 200
    alone = engine.generate(prompt, 6)
    cached = sorted(reply["meta_info"]["cached_tokens"] for reply in replies)
    num_tokens = alone["meta_info"]["prompt_tokens"]
    assert num_tokens > 400 and cached[0] < 100 and cached[1] >= num_tokens - 1
    assert {reply["text"] for reply in replies} == {alone["text"]}
    assert 3 <= engine.stats()["prefix_waits"] - waits < num_calls
    engine.wait_until_empty()
