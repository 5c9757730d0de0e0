"""A replica that answers at once, over HTTP and through a router: what is left is the way to it.

    python -m bench.echo_replica --port 31000 --router-endpoint ipc://router.sock

`POST /generate` with the prompt `{"n": 3, "every_s": 0.01}` streams three events of about 100
bytes, one each 10 ms; without `n` it answers with a short JSON. `/health` and `/v1/models` are for
sglang-router.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence

import uvicorn
from starlette.types import Receive, Scope, Send

from autellix_sglang.engine.worker import WorkerAgent
from autellix_sglang.router.config import add_worker_arguments, worker_from_arguments
from autellix_sglang.router.messages import Report

EVENT = b"data: " + json.dumps({"text": "x" * 72, "index": 0}).encode() + b"\n\n"
SHORT = b'{"text": "done", "model_path": "echo", "data": []}'


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Plain ASGI: a framework's time would count as the router's."""
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    asked = json.loads(json.loads(body)["text"]) if body else {}
    is_stream = "n" in asked
    kind = b"text/event-stream" if is_stream else b"application/json"
    headers = [(b"content-type", kind)]
    if not is_stream:
        headers.append((b"content-length", str(len(SHORT)).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if is_stream:
        async for event in _events(asked["n"], asked.get("every_s", 0.0)):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
    else:
        await send({"type": "http.response.body", "body": SHORT})


async def _events(count: int, every_s: float) -> AsyncIterator[bytes]:
    for i in range(count):
        if i:
            await asyncio.sleep(every_s)
        yield EVENT


async def probe() -> Report:
    return Report(is_ready=True, num_slots=1024)


async def _serve(options: argparse.Namespace) -> None:
    config = worker_from_arguments(options)
    settings = uvicorn.Config(
        app, port=options.port, lifespan="off", log_level="warning", access_log=False
    )
    server = uvicorn.Server(settings)
    agent = None if config is None else WorkerAgent(app, config, probe)
    if agent is not None:
        await agent.start()
    await server.serve()
    if agent is not None:
        await agent.stop()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.echo_replica", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    add_worker_arguments(parser)
    asyncio.run(_serve(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
