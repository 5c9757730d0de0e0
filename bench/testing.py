"""A stand-in for SGLang's `/generate`, to try the benchmark side without an engine.

`FakeServer` answers on a real socket in the caller's event loop: it is a few slots that serve calls
first come, first served, at a fixed time per token. Outputs depend on the prompt only, as
greedy ones do. It notes every call with its headers, and can be told to fail.

`UNIT_DEVICE` is a device for the simulator whose times a person can add up.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from bench.sim_device import Device

T = TypeVar("T")

# A decode step of any batch takes 1 s, a prefill batch 1 s per new token; copying 1/4 s per token.
UNIT_DEVICE = Device(
    name="unit",
    decode_s=1.0,
    decode_call_s=0.0,
    decode_kv_s=0.0,
    prefill_min_s=0.0,
    prefill_token_s=1.0,
    prefill_pair_s=0.0,
    overhead_s=0.0,
    copy_token_s=0.25,
    kv_tokens=1000,
)


@dataclass(slots=True)
class FakeCall:
    """One call as the server saw it; times are of `time.perf_counter`."""

    headers: Mapping[str, str]
    input_ids: list[int]
    body: Mapping[str, Any]
    received_s: float
    finished_s: float = 0.0


def echo_output(input_ids: list[int], count: int) -> list[int]:
    """What the fake generates: ids that change with any token of the prompt."""
    seed = sum((i + 1) * token for i, token in enumerate(input_ids))
    return [(seed + 7 * i) % 256 for i in range(count)]


@dataclass
class FakeServer:
    """Settings and notes of a fake engine; `async with fake.listen() as url` serves it.

    `fail` may return an HTTP status other than 200 for a call, or 0 to drop its connection.
    """

    slots: int = 1000
    token_s: float = 0.0
    reports_queueing: bool = True
    program_info: Mapping[str, Any] | None = None
    fail: Callable[[FakeCall], int] = lambda call: 200
    calls: list[FakeCall] = field(default_factory=list)
    ended_programs: list[str] = field(default_factory=list)
    config_changes: list[Mapping[str, Any]] = field(default_factory=list)

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[str]:
        """Serve on a free port of the loopback; yields the base URL."""
        self._free = asyncio.Semaphore(self.slots)
        application = web.Application(client_max_size=2**26)
        application.router.add_post("/generate", self._generate)
        application.router.add_delete("/v1/programs/{id}", self._end_program)
        application.router.add_patch("/program_config", self._configure)
        application.router.add_post("/flush_cache", _nothing_to_do)
        runner = web.AppRunner(application)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            yield f"http://{host}:{port}"
        finally:
            await runner.cleanup()

    @contextmanager
    def listen_in_thread(self) -> Iterator[str]:
        """The same for callers without an event loop; yields the base URL."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        listening = self.listen()
        try:
            url = _run_on(loop, listening.__aenter__())
            try:
                yield url
            finally:
                _run_on(loop, listening.__aexit__(None, None, None))
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        call = FakeCall(dict(request.headers), body["input_ids"], body, time.perf_counter())
        self.calls.append(call)
        status = self.fail(call)
        if status == 0:
            assert request.transport is not None
            request.transport.close()
        if status != 200:
            return web.Response(status=status or 500, text="told to fail")
        count = body["sampling_params"]["max_new_tokens"]
        async with self._free:
            queue_s = time.perf_counter() - call.received_s
            await asyncio.sleep(count * self.token_s)
        call.finished_s = time.perf_counter()
        reply = self._reply(call, count, queue_s)
        return await _stream(request, reply) if body["stream"] else web.json_response(reply)

    def _reply(self, call: FakeCall, count: int, queue_s: float) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "prompt_tokens": len(call.input_ids),
            "cached_tokens": len(call.input_ids) // 2,
            "completion_tokens": count,
            "e2e_latency": call.finished_s - call.received_s,
            "finish_reason": {"type": "length", "length": count},
            "num_retractions": 0,
        }
        if self.reports_queueing:
            meta["queue_time"] = queue_s
        if self.program_info is not None:
            meta["program"] = dict(self.program_info)
        return {"output_ids": echo_output(call.input_ids, count), "meta_info": meta}

    async def _end_program(self, request: web.Request) -> web.Response:
        self.ended_programs.append(request.match_info["id"])
        return web.Response(status=404, text="stock SGLang has no such route")

    async def _configure(self, request: web.Request) -> web.Response:
        self.config_changes.append(await request.json())
        return web.json_response({})


async def _nothing_to_do(request: web.Request) -> web.Response:
    return web.Response()


def _run_on(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout=60)


async def _stream(request: web.Request, reply: Mapping[str, Any]) -> web.StreamResponse:
    """The reply as server-sent events that repeat everything so far, as SGLang's do."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    ids = reply["output_ids"]
    for count in range(1, len(ids) + 1):
        chunk = {
            "output_ids": ids[:count],
            "meta_info": {**reply["meta_info"], "completion_tokens": count},
        }
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response
