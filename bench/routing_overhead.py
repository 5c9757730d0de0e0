"""What a router adds: the same calls straight to a replica, through ours, and through the peer's.

Everything runs on this machine's cores, the load too, so `calls_per_s` and `frames_per_s` are of
the whole chain; `router_cpu_s_per_1000_calls` and `..._frames` are the router's own, and their
inverse is what one core of it could carry.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from bench.common import say
from bench.server import Server, free_port
from bench.stats import percentile

OPEN_STREAMS = 500
CALLERS = 64
FRAMES_PER_STREAM = 200
PEER_POLICY = "cache_aware"


def measure(seconds: float) -> dict[str, Any]:
    """Keys `overhead`, `peer` (None where sglang-router is not installed) and `paths`."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoint = f"ipc://{directory}/router.sock"
        ours = _start(stack, directory, "router", "autellix_sglang.router", "--endpoint", endpoint)
        replica = _start(
            stack, directory, "replica", "bench.echo_replica", "--router-endpoint", endpoint
        )
        ours.wait_ready()
        servers = {
            "direct": replica,
            "router": ours,
            "peer": _start_peer(stack, directory, replica),
        }
        paths = {name: _measure_path(name, server, seconds) for name, server in servers.items()}
    direct = paths["direct"]
    assert direct is not None
    return {
        "overhead": _over(paths["router"], direct),
        "peer": _over(paths["peer"], direct),
        "paths": paths,
    }


def _start(stack: ExitStack, directory: Path, name: str, module: str, *flags: str) -> Server:
    port = free_port()
    command = [sys.executable, "-m", module, "--port", str(port), *flags]
    server = Server(name, command, port, directory)
    stack.callback(server.stop)
    server.start()
    return server


def _start_peer(stack: ExitStack, directory: Path, replica: Server) -> Server | None:
    if importlib.util.find_spec("sglang_router") is None:
        say("sglang-router is not installed: no peer to compare with")
        return None
    peer = _start(
        stack, directory, "peer", "sglang_router.launch_router", "--host", "127.0.0.1",
        "--worker-urls", replica.base_url, "--policy", PEER_POLICY, "--log-level", "error",
        "--prometheus-port", str(free_port()),
    )  # fmt: skip
    peer.wait_ready(timeout_s=60)
    return peer


def _over(path: dict[str, float] | None, direct: dict[str, float]) -> dict[str, float] | None:
    """The contract's keys: added time to first byte, and throughput as it is."""
    if path is None:
        return None
    added = {key: path[key] - direct[key] for key in ("ttft_p50_ms", "ttft_p99_ms")}
    return {**added, **{key: path[key] for key in path if key not in added}}


def _measure_path(name: str, server: Server | None, seconds: float) -> dict[str, float] | None:
    if server is None:
        return None
    say(f"{name}: calls, frames, and {OPEN_STREAMS} open streams")
    return asyncio.run(_measure(server, seconds))


async def _measure(server: Server, seconds: float) -> dict[str, float]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.base_url, connector=connector) as session:
        await _until_served(session)

        async def short() -> int:
            return await _read(session, {})

        async def stream() -> int:
            return await _read(session, {"n": FRAMES_PER_STREAM})

        num_calls, calls_cpu_s = await _repeat(short, server, seconds)
        num_frames, frames_cpu_s = await _repeat(stream, server, seconds)
        before = _memory_bytes(server)
        waits, held = await _wait_with_open_streams(session, server, seconds)
    return {
        "ttft_p50_ms": 1e3 * percentile(waits, 0.5),
        "ttft_p99_ms": 1e3 * percentile(waits, 0.99),
        "calls_per_s": num_calls / seconds,
        "frames_per_s": num_frames / seconds,
        "cpu_s_per_1000_calls": 1e3 * calls_cpu_s / max(1, num_calls),
        "cpu_s_per_1000_frames": 1e3 * frames_cpu_s / max(1, num_frames),
        "kib_per_open_stream": max(0, held - before) / OPEN_STREAMS / 1024,
    }


async def _until_served(session: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                if await _read(session, {}) == 1:
                    return
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)


async def _read(session: aiohttp.ClientSession, asked: dict[str, Any]) -> int:
    """The number of events in an answer, 1 for one that is none; raises unless it is whole."""
    async with session.post("/generate", data=json.dumps({"text": "", **asked})) as response:
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
    slow = {"text": "", "n": 1 + round(2 * seconds + 4), "every_s": 0.5}
    streams = [await session.post("/generate", data=json.dumps(slow)) for _ in range(OPEN_STREAMS)]
    held = _memory_bytes(server)
    readers = [asyncio.create_task(stream.read()) for stream in streams]
    waits = [wait_s async for wait_s in _probe(session, seconds)]
    await asyncio.gather(*readers)
    return waits, held


async def _probe(session: aiohttp.ClientSession, seconds: float) -> AsyncIterator[float]:
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        started = time.perf_counter()
        async with session.post("/generate", data='{"text": "", "n": 1}') as response:
            await response.content.readany()
            yield time.perf_counter() - started
            await response.read()
        await asyncio.sleep(0.005)


def _processes(server: Server) -> Sequence[psutil.Process]:
    root = psutil.Process(server.pid)
    return [root, *root.children(recursive=True)]


def _cpu_s(server: Server) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in _processes(server))


def _memory_bytes(server: Server) -> int:
    return sum(process.memory_info().rss for process in _processes(server))
