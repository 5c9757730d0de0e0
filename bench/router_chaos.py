"""Does anything get lost when things break? Programs through a router while its world falls apart.

    python -m bench.router_chaos                  # 2,000 programs on four fake replicas
    python -m bench.router_chaos --quick          # 300 of them
    python -m bench.router_chaos --engines 2      # on real engines with the built-in model

Everything is a process of its own: router, replicas, and a link to them that can be cut. Trouble
comes in turn, every few seconds: a replica is killed (`kill -9`) and started again, one is paused
(SIGSTOP) for longer than the router waits, the link of one falls silent, the router is killed and
started again. Meanwhile programs run: each call's prompt is what was said before, half of the
calls stream. A call that ends in an error is sent again, as an agent would do.

What must hold: every call ends in a result or an explicit error within `--timeout` seconds; no
stream says anything twice; every program's transcript is that of the undisturbed run (greedy, so
it is known); and at the end the router holds no call, no body and no more memory than before.
The last line of stdout is one JSON object; the exit status is 0 only if all of that is so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil

from autellix_sglang.router.testing import output_of
from bench.common import ROOT, Progress, new_parser, print_result, provenance, say
from bench.server import free_port

CALLS_PER_PROGRAM: Final = 3
NUM_TOKENS: Final = 12
HEARTBEAT_S: Final = 0.1
TIMEOUT_S: Final = 1.0  # of silence, after which the router gives a replica up
ENGINE_FLAGS: Final = (
    "--max-running-requests", "8", "--max-total-tokens", "6000", "--context-length", "2048",
    "--sleep-on-idle", "--skip-server-warmup", "--program-prefill-weight", "0.02",
)  # fmt: skip

# -- processes -----------------------------------------------------------------------------------


class Child:
    """A process group that can be killed and started again."""

    def __init__(self, name: str, command: Sequence[str], directory: Path) -> None:
        self.name = name
        self._command = list(command)
        self._log = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "start() comes first"
        return self._process.pid

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()


class Link:
    """A TCP relay that can fall silent: connections stay up and nothing passes."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_whole = asyncio.Event()
        self._is_whole.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        """Relay to `port`; returns the port to dial."""
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def cut(self, seconds: float) -> None:
        self._is_whole.clear()
        await asyncio.sleep(seconds)
        self._is_whole.set()

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.close()
            return
        for source, sink in ((reader, there[1]), (there[0], writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                await self._is_whole.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


@dataclass
class World:
    """Router, replicas and the link that the first replica's traffic takes."""

    router: Child
    replicas: list[Child]
    link: Link
    url: str
    pause_s: float

    @classmethod
    async def build(cls, options: argparse.Namespace, directory: Path) -> World:
        port, endpoint = free_port(), free_port()
        router = Child(
            "router",
            [
                sys.executable, "-m", "autellix_sglang.router", "--port", str(port),
                "--endpoint", f"tcp://127.0.0.1:{endpoint}", "--heartbeat-s", str(HEARTBEAT_S),
                "--timeout-s", str(options.silence), "--worker-wait-s", "20",
            ],
            directory,
        )  # fmt: skip
        link = Link(endpoint)
        linked = await link.start()
        replicas = [
            Child(
                f"replica-{i}", _replica_command(options, i, endpoint if i else linked), directory
            )
            for i in range(options.engines or options.replicas)
        ]
        pause_s = 2 * options.silence
        return cls(router, replicas, link, f"http://127.0.0.1:{port}", pause_s)

    async def start(self) -> None:
        for child in (self.router, *self.replicas):
            child.start()
        await self.until(lambda seen: _num_ready(seen) == len(self.replicas), 300)

    async def stop(self) -> None:
        for child in (*self.replicas, self.router):
            child.kill()
        await self.link.stop()

    async def hurt(self, kind: str, rng: random.Random) -> None:
        """One trouble, and the end of it."""
        victim = rng.choice(self.replicas)
        match kind:
            case "kill":
                victim.restart()
            case "pause":
                victim.signal(signal.SIGSTOP)
                await asyncio.sleep(self.pause_s)
                victim.signal(signal.SIGCONT)
            case "cut":
                await self.link.cut(self.pause_s)
            case "router":
                self.router.restart()

    async def seen(self) -> dict[str, Any]:
        """The router's account of itself and its workers."""
        async with aiohttp.ClientSession() as session, session.get(self.url + "/workers") as reply:
            found: dict[str, Any] = await reply.json()
            return found

    async def until(self, is_so: Callable[[dict[str, Any]], bool], timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            while True:
                with suppress(aiohttp.ClientError):
                    if is_so(await self.seen()):
                        return
                await asyncio.sleep(0.1)


def _replica_command(options: argparse.Namespace, index: int, endpoint: int) -> list[str]:
    join = ["--router-endpoint", f"tcp://127.0.0.1:{endpoint}", "--worker-name", f"replica-{index}"]
    if not options.engines:
        module = "autellix_sglang.router.testing"
        return [sys.executable, "-m", module, "--speed", str(options.speed), *join]
    launch = [sys.executable, "-m", "autellix_sglang.launch", "--port", str(free_port())]
    return [*launch, *ENGINE_FLAGS, *join]


def _num_ready(seen: dict[str, Any]) -> int:
    return sum(worker["state"] == "ready" for worker in seen["workers"])


def _num_held(seen: dict[str, Any]) -> int:
    streams = sum(worker["open_streams"] for worker in seen["workers"])
    return int(seen["open_calls"] + seen["buffered_bytes"] + streams)


# -- programs ------------------------------------------------------------------------------------


@dataclass
class Account:
    """What became of the calls."""

    num_calls: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)  # no end in time
    twice: list[str] = field(default_factory=list)  # said again, or out of order


class CallError(Exception):
    """A call ended in an explicit error; says which."""


class Client:
    """Runs programs, one call after the other, each as often as it takes."""

    def __init__(self, session: aiohttp.ClientSession, account: Account, timeout_s: float) -> None:
        self._session = session
        self._account = account
        self._timeout_s = timeout_s

    async def run(self, number: int) -> list[list[int]]:
        """The outputs of all calls of a program."""
        prompt, outputs = first_prompt(number), []
        for index in range(CALLS_PER_PROGRAM):
            outputs.append(await self._call(f"p{number}", prompt, (number + index) % 2 == 0))
            prompt = next_prompt(prompt, outputs[-1], index)
        return outputs

    async def _call(self, program: str, prompt: list[int], stream: bool) -> list[int]:
        while True:
            self._account.num_calls += 1
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._ask(program, prompt, stream)
            except TimeoutError:
                self._account.lost.append(program)
            except CallError as error:
                self._account.errors[str(error)] += 1
            except aiohttp.ClientError as error:
                self._account.errors[type(error).__name__] += 1
            await asyncio.sleep(0.2)

    async def _ask(self, program: str, prompt: list[int], stream: bool) -> list[int]:
        params = {"max_new_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": params, "stream": stream}
        headers = {"x-program-id": program}
        async with self._session.post("/generate", json=body, headers=headers) as reply:
            if reply.status != 200:
                raise CallError(f"HTTP {reply.status}")
            if not stream:
                return list((await reply.json())["output_ids"])
            return self._read_events(program, await reply.text())

    def _read_events(self, program: str, text: str) -> list[int]:
        *events, last = [e.removeprefix("data: ") for e in text.split("\n\n") if e.strip()]
        if last != "[DONE]":
            raise CallError("error event" if '"error"' in last else "stream without an end")
        found = [json.loads(event) for event in events]
        counts = [event["meta_info"]["completion_tokens"] for event in found]
        if counts != sorted(set(counts)):
            self._account.twice.append(program)
        return list(found[-1]["output_ids"])


def first_prompt(number: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(32, 128) for _ in range(rng.randrange(20, 200))]


def next_prompt(prompt: list[int], output: Sequence[int], index: int) -> list[int]:
    return [*prompt, *output, *range(40, 50 + index)]


def undisturbed(number: int) -> list[list[int]]:
    """What fake replicas answer: a function of the prompt."""
    prompt, outputs = first_prompt(number), []
    for index in range(CALLS_PER_PROGRAM):
        outputs.append(output_of(prompt, NUM_TOKENS))
        prompt = next_prompt(prompt, outputs[-1], index)
    return outputs


async def run_programs(
    world: World, options: argparse.Namespace, numbers: Sequence[int], account: Account
) -> list[list[list[int]]]:
    limit = asyncio.Semaphore(options.at_once)
    connector = aiohttp.TCPConnector(limit=0)
    with Progress("programs", len(numbers)) as progress:
        async with aiohttp.ClientSession(world.url, connector=connector) as session:
            client = Client(session, account, options.timeout)

            async def one(number: int) -> list[list[int]]:
                async with limit:
                    outputs = await client.run(number)
                progress.advance()
                return outputs

            return await asyncio.gather(*map(one, numbers))


# -- the run -------------------------------------------------------------------------------------


async def chaos(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """All of it; the result's `ok` says whether everything held."""
    world = await World.build(options, directory)
    account, troubles = Account(), Counter[str]()
    try:
        say(f"starting a router and {len(world.replicas)} replicas")
        await world.start()
        numbers = range(options.programs)
        if options.engines:
            say("undisturbed")
            expected = await run_programs(world, options, numbers, Account())
        else:
            expected = [undisturbed(number) for number in numbers]
        say("disturbed")
        started_s = time.perf_counter()
        task = asyncio.create_task(run_programs(world, options, numbers, account))
        await disturb(world, options, troubles, task)
        found = await task
        seconds = time.perf_counter() - started_s
        rss = await settle(world, options)
    finally:
        await world.stop()
    wrong = sum(a != b for a, b in zip(found, expected, strict=True))
    return {
        "programs": options.programs,
        "calls": account.num_calls,
        "replicas": len(world.replicas),
        "real_engines": bool(options.engines),
        "troubles": troubles,
        "lost": len(account.lost),
        "answered_twice": len(account.twice),
        "wrong_results": wrong,
        "errors": account.errors,
        "run_s": round(seconds, 1),
        **rss,
        "ok": not (account.lost or account.twice or wrong or rss["held_at_end"]),
    }


async def disturb(
    world: World, options: argparse.Namespace, troubles: Counter[str], until: Awaitable[Any]
) -> None:
    """Trouble of one kind after the other while the programs run."""
    rng = random.Random(options.seed)
    task = asyncio.ensure_future(until)
    while not task.done():
        for kind in options.troubles:
            await asyncio.wait({task}, timeout=options.every * rng.uniform(0.5, 1.5))
            if task.done():
                return
            troubles[kind] += 1
            await world.hurt(kind, rng)
            await world.until(lambda seen: _num_ready(seen) == len(world.replicas), 300)


async def settle(world: World, options: argparse.Namespace) -> dict[str, Any]:
    """What the router holds at rest, and how its memory grows over the same work once more."""
    await world.until(lambda seen: _num_ready(seen) == len(world.replicas), 60)
    router = psutil.Process(world.router.pid)
    numbers = range(options.programs, options.programs + max(20, options.programs // 4))
    sizes = []
    for _ in range(3):  # the same programs again: nothing new to remember after the first round
        await run_programs(world, options, numbers, Account())
        sizes.append(router.memory_info().rss / 2**20)
    with suppress(TimeoutError):
        await world.until(lambda seen: _num_held(seen) == 0, 10)
    return {
        "held_at_end": _num_held(await world.seen()),
        "router_rss_mib": [round(size, 1) for size in sizes],
    }


def parser() -> argparse.ArgumentParser:
    made = new_parser("bench.router_chaos", __doc__)
    add = made.add_argument
    add("--quick", action="store_true", help="300 programs")
    add("--programs", type=int, default=2000, help="default: %(default)s")
    add("--replicas", type=int, default=4, help="fake ones (default: %(default)s)")
    add("--engines", type=int, default=0, help="real engines in their place")
    add("--troubles", nargs="+", default=["kill", "pause", "cut", "router"],
        choices=["kill", "pause", "cut", "router"], help="default: all")  # fmt: skip
    add("--every", type=float, default=1.0, help="seconds between troubles (%(default)s)")
    add("--silence", type=float, default=TIMEOUT_S, help="the router's --timeout-s (%(default)s)")
    add("--timeout", type=float, default=60.0, help="seconds after which a call is lost")
    add("--at-once", type=int, default=16, help="programs at once (%(default)s)")
    add("--speed", type=float, default=1.0, help="of fake replicas (%(default)s)")
    add("--seed", type=int, default=1)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    options = parser().parse_args(argv)
    if options.quick:
        options.programs = min(options.programs, 300)
    with tempfile.TemporaryDirectory(prefix="autellix-chaos-") as directory:
        result = asyncio.run(chaos(options, Path(directory)))
    for key, value in result.items():
        print(f"{key:16} {json.dumps(value)}")
    print_result(result | provenance(started))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
