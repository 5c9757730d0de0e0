"""What goes over the wire between router and workers."""

from __future__ import annotations

import msgspec
import pytest

pytest.importorskip("zmq")

from autellix_sglang.router import messages as m
from autellix_sglang.router.channel import HELLO, NUMBERS, Codec, Garbage, Quiet, WrongVersion

HEADERS = [(b"a", b"\xff")]
FROM_WORKER = (
    m.Register(worker="w", url="http://h", programs=[("p", 3, 0.5)], is_draining=True),
    m.Report(is_ready=True, num_ours=1, num_live=2, call_s=0.5, programs=[("q", 1, 2.0)]),
    m.Head(stream=1, status=200, headers=HEADERS),
    m.Chunk(stream=1, body=b"\x00\xff", is_last=True),
    m.Failed(stream=1, reason="why"),
    m.Leave(),
)
FROM_ROUTER = (
    m.Welcome(heartbeat_s=0.5, timeout_s=5.0),
    m.Alive(),
    m.Call(
        stream=1, method="POST", path="/\u4e2d", raw_path=b"/%", query=b"q", headers=HEADERS,
        body=b"\x00\xff", client=("::1", 5), program="p", num_tokens=3, credit_bytes=9,
        deadline_s=1.5,
    ),
    m.Credit(stream=1, num_bytes=2),
    m.Cancel(stream=1),
    m.Drain(is_draining=True),
)  # fmt: skip
BOTH = [(m.FROM_WORKER, FROM_WORKER), (m.FROM_ROUTER, FROM_ROUTER)]


@pytest.mark.parametrize(("union", "examples"), BOTH, ids=["from worker", "from router"])
def test_every_message_survives_the_wire(union, examples):
    """A batch with one of each message decodes to what it was, with its numbers."""
    assert tuple(type(example) for example in examples) == union
    codec = Codec(union)
    assert codec.decode(codec.encode(2**63, 7, examples)) == (2**63, 7, list(examples))


@pytest.mark.parametrize(("union", "examples"), BOTH, ids=["from worker", "from router"])
def test_longer_message_of_a_later_release_is_understood(union, examples):
    """Fields are only appended, so what a decoder does not know it skips."""
    for example in examples:
        longer = [*msgspec.msgpack.decode(msgspec.msgpack.encode(example)), "new"]
        frames = [HELLO, NUMBERS.pack(1, 0), msgspec.msgpack.encode([longer])]
        assert Codec(union).decode(frames)[2] == [example]


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [HELLO],
        [b"GET / HTTP/1.1", b"", b""],
        [HELLO, b"short", b"\x90"],
        [HELLO, NUMBERS.pack(1, 0), b"\xc1"],
        [HELLO, NUMBERS.pack(1, 0), msgspec.msgpack.encode([["unheard of", 1]])],
        [HELLO, NUMBERS.pack(1, 0), msgspec.msgpack.encode([["chunk", "not a number"]])],
        [HELLO, NUMBERS.pack(1, 0), b"\x90", b"one more"],
    ],
)
def test_garbage_is_told_from_frames(frames):
    """Anything that is not a batch of ours is garbage, whatever it is."""
    with pytest.raises(Garbage):
        Codec(m.FROM_WORKER).decode(frames)


def test_other_version_is_told_from_garbage():
    """A frame of another version is named as such, so that its sender can be told."""
    with pytest.raises(WrongVersion, match="17"):
        Codec(m.FROM_WORKER).decode([b"autellix-router/17", b"anything"])


def test_quiet_counts_what_it_does_not_say(caplog):
    """The first of a kind is logged, later ones are counted into the next line."""
    now_s = [0.0]
    quiet = Quiet(lambda: now_s[0], interval_s=60.0)
    for second in (0.0, 1.0, 59.0, 60.0, 61.0):
        now_s[0] = second
        quiet.warning("kind", f"at {second:g}")
    quiet.warning("other", "other")
    assert caplog.messages == ["at 0", "at 60 (2 more since the last line)", "other"]
