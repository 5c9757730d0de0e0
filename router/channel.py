"""One ZMQ socket on an asyncio loop: batches of messages in and out, without ever blocking.

A frame on the wire, after the peer's address on the router's side:

    b"autellix-router/1" | session, number (two u64) | msgpack list of messages

Messages sent within one tick of the event loop leave as one frame. `session` is the worker's name
for the time since it registered, and frames of a session are numbered from 0 in each direction:
whoever sees a gap knows that something was lost (a broken connection, a full queue), and the
session ends. A frame of another version is answered with `b"autellix-refused" | reason`, in all
versions; a frame that is none of ours is ignored, and said so once.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import operator
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from autellix_sglang.errors import ConfigError
from autellix_sglang.router.messages import VERSION

logger = logging.getLogger(__name__)

MAGIC: Final = b"autellix-router/"
HELLO: Final = MAGIC + str(VERSION).encode()
REFUSED: Final = b"autellix-refused"
REJOIN: Final = b"autellix-rejoin"
NUMBERS: Final = struct.Struct("<QQ")
MAX_FRAME_BYTES: Final = 1 << 28
BATCH_BYTES: Final = 1 << 20  # a batch is closed once its bodies have this size
RECEIVE_LIMIT: Final = 64  # frames taken before other work of the loop gets its turn
RETRY_S: Final = 0.005  # until a full socket is tried again
HIGH_WATER: Final = 10_000  # frames queued in ZMQ per peer
CURVE_ROUTER: Final = "router"
CURVE_WORKER: Final = "worker"
ALLOWED: Final = "allowed"


class Garbage(Exception):
    """A frame that is not one of ours; says what it is."""


class WrongVersion(Exception):
    """A frame of another version of this protocol."""


class Codec:
    """Frames from and to messages; one direction's messages are decoded, any are encoded."""

    def __init__(self, incoming: Sequence[type]) -> None:
        union: Any = functools.reduce(operator.or_, incoming)
        self._decoder: msgspec.msgpack.Decoder[list[Any]] = msgspec.msgpack.Decoder(list[union])
        self._encode = msgspec.msgpack.Encoder().encode

    def encode(self, session: int, number: int, batch: Sequence[Any]) -> list[bytes]:
        return [HELLO, NUMBERS.pack(session, number), self._encode(batch)]

    def decode(self, frames: Sequence[bytes]) -> tuple[int, int, list[Any]]:
        """(session, number, messages); raises `Garbage` or `WrongVersion`."""
        if frames and frames[0] != HELLO and frames[0].startswith(MAGIC):
            raise WrongVersion(frames[0][len(MAGIC) :][:16].decode("latin-1"))
        if len(frames) != 3 or frames[0] != HELLO or len(frames[1]) != NUMBERS.size:
            raise Garbage(f"{len(frames)} frames that are not ours")
        try:
            session, number = NUMBERS.unpack(frames[1])
            return session, number, self._decoder.decode(frames[2])
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise Garbage(f"a batch that cannot be read: {error}") from None


class AwakeClock:
    """Seconds in which this process could hear its peers, for who calls it about every `period_s`.

    Time between two calls counts as `period_s` at most: what is beyond was a pause (SIGSTOP, a
    machine that stalls, a blocked loop). What peers sent in a pause is still in the socket after
    it, so the pause is no silence of theirs.
    """

    def __init__(self, clock: Callable[[], float], period_s: float) -> None:
        self.period_s = period_s
        self._clock = clock
        self._last_s = clock()
        self._awake_s = 0.0

    def __call__(self) -> float:
        now_s = self._clock()
        self._awake_s += min(now_s - self._last_s, self.period_s)
        self._last_s = now_s
        return self._awake_s


class Quiet:
    """Logs the first of its kind, then at most one line a minute with how many there were."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, interval_s: float = 60.0
    ) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def warning(self, kind: str, text: str) -> None:
        now_s, (last_s, count) = self._clock(), self._seen.get(kind, (None, 0))
        if last_s is not None and now_s - last_s < self._interval_s:
            self._seen[kind] = (last_s, count + 1)
            return
        more = f" ({count} more since the last line)" if count else ""
        logger.warning("%s%s", text, more)
        self._seen[kind] = (now_s, 0)
        if len(self._seen) > 1000:
            self._seen.popitem(last=False)


@dataclass(slots=True)
class Outbox:
    """Messages for one peer that have not left yet, in frames of at most about `BATCH_BYTES`."""

    session: int
    next_number: int = 0
    batches: list[list[Any]] = field(default_factory=list)
    num_bytes: int = 0  # of bodies waiting here
    _open_bytes: int = 0  # in the last batch

    def put(self, message: Any, num_bytes: int) -> None:
        if not self.batches or self._open_bytes >= BATCH_BYTES:
            self.batches.append([])
            self._open_bytes = 0
        self.batches[-1].append(message)
        self._open_bytes += num_bytes
        self.num_bytes += num_bytes


class Channel:
    """A ROUTER or DEALER socket whose frames are given to `on_frames`, many peers to one socket.

    `address` is b"" on a DEALER. Never blocks: what does not fit a full socket waits in its
    outbox, whose size is for the owner to watch.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        codec: Codec,
        on_frames: Callable[[bytes, list[bytes]], None],
    ) -> None:
        self.codec = codec
        self._socket = socket
        self._is_router = socket.type == zmq.ROUTER
        self._on_frames = on_frames
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[bytes, Outbox] = {}  # with something to send
        self._is_flush_planned = False
        self._is_closed = False
        self._loop.add_reader(socket.fileno(), self._receive)
        self._loop.call_soon(self._receive)  # the descriptor tells only of changes

    def send(self, address: bytes, outbox: Outbox, message: Any, num_bytes: int = 0) -> None:
        """Send with whatever else is sent in this tick."""
        outbox.put(message, num_bytes)
        self._waiting[address] = outbox
        self._plan_flush()

    def send_frames(self, address: bytes, frames: list[bytes]) -> None:
        """Send plain frames, or nothing at all if the socket is full or the peer is gone."""
        try:
            self._send(address, frames)
        except zmq.ZMQError as error:
            logger.debug("could not send to a peer: %s", error)

    def drop(self, address: bytes) -> None:
        """Forget what has not left for a peer."""
        self._waiting.pop(address, None)

    def flush(self) -> None:
        """Send what can be sent now."""
        self._is_flush_planned = False
        if self._is_closed:
            return
        is_full = False
        for address, outbox in list(self._waiting.items()):
            if self._flush_one(address, outbox):
                self._waiting.pop(address, None)
            else:
                is_full = True
        if is_full:
            self._loop.call_later(RETRY_S, self.flush)
            self._is_flush_planned = True
        self._receive()  # sending may have swallowed the news that something came in

    def close(self, linger_ms: int = 500) -> None:
        """Send what can be sent now, and close the socket."""
        if not self._is_closed:
            self.flush()
            self._is_closed = True
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close(linger=linger_ms)

    def _plan_flush(self) -> None:
        if not self._is_flush_planned:
            self._is_flush_planned = True
            self._loop.call_soon(self.flush)

    def _flush_one(self, address: bytes, outbox: Outbox) -> bool:
        """Whether all of it left, or can never leave."""
        while outbox.batches:
            frames = self.codec.encode(outbox.session, outbox.next_number, outbox.batches[0])
            try:
                self._send(address, frames)
            except zmq.Again:
                return False
            except zmq.ZMQError as error:
                # No such peer: should it dial again within its session, it shall see the gap.
                logger.debug("could not send to a peer: %s", error)
                outbox.next_number += 1
                outbox.batches.clear()
                break
            outbox.next_number += 1
            del outbox.batches[0]
        outbox.num_bytes = 0
        return True

    def _send(self, address: bytes, frames: list[bytes]) -> None:
        parts = [address, *frames] if self._is_router else frames
        self._socket.send_multipart(parts, zmq.NOBLOCK)

    def _receive(self) -> None:
        for _ in range(RECEIVE_LIMIT):
            if self._is_closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                logger.error("router socket: %s", error)
                return
            address = frames.pop(0) if self._is_router else b""
            self._on_frames(address, frames)
        self._loop.call_soon(self._receive)


# -- sockets -------------------------------------------------------------------------------------


def listen(
    context: zmq.Context[Any], endpoint: str, keys: str, allowed: Allowed | None
) -> zmq.Socket[bytes]:
    """A ROUTER socket bound to `endpoint`; raises `ConfigError`."""
    socket = _socket(context, zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a worker that dials again is the same worker
    if allowed is not None:
        socket.curve_publickey, socket.curve_secretkey = _own_key(keys, CURVE_ROUTER)
        socket.curve_server = True
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        raise ConfigError("--endpoint", f"{endpoint}: {error}") from None
    return socket


def dial(context: zmq.Context[Any], endpoint: str, keys: str, identity: bytes) -> zmq.Socket[bytes]:
    """A DEALER socket that connects to `endpoint`, again and again; raises `ConfigError`."""
    own_key = _own_key(keys, CURVE_WORKER) if keys else None  # before there is a socket to close
    router_key = _load_key(Path(keys) / f"{CURVE_ROUTER}.key")[0] if keys else None
    socket = _socket(context, zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    if own_key is not None:
        socket.curve_publickey, socket.curve_secretkey = own_key
        socket.curve_serverkey = router_key
    socket.connect(endpoint)
    return socket


def _socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.IPV6, 1)
    return socket


# -- keys ----------------------------------------------------------------------------------------


def make_keys(directory: str) -> None:
    """Write a key pair for the router and one for workers, and allow the latter.

    A worker needs router.key, worker.key and worker.key_secret; the router needs router.key_secret
    and the folder `allowed`, into which further workers' public keys can be put.
    """
    path = Path(directory)
    if (path / f"{CURVE_ROUTER}.key_secret").exists():
        raise ConfigError("--make-keys", f"{path} holds keys already")
    (path / ALLOWED).mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    for name in (CURVE_ROUTER, CURVE_WORKER):
        zmq.auth.create_certificates(path, name)
        (path / f"{name}.key_secret").chmod(0o600)
    public = path / f"{CURVE_WORKER}.key"
    (path / ALLOWED / public.name).write_bytes(public.read_bytes())


class Allowed:
    """The workers' public keys that may join; others are refused, and logged once a minute."""

    def __init__(self, context: zmq.Context[Any], keys: str) -> None:
        self._keys = {_load_key(path)[0] for path in sorted((Path(keys) / ALLOWED).glob("*.key"))}
        if not self._keys:
            raise ConfigError("--keys", f"no worker's public key in {Path(keys) / ALLOWED}")
        self._quiet = Quiet()
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether this key may join; called by ZMQ's authenticator with the key as Z85 text."""
        is_allowed = key in self._keys
        if not is_allowed:
            self._quiet.warning("key", "refused a worker whose key is not in the allow list")
        return is_allowed

    def stop(self) -> None:
        self._authenticator.stop()


def _own_key(keys: str, name: str) -> tuple[bytes, bytes]:
    public, secret = _load_key(Path(keys) / f"{name}.key_secret")
    if secret is None:
        raise ConfigError("keys", f"{keys}/{name}.key_secret holds no secret key")
    return public, secret


def _load_key(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError("keys", f"{path}: {error}") from None
