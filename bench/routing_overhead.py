"""What a router adds: the same calls straight to a replica, through ours, and through the peer's.

Everything runs on this machine's cores, the load too. So `calls_per_s` and `frames_per_s` are what
one core of the router carries: the work done over the CPU time that the router's own processes
took for it. What the whole chain did is in `chain_calls_per_s` and `chain_frames_per_s`. Times to
first byte are those of single calls while `OPEN_STREAMS` others stream an event every half second.

`slow_readers_ratio`: the median time in which `FAST_READERS` clients at full speed read an answer
while `SLOW_READERS` others read one byte a second of endless ones, over that without them.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil

from bench.common import say
from bench.routing_live import peer_command
from bench.server import Server, free_port
from bench.stats import percentile, ratio

OPEN_STREAMS = 500
CALLERS = 64
# One event a millisecond at most: sent all at once, they would leave as one.
PACED: Final[dict[str, Any]] = {"n": 200, "every_s": 0.001}
SLOW_READERS = 100
FAST_READERS = 100
SLOW_ROUNDS = 5
IDLE_TIMEOUT_S = 20.0
PEER_POLICY = "cache_aware"
DIRECT: Final = "direct"

Numbers = dict[str, float]


@dataclass(frozen=True, slots=True)
class Overhead:
    """What was measured, by path: `direct`, `router`, and `peer` where there is one."""

    paths: dict[str, Numbers]

    @classmethod
    def measure(cls, seconds: float, peer_python: str | None = None) -> Overhead:
        """`peer_python` is a Python with sglang-router; by default this one, if it has it."""
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            endpoint = f"ipc://{directory}/router.sock"
            router = _start(
                stack, directory, "router", _module("autellix_sglang.router"),
                "--endpoint", endpoint,
            )  # fmt: skip
            replica = _start(
                stack, directory, "replica", _module("bench.echo_replica"),
                "--router-endpoint", endpoint,
            )  # fmt: skip
            router.wait_ready()
            servers = {DIRECT: replica, "router": router}
            peer = peer_command(peer_python)
            if peer is not None:
                servers["peer"] = _start_peer(stack, directory, peer, replica)
            return cls({name: _measure_path(name, s, seconds) for name, s in servers.items()})

    def over_direct(self, name: str) -> Any:
        """The contract's keys: times to first byte are what is added. None for a path not there."""
        path, direct = self.paths.get(name), self.paths[DIRECT]
        if path is None:
            return None
        added = {key: path[key] - direct[key] for key in ("ttft_p50_ms", "ttft_p99_ms")}
        return {**path, **added}

    @property
    def columns(self) -> list[str]:
        return ["", *self.paths, *(["router / peer"] if "peer" in self.paths else [])]

    @property
    def rows(self) -> list[list[object]]:
        """One per number; those of the direct path that are a router's own are left open."""
        rows: list[list[object]] = []
        for key in self.paths["router"]:
            row: list[object] = [key, *(path.get(key) for path in self.paths.values())]
            if "peer" in self.paths:
                row.append(ratio(self.paths["router"][key], self.paths["peer"][key]))
            rows.append(row)
        return rows


# -- servers -------------------------------------------------------------------------------------


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def _start(
    stack: ExitStack, directory: Path, name: str, command: Sequence[str], *flags: str
) -> Server:
    port = free_port()
    server = Server(name, [*command, "--port", str(port), *flags], port, directory)
    stack.callback(server.stop)
    server.start()
    return server


def _start_peer(
    stack: ExitStack, directory: Path, command: Sequence[str], replica: Server
) -> Server:
    peer = _start(
        stack, directory, "peer", command, "--host", "127.0.0.1",
        "--worker-urls", replica.base_url, "--policy", PEER_POLICY, "--log-level", "error",
        "--prometheus-port", str(free_port()),
    )  # fmt: skip
    peer.wait_ready(timeout_s=60)
    return peer


# -- measurements --------------------------------------------------------------------------------


def _measure_path(name: str, server: Server, seconds: float) -> Numbers:
    say(f"{name}: calls, frames, and {OPEN_STREAMS} open streams")
    return asyncio.run(_measure(server, seconds, is_router=name != DIRECT))


async def _measure(server: Server, seconds: float, *, is_router: bool) -> Numbers:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        server.base_url, connector=connector, headers={"content-type": "application/json"}
    ) as session:
        await _until_served(session)

        async def short() -> int:
            return await _read(session, {})

        async def stream() -> int:
            return await _read(session, PACED)

        num_calls, calls_cpu_s = await _repeat(short, server, seconds)
        num_frames, frames_cpu_s = await _repeat(stream, server, seconds)
        before = _memory_bytes(server)
        waits, held = await _wait_with_open_streams(session, server, seconds)
        slow = await _slow_readers(session, server, seconds) if is_router else {}
    found = {
        "ttft_p50_ms": 1e3 * percentile(waits, 0.5),
        "ttft_p99_ms": 1e3 * percentile(waits, 0.99),
        "chain_calls_per_s": num_calls / seconds,
        "chain_frames_per_s": num_frames / seconds,
    }
    own = {
        "calls_per_s": num_calls / max(1e-3, calls_cpu_s),
        "frames_per_s": num_frames / max(1e-3, frames_cpu_s),
        "kib_per_open_stream": max(0, held - before) / OPEN_STREAMS / 1024,
    }
    return found | own | slow if is_router else found


async def _until_served(session: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                if await _read(session, {}) == 1:
                    return
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)


def _body(asked: dict[str, Any]) -> bytes:
    """What is asked of the replica goes into the prompt: the peer drops fields it does not know."""
    return json.dumps({"text": json.dumps(asked), "stream": "n" in asked}).encode()


async def _read(session: aiohttp.ClientSession, asked: dict[str, Any]) -> int:
    """The number of events in an answer, 1 for one that is none; raises unless it is whole."""
    async with session.post("/generate", data=_body(asked)) as response:
        body = await response.read()
        response.raise_for_status()
    if "n" not in asked:
        return 1
    count = body.count(b"data: ") - 1
    assert count == asked["n"], f"{count} of {asked['n']} events"
    return count


async def _repeat(
    act: Callable[[], Awaitable[int]], server: Server, seconds: float
) -> tuple[int, float]:
    """(what `CALLERS` loops of `act` count within so many seconds, the server's CPU seconds)."""
    end_s = time.perf_counter() + seconds
    before_s = _cpu_s(server)

    async def loop() -> int:
        total = 0
        while time.perf_counter() < end_s:
            total += await act()
        return total

    counts = await asyncio.gather(*(loop() for _ in range(CALLERS)))
    return sum(counts), _cpu_s(server) - before_s


async def _wait_with_open_streams(
    session: aiohttp.ClientSession, server: Server, seconds: float
) -> tuple[list[float], int]:
    """Times to first byte of single calls while many slow streams are open; memory meanwhile."""
    slow = _body({"n": 1 + round(2 * seconds + 4), "every_s": 0.5})
    streams = [await session.post("/generate", data=slow) for _ in range(OPEN_STREAMS)]
    held = _memory_bytes(server)
    readers = [asyncio.create_task(stream.read()) for stream in streams]
    waits = [wait_s async for wait_s in _probe(session, seconds)]
    await asyncio.gather(*readers)
    return waits, held


async def _probe(session: aiohttp.ClientSession, seconds: float) -> AsyncIterator[float]:
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        started = time.perf_counter()
        async with session.post("/generate", data=_body({"n": 1})) as response:
            await response.content.readany()
            yield time.perf_counter() - started
            await response.read()
        await asyncio.sleep(0.005)


async def _slow_readers(session: aiohttp.ClientSession, server: Server, seconds: float) -> Numbers:
    """What clients that hardly read cost those that do, and the router's memory."""
    before, alone, beside = _memory_bytes(server), [], []
    held = before
    for _ in range(SLOW_ROUNDS):
        alone += await _read_times(session, seconds / 2)
        slow = [asyncio.create_task(_read_slowly(server)) for _ in range(SLOW_READERS)]
        await _until_idle(server)  # they are held back
        beside += await _read_times(session, seconds / 2)
        held = max(held, _memory_bytes(server))
        for reader in slow:
            reader.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
    return {
        "slow_readers_ratio": percentile(beside, 0.5) / percentile(alone, 0.5),
        "slow_reader_kib": max(0, held - before) / SLOW_READERS / 1024,
    }


async def _until_idle(server: Server) -> None:
    """Wait until the server has nothing to do, at most `IDLE_TIMEOUT_S`."""
    end_s = time.perf_counter() + IDLE_TIMEOUT_S
    while time.perf_counter() < end_s:
        before_s = _cpu_s(server)
        await asyncio.sleep(0.5)
        if _cpu_s(server) - before_s < 0.02:
            return


async def _read_times(session: aiohttp.ClientSession, seconds: float) -> list[float]:
    """How long each answer took `FAST_READERS` clients, one after the other."""
    end_s = time.perf_counter() + seconds

    async def loop() -> list[float]:
        times: list[float] = []
        while not times or time.perf_counter() < end_s:
            started = time.perf_counter()
            await _read(session, PACED)
            times.append(time.perf_counter() - started)
        return times

    found = await asyncio.gather(*(loop() for _ in range(FAST_READERS)))
    return [seconds for times in found for seconds in times]


async def _read_slowly(server: Server) -> None:
    """One byte a second of an answer without end, until cancelled."""
    host, _, port = server.base_url.rpartition("/")[2].partition(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    body = _body({"n": 10_000_000})
    head = (
        "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with connection:
        await loop.sock_sendall(connection, head.encode() + body)
        while await loop.sock_recv(connection, 1):
            await asyncio.sleep(1.0)


def _processes(server: Server) -> Sequence[psutil.Process]:
    root = psutil.Process(server.pid)
    return [root, *root.children(recursive=True)]


def _cpu_s(server: Server) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in _processes(server))


def _memory_bytes(server: Server) -> int:
    return sum(process.memory_info().rss for process in _processes(server))
