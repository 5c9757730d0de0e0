"""Streams without a GPU: queued work is done late, in any order that real ones might do it in.

Real streams nearly always do the right thing, ordered or not. These are out for mischief: each has
a pace of its own for a while, from far too hasty to as slow as is legal, and what nobody waits for
may stay undone forever.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PACES = (1e-4, 1.0, 1e4)
MOOD_ITEMS = 300  # of all streams, after which their paces are others


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Item:
    """Work that may begin when `awaited` has done the first `count` of its items."""

    work: Callable[[], None]
    awaited: FakeStream
    count: int = 0


class FakeStream:
    """`torch.cuda.Stream`: does its items one after the other."""

    def __init__(self, streams: FakeStreams, handle: int, pace: float) -> None:
        self._streams = streams
        self.cuda_stream = handle
        self.pace = pace
        self._queue: deque[_Item] = deque()
        self._num_done = 0

    def submit(self, work: Callable[[], None]) -> None:
        self._queue.append(_Item(work, self))

    def wait_stream(self, other: FakeStream) -> None:
        """Later items begin after those that `other` has now."""
        self._queue.append(_Item(_nothing, other, other._num_queued))

    def synchronize(self) -> None:
        """Wait for the items so far; others may get done meanwhile."""
        count = self._num_queued
        while self._num_done < count:
            self._streams.advance()

    @property
    def _num_queued(self) -> int:
        return self._num_done + len(self._queue)

    @property
    def is_ready(self) -> bool:
        return bool(self._queue) and self._queue[0].awaited._num_done >= self._queue[0].count

    def do_next(self) -> None:
        self._queue.popleft().work()
        self._num_done += 1


class FakeStreams:
    """`torch.cuda`, as far as streams go, and `submit`; a seed says what happens when."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._all: list[FakeStream] = []
        self._current = self.Stream()

    def Stream(self, priority: int = 0) -> FakeStream:
        stream = FakeStream(self, len(self._all), self._rng.choice(PACES))
        self._all.append(stream)
        return stream

    def current_stream(self) -> FakeStream:
        return self._current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def submit(self, work: Callable[[], None]) -> None:
        """Queue work on the current stream, in place of a kernel's launch."""
        self._current.submit(work)

    def advance(self) -> None:
        """Do one item of a stream that may go on: there is one, for items wait for earlier ones."""
        if self._rng.random() < 1 / MOOD_ITEMS:
            for stream in self._all:
                stream.pace = self._rng.choice(PACES)
        ready = [stream for stream in self._all if stream.is_ready]
        paces = [stream.pace for stream in ready]
        self._rng.choices(ready, paces)[0].do_next()
