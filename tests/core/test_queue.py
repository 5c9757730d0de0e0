"""`CallQueue` against its specification, `sorted()`."""

from __future__ import annotations

import random

import pytest

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.program import Call
from autellix_sglang.core.queue import CallQueue
from autellix_sglang.testing import table_from


def some_calls(count: int) -> list[Call]:
    """Calls with the keys (0, i, i); the table that made them is not used any more."""
    table = table_from(ProgramConfig())
    calls = [table.open_call(str(i)) for i in range(count)]
    for i, call in enumerate(calls):
        call.order_key = (0, i, i)
    return calls


def rekey(call: Call, level: int) -> None:
    call.order_key = (level, *call.order_key[1:])


def expected(calls: set[Call]) -> list[Call]:
    return sorted(calls, key=lambda call: call.order_key)


# A touch at a time is settled by single moves; touching most entries at once is settled by a sort.
@pytest.mark.parametrize("num_touched", [1, 100], ids=["incremental", "resort"])
@pytest.mark.parametrize("seed", range(5))
def test_iterates_like_sorted(num_touched: int, seed: int) -> None:
    """Whatever is pushed, discarded and touched, iteration is `sorted()` by `order_key`."""
    rng = random.Random(seed)
    calls = some_calls(200)
    queue, model = CallQueue(), set[Call]()
    for _ in range(400):
        call = rng.choice(calls)
        if call in model:
            model.discard(call)
            queue.discard(call)
        else:
            rekey(call, rng.randrange(4))
            model.add(call)
            queue.push(call)
        for touched in rng.sample(calls, num_touched):
            rekey(touched, rng.randrange(4))
            queue.touch(touched)
        if rng.random() < 0.7:  # else changes pile up until the next look
            assert list(queue) == expected(model)
            assert queue.first() == next(iter(expected(model)), None)
        assert len(queue) == len(model)
        assert all((call in queue) == (call in model) for call in calls)


def test_a_touched_call_can_leave_before_anyone_looks() -> None:
    """Discarding works by the key a call is filed under, not the one it has now."""
    calls = some_calls(40)
    queue = CallQueue()
    for call in calls:
        queue.push(call)
    rekey(calls[0], 3)
    queue.touch(calls[0])
    queue.discard(calls[0])
    assert list(queue) == calls[1:]


def test_pushing_twice_is_a_bug() -> None:
    """A call is in the queue once."""
    (call,) = some_calls(1)
    queue = CallQueue()
    queue.push(call)
    with pytest.raises(AssertionError, match="queued already"):
        queue.push(call)


def test_version_grows_when_the_seen_order_may_not_hold() -> None:
    """Pushes and touches change the version; departures and strangers do not."""
    first, second, stranger = some_calls(3)
    queue = CallQueue()
    changes = [
        (queue.push, first, True),
        (queue.push, second, True),
        (queue.touch, first, True),
        (queue.touch, stranger, False),
        (queue.discard, first, False),
        (queue.discard, stranger, False),
    ]
    for change, call, grows in changes:
        before = queue.version
        change(call)
        assert (queue.version > before) == grows


def test_empty_queue_has_no_first() -> None:
    """An empty queue answers None rather than raising."""
    assert CallQueue().first() is None
