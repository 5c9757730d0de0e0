"""What router and workers say to each other, and nothing else.

Array-like tagged structs: fields are only ever appended. A change that an older peer would
misunderstand raises `VERSION`, which is part of every frame (see `channel.py`).
"""

from __future__ import annotations

from typing import Final

import msgspec

VERSION: Final = 1
Headers = list[tuple[bytes, bytes]]
Visit = tuple[str, int, float]  # a program's key, its prompt tokens, seconds since its last call


class _Message(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    pass


# -- worker to router ----------------------------------------------------------------------------


class Register(_Message, frozen=True, tag="register"):
    """The first message of a session: who joins, and the programs that it has served."""

    worker: str
    url: str = ""  # where its own HTTP server listens, for people
    programs: list[Visit] = []
    is_draining: bool = False


class Report(_Message, frozen=True, tag="report"):
    """Heartbeat and load. `num_ours` of its live calls came by this router's session."""

    is_ready: bool
    num_ours: int = 0
    num_live: int = 0  # running or waiting in the engine, whoever sent them
    num_slots: int = 1
    call_s: float = 1.0
    prefill_tokens_per_s: float = 0.0  # 0: not known
    kv_tokens: int = 0
    kv_used_tokens: int = 0
    computed_tokens: int = 0
    cache_hit_rate: float = 0.0
    programs: list[Visit] = []  # that other routers sent here since the last report


class Head(_Message, frozen=True, tag="head"):
    """Status and headers of an answer."""

    stream: int
    status: int
    headers: Headers = []


class Chunk(_Message, frozen=True, tag="chunk"):
    """Part of an answer's body; the last one has `is_last`."""

    stream: int
    body: bytes = b""
    is_last: bool = False


class Failed(_Message, frozen=True, tag="failed"):
    """The replica's app gave a call no proper end."""

    stream: int
    reason: str


class Leave(_Message, frozen=True, tag="leave"):
    """The worker stops: no more calls; those that run end in their own time."""


# -- router to worker ----------------------------------------------------------------------------


class Welcome(_Message, frozen=True, tag="welcome"):
    """The session stands; report this often, and give the router up after this much silence."""

    heartbeat_s: float
    timeout_s: float


class Alive(_Message, frozen=True, tag="alive"):
    """The router's heartbeat."""


class Call(_Message, frozen=True, tag="call"):
    """An HTTP request for the replica's app; the body is the client's, byte for byte.

    The worker sends at most `credit_bytes` of body before it is given more.
    """

    stream: int
    method: str
    path: str
    raw_path: bytes = b""
    query: bytes = b""
    headers: Headers = []
    body: bytes = b""
    client: tuple[str, int] | None = None
    program: str | None = None
    num_tokens: int = 0
    credit_bytes: int = 0
    deadline_s: float | None = None  # from now


class Credit(_Message, frozen=True, tag="credit"):
    """The client has taken this much: as much more may be sent."""

    stream: int
    num_bytes: int


class Cancel(_Message, frozen=True, tag="cancel"):
    """Nobody waits for this call any more."""

    stream: int


class Drain(_Message, frozen=True, tag="drain"):
    """An operator's wish, kept by the worker so that it outlives the router."""

    is_draining: bool


FROM_WORKER: Final = (Register, Report, Head, Chunk, Failed, Leave)
FROM_ROUTER: Final = (Welcome, Alive, Call, Credit, Cancel, Drain)
FromWorker = Register | Report | Head | Chunk | Failed | Leave
FromRouter = Welcome | Alive | Call | Credit | Cancel | Drain
