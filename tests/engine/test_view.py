"""What the planner is told of KV, against what SGLang's own tree and allocator then have."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from autellix_sglang.config import ProgramConfig
from autellix_sglang.engine.swap import shared_rows
from autellix_sglang.engine.view import SchedulerView
from bench.swap_rig import Rig, sglang_settings

PROMPT = list(range(1, 31)) * 5


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with sglang_settings():
        yield


def make_rig(num_kv_tokens: int) -> Any:
    rig: Any = Rig(ProgramConfig(prefix_wait=0), num_slots=6, num_kv_tokens=num_kv_tokens)
    rig.is_kv_blocked = False
    rig.new_token_ratio_tracker = SimpleNamespace(current=0.0)
    return rig


def view_of(rig: Any) -> SchedulerView:
    return SchedulerView(rig, SimpleNamespace(reqs=rig.running))


def call(req: Any) -> Any:
    return SimpleNamespace(handle=req)


def free_tokens(rig: Any) -> int:
    return int(rig.token_to_kv_pool_allocator.available_size() + rig.tree_cache.evictable_size())


def test_preempting_gains_what_the_planner_was_told() -> None:
    """Rows of a prompt that other running calls share stay where they are."""
    rig = make_rig(600)
    reqs = [rig.submit(str(i), [*PROMPT, i], 40) for i in range(4)]
    for _ in range(3):
        rig.step()
    assert len(rig.running) == 4
    told, before = view_of(rig).holding(call(reqs[3])), free_tokens(rig)
    rig.preempt([reqs[3]])
    assert told == pytest.approx(free_tokens(rig) - before, abs=4)


def test_a_call_alone_holds_its_prompt() -> None:
    """Nobody shares it, so all of it is gained."""
    rig = make_rig(600)
    req = rig.submit("alone", PROMPT, 40)
    rig.submit("other", [7] * 40, 40)
    rig.step()
    assert view_of(rig).holding(call(req)) >= len(PROMPT)


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_shared_beginning_is_found(seed: int) -> None:
    """As by comparing with each in turn, token by token."""
    rng = random.Random(seed)

    def made() -> Any:
        tokens = array("q", [rng.randrange(2) for _ in range(12)])
        kv = SimpleNamespace(cache_protected_len=rng.randrange(13))
        key = rng.choice([None, "key"])
        return SimpleNamespace(
            full_untruncated_fill_ids=tokens, kv=kv, extra_key=key, cache_salt=None
        )

    def shared(a: Any, b: Any) -> int:
        limit = min(a.kv.cache_protected_len, b.kv.cache_protected_len)
        pairs = zip(a.full_untruncated_fill_ids, b.full_untruncated_fill_ids, strict=True)
        alike = [x == y for x, y in pairs][:limit] if a.extra_key == b.extra_key else []
        return len(alike) if all(alike) else alike.index(False)

    for _ in range(50):
        req, *others = (made() for _ in range(8))
        assert shared_rows(req, others) == max(shared(req, other) for other in others)


def test_what_a_call_has_cached_is_not_free_for_it() -> None:
    """120 of 200 tokens are its own history, which its admission locks: 60 more are not there."""
    rig = make_rig(200)
    history = [40 + i % 9 for i in range(120)]
    rig.submit("before", history, 1)
    rig.step()
    rig.submit("other", [3] * 29, 40)
    rig.step()
    req = rig.submit("next", [*history, *[5] * 30], 30)
    view = view_of(rig)
    is_told_to_fit = view.demand(call(req), ()).kv_tokens <= view.free_kv_tokens
    rig.step()
    assert (is_told_to_fit, req in rig.running) == (False, False)


def test_a_prefix_that_two_calls_share_is_locked_once() -> None:
    """The second one of them asks for its own tokens only."""
    rig = make_rig(600)
    rig.submit("before", PROMPT, 1)
    rig.step()
    first, second = (rig.submit(name, [*PROMPT, *[9] * 10], 20) for name in "ab")
    view = view_of(rig)
    alone = view.demand(call(first), ()).kv_tokens
    after = view.demand(call(second), [call(first)]).kv_tokens
    assert alone - after == pytest.approx(len(PROMPT), abs=1)
    assert rig.tree_cache.protected_size() == 0, "looking must not lock anything"
