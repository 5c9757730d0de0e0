"""The worker agent: serves a replica's own ASGI app to routers, over ZMQ, in the same process.

    router A  <== DEALER ==  _Link  --+
                                      +--  WorkerAgent  --  app(scope, receive, send)
    router B  <== DEALER ==  _Link  --+

The agent dials out, so a router needs no list of workers. Per router there is one session at a
time; whatever goes wrong between the two (silence, a lost frame, a restart on either side) ends the
session and its calls, and a new one begins. To the app a call looks as it does under uvicorn: a
client that is gone shows as `http.disconnect`, a slow one as a `send` that takes its time.

Nothing here imports SGLang at module level; `attach` is where it comes in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket as sockets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgspec
import zmq
from starlette.types import ASGIApp, Message, Scope

from autellix_sglang.router.channel import (
    REFUSED,
    REJOIN,
    AwakeClock,
    Channel,
    Codec,
    Garbage,
    Outbox,
    Quiet,
    WrongVersion,
    dial,
)
from autellix_sglang.router.config import WorkerConfig
from autellix_sglang.router.messages import (
    FROM_ROUTER,
    Alive,
    Call,
    Cancel,
    Chunk,
    Credit,
    Drain,
    Failed,
    Head,
    Leave,
    Register,
    Report,
    Visit,
    Welcome,
)

logger = logging.getLogger(__name__)

MAX_PROGRAMS: Final = 10_000  # whose home a restarted router is told
JOIN_S: Final = 1.0  # between attempts to register
DIAL_S: Final = JOIN_S / 10  # between looks at whether it is time for one
REFUSED_S: Final = 30.0  # and after a refusal, which somebody has to see to
RATE_TOKENS: Final = 10_000  # prefilled before the rate is told: first batches are slow
SMOOTHING: Final = 0.02  # weight of the latest call in the mean time per call
PROGRAMS_PATH: Final = "/v1/programs"  # opening a program takes no slot
ASGI: Final = {"version": "3.0", "spec_version": "2.3"}  # uvicorn's

Probe = Callable[[], Awaitable[Report]]


@dataclass(frozen=True, slots=True)
class _Visited:
    num_tokens: int  # of the prompt of the program's last call
    at_s: float


class WorkerAgent:
    """Works for all routers of `config` between `start` and `stop`.

    `probe` reports on the engine; the agent fills in what it knows itself (`num_ours`, `call_s`,
    `programs`).
    """

    def __init__(
        self,
        app: ASGIApp,
        config: WorkerConfig,
        probe: Probe,
        url: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app = app
        self.name = config.name or f"{sockets.gethostname()}-{os.getpid()}"
        self.url = url
        self.probe = probe
        self.clock = clock
        self.is_draining = False
        self.call_s = 0.0  # mean time in a slot; 0: no call yet
        self._programs: OrderedDict[str, _Visited] = OrderedDict()  # by key, oldest first
        self._config = config
        self._links: list[_Link] = []

    async def start(self) -> None:
        """Dial every router; raises `ConfigError` for keys that cannot be read."""
        self._context: zmq.Context[Any] = zmq.Context()
        identity = f"{self.name}/{secrets.token_hex(4)}".encode()
        for endpoint in self._config.endpoints:
            redial = partial(dial, self._context, endpoint, self._config.keys, identity)
            self._links.append(_Link(self, endpoint, redial))
        logger.info("worker %r works for %s", self.name, ", ".join(self._config.endpoints))

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take no more calls, let those that run end for `grace_s`, and hang up."""
        for link in self._links:
            link.leave()
        deadline_s = self.clock() + grace_s
        while self.num_live and self.clock() < deadline_s:
            await asyncio.sleep(0.05)
        for link in self._links:
            await link.close()
        self._links.clear()
        self._context.term()

    @property
    def num_live(self) -> int:
        """Inference calls that came through routers and have not ended."""
        return sum(link.num_live for link in self._links)

    async def report(self, link: _Link) -> Report:
        """The state of the engine for one router; not ready if the engine cannot be asked."""
        try:
            found = await self.probe()
        except Exception as error:
            logger.warning("the engine's load could not be read: %s", error)
            found = Report(is_ready=False)
        return msgspec.structs.replace(
            found,
            num_ours=link.num_live,
            num_live=max(found.num_live, self.num_live),
            call_s=self.call_s or found.call_s,
            programs=link.take_news(),
        )

    def note_call(self, link: _Link, call: Call) -> None:
        """A program was sent here: remember it, and tell the other routers."""
        if call.program is None or not call.num_tokens:
            return
        self._programs[call.program] = visited = _Visited(call.num_tokens, self.clock())
        self._programs.move_to_end(call.program)
        if len(self._programs) > MAX_PROGRAMS:
            self._programs.popitem(last=False)
        for other in self._links:
            if other is not link:
                other.news[call.program] = visited

    def visits(self, programs: Mapping[str, _Visited] | None = None) -> list[Visit]:
        """Programs served here, by default all that are remembered, as routers are told."""
        now_s = self.clock()
        found = self._programs if programs is None else programs
        return [(key, v.num_tokens, now_s - v.at_s) for key, v in found.items()]

    def note_end(self, seconds: float, num_slots: int) -> None:
        """A call ended after so long here, part of which it may have waited for a slot."""
        in_slot_s = seconds * min(1.0, num_slots / max(1, self.num_live + 1))
        weight = SMOOTHING if self.call_s else 1.0
        self.call_s += weight * (in_slot_s - self.call_s)


class _Link:
    """The connection to one router: registers, reports, and runs the calls of its session."""

    def __init__(
        self, agent: WorkerAgent, endpoint: str, redial: Callable[[], zmq.Socket[bytes]]
    ) -> None:
        self.agent = agent
        self.news: dict[str, _Visited] = {}  # what this router does not know yet
        self.num_slots = 1
        self._endpoint = endpoint
        self._quiet = Quiet(agent.clock)
        self._streams: dict[int, _Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._outbox = Outbox(0)
        self._next_number = 0
        self._welcome: Welcome | None = None
        self._awake = AwakeClock(agent.clock, DIAL_S)
        self._heard_s = self._awake()
        self._next_join_s = agent.clock()
        self._is_leaving = False
        self._redial = redial
        self._channel = self._connect()
        self._beating = asyncio.create_task(self._beat())

    @property
    def num_live(self) -> int:
        return sum(stream.call.num_tokens > 0 for stream in self._streams.values())

    def leave(self) -> None:
        self._is_leaving = True
        if self._welcome is not None:
            self.send(self._outbox.session, Leave())

    async def close(self) -> None:
        self._beating.cancel()
        self._end_session()
        self._channel.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._beating, *self._tasks, return_exceptions=True)

    def take_news(self) -> list[Visit]:
        news, self.news = self.news, {}
        return self.agent.visits(news)

    def send(self, session: int, message: Any, num_bytes: int = 0) -> None:
        """Send within a session; what belongs to an earlier one is dropped."""
        if session == self._outbox.session:
            self._channel.send(b"", self._outbox, message, num_bytes)

    # -- sessions --------------------------------------------------------------------------------

    async def _beat(self) -> None:
        while True:
            try:
                await self._beat_once()
            except Exception as error:  # keys that are being changed, no descriptor to be had
                self._quiet.warning("beat", f"could not work for {self._endpoint}: {error}")
            await asyncio.sleep(self._awake.period_s)

    async def _beat_once(self) -> None:
        silent_s = self._awake() - self._heard_s
        if self._welcome is not None and silent_s > self._welcome.timeout_s:
            logger.warning("no word from the router at %s, joining anew", self._endpoint)
            self._end_session()
        if self._welcome is not None:
            report = await self.agent.report(self)
            self.num_slots = report.num_slots
            self.send(self._outbox.session, report)
        elif self.agent.clock() >= self._next_join_s and not self._is_leaving:
            self._join()

    def _connect(self) -> Channel:
        return Channel(self._redial(), Codec(FROM_ROUTER), self._take_frames)

    def _join(self) -> None:
        self._end_session()
        self._next_join_s = self.agent.clock() + JOIN_S
        silent_s = self._awake() - self._heard_s
        if silent_s > JOIN_S:
            # What was sent into the silence would all arrive at its end, and TCP tries ever less.
            self._channel.close(linger_ms=0)
            self._channel = self._connect()
        if silent_s > 10 * JOIN_S:
            self._quiet.warning("silent", f"no answer from a router at {self._endpoint} yet")
        agent = self.agent
        register = Register(
            worker=agent.name,
            url=agent.url,
            programs=agent.visits(),
            is_draining=agent.is_draining,
        )
        self._channel.send(b"", self._outbox, register)

    def _end_session(self) -> None:
        """Nobody waits for the answers of this session any more."""
        self._welcome = None
        self._awake.period_s = DIAL_S
        self._channel.drop(b"")
        self._outbox = Outbox(secrets.randbits(63) | 1)
        self._next_number = 0
        for stream in self._streams.values():
            stream.cancel()
        self._streams.clear()

    # -- frames ----------------------------------------------------------------------------------

    def _take_frames(self, address: bytes, frames: list[bytes]) -> None:
        if frames and frames[0] == REFUSED:
            self._be_refused(frames)
            return
        if frames and frames[0] == REJOIN:
            if self._welcome is not None:
                logger.info("the router at %s asks to join anew", self._endpoint)
                self._end_session()
                self._next_join_s = self.agent.clock()
            return
        try:
            session, number, messages = self._channel.codec.decode(frames)
        except WrongVersion as error:
            self._quiet.warning("version", f"router {self._endpoint} speaks version {error}")
            return
        except Garbage as error:
            self._quiet.warning("garbage", f"ignored {error}, from {self._endpoint}")
            return
        if session == self._outbox.session:
            self._take_batch(number, messages)

    def _be_refused(self, frames: list[bytes]) -> None:
        reason = b" ".join(frames[1:])[:200].decode(errors="replace")
        self._quiet.warning("refused", f"the router at {self._endpoint} refuses us: {reason}")
        self._end_session()
        self._next_join_s = self.agent.clock() + REFUSED_S

    def _take_batch(self, number: int, messages: list[Any]) -> None:
        if number != self._next_number:
            logger.warning("frames from the router at %s were lost, joining anew", self._endpoint)
            self._end_session()
            self._next_join_s = self.agent.clock()
            return
        self._next_number += 1
        self._heard_s = self._awake()
        for message in messages:
            self._take(message)

    def _take(self, message: Any) -> None:
        match message:
            case Call():
                self._serve(message)
            case Credit():
                if message.stream in self._streams:
                    self._streams[message.stream].add_credit(message.num_bytes)
            case Cancel():
                stream = self._streams.pop(message.stream, None)
                if stream is not None:
                    stream.cancel()
            case Welcome():
                self._welcome = message
                self._awake.period_s = message.heartbeat_s
            case Drain():
                self.agent.is_draining = message.is_draining
            case Alive():
                pass

    def _serve(self, call: Call) -> None:
        stream = self._streams[call.stream] = _Stream(self, self._outbox.session, call)
        self.agent.note_call(self, call)
        task = asyncio.create_task(self._run(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, stream: _Stream) -> None:
        started_s = self.agent.clock()
        await stream.run()
        number = stream.call.stream
        if self._streams.get(number) is not stream:  # it was cancelled
            return  # a restarted router counts from 1 again: the number may be another call's
        del self._streams[number]
        if stream.call.num_tokens and stream.call.path != PROGRAMS_PATH:
            self.agent.note_end(self.agent.clock() - started_s, self.num_slots)


class _Stream:
    """One call in the app: ASGI `receive` and `send` on one side, messages on the other."""

    def __init__(self, link: _Link, session: int, call: Call) -> None:
        self.call = call
        self._link = link
        self._session = session
        self._credit_bytes = call.credit_bytes
        self._wake = asyncio.Event()  # there is credit, or nobody waits for the answer
        self._is_gone = asyncio.Event()
        self._is_received = False
        self._is_started = False
        self._is_ended = False

    def add_credit(self, num_bytes: int) -> None:
        self._credit_bytes += num_bytes
        self._wake.set()

    def cancel(self) -> None:
        """Let the app see that its client is gone; like uvicorn, leave the rest to the app."""
        self._is_gone.set()
        self._wake.set()

    async def run(self) -> None:
        """Run the app on this call; whatever it does, the call gets an end."""
        timer = None
        if self.call.deadline_s is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(max(0.0, self.call.deadline_s), self.cancel)
        reason = "the app ended without a whole answer"
        try:
            await self._link.agent.app(self._scope(), self._receive, self._send)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("%s %s failed", self.call.method, self.call.path)
            reason = f"{type(error).__name__} in the replica's app"
        finally:
            if timer is not None:
                timer.cancel()
            if not (self._is_ended or self._is_gone.is_set()):
                self._link.send(self._session, Failed(stream=self.call.stream, reason=reason))

    def _scope(self) -> Scope:
        call = self.call
        return {
            "type": "http",
            "asgi": dict(ASGI),
            "http_version": "1.1",
            "method": call.method,
            "scheme": "http",
            "path": call.path,
            "raw_path": call.raw_path,
            "query_string": call.query,
            "root_path": "",
            "headers": call.headers,
            "client": call.client,
            "server": None,
            "state": {},
        }

    async def _receive(self) -> Message:
        if not self._is_received:
            self._is_received = True
            return {"type": "http.request", "body": self.call.body, "more_body": False}
        await self._is_gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._is_gone.is_set():
            return
        if message["type"] == "http.response.start":
            self._is_started = True
            headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            head = Head(stream=self.call.stream, status=message["status"], headers=headers)
            self._link.send(self._session, head)
        elif message["type"] == "http.response.body" and not self._is_ended:
            assert self._is_started, "a body before its head"
            await self._send_body(message.get("body", b""), not message.get("more_body", False))

    async def _send_body(self, body: bytes, is_last: bool) -> None:
        """Send what the credit allows, and wait for more of it."""
        while len(body) > self._credit_bytes:
            if self._credit_bytes > 0:
                part, body = body[: self._credit_bytes], body[self._credit_bytes :]
                self._send_chunk(part, is_last=False)
            self._wake.clear()
            await self._wake.wait()
            if self._is_gone.is_set():
                return
        self._is_ended = is_last
        if body or is_last:
            self._send_chunk(body, is_last=is_last)

    def _send_chunk(self, part: bytes, *, is_last: bool) -> None:
        self._credit_bytes -= len(part)
        chunk = Chunk(stream=self.call.stream, body=part, is_last=is_last)
        self._link.send(self._session, chunk, len(part))


# -- in SGLang's HTTP process --------------------------------------------------------------------


def attach(app: Any, manager: Any, config: WorkerConfig, url: str) -> None:
    """Let an agent work while SGLang's app runs: from its start-up on to its shutdown."""
    original = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(started: Any) -> Any:
        async with original(started) as state:
            agent = WorkerAgent(app, config, lambda: probe_sglang(manager), url)
            await agent.start()
            try:
                yield state
            finally:
                await agent.stop()

    app.router.lifespan_context = lifespan


async def probe_sglang(manager: Any) -> Report:
    """What SGLang's tokenizer manager knows of its scheduler; ready once it has warmed up."""
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    is_ready = manager.server_status == ServerStatus.Up and not manager.gracefully_exit
    loads = await manager.get_loads()
    if not loads:
        return Report(is_ready=is_ready)
    load = loads[0]  # one scheduler: data parallelism is replicas here
    num_computed, busy_s = load.total_prefill_uncached_tokens, load.total_prefill_busy_us / 1e6
    has_rate = num_computed >= RATE_TOKENS and busy_s > 0
    return Report(
        is_ready=is_ready,
        num_live=load.num_running_reqs + load.num_waiting_reqs,
        num_slots=max(1, load.max_running_requests),
        prefill_tokens_per_s=num_computed / busy_s if has_rate else 0.0,
        kv_tokens=load.max_total_num_tokens,
        kv_used_tokens=load.num_used_tokens,
        computed_tokens=num_computed,
        cache_hit_rate=load.cache_hit_rate,
    )
