"""The hub without sockets: one call's answer, piece by piece."""

from __future__ import annotations

import pytest

pytest.importorskip("zmq")

from autellix_sglang.router.config import RouterConfig
from autellix_sglang.router.hub import Answer, Hub, RemoteWorker, Request, _Stream
from autellix_sglang.router.messages import Chunk, Head, Register


async def test_end_that_arrives_while_the_client_is_slow_is_passed_on():
    """What comes while a piece is being taken is the next piece, and the last one says so."""
    hub = Hub(RouterConfig(credit_bytes=4))  # every piece is worth telling the worker of
    worker = RemoteWorker(hub, b"a/1", 1, Register(worker="a"))
    stream = _Stream(1, worker, 0, Request(method="GET", path="/x"))
    stream.take(Head(stream=1, status=200))
    stream.take(Chunk(stream=1, body=b"one,"))
    pieces = Answer(hub, stream).pieces()
    assert await anext(pieces) == (b"one,", False)
    stream.take(Chunk(stream=1, body=b"two,"))
    stream.take(Chunk(stream=1, body=b"three", is_last=True))
    # The hub has no socket: a credit for a stream that is over would fail here.
    assert [piece async for piece in pieces] == [(b"two,three", True)]
