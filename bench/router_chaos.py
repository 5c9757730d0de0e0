"""Does anything get lost when things break? Programs through a router while its world falls apart.

    python -m bench.router_chaos                  # 2,000 programs on four fake replicas
    python -m bench.router_chaos --quick          # 300 of them, pauses of 2 s
    python -m bench.router_chaos --engines 2      # on real engines with the built-in model

Everything is a process of its own: router and replicas, the first of them in a network namespace
at the other end of a link. Trouble comes in turn, every few seconds: a replica is killed (`kill
-9`) and started again, one is paused (SIGSTOP) for much longer than the router waits, the link of
the first goes down for as long, the router is killed and started again. Meanwhile programs run:
each call's prompt is what was said before, half of the calls stream. A call that ends in an error
is sent again, as an agent would do.

What must hold: every call ends in a result or an explicit error within `--timeout` seconds; no
stream says anything twice; every program's transcript is that of the undisturbed run (greedy, so
it is known); and at rest the router holds no call and no body, the replicas run nothing, and the
router takes no more memory for the same programs than before the trouble.
The last line of stdout is one JSON object; the exit status is 0 only if all of that is so.

A namespace needs root and `ip`; without them the link is left alone, which the first line says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil

from autellix_sglang.router.fleet import die_with_parent
from autellix_sglang.router.testing import output_of
from bench.common import ROOT, Progress, new_parser, print_result, provenance, say
from bench.server import free_port

CALLS_PER_PROGRAM: Final = 3
NUM_TOKENS: Final = 12
HEARTBEAT_S: Final = 0.1
TIMEOUT_S: Final = 1.0  # of silence, after which the router gives a replica up
READY_S: Final = 900.0  # for all replicas to take calls, engines on a busy machine included
GROWTH: Final = 1.1  # of the router's memory: what it remembers of more programs
FAR_DEVICE: Final = "far0"
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
                preexec_fn=partial(die_with_parent, signal.SIGKILL),
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
    """A network namespace at the far end of a link that can be cut; `near` and `far` are its ends.

    The namespace lives as long as processes are in it, and the link as long as the namespace.
    All of them die with us, so nothing stays behind; only what an engine was just starting
    outlives a `kill -9` of this process.
    """

    def __init__(self, directory: Path) -> None:
        """Raises `OSError` or `CalledProcessError` where namespaces cannot be made."""
        self._holder = Child("network", ["unshare", "--net", "sleep", "infinity"], directory)
        subnet = f"169.254.{1 + os.getpid() % 150}"
        self.near, self.far = f"{subnet}.1", f"{subnet}.2"
        try:
            self._connect(f"chaos{os.getpid()}")
        except BaseException:
            self.stop()
            raise

    @property
    def inside(self) -> list[str]:
        """What to put before a command that is to run at the far end."""
        return ["nsenter", "--target", str(self._holder.pid), "--net"]

    def _connect(self, device: str) -> None:
        self._holder.start()
        namespace = Path(f"/proc/{self._holder.pid}/ns/net")
        ours = Path("/proc/self/ns/net").readlink()
        deadline_s = time.monotonic() + 5
        while namespace.readlink() == ours:
            if time.monotonic() > deadline_s:
                raise OSError("no network namespace")
            time.sleep(0.01)
        peer = ["type", "veth", "peer", "name", FAR_DEVICE, "netns", str(self._holder.pid)]
        _run("ip", "link", "add", device, *peer)
        _run("ip", "address", "add", f"{self.near}/30", "dev", device)
        _run("ip", "link", "set", device, "up")
        _run(*self.inside, "ip", "address", "add", f"{self.far}/30", "dev", FAR_DEVICE)
        for name in ("lo", FAR_DEVICE):
            _run(*self.inside, "ip", "link", "set", name, "up")

    async def cut(self, seconds: float) -> None:
        """Nothing passes for a while; connections are told nothing."""
        _run(*self.inside, "ip", "link", "set", FAR_DEVICE, "down")
        try:
            await asyncio.sleep(seconds)
        finally:
            _run(*self.inside, "ip", "link", "set", FAR_DEVICE, "up")

    def stop(self) -> None:
        self._holder.kill()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def make_link(directory: Path) -> Link | None:
    """A link, or None and a line that says why there is none."""
    try:
        return Link(directory)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"no link will be cut: network namespaces cannot be made here ({error})")
        return None


@dataclass
class World:
    """Router, replicas, and the link to the first of them if there is one."""

    router: Child
    replicas: list[Child]
    link: Link | None
    url: str
    pause_s: float

    @classmethod
    def build(cls, options: argparse.Namespace, directory: Path) -> World:
        link = make_link(directory) if "cut" in options.troubles else None
        port, address = free_port(), link.near if link else "127.0.0.1"
        endpoint = f"tcp://{address}:{free_port()}"
        router = Child(
            "router",
            [
                sys.executable, "-m", "autellix_sglang.router", "--port", str(port),
                "--endpoint", endpoint, "--insecure", "--heartbeat-s", str(HEARTBEAT_S),
                "--timeout-s", str(options.silence), "--worker-wait-s", "20",
            ],
            directory,
        )  # fmt: skip
        commands = [
            _replica_command(options, index, endpoint)
            for index in range(options.engines or options.replicas)
        ]
        if link:
            commands[0] = [*link.inside, *commands[0]]
        replicas = [Child(f"replica-{i}", c, directory) for i, c in enumerate(commands)]
        return cls(router, replicas, link, f"http://127.0.0.1:{port}", options.pause)

    async def start(self) -> None:
        for child in (self.router, *self.replicas):
            child.start()
        await self.until(lambda seen: _num_ready(seen) == len(self.replicas), READY_S)

    async def stop(self) -> None:
        for child in (*self.replicas, self.router):
            child.kill()
        if self.link:
            self.link.stop()

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
                assert self.link is not None
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


def _replica_command(options: argparse.Namespace, index: int, endpoint: str) -> list[str]:
    name = f"replica-{index}"
    join = ["--router-endpoint", endpoint, "--router-insecure", "--worker-name", name]
    if not options.engines:
        module = "autellix_sglang.router.testing"
        return [sys.executable, "-m", module, "--speed", str(options.speed), *join]
    launch = [sys.executable, "-m", "autellix_sglang.launch", "--port", str(free_port())]
    return [*launch, *ENGINE_FLAGS, *join]


def _num_ready(seen: dict[str, Any]) -> int:
    return sum(worker["state"] == "ready" for worker in seen["workers"])


def _num_held(seen: dict[str, Any]) -> int:
    """What is not over yet: calls and bodies in the router, calls in the replicas."""
    calls = sum(worker["open_streams"] + worker["live_calls"] for worker in seen["workers"])
    return int(seen["open_calls"] + seen["buffered_bytes"] + calls)


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
    world = World.build(options, directory)
    account, troubles = Account(), Troubles()
    numbers = range(options.programs)
    again = range(options.programs, options.programs + max(20, options.programs // 4))
    try:
        say(f"starting a router and {len(world.replicas)} replicas")
        await world.start()
        say("undisturbed")
        if options.engines:
            expected = await run_programs(world, options, numbers, Account())
        else:
            expected = [undisturbed(number) for number in numbers]
        sizes = [await router_size(world, options, again)]
        say("disturbed")
        started_s = time.perf_counter()
        task = asyncio.create_task(run_programs(world, options, numbers, account))
        await disturb(world, options, troubles, task)
        found = await task
        seconds = time.perf_counter() - started_s
        say("at rest")
        await world.until(lambda seen: _num_ready(seen) == len(world.replicas), READY_S)
        sizes += [await router_size(world, options, again) for _ in range(3)]
        with suppress(TimeoutError):
            await world.until(lambda seen: _num_held(seen) == 0, 10)
        num_held = _num_held(await world.seen())
    finally:
        await world.stop()
    wrong = sum(a != b for a, b in zip(found, expected, strict=True))
    has_grown = sizes[-1] > GROWTH * sizes[0]
    return {
        "programs": options.programs,
        "calls": account.num_calls,
        "replicas": len(world.replicas),
        "real_engines": bool(options.engines),
        "pause_s": options.pause,
        "troubles": troubles.counts,
        "whole_again_s": {kind: round(s, 1) for kind, s in troubles.longest_s.items()},
        "lost": len(account.lost),
        "answered_twice": len(account.twice),
        "wrong_results": wrong,
        "errors": account.errors,
        "run_s": round(seconds, 1),
        "held_at_end": num_held,
        "router_rss_mib": sizes,
        "ok": not (account.lost or account.twice or wrong or num_held or has_grown),
    }


@dataclass
class Troubles:
    """How often each kind was made, and how long it took at most until all was well after it."""

    counts: Counter[str] = field(default_factory=Counter)
    longest_s: dict[str, float] = field(default_factory=dict)


async def disturb(
    world: World, options: argparse.Namespace, troubles: Troubles, until: Awaitable[Any]
) -> None:
    """Trouble of one kind after the other while the programs run."""
    rng = random.Random(options.seed)
    task = asyncio.ensure_future(until)
    kinds = [kind for kind in options.troubles if kind != "cut" or world.link]
    while not task.done():
        for kind in kinds:
            await asyncio.wait({task}, timeout=options.every * rng.uniform(0.5, 1.5))
            if task.done():
                return
            await world.hurt(kind, rng)
            over_s = time.perf_counter()
            await asyncio.sleep(options.silence)  # by then the router knows who is gone
            await world.until(lambda seen: _num_ready(seen) == len(world.replicas), READY_S)
            took_s = time.perf_counter() - over_s
            troubles.counts[kind] += 1
            troubles.longest_s[kind] = max(took_s, troubles.longest_s.get(kind, 0.0))


async def router_size(world: World, options: argparse.Namespace, numbers: Sequence[int]) -> float:
    """The router's memory in MiB after some programs in peace."""
    await run_programs(world, options, numbers, Account())
    num_bytes: int = psutil.Process(world.router.pid).memory_info().rss
    return round(num_bytes / 2**20, 1)


def parser() -> argparse.ArgumentParser:
    made = new_parser("bench.router_chaos", __doc__)
    add = made.add_argument
    add("--quick", action="store_true", help="300 programs, pauses of 2 s")
    add("--programs", type=int, default=2000, help="default: %(default)s")
    add("--replicas", type=int, default=4, help="fake ones (default: %(default)s)")
    add("--engines", type=int, default=0, help="real engines in their place")
    add("--troubles", nargs="+", default=["kill", "pause", "cut", "router"],
        choices=["kill", "pause", "cut", "router"], help="default: all")  # fmt: skip
    add("--every", type=float, default=1.0, help="seconds between troubles (%(default)s)")
    add("--pause", type=float, default=10.0, help="seconds of a pause or a cut (%(default)s)")
    add("--silence", type=float, default=TIMEOUT_S, help="the router's --timeout-s (%(default)s)")
    add("--timeout", type=float, default=60.0, help="seconds after which a call is lost")
    add("--at-once", type=int, default=6, help="programs at once (%(default)s)")
    add("--speed", type=float, default=1.0, help="of fake replicas (%(default)s)")
    add("--seed", type=int, default=1)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    options = parser().parse_args(argv)
    if options.quick:
        options.programs, options.pause = min(options.programs, 300), min(options.pause, 2.0)
    directory = Path(tempfile.mkdtemp(prefix="autellix-chaos-"))
    say(f"logs, kept unless all goes well: {directory}")
    result = asyncio.run(chaos(options, directory))
    if result["ok"]:
        shutil.rmtree(directory)
    for key, value in result.items():
        print(f"{key:16} {json.dumps(value)}")
    print_result(result | provenance(started))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
