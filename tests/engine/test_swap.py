"""The swap manager on SGLang's own radix cache, allocator, admission and requests."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Req

from autellix_sglang.config import ProgramConfig
from autellix_sglang.engine.swap import SwapManager, common_prefix
from autellix_sglang.errors import ConfigError
from bench.swap_rig import Chaos, Rig, answer, sglang_settings

PROMPT = list(range(1, 31))
RECORD_BYTES = 64  # of the rig's pool


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with sglang_settings():
        yield


def _rig(kv: str, num_kv_tokens: int = 100, num_host_tokens: int = 640) -> Rig:
    host_memory = num_host_tokens * RECORD_BYTES / 2**30
    config = ProgramConfig(kv=kv, kv_break_even=1, host_memory=host_memory)
    return Rig(config, num_slots=2, num_kv_tokens=num_kv_tokens)


def _running(rig: Rig, rid: str, prompt: list[int] = PROMPT, num_output: int = 20) -> Req:
    """A call that has generated a few tokens."""
    req = rig.submit(rid, prompt, num_output)
    for _ in range(3):
        rig.step()
    assert req in rig.running
    return req


def _crowd_out(rig: Rig) -> None:
    """Fill the KV pool with something else, so that the tree evicts whatever it can."""
    other = rig.submit("crowd", [7] * (rig.num_kv_tokens - 5), 2)
    waiting = [req for req in rig.waiting if req is not other]
    rig.waiting[:] = [other]
    _finish(rig, other)
    rig.waiting[:] = waiting


def _finish(rig: Rig, req: Req) -> list[int]:
    """The whole output of a call that does not take forever."""
    for _ in range(200):
        if req not in (*rig.waiting, *rig.running):
            break
        rig.step()
    assert req.finished(), f"{req.rid} is stuck"
    return list(req.output_ids)


@pytest.mark.parametrize(
    ("kv", "num_recomputed"),
    [("keep", 32), ("drop", 32), ("swap", 0), ("backup", 0), ("auto", 0)],
)
def test_a_preempted_call_goes_on_as_if_nothing_had_been(kv: str, num_recomputed: int) -> None:
    """Its output is the same; only host memory saves it from computing everything again."""
    rig = _rig(kv)
    req = _running(rig, "a")
    rig.preempt([req])
    _crowd_out(rig)
    assert _finish(rig, req) == answer(PROMPT, 20)
    assert rig.num_recomputed == num_recomputed
    assert rig.swaps.counters.swaps_in == (kv in ("swap", "backup", "auto"))
    assert rig.swaps.totals()["host_pool_used_bytes"] == 0


def test_only_the_rows_that_the_tree_has_lost_are_copied_back() -> None:
    """Without memory pressure the prompt is still there, and nothing but the answer is copied."""
    rig = _rig("swap")
    req = _running(rig, "a")
    rig.preempt([req])
    assert rig.swaps.counters.swapped_out_tokens == len(PROMPT) + 2
    assert _finish(rig, req) == answer(PROMPT, 20)
    assert rig.swaps.counters.swapped_in_tokens == 2


def test_rows_that_a_running_call_shares_stay_on_the_device() -> None:
    """Two calls with one beginning: only what is a victim's own is moved."""
    rig = _rig("swap")
    first = _running(rig, "a", [*PROMPT, 1, 2, 3])
    second = _running(rig, "b", [*PROMPT, 4, 5, 6, 7])
    rig.preempt([second])
    own = len(second.origin_input_ids) + len(second.output_ids) - 1 - len(PROMPT)
    assert rig.swaps.counters.swapped_out_tokens == own
    rig.preempt([first])
    assert _finish(rig, second) == answer([*PROMPT, 4, 5, 6, 7], 20)


def test_two_victims_at_once_each_keep_their_whole_beginning() -> None:
    """What only victims share is copied with each of them: neither depends on the other."""
    rig = _rig("swap")
    first = _running(rig, "a", [*PROMPT, 1], num_output=30)
    second = _running(rig, "b", [*PROMPT, 2], num_output=30)
    rig.preempt([first, second])
    _crowd_out(rig)
    rig.waiting.remove(first)
    rig.swaps.forget(first)
    assert _finish(rig, second) == answer([*PROMPT, 2], 30)
    assert rig.num_recomputed == 0


def test_a_chunk_that_lost_its_beginning_is_given_up() -> None:
    """When the shared rows are evicted after all, the call is computed again, and rightly so."""
    rig = _rig("swap")
    first = _running(rig, "a", [*PROMPT, 1])
    second = _running(rig, "b", [*PROMPT, 2])
    rig.preempt([second])
    rig.abort(first)
    _crowd_out(rig)
    assert _finish(rig, second) == answer([*PROMPT, 2], 20)
    assert rig.swaps.counters.swaps_lost == 1
    assert rig.swaps.totals()["host_pool_used_bytes"] == 0


def test_a_full_host_pool_leaves_the_kv_to_eviction_and_counts() -> None:
    """Never an error; while the tree still has the rows, they are not even lost."""
    rig = _rig("swap", num_host_tokens=0)
    req = _running(rig, "a")
    rig.preempt([req])
    assert rig.swaps.counters.dropped_for_full_pool == 1
    assert _finish(rig, req) == answer(PROMPT, 20)
    assert rig.num_recomputed == 0


def test_a_backup_costs_no_copy_back_while_the_tree_has_the_rows() -> None:
    """Without memory pressure the call resumes as if its KV had been kept."""
    rig = _rig("backup")
    req = _running(rig, "a")
    rig.preempt([req])
    assert rig.swaps.counters.swapped_out_tokens == len(PROMPT) + 2
    assert _finish(rig, req) == answer(PROMPT, 20)
    assert rig.swaps.counters.swaps_in == rig.num_recomputed == 0
    assert rig.swaps.totals()["host_pool_used_bytes"] == 0


def _waiting_for_a_slot(rig: Rig, num_held: int = 1) -> Req:
    """A swapped call, next in line, while two others of some length hold both slots."""
    req = _running(rig, "a")
    rig.preempt([req])
    rig.waiting.remove(req)
    for i, rid in enumerate("bc"):
        rig.submit(rid, [40 + i] * num_held, 20)
    rig.step()
    rig.waiting.append(req)
    rig.step()
    assert req in rig.waiting and len(rig.running) == 2
    return req


def test_the_call_next_in_line_is_prefetched() -> None:
    """Its rows come back, as evictable cache, before it has a slot; then nothing is copied."""
    rig = _rig("swap", num_kv_tokens=200)
    evictable = rig.tree_cache.evictable_size()
    req = _waiting_for_a_slot(rig)
    counters = rig.swaps.counters
    assert (counters.swaps_in, counters.prefetches, counters.prefetch_hits) == (1, 1, 0)
    assert rig.tree_cache.evictable_size() >= evictable + len(PROMPT) + 2
    assert _finish(rig, req) == answer(PROMPT, 20)
    assert (counters.swaps_in, counters.prefetch_hits, rig.num_recomputed) == (1, 1, 0)


def test_a_prefetch_needs_room_that_nobody_has_a_claim_on() -> None:
    """With less than the call's whole need to spare, nothing is copied or evicted for it."""
    rig = _rig("swap", num_kv_tokens=60)
    _waiting_for_a_slot(rig, num_held=14)
    assert rig.swaps.counters.prefetches == 0


def test_prefetched_rows_give_way_and_come_back() -> None:
    """They are cache like any other: evicted in need, and copied once more on admission."""
    rig = _rig("swap", num_kv_tokens=200)
    req = _waiting_for_a_slot(rig)
    rig.waiting.clear()
    for other in list(rig.running):
        _finish(rig, other)
    _crowd_out(rig)
    rig.waiting.append(req)
    assert _finish(rig, req) == answer(PROMPT, 20)
    counters = rig.swaps.counters
    assert (counters.swaps_in, counters.prefetch_hits, rig.num_recomputed) == (2, 1, 0)


def test_an_abort_after_a_prefetch_leaves_nothing_behind() -> None:
    """The chunk is freed; the rows stay in the tree, like those of any call that was aborted."""
    rig = _rig("swap", num_kv_tokens=200)
    req = _waiting_for_a_slot(rig)
    assert rig.swaps.counters.prefetches == 1
    rig.abort(req)
    rig.check_integrity()
    assert rig.swaps.totals()["host_pool_used_bytes"] == 0


def test_an_aborted_call_frees_its_chunk() -> None:
    """What is saved for a waiting call goes with it."""
    rig = _rig("swap")
    req = _running(rig, "a")
    rig.preempt([req])
    assert rig.swaps.totals()["host_pool_used_bytes"] > 0
    rig.abort(req)
    assert rig.swaps.totals()["host_pool_used_bytes"] == 0
    rig.check_integrity()


def test_a_flush_of_the_cache_forgets_what_was_saved() -> None:
    """Weights may have changed: rows from before it never come back."""
    rig = _rig("swap")
    req = _running(rig, "a")
    rig.preempt([req])
    rig.flush()
    assert rig.swaps.totals()["swapped_calls"] == 0
    assert _finish(rig, req) == answer(PROMPT, 20)
    assert rig.swaps.counters.swaps_in == 0


def test_a_call_that_still_does_not_fit_is_not_copied_back() -> None:
    """SGLang would refuse it: its rows stay in host memory, and nothing is evicted for them."""
    rig = _rig("swap", num_kv_tokens=60)
    req = _running(rig, "a")
    rig.preempt([req])
    rig.waiting.clear()
    _running(rig, "b", [9] * 30, num_output=25)
    rig.waiting.append(req)
    rig.step()
    assert req in rig.waiting
    assert rig.swaps.counters.swaps_in == 0
    assert rig.swaps.totals()["swapped_calls"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_random_events_leak_nothing_and_change_nothing(seed: int) -> None:
    """Preemptions, retractions, aborts, flushes, a full host pool, changing modes: all at once."""
    found = Chaos(seed).run(600)
    assert found["completed"] > 30
    assert found["swaps_out"] > 10 and found["swaps_in"] > 5
    assert found["retractions"] > 0 and found["dropped_for_full_pool"] > 0


def test_random_events_with_room_to_prefetch() -> None:
    """A larger KV pool, so that calls wait for a batch slot with memory to spare."""
    found = Chaos(0, num_kv_tokens=160).run(600)
    assert found["prefetches"] >= found["prefetch_hits"] > 5


@pytest.mark.parametrize(
    ("a", "b", "limit", "length"),
    [([1, 2, 3], [1, 2, 4], 9, 2), ([1, 2, 3], [1, 2, 3], 2, 2), ([1], [2], 9, 0), ([], [1], 9, 0)],
)
def test_common_prefix(a: list[int], b: list[int], limit: int, length: int) -> None:
    """The longest common beginning, at most the limit."""
    assert common_prefix(array("q", a), array("q", b), limit) == length


def test_a_pool_whose_rows_we_cannot_move_is_refused() -> None:
    """`--program-kv swap` on an exotic KV pool stops with the flag's name; `keep` needs nothing."""
    scheduler: Any = SimpleNamespace(
        tree_cache=SimpleNamespace(supports_mamba=lambda: False, supports_swa=lambda: False),
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: object()),
        page_size=1,
        tp_size=1,
    )
    manager = SwapManager(scheduler)
    manager.configure(ProgramConfig(kv="keep"))
    with pytest.raises(ConfigError, match="--program-kv"):
        manager.configure(ProgramConfig(kv="swap"))


@pytest.mark.parametrize("gib", [-1, 2.0**40])
def test_a_pool_that_cannot_be_made_changes_nothing(gib: float) -> None:
    """A size that is left open, or beyond this machine, is refused; the old settings hold."""
    rig = _rig("keep")
    with pytest.raises(ConfigError, match="--program-host-memory"):
        rig.swaps.configure(ProgramConfig(kv="swap", host_memory=gib))
    req = _running(rig, "a")
    rig.preempt([req])
    assert rig.swaps.totals()["host_pool_bytes"] == rig.swaps.counters.swaps_out == 0
    rig.swaps.configure(ProgramConfig(kv="swap", host_memory=2.0**-10))
    assert rig.swaps.totals()["host_pool_bytes"] > 0


def test_a_pool_that_another_rank_could_not_make_is_given_up() -> None:
    """Its own was made by then; it goes, the old settings hold, and a later try is free."""
    rig = _rig("keep")
    asked: list[ConfigError | None] = []

    def agree(error: ConfigError | None) -> None:
        asked.append(error)
        raise ConfigError("--program-host-memory", "cannot be pinned on rank 1")

    config = ProgramConfig(kv="swap", host_memory=2.0**-10)
    with pytest.raises(ConfigError, match="rank 1"):
        rig.swaps.configure(config, agree)
    assert asked == [None]  # reached without an error of its own
    rig.preempt([_running(rig, "a")])
    assert rig.swaps.totals()["host_pool_bytes"] == rig.swaps.counters.swaps_out == 0
    with pytest.raises(ConfigError, match="rank 1"):
        rig.swaps.configure(config.replace(host_memory=2.0**29), agree)
    assert isinstance(asked[1], ConfigError)  # and with one
    rig.swaps.configure(config)
    assert rig.swaps.totals()["host_pool_bytes"] > 0
