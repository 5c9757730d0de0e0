"""The router's side of the transport: workers, calls in flight, and what happens when one dies.

    app.py --- Hub.open(request) ---> Answer: status, headers, pieces of the body
                 |
                 |  place (balance.py), send, wait for the first byte; on a lost worker place again
                 v
             RemoteWorker  --- Call, Credit, Cancel --->  worker agent
                           <-- Head, Chunk, Failed, Report ---

A call is an `Answer` over one or more attempts, each a `_Stream` with a number of its own on one
worker. What a worker says about a stream that is no longer its own is ignored, so no call is
answered twice. Nothing here knows HTTP servers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from statistics import median
from typing import Any, Final

import zmq

from autellix_sglang.errors import AutellixError
from autellix_sglang.router import balance
from autellix_sglang.router.balance import POLICIES, Choice, Programs
from autellix_sglang.router.channel import (
    REFUSED,
    REJOIN,
    Allowed,
    AwakeClock,
    Channel,
    Codec,
    Garbage,
    Outbox,
    Quiet,
    WrongVersion,
    listen,
)
from autellix_sglang.router.config import RouterConfig
from autellix_sglang.router.messages import (
    FROM_WORKER,
    VERSION,
    Alive,
    Call,
    Cancel,
    Chunk,
    Credit,
    Drain,
    Failed,
    Head,
    Headers,
    Leave,
    Register,
    Report,
    Visit,
    Welcome,
)

logger = logging.getLogger(__name__)

LINK_RETRIES: Final = 5  # after a break of the link, which is no call's doing
OUTBOX_BYTES: Final = 1 << 28  # a worker that takes nothing while this much waits gets no more


class RouterError(AutellixError):
    """A call that the router has to answer itself; `status` is the HTTP status."""

    status = 502


class NoWorkerError(RouterError):
    """No worker takes calls now, or the router holds as many as it may."""

    status = 503


class WorkerLostError(RouterError):
    """The worker is gone, and with it the answer or the rest of it."""


class LinkLostError(WorkerLostError):
    """The session ended while the worker lives: the link broke, or the router was away too long."""


class WorkerFailedError(RouterError):
    """The replica's app gave no proper answer; trying elsewhere would not help."""


class DeadlineError(RouterError):
    """The call did not end in time."""

    status = 504


class State(Enum):
    """What a worker can do for us."""

    STARTING = "starting"  # registered, its engine is not ready
    READY = "ready"
    DRAINING = "draining"  # finishes what it has
    LEAVING = "leaving"  # the same, by its own wish


@dataclass(slots=True, kw_only=True)
class Request:
    """What a client asks, and what placement needs to know of it.

    Its body is dropped when the answer begins: from then on nothing is sent again.
    """

    method: str
    path: str
    raw_path: bytes = b""
    query: bytes = b""
    headers: Headers = field(default_factory=list)
    body: bytes = b""
    client: tuple[str, int] | None = None
    program: str | None = None
    num_tokens: int = 0  # of its prompt; 0: no inference
    beginnings: tuple[tuple[str, int], ...] = ()  # see `balance.Call`
    worker: str | None = None  # the only one that will do
    can_retry: bool = True
    timeout_s: float | None = None


class _Stream:
    """One attempt at a call on one worker."""

    def __init__(
        self, number: int, worker: RemoteWorker, num_uncached: int, request: Request
    ) -> None:
        self.number = number
        self.worker = worker
        self.request = request
        self.num_uncached = num_uncached  # counted as pending until the first byte
        self.head: Head | None = None
        self.chunks: deque[bytes] = deque()
        self.is_whole = False
        self.error: RouterError | None = None
        self.timer: asyncio.TimerHandle | None = None  # its deadline
        self._news = asyncio.Event()

    def take(self, message: Head | Chunk) -> None:
        if isinstance(message, Head):
            self.head = message
            return
        self.is_whole = self.is_whole or message.is_last
        self.chunks.append(message.body)
        self._news.set()

    def fail(self, error: RouterError) -> None:
        self.error = self.error or error
        self._news.set()

    async def news(self) -> None:
        """Return when there are chunks or an error."""
        await self._news.wait()
        self._news.clear()

    def take_body(self) -> bytes:
        """All that has arrived, as one piece."""
        body = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
        self.chunks.clear()
        return body


class RemoteWorker:
    """A registered worker during one session."""

    def __init__(self, hub: Hub, address: bytes, session: int, register: Register) -> None:
        self.id = register.worker
        self.url = register.url
        self.address = address
        self.displaced: set[bytes] = set()  # addresses of others that had its name before
        self.outbox = Outbox(session)
        self.next_number = 0
        self.heard_s = hub.awake()  # by that clock
        self.patience_s = hub.config.timeout_s  # of silence, until it counts as lost
        self.report = Report(is_ready=False)
        self.is_draining = register.is_draining
        self.is_leaving = False
        self.streams: dict[int, _Stream] = {}
        self.num_calls = 0  # ended, since it registered
        self._num_own = 0  # inference calls of ours in it
        self._pending_tokens = 0  # uncached, of those without a first byte
        self._hub = hub

    @property
    def state(self) -> State:
        if self.is_leaving:
            return State.LEAVING
        if self.is_draining:
            return State.DRAINING
        return State.READY if self.report.is_ready else State.STARTING

    @property
    def can_take(self) -> bool:
        """Whether calls may be sent to it: ready, heard of lately, and reading what it is sent."""
        is_silent = self._hub.awake() - self.heard_s > self.patience_s / 2
        return self.state is State.READY and not is_silent and self.outbox.num_bytes < OUTBOX_BYTES

    def load(self) -> balance.Worker:
        """Its last report, corrected by what was sent and what ended since."""
        report = self.report
        return balance.Worker(
            id=self.id,
            num_live=max(0, report.num_live - report.num_ours) + self._num_own,
            num_slots=report.num_slots,
            call_s=report.call_s,
            pending_tokens=self._pending_tokens,
            prefill_tokens_per_s=report.prefill_tokens_per_s or self._hub.typical_prefill_rate,
            kv_tokens=report.kv_tokens,
            computed_tokens=report.computed_tokens,
        )

    def add(self, stream: _Stream) -> None:
        self.streams[stream.number] = stream
        self._num_own += stream.request.num_tokens > 0
        self._pending_tokens += stream.num_uncached

    def remove(self, stream: _Stream) -> bool:
        """Whether the stream was still here."""
        if self.streams.pop(stream.number, None) is None:
            return False
        if stream.timer is not None:
            stream.timer.cancel()
        self.answered(stream)
        self._num_own -= stream.request.num_tokens > 0
        self.num_calls += 1
        return True

    def answered(self, stream: _Stream) -> None:
        """The first byte is there: its prompt is computed."""
        self._pending_tokens -= stream.num_uncached
        stream.num_uncached = 0

    def send(self, message: Any, num_bytes: int = 0) -> None:
        self._hub.channel.send(self.address, self.outbox, message, num_bytes)


class Answer:
    """A call on its way: its head is there, its body comes in pieces."""

    def __init__(self, hub: Hub, stream: _Stream) -> None:
        assert stream.head is not None
        self.status = stream.head.status
        self.headers = stream.head.headers
        self.worker = stream.worker.id
        self._hub = hub
        self._stream = stream
        self._taken_bytes = 0  # by the client, and not yet given back as credit

    async def pieces(self) -> AsyncGenerator[tuple[bytes, bool], None]:
        """(piece of the body, whether it is the last); raises `RouterError` if the rest is lost.

        A piece counts as taken by the client when the next one is asked for.
        """
        stream = self._stream
        while True:
            if stream.chunks:
                body, is_last = stream.take_body(), stream.is_whole
                yield body, is_last  # meanwhile more may arrive, the end included
                if is_last:
                    return
                self._give_credit(len(body))
            elif stream.error is not None:
                raise stream.error
            else:
                await stream.news()

    def close(self) -> None:
        """Whatever is left of the call is not wanted any more."""
        self._hub.close_stream(self._stream)

    def _give_credit(self, num_bytes: int) -> None:
        """Let the worker send as much more, told a quarter of the credit at a time."""
        stream = self._stream
        self._taken_bytes += num_bytes
        is_over = stream.is_whole or stream.error is not None
        if 4 * self._taken_bytes >= self._hub.config.credit_bytes and not is_over:
            stream.worker.send(Credit(stream=stream.number, num_bytes=self._taken_bytes))
            self._taken_bytes = 0


class Hub:
    """All workers and all calls of one router."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.clock = clock
        self.awake = AwakeClock(clock, config.heartbeat_s)
        self.programs = Programs()
        self.workers: dict[str, RemoteWorker] = {}  # by name
        self.num_open = 0
        self.num_buffered_bytes = 0
        self.num_retries = 0
        self.num_spills = 0
        self.typical_prefill_rate = config.prefill_tokens_per_s  # of a worker that knows none
        self._by_address: dict[bytes, RemoteWorker] = {}
        self._place = POLICIES[config.policy]
        self._turns = count()
        self._numbers = count(1)
        self._quiet = Quiet(clock)
        self._has_changed = asyncio.Event()  # a worker may have become ready
        self._allowed: Allowed | None = None

    async def start(self) -> None:
        """Listen for workers; raises `ConfigError` for an endpoint or keys that cannot work."""
        self._context: zmq.Context[Any] = zmq.Context()
        if self.config.keys:
            self._allowed = Allowed(self._context, self.config.keys)
        socket = listen(self._context, self.config.endpoint, self.config.keys, self._allowed)
        self.endpoint = str(socket.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")
        self.channel = Channel(socket, Codec(FROM_WORKER), self._take_frames)
        self._beating = asyncio.create_task(self._beat())

    async def stop(self) -> None:
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)
        for worker in list(self.workers.values()):
            self._lose(worker, "the router stops")
        self.channel.close()
        if self._allowed is not None:
            self._allowed.stop()
        self._context.term()

    # -- calls -----------------------------------------------------------------------------------

    async def open(self, request: Request) -> Answer:
        """Send a call and wait for its first byte; raises `RouterError` when it cannot be had.

        A worker that is lost before that is replaced by another, `config.retries` times: the call
        itself may be what kills it. Sessions that ended while their worker lives are counted apart.
        """
        deadline_s = self.clock() + self.timeout_s(request)
        tried: set[str] = set()
        num_lost: Counter[type[WorkerLostError]] = Counter()
        while True:
            worker, choice, call = await self._choose(request, tried, deadline_s)
            stream = self._send(request, worker, choice, call, deadline_s)
            try:
                while not stream.chunks:
                    if stream.error is not None:
                        raise stream.error
                    await stream.news()
                request.body = b""
                return Answer(self, stream)
            except WorkerLostError as error:
                if not isinstance(error, LinkLostError):
                    tried.add(worker.id)
                num_lost[type(error)] += 1  # a worker that joined anew may have been lost before
                limit = LINK_RETRIES if isinstance(error, LinkLostError) else self.config.retries
                if not request.can_retry or num_lost[type(error)] > limit:
                    raise
                self.num_retries += 1
            except BaseException:
                self.close_stream(stream)
                raise

    def timeout_s(self, request: Request) -> float:
        """How long a call may take: as long as it says, and not longer than we let any."""
        limit_s = self.config.request_timeout_s
        return min(request.timeout_s or limit_s, limit_s)

    def _expire(self, stream: _Stream) -> None:
        self.close_stream(stream, DeadlineError("the call did not end before its deadline"))

    def close_stream(self, stream: _Stream, error: RouterError | None = None) -> None:
        """Forget a stream; its worker is told unless it is done with it, its reader why."""
        worker = stream.worker
        if not worker.remove(stream):
            return
        if stream.request.num_tokens:
            self.programs.ended(stream.request.program, worker.id)
        if not stream.is_whole and stream.error is None:
            worker.send(Cancel(stream=stream.number))
            stream.fail(error or RouterError("cancelled"))

    async def _choose(
        self, request: Request, tried: set[str], deadline_s: float
    ) -> tuple[RemoteWorker, Choice, balance.Call]:
        """A worker for the call, waiting a while for one; raises `NoWorkerError`."""
        wait_until_s = min(deadline_s, self.clock() + self.config.worker_wait_s)
        call = balance.Call(
            program=request.program,
            num_tokens=max(1, request.num_tokens),
            turn=next(self._turns),
            beginnings=request.beginnings,
        )
        while True:
            able = [w for w in self.workers.values() if w.can_take]
            if request.worker is not None:
                able = [w for w in self.workers.values() if w.id == request.worker]
            fresh = [worker for worker in able if worker.id not in tried] or able
            if fresh:
                loads = [worker.load() for worker in fresh]
                choice = self._place(call, self.programs.view(call), loads)
                self.num_spills += choice.is_spill
                return self.workers[choice.worker], choice, call
            self._has_changed.clear()
            try:
                async with asyncio.timeout(wait_until_s - self.clock()):
                    await self._has_changed.wait()
            except TimeoutError:
                wanted = f"worker {request.worker!r} is not" if request.worker else "no worker is"
                raise NoWorkerError(f"{wanted} ready to take calls") from None

    def _send(
        self,
        request: Request,
        worker: RemoteWorker,
        choice: Choice,
        call: balance.Call,
        deadline_s: float,
    ) -> _Stream:
        num_uncached = choice.uncached_tokens if request.num_tokens else 0
        stream = _Stream(next(self._numbers), worker, num_uncached, request)
        left_s = deadline_s - self.clock()
        stream.timer = asyncio.get_running_loop().call_later(left_s, self._expire, stream)
        worker.add(stream)
        if request.num_tokens:
            self.programs.sent(call, choice, worker.load(), self.clock())
        message = Call(
            stream=stream.number,
            method=request.method,
            path=request.path,
            raw_path=request.raw_path,
            query=request.query,
            headers=request.headers,
            body=request.body,
            client=request.client,
            program=request.program,
            num_tokens=request.num_tokens,
            credit_bytes=self.config.credit_bytes,
            deadline_s=left_s,
        )
        worker.send(message, len(request.body))
        return stream

    # -- operators -------------------------------------------------------------------------------

    def drain(self, name: str, *, is_draining: bool) -> bool:
        """Let a worker finish and give it no more, or take that back; False if it is not known."""
        worker = self.workers.get(name)
        if worker is None:
            return False
        worker.is_draining = is_draining
        worker.send(Drain(is_draining=is_draining))
        self._has_changed.set()
        logger.info("worker %r is %s", name, worker.state.value)
        return True

    def describe(self) -> list[dict[str, Any]]:
        """Every worker's state, load, programs and cache use, in JSON types."""
        homed = self.programs.num_homed()
        return [
            {
                "id": worker.id,
                "url": worker.url,
                "state": worker.state.value,
                "live_calls": (load := worker.load()).num_live,
                "slots": load.num_slots,
                "delay_s": round(load.delay_s, 4),
                "open_streams": len(worker.streams),
                "ended_calls": worker.num_calls,
                "programs": homed.get(worker.id, 0),
                "kv_tokens": worker.report.kv_tokens,
                "kv_used_tokens": worker.report.kv_used_tokens,
                "cache_hit_rate": round(worker.report.cache_hit_rate, 4),
                "silent_s": round(self.awake() - worker.heard_s, 2),
            }
            for worker in self.workers.values()
        ]

    @property
    def num_ready(self) -> int:
        return sum(worker.can_take for worker in self.workers.values())

    # -- workers ---------------------------------------------------------------------------------

    def expect_end(self, name: str) -> None:
        """The worker's process is gone: take what it said last, and wait for no more."""
        worker = self.workers.get(name)
        if worker is not None:
            worker.patience_s = self.config.heartbeat_s

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.config.heartbeat_s)
            now_s = self.awake()
            for worker in list(self.workers.values()):
                if now_s - worker.heard_s > worker.patience_s:
                    self._lose(worker, f"nothing heard for {worker.patience_s:g} s")
                else:
                    worker.send(Alive())

    def _take_frames(self, address: bytes, frames: list[bytes]) -> None:
        try:
            session, number, messages = self.channel.codec.decode(frames)
        except WrongVersion as error:
            reason = f"this router speaks version {VERSION}, not {error}"
            self._quiet.warning("version", f"refused a worker of another version: {reason}")
            self.channel.send_frames(address, [REFUSED, reason.encode()])
            return
        except Garbage as error:
            self._quiet.warning("garbage", f"ignored {error}")
            return
        worker = self._by_address.get(address)
        is_over = address.startswith(b"\0")  # a worker that dialled anew: ZMQ renamed the old link
        if messages and isinstance(messages[0], Register) and number == 0 and not is_over:
            holder = self.workers.get(messages[0].worker)
            if holder is not None and address in holder.displaced:
                self._refuse(address, holder.id)
                return
            worker = self._register(address, session, messages[0])
        if worker is None or worker.outbox.session != session:
            self.channel.send_frames(address, [REJOIN])
        elif number != worker.next_number:
            self._lose(worker, "frames were lost", LinkLostError)
            self.channel.send_frames(address, [REJOIN])
        else:
            worker.next_number += 1
            worker.heard_s = self.awake()
            for message in messages:
                self._take(worker, message)

    def _register(self, address: bytes, session: int, register: Register) -> RemoteWorker:
        earlier = self.workers.get(register.worker)
        worker = RemoteWorker(self, address, session, register)
        if earlier is not None:
            is_other = earlier.address != address
            error = WorkerLostError if is_other else LinkLostError
            self._lose(earlier, "it joined anew", error)
            worker.displaced = earlier.displaced
            if is_other:  # it may still be there
                worker.displaced.add(earlier.address)
                self._refuse(earlier.address, earlier.id)
        self.workers[worker.id] = self._by_address[address] = worker
        self._learn(worker, register.programs)
        worker.send(Welcome(heartbeat_s=self.config.heartbeat_s, timeout_s=self.config.timeout_s))
        logger.info(
            "worker %r joined with %d programs (%s)",
            worker.id, len(register.programs), worker.url or "no url",
        )  # fmt: skip
        return worker

    def _refuse(self, address: bytes, name: str) -> None:
        """Another process has the name, and keeps it while it is there."""
        reason = f"another process joined as {name!r}"
        self.channel.send_frames(address, [REFUSED, reason.encode()])

    def _lose(
        self, worker: RemoteWorker, reason: str, error: type[WorkerLostError] = WorkerLostError
    ) -> None:
        """End a worker's session: its streams fail, its programs live elsewhere."""
        self._by_address.pop(worker.address, None)
        if self.workers.get(worker.id) is worker:
            del self.workers[worker.id]
            self.programs.forget_worker(worker.id)
        self.channel.drop(worker.address)
        is_expected = worker.is_leaving or not worker.streams
        log = logger.info if is_expected else logger.warning
        log("worker %r is gone with %d streams: %s", worker.id, len(worker.streams), reason)
        for stream in list(worker.streams.values()):
            stream.fail(error(f"worker {worker.id!r} was lost: {reason}"))
            worker.remove(stream)

    def _take(self, worker: RemoteWorker, message: Any) -> None:
        match message:
            case Head() | Chunk():
                self._take_answer(worker, message)
            case Report():
                self._take_report(worker, message)
            case Failed():
                stream = worker.streams.get(message.stream)
                if stream is not None:
                    stream.fail(WorkerFailedError(f"worker {worker.id!r}: {message.reason}"))
            case Leave():
                worker.is_leaving = True
                logger.info("worker %r leaves", worker.id)
            case Register():  # taken by `_register`
                pass

    def _take_answer(self, worker: RemoteWorker, message: Head | Chunk) -> None:
        stream = worker.streams.get(message.stream)
        if stream is None or stream.error is not None:
            return
        stream.take(message)
        if isinstance(message, Chunk):
            worker.answered(stream)
        if stream.is_whole:
            self.close_stream(stream)

    def _learn(self, worker: RemoteWorker, visits: list[Visit]) -> None:
        """A worker holds prefixes of these programs, from before or by another router."""
        load, now_s = worker.load(), self.clock()
        for key, num_tokens, ago_s in visits:
            self.programs.learn(key, load, num_tokens, now_s - ago_s)

    def _take_report(self, worker: RemoteWorker, report: Report) -> None:
        was_ready = worker.report.is_ready
        worker.report = report
        self._learn(worker, report.programs)
        rates = [w.report.prefill_tokens_per_s for w in self.workers.values()]
        known = [rate for rate in rates if rate > 0]
        self.typical_prefill_rate = median(known) if known else self.config.prefill_tokens_per_s
        if report.is_ready:
            self._has_changed.set()
        if report.is_ready != was_ready:
            logger.info("worker %r is %s", worker.id, worker.state.value)
