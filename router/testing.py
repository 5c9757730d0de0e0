"""A fake replica with a timing model, to try routing without a model or a GPU.

    StepEngine    the model: slots, prefill rate, decode steps, a prefix cache; no clock, no I/O
    FakeReplica   an ASGI app over it that takes as long as the model says
    python -m autellix_sglang.router.testing --router-endpoint ipc://... --worker-name w0

A simulation advances `StepEngine` in virtual time; `FakeReplica` sleeps what each step takes. What
is generated depends on the prompt alone, so two runs of the same calls must answer alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from zlib import crc32

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from autellix_sglang.engine.worker import WorkerAgent
from autellix_sglang.router.config import (
    WorkerConfig,
    add_worker_arguments,
    worker_from_arguments,
)
from autellix_sglang.router.messages import Report

BLOCK_TOKENS: Final = 32
CHUNK_TOKENS: Final = 4096  # prefilled in one step at most
LOOK_EVERY: Final = 16  # tokens between looks whether the client is still there


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What a step costs, and how much fits. The default is the order of an 8B model on one GPU.

    It is an assumption, not a measurement; give your engine's own numbers to plan with.
    """

    num_slots: int = 32
    kv_tokens: int = 120_000
    prefill_tokens_per_s: float = 12_000.0
    step_s: float = 0.012  # a decode step of one call
    step_call_s: float = 0.0003  # and of each further one


@dataclass(slots=True, eq=False)
class Job:
    """One call in a `StepEngine`."""

    prompt: Sequence[int]
    num_output: int
    num_cached: int = 0
    num_missing: int = 0  # tokens to prefill before it decodes
    num_generated: int = 0
    handle: Any = None

    @property
    def is_done(self) -> bool:
        return self.num_generated >= self.num_output


class StepEngine:
    """Calls run first come, first served, in as many slots as there are, over an LRU cache."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.waiting: deque[Job] = deque()
        self.running: dict[Job, None] = {}
        self.num_prompt_tokens = 0
        self.num_computed_tokens = 0
        self._blocks: OrderedDict[int, None] = OrderedDict()

    @property
    def num_live(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def kv_used_tokens(self) -> int:
        return len(self._blocks) * BLOCK_TOKENS

    def submit(self, job: Job) -> None:
        self.waiting.append(job)

    def abort(self, job: Job) -> None:
        """Take a call out, wherever it is; one that is over is left alone."""
        if job in self.running:
            del self.running[job]
        elif job in self.waiting:
            self.waiting.remove(job)

    def step(self) -> tuple[float, list[Job]]:
        """(seconds it takes, the calls that get a token at its end)."""
        while self.waiting and len(self.running) < self.timing.num_slots:
            self._admit(self.waiting.popleft())
        budget = CHUNK_TOKENS
        for job in self.running:
            part = min(job.num_missing, budget)
            job.num_missing -= part
            budget -= part
        decoding = [job for job in self.running if not job.num_missing]
        for job in decoding:
            job.num_generated += 1
            if job.is_done:
                del self.running[job]
        return self._seconds(CHUNK_TOKENS - budget, len(decoding)), decoding

    def _seconds(self, num_prefilled: int, num_decoding: int) -> float:
        timing = self.timing
        decode_s = timing.step_s + (num_decoding - 1) * timing.step_call_s if num_decoding else 0.0
        return num_prefilled / timing.prefill_tokens_per_s + decode_s

    def _admit(self, job: Job) -> None:
        """Start a call; its whole blocks count as cached from now on, as in a radix tree."""
        is_prefix = True
        for key in block_keys(job.prompt):
            is_prefix = is_prefix and key in self._blocks
            job.num_cached += BLOCK_TOKENS * is_prefix
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while self.kv_used_tokens > self.timing.kv_tokens:
            self._blocks.popitem(last=False)
        job.num_missing = max(1, len(job.prompt) - job.num_cached)
        self.num_prompt_tokens += len(job.prompt)
        self.num_computed_tokens += job.num_missing
        self.running[job] = None


def block_keys(prompt: Sequence[int]) -> list[int]:
    """One key per whole block, which names the block and everything before it."""
    keys, last = [], 0
    for start in range(0, len(prompt) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        last = hash((last, tuple(prompt[start : start + BLOCK_TOKENS])))
        keys.append(last)
    return keys


def output_of(prompt: Sequence[int], count: int) -> list[int]:
    """What is generated for a prompt: bytes that change with any token of it."""
    seed = crc32(repr(list(prompt)).encode())
    return [(seed >> (i % 24)) % 96 + 32 for i in range(count)]


# -- as a replica --------------------------------------------------------------------------------


@dataclass
class FakeReplica:
    """An app with SGLang's `/generate` and OpenAI's chat; `async with` nothing, just `app`."""

    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        self.engine = StepEngine(self.timing)
        self.num_answered = 0
        self._has_work = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None
        self.app = Starlette(
            routes=[
                Route("/generate", self._generate, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/health", self._health),
            ]
        )

    async def probe(self) -> Report:
        """The engine's load as a worker agent reports it."""
        engine, timing = self.engine, self.timing
        num_cached = engine.num_prompt_tokens - engine.num_computed_tokens
        return Report(
            is_ready=True,
            num_live=engine.num_live,
            num_slots=timing.num_slots,
            prefill_tokens_per_s=timing.prefill_tokens_per_s,
            kv_tokens=timing.kv_tokens,
            kv_used_tokens=engine.kv_used_tokens,
            computed_tokens=engine.num_computed_tokens,
            cache_hit_rate=num_cached / max(1, engine.num_prompt_tokens),
        )

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        prompt = body.get("input_ids") or list(str(body.get("text", "")).encode())
        count = body.get("sampling_params", {}).get("max_new_tokens", 16)
        job = Job(prompt, count)
        if body.get("stream"):
            return StreamingResponse(_events(self._run(job), job), media_type="text/event-stream")
        await self._run_whole(request, job)
        return JSONResponse(_reply(job))

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        prompt = list(json.dumps(body["messages"]).encode())
        job = Job(prompt, body.get("max_tokens") or 16)
        if body.get("stream"):
            events = _chat_events(self._run(job), job)
            return StreamingResponse(events, media_type="text/event-stream")
        await self._run_whole(request, job)
        return JSONResponse(_chat_reply(job))

    async def _run_whole(self, request: Request, job: Job) -> None:
        async for num in self._run(job):
            if num % LOOK_EVERY == 0 and await request.is_disconnected():
                return

    async def _run(self, job: Job) -> AsyncIterator[int]:
        """Yields after each token how many there are; leaves early when its reader does."""
        news = job.handle = asyncio.Event()
        self.engine.submit(job)
        self._has_work.set()
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step())
        try:
            while not job.is_done:
                await news.wait()
                news.clear()
                yield job.num_generated
            self.num_answered += 1
        finally:
            self.engine.abort(job)

    async def _step(self) -> None:
        loop = asyncio.get_running_loop()
        at_s = loop.time()
        while self.engine.num_live:
            seconds, jobs = self.engine.step()
            at_s += seconds  # a step that was late does not delay those after it
            await asyncio.sleep(at_s - loop.time())
            for job in jobs:
                job.handle.set()


def _reply(job: Job) -> dict[str, Any]:
    num = job.num_generated
    return {
        "text": bytes(output_of(job.prompt, num)).decode(),
        "output_ids": output_of(job.prompt, num),
        "meta_info": {
            "prompt_tokens": len(job.prompt),
            "cached_tokens": job.num_cached,
            "completion_tokens": num,
            "finish_reason": {"type": "length", "length": num} if job.is_done else None,
        },
    }


async def _events(steps: AsyncIterator[int], job: Job) -> AsyncIterator[str]:
    async for _ in steps:
        yield f"data: {json.dumps(_reply(job))}\n\n"
    yield "data: [DONE]\n\n"


def _chat_reply(job: Job) -> dict[str, Any]:
    text = bytes(output_of(job.prompt, job.num_generated)).decode()
    num_prompt, num_output = len(job.prompt), job.num_generated
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "length",
    }
    usage = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }
    base = {"id": "chatcmpl-fake", "created": 0, "model": "fake"}
    return {**base, "object": "chat.completion", "choices": [choice], "usage": usage}


async def _chat_events(steps: AsyncIterator[int], job: Job) -> AsyncIterator[str]:
    sent = 0
    async for num in steps:
        text = bytes(output_of(job.prompt, num)[sent:]).decode()
        sent = num
        reason = "length" if job.is_done else None
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
        chunk = {
            "id": "chatcmpl-fake",
            "created": 0,
            "model": "fake",
            "object": "chat.completion.chunk",
            "choices": [choice],
        }
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"


# -- as a process --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    default = Timing()
    parser = argparse.ArgumentParser(
        prog="python -m autellix_sglang.router.testing", description=__doc__.partition("\n")[0]
    )
    add_worker_arguments(parser)
    add = parser.add_argument
    add("--port", type=int, help="serve HTTP too, on 127.0.0.1")
    add("--slots", type=int, default=default.num_slots, help="default: %(default)s")
    add("--kv-tokens", type=int, default=default.kv_tokens, help="default: %(default)s")
    add("--speed", type=float, default=1.0, help="times as fast as the default")
    options = parser.parse_args(argv)
    config = worker_from_arguments(options)
    if config is None and options.port is None:
        parser.error("--router-endpoint or --port is needed")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    timing = Timing(
        num_slots=options.slots,
        kv_tokens=options.kv_tokens,
        prefill_tokens_per_s=default.prefill_tokens_per_s * options.speed,
        step_s=default.step_s / options.speed,
        step_call_s=default.step_call_s / options.speed,
    )
    asyncio.run(_work(FakeReplica(timing), config, options.port))
    return 0


async def _work(replica: FakeReplica, config: WorkerConfig | None, port: int | None) -> None:
    """Be a replica for routers, over HTTP, or both, until SIGTERM."""
    agent = None if config is None else WorkerAgent(replica.app, config, replica.probe)
    if agent is not None:
        await agent.start()
    if port is None:
        is_over = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, is_over.set)
        await is_over.wait()
    else:
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again at its end
        settings = uvicorn.Config(replica.app, port=port, log_level="warning", access_log=False)
        await uvicorn.Server(settings).serve()
    if agent is not None:
        await agent.stop(grace_s=5.0)


if __name__ == "__main__":
    sys.exit(main())
