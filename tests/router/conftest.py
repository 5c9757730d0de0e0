"""A router and workers on real sockets: uvicorn in front, ZMQ between, a Starlette app behind."""

from __future__ import annotations

import asyncio
import gzip
import json
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

pytest.importorskip("zmq")

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from autellix_sglang.engine.worker import WorkerAgent
from autellix_sglang.router.__main__ import listen
from autellix_sglang.router.app import RouterApp
from autellix_sglang.router.config import RouterConfig, WorkerConfig
from autellix_sglang.router.hub import Hub
from autellix_sglang.router.messages import Report

FAST = {"heartbeat_s": 0.05, "timeout_s": 0.5, "worker_wait_s": 0.5}


class Replica:
    """What a replica's app does and saw; the kind of endpoints that SGLang has."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[Request] = []
        self.bodies: list[bytes] = []
        self.num_sent_bytes = 0
        self.num_cancelled = 0
        self.hold = asyncio.Event()  # answers wait for it where a test asks for that
        methods = ["GET", "POST", "PUT", "DELETE", "PATCH"]
        self.app = Starlette(
            routes=[
                Route("/generate", self.generate, methods=["POST"]),
                Route("/v1/chat/completions", self.generate, methods=["POST"]),
                Route("/v1/messages", self.generate, methods=["POST"]),
                Route("/flood", self.flood),
                Route("/broken", self.broken),
                Route("/metrics", self.metrics),
                Route("/{path:path}", self.echo, methods=methods),
            ]
        )

    async def echo(self, request: Request) -> Response:
        """Everything the app was given."""
        await self._note(request)
        raw = [[k.decode("latin-1"), v.decode("latin-1")] for k, v in request.scope["headers"]]
        told = {
            "worker": self.name,
            "method": request.method,
            "path": request.scope["path"],
            "query": request.scope["query_string"].decode(),
            "headers": raw,
            "num_bytes": len(self.bodies[-1]),
        }
        return JSONResponse(told, headers={"x-app": self.name}, status_code=418)

    async def generate(self, request: Request) -> Response:
        """`n` tokens, as server-sent events if `stream`; before token `hold_at` it waits."""
        asked = json.loads(await self._note(request))
        tokens = self._tokens(asked.get("n", 3), asked.get("hold_at"))
        if asked.get("stream"):
            events = (f"data: {token}\n\n" async for token in tokens)
            return StreamingResponse(self._watched(events), media_type="text/event-stream")
        answering = asyncio.create_task(_all(tokens))
        while not answering.done():
            await asyncio.wait({answering}, timeout=0.01)
            if await request.is_disconnected():
                answering.cancel()
                self.num_cancelled += 1
                return Response()
        return JSONResponse({"worker": self.name, "tokens": answering.result()})

    async def flood(self, request: Request) -> Response:
        """Ten megabytes, as fast as they are taken."""

        async def pieces():
            for _ in range(160):
                yield bytes(65_536)
                self.num_sent_bytes += 65_536

        return StreamingResponse(pieces(), media_type="application/octet-stream")

    async def metrics(self, request: Request) -> Response:
        """Compressed for who can read that, as SGLang's are; waits for `hold` if asked to."""
        await self._note(request)
        if "hold" in request.query_params:
            await self.hold.wait()
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(gzip.compress(b"x 1\n"), headers={"content-encoding": "gzip"})
        return Response(b"x 1\n")

    async def broken(self, request: Request) -> Response:
        raise ValueError("a bug in the app")

    async def _note(self, request: Request) -> bytes:
        self.seen.append(request)
        self.bodies.append(await request.body())
        return self.bodies[-1]

    async def _tokens(self, count: int, hold_at: int | None):
        for i in range(count):
            if i == hold_at:
                await self.hold.wait()
            yield i

    async def _watched(self, events):
        try:
            async for event in events:
                yield event
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise


async def _all(tokens) -> list[int]:
    return [token async for token in tokens]


class Rig:
    """One router at a time, any number of workers, a client; everything on this event loop."""

    def __init__(self, directory: Path, stack: AsyncExitStack) -> None:
        self.endpoint = f"ipc://{directory}/router.sock"
        self.replicas: dict[str, Replica] = {}
        self.agents: dict[str, WorkerAgent] = {}
        self._stack = stack

    async def route(self, **settings) -> httpx.AsyncClient:
        """Start the router; returns a client that talks to it."""
        config = RouterConfig(**{"port": 0, "endpoint": self.endpoint, **FAST, **settings})
        self.hub = Hub(config)
        server = uvicorn.Server(
            uvicorn.Config(
                RouterApp(self.hub), log_level="critical", lifespan="on",
                timeout_graceful_shutdown=1,
            )
        )  # fmt: skip
        listener = listen(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            assert not serving.done(), "the router did not start"
            await asyncio.sleep(0.005)
        self.port = listener.getsockname()[1]

        async def stop() -> None:
            server.should_exit = True
            await serving

        self.stop_router = stop
        self._stack.push_async_callback(stop)
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=20)
        return await self._stack.enter_async_context(client)

    async def join(self, *names: str, endpoints=(), report=None, **settings) -> None:
        """Let workers join, and wait until the router may send them calls."""
        for name in names:
            self.replicas[name] = Replica(name)
            await self.work(name, endpoints or (self.endpoint,), report, **settings)
        await self.until(lambda: all(self.is_ready(name) for name in names))

    async def work(self, name, endpoints, report=None, **settings) -> None:
        found = report or Report(is_ready=True, num_slots=4, prefill_tokens_per_s=1e4)

        async def probe() -> Report:
            return found

        config = WorkerConfig(endpoints=tuple(endpoints), name=name, **settings)
        agent = self.agents[name] = WorkerAgent(self.replicas[name].app, config, probe)
        await agent.start()
        self._stack.push_async_callback(agent.stop)

    def is_ready(self, name: str) -> bool:
        worker = self.hub.workers.get(name)
        return worker is not None and worker.can_take

    async def kill(self, name: str) -> None:
        """As `kill -9` looks from outside: the worker falls silent, and nothing follows."""
        for link in self.agents[name]._links:
            link._beating.cancel()
            link._channel._on_frames = lambda *_: None
            link._channel.send = lambda *_: None

    @staticmethod
    async def until(condition, timeout_s: float = 5.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)

    @property
    def num_streams(self) -> int:
        """Calls that router or workers hold; zero when nothing is open."""
        here = sum(len(worker.streams) for worker in self.hub.workers.values())
        there = sum(len(link._streams) for a in self.agents.values() for link in a._links)
        return here + there + self.hub.num_open


@pytest.fixture
async def rig(tmp_path):
    async with AsyncExitStack() as stack:
        made = Rig(tmp_path, stack)
        yield made


@asynccontextmanager
async def streaming(client: httpx.AsyncClient, path: str = "/generate", **asked):
    """An open stream of events."""
    async with client.stream("POST", path, json={"stream": True, **asked}) as response:
        yield response
