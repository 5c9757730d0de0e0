"""The order of copies and batches on streams: right outputs whatever the streams do first.

And the other way round: each rule that is broken here shows in the outputs, so the rules are
needed, and the runs above would have noticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Req

from autellix_sglang.config import ProgramConfig
from autellix_sglang.engine.swap import CopyOrder, SwapManager
from bench.swap_rig import Chaos, Rig, answer, sglang_settings
from tests.engine.fake_streams import FakeStream, FakeStreams

NUM_STEPS = 150
NUM_SEEDS = 40  # within which a broken rule has to show
POOLS = (90, 130, 200)  # KV tokens: a call takes up to 77
PROMPT = list(range(1, 31))
HAPPENED = (
    "completed", "preempted", "aborted", "flushed", "retractions", "swaps_out", "swaps_in",
    "prefetches", "prefetch_hits", "swaps_lost", "dropped_for_full_pool",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with sglang_settings():
        yield


# --- what may happen ----------------------------------------------------------------------------


def _chaos(seed: int, has_overlap: bool) -> dict[str, Any]:
    num_kv_tokens = POOLS[seed % len(POOLS)]
    return Chaos(seed, num_kv_tokens, 256, streams=FakeStreams(seed), has_overlap=has_overlap).run(
        NUM_STEPS
    )


def _random_events(seed: int) -> None:
    _chaos(seed, has_overlap=True)


def _random_events_on_one_stream(seed: int) -> None:
    _chaos(seed, has_overlap=False)


def _a_prompt_is_saved_while_it_is_computed(seed: int) -> None:
    rig = _rig(seed, num_slots=1)
    req = rig.submit("a", PROMPT, 10)
    rig.admit()
    rig.preempt([req])
    _crowd_out(rig)
    _end_all(rig)
    assert rig.swaps.counters.swaps_in == 1


def _a_call_is_retracted_beside_a_prefetch(seed: int) -> None:
    """What is on its way back in is evicted at once, and the next batch takes its rows."""
    rig = _rig(seed, num_slots=3)
    req = rig.submit("a", PROMPT, 20)
    for _ in range(3):
        rig.step()
    rig.preempt([req])
    _crowd_out(rig)
    rig.waiting.remove(req)
    for i, rid in enumerate("bcd"):
        rig.submit(rid, [40 + i], 20)
    rig.step()
    rig.swaps.configure(rig.program_config.replace(kv="drop"))
    rig.waiting.append(req)
    rig.must_retract = True
    rig.step()
    assert (rig.swaps.counters.prefetches, rig.num_retractions) == (1, 1)
    _end_all(rig)


def _happen_often(happen: Callable[[int], None]) -> None:
    for seed in range(NUM_SEEDS):
        happen(seed)


def _rig(seed: int, num_slots: int) -> Rig:
    config = ProgramConfig(kv="swap", kv_break_even=1, host_memory=2.0**-10)
    return Rig(config, num_slots, num_kv_tokens=70, streams=FakeStreams(seed))


def _crowd_out(rig: Rig) -> None:
    """Fill the KV pool with something else while all others wait."""
    waiting, rig.waiting[:] = list(rig.waiting), []
    rig.submit("crowd", [7] * (rig.num_kv_tokens - 5), 2)
    _end_all(rig)
    rig.waiting[:] = waiting


def _end_all(rig: Rig) -> None:
    for _ in range(100):
        for req in rig.step():
            assert list(req.output_ids) == _answer(req), f"{req.rid}: a changed output"
    assert not rig.waiting and not rig.running


def _answer(req: Req) -> list[int]:
    return answer(list(req.origin_input_ids), req.sampling_params.max_new_tokens)


def test_fake_streams_find_all_legal_orders_and_no_other() -> None:
    """Work waits for what was queued before the wait, also through a stream without any."""
    found = set()
    for seed in range(50):
        streams = FakeStreams(seed)
        first, between, second = (streams.Stream() for _ in range(3))
        done: list[str] = []
        first.submit(partial(done.append, "a"))
        between.wait_stream(first)
        first.submit(partial(done.append, "b"))
        second.wait_stream(between)
        second.submit(partial(done.append, "c"))
        for stream in (second, first):
            stream.synchronize()
        found.add("".join(done))
    assert found == {"abc", "acb"}


# --- with all rules -----------------------------------------------------------------------------


@pytest.mark.parametrize("has_overlap", [True, False])
def test_no_order_of_the_streams_changes_an_output(has_overlap: bool) -> None:
    """Random events, with the batches on a stream of their own or on the scheduler's."""
    found: Counter[str] = Counter()
    for seed in range(15):
        happened = _chaos(seed, has_overlap)
        found.update({name: happened[name] for name in HAPPENED if name in happened})
    assert all(found[name] > 0 for name in HAPPENED), found


@pytest.mark.parametrize(
    "happen", [_a_prompt_is_saved_while_it_is_computed, _a_call_is_retracted_beside_a_prefetch]
)
def test_no_order_of_the_streams_changes_a_rare_event(happen: Callable[[int], None]) -> None:
    """What random events seldom lead to."""
    _happen_often(happen)


# --- with one rule broken -----------------------------------------------------------------------


def _nothing(*args: Any) -> None:
    pass


def _no_batch_waits_for_copies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CopyOrder, "settle", _nothing)


def _only_the_next_pass_waits_for_copies(patch: pytest.MonkeyPatch) -> None:
    stock = CopyOrder.after_results
    patch.setattr(
        CopyOrder, "after_results", lambda self, slots, is_awaited=True: stock(self, slots, False)
    )


def _no_batch_waits_for_prefetches(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SwapManager, "settle", _nothing)


def _copies_do_not_wait_for_the_batch_in_flight(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CopyOrder, "after_forward", CopyOrder.after_results)


def _copies_do_not_wait_for_prompts_in_flight(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rig, "reqs_prefilling_in_flight", lambda self: set())


def _copies_do_not_wait_for_the_current_stream(patch: pytest.MonkeyPatch) -> None:
    stock = FakeStream.wait_stream
    patch.setattr(
        FakeStream,
        "wait_stream",
        lambda self, other: other is self._streams.current_stream() or stock(self, other),
    )


def _each_copy_has_a_stream_of_its_own(patch: pytest.MonkeyPatch) -> None:
    """Batches wait for it as before; copies do not wait for each other."""

    def on_a_new_stream(stock: Callable[..., None]) -> Callable[..., None]:
        def copy(self: SwapManager, *args: Any) -> None:
            self._copies.settle()
            self._copies.__dict__.pop("_stream", None)
            stock(self, *args)

        return copy

    for name in ("_gather", "_scatter"):
        patch.setattr(SwapManager, name, on_a_new_stream(getattr(SwapManager, name)))


def _a_retraction_does_not_settle(patch: pytest.MonkeyPatch) -> None:
    stock = Rig._make_room

    def make_room(self: Rig) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(SwapManager, "settle", _nothing)
            stock(self)

    patch.setattr(Rig, "_make_room", make_room)


@pytest.mark.parametrize(
    ("break_rule", "happen"),
    [
        (_no_batch_waits_for_copies, _random_events),
        (_no_batch_waits_for_copies, _random_events_on_one_stream),
        (_only_the_next_pass_waits_for_copies, _random_events),
        (_only_the_next_pass_waits_for_copies, _random_events_on_one_stream),
        (_no_batch_waits_for_prefetches, _random_events),
        (_no_batch_waits_for_prefetches, _random_events_on_one_stream),
        (_copies_do_not_wait_for_the_batch_in_flight, _random_events),
        (_copies_do_not_wait_for_the_current_stream, _random_events_on_one_stream),
        (_each_copy_has_a_stream_of_its_own, _random_events),
        (_copies_do_not_wait_for_prompts_in_flight, _a_prompt_is_saved_while_it_is_computed),
        (_a_retraction_does_not_settle, _a_call_is_retracted_beside_a_prefetch),
    ],
)
def test_a_broken_rule_changes_an_output(
    break_rule: Callable[[pytest.MonkeyPatch], None],
    happen: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In some order of the streams, after some of the random events."""
    break_rule(monkeypatch)
    with pytest.raises(AssertionError, match="a changed output"):
        _happen_often(happen)
