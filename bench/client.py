"""What does joining cost a client, and do concurrent programs keep their ids apart?

    python -m bench.client --quick

Overhead: the same call through the same library, inside a program and outside, in turns. It is
answered inside the process (httpx, openai) or by a constant below our hook (requests), for
the noise of a network would hide the microseconds. `overhead_us` is the difference between pairs of
batches, for the slowest library by median; `libraries` has all of them.

Cross-talk: `--programs` asyncio programs at once in one process, each a chain with fan-outs. A
request says in its body whose it is; `cross_talk` counts headers that say otherwise,
`wrong_parents` parents other than the script's, and `sessions` the starts and ends that arrived.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import median
from typing import Any, Final

import httpx
import openai
import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse

from autellix_sglang.client import flush, program, register
from autellix_sglang.client.program import registry
from bench.common import format_table, from_one, new_parser, run_benchmark, say
from bench.stats import percentile

BAR_US: Final = 50.0
BATCH: Final = 20  # calls of one kind in a row
SEED: Final = 1
REPLY: Final = {
    "id": "1", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}
    ],
}  # fmt: skip
MESSAGES: Final[Any] = [{"role": "user", "content": "hi"}]
CallMaker = Callable[[str], Callable[[], object]]


@contextmanager
def sink() -> Iterator[tuple[str, dict[str, int]]]:
    """A registered server that takes starts and ends of programs, and counts them by method."""
    counts = {"POST": 0, "DELETE": 0}

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            counts[self.command] += 1
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.end_headers()

        do_POST = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        registration = register(f"http://127.0.0.1:{server.server_address[1]}")
        try:
            yield registration.url, counts
        finally:
            registry.discard(registration)
            server.shutdown()


# -- overhead ------------------------------------------------------------------------------------


def answer(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=REPLY, headers={"x-program-id": "p"})


def with_httpx(base_url: str) -> Callable[[], object]:
    client = httpx.Client(transport=httpx.MockTransport(answer))
    return lambda: client.post(base_url + "/v1/chat/completions", json={"messages": MESSAGES})


def with_httpx_async(base_url: str) -> Callable[[], object]:
    """An asynchronous call that never waits, stepped by hand: a loop would add its own noise."""
    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))

    def step() -> None:
        call = client.post(base_url + "/v1/chat/completions", json={"messages": MESSAGES})
        try:
            call.send(None)
        except StopIteration:
            return
        raise AssertionError("the transport never waits")

    return step


def with_openai(base_url: str) -> Callable[[], object]:
    http = httpx.Client(transport=httpx.MockTransport(answer))
    client = openai.OpenAI(base_url=base_url + "/v1", api_key="none", http_client=http)
    return lambda: client.chat.completions.create(model="m", messages=MESSAGES)


def with_requests(base_url: str) -> Callable[[], object]:
    """The hook is on `HTTPAdapter.send`, so what it sends with is replaced on the instance."""
    session = requests.Session()
    session.mount("http://", _ConstantAdapter())
    return lambda: session.post(base_url + "/generate", json={"messages": MESSAGES})


class _ConstantAdapter(HTTPAdapter):
    """Answers without a connection, below everything that requests itself does."""

    def get_connection_with_tls_context(self, *_: Any, **__: Any) -> Any:
        return self

    def urlopen(self, **_: Any) -> Any:
        headers = {"x-program-id": "p"}
        return HTTPResponse(io.BytesIO(b"{}"), headers, 200, preload_content=False)


LIBRARIES: Final[dict[str, CallMaker]] = {
    "httpx": with_httpx,
    "httpx async": with_httpx_async,
    "openai": with_openai,
    "requests": with_requests,
}


def time_us(call: Callable[[], object]) -> float:
    """Mean microseconds per call over one batch."""
    started = time.perf_counter()
    for _ in range(BATCH):
        call()
    return (time.perf_counter() - started) * 1e6 / BATCH


def measure(call: Callable[[], object], num_pairs: int) -> dict[str, float]:
    """Medians of a call alone and of what a program adds, and the latter's 99th percentile."""
    alone: list[float] = []
    added: list[float] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(num_pairs):
            before_us = time_us(call)
            with program("overhead"):
                flush()  # telling the server is work of another thread, and not per call
                inside_us = time_us(call)
            flush()
            alone.append(before_us)
            added.append(inside_us - before_us)
    finally:
        gc.enable()
    return {
        "call_us": round(median(alone), 2),
        "median": round(median(added), 2),
        "p99": round(percentile(added, 0.99), 2),
    }


# -- cross-talk ----------------------------------------------------------------------------------


@dataclass
class Witness:
    """Compares what each request says in its body with what its headers say."""

    num_calls: int = 0
    cross_talk: int = 0
    wrong_parents: int = 0
    labels: dict[str, str] = field(default_factory=dict)  # call id -> its label in the script

    async def answer(self, request: httpx.Request) -> httpx.Response:
        said = json.loads(request.content)
        headers = request.headers
        self.num_calls += 1
        self.cross_talk += headers.get("x-program-id") != said["program"]
        key = f"{said['program']}/{headers.get('x-call-id')}"
        self.labels[key] = said["label"]
        parents = headers.get("x-parent-call-ids", "").split(",")
        found = {self.labels.get(f"{said['program']}/{call}") for call in parents if call}
        self.wrong_parents += found != set(said["parents"])
        await asyncio.sleep(0)
        return httpx.Response(200, json=REPLY, headers={"x-program-id": said["program"]})


async def agent(client: httpx.AsyncClient, base_url: str, rng: random.Random, rounds: int) -> None:
    """Alternates a call and a fan-out of up to four; each request carries the true parents."""
    with program("agent") as running:

        async def call(label: str, parents: Sequence[str]) -> None:
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
            body = {"program": running.id, "label": label, "parents": list(parents)}
            await client.post(base_url + "/v1/chat/completions", json=body)

        last: list[str] = []
        for turn in range(rounds):
            await call(f"one{turn}", last)
            wide = [f"map{turn}.{i}" for i in range(rng.randrange(1, 5))]
            await asyncio.gather(*(call(label, [f"one{turn}"]) for label in wide))
            last = wide


async def run_agents(base_url: str, num_programs: int, rounds: int) -> Witness:
    witness = Witness()
    rng = random.Random(SEED)
    async with httpx.AsyncClient(transport=httpx.MockTransport(witness.answer)) as client:
        await asyncio.gather(*(agent(client, base_url, rng, rounds) for _ in range(num_programs)))
    return witness


# -- both ----------------------------------------------------------------------------------------


def benchmark(num_pairs: int, num_programs: int, rounds: int) -> dict[str, Any]:
    """The result without its provenance."""
    libraries = {}
    with sink() as (base_url, _):
        for name, make in LIBRARIES.items():
            say(f"{name}: {num_pairs} pairs of {BATCH} calls")
            call = make(base_url)
            time_us(call)
            libraries[name] = measure(call, num_pairs)
        flush()
    slowest = max(libraries.values(), key=lambda row: row["median"])
    say(f"{num_programs} programs at once")
    with sink() as (base_url, sessions):
        witness = asyncio.run(run_agents(base_url, num_programs, rounds))
        is_told = flush(60.0)
    return {
        "overhead_us": {"median": slowest["median"], "p99": slowest["p99"]},
        "within_bar": slowest["median"] <= BAR_US,
        "libraries": libraries,
        "programs": num_programs,
        "calls": witness.num_calls,
        "cross_talk": witness.cross_talk,
        "wrong_parents": witness.wrong_parents,
        "sessions": {"start": sessions["POST"], "end": sessions["DELETE"], "all_sent": is_told},
    }


def table(result: Mapping[str, Any]) -> str:
    rows = [[name, *row.values()] for name, row in result["libraries"].items()]
    return format_table(["library", "call us", "overhead us", "p99 us"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = new_parser("bench.client", __doc__)
    parser.add_argument("--quick", action="store_true", help="100 pairs of batches, not 1,000")
    parser.add_argument("--programs", type=from_one, default=1000, help="default: %(default)s")
    parser.add_argument("--rounds", type=from_one, default=4, help="per program (%(default)s)")

    def run(options: argparse.Namespace) -> dict[str, Any]:
        num_pairs = 100 if options.quick else 1000
        return benchmark(num_pairs, options.programs, options.rounds)

    return run_benchmark(
        parser, argv, run, table, lambda result: not result["cross_talk"] + result["wrong_parents"]
    )


if __name__ == "__main__":
    sys.exit(main())
