"""Placement on real sockets: the same programs through our router and through sglang-router's.

Replicas are processes with a timing model and a prefix cache (`autellix_sglang.router.testing`),
which sleep what a GPU would compute: so a few of them run on two cores, and where a call runs
decides how long it takes. Each door and policy gets fresh ones, in turn, `repeats` times over; the
programs and their arrivals are the same for all. Load 1 is the rate that would keep every replica
in full batches all the time with all that programs share with their own history cached.

Times are those of the model over `SPEED`; late clients (`client_late_s`) and lost calls would show
that the machine was too slow for it. This is the check of the models of sglang-router's policies
in `bench/sim_fleet.py`. Its `cache_aware` balances from a difference of 64 calls on by default,
which replicas of 8 slots never see; it is told 8.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from autellix_sglang.router.testing import Timing
from bench.common import say
from bench.replay import ReplayOptions, poisson_arrivals, replay
from bench.server import Server, ServerError, free_port
from bench.sim_engine import blueprint
from bench.stats import combine, summarize
from bench.trace import TraceProgram

SPEED: Final = 2.0
TIMING: Final = Timing(num_slots=8, kv_tokens=30_000)  # few slots: few programs fill them
READY_S: Final = 60.0
KEPT: Final = (
    *("program_token_latency_ms", "program_response_s", "prefix_hit_rate"),
    *("programs", "calls", "lost", "errors", "client_late_s", "repeats"),
)


@dataclass(frozen=True, slots=True)
class Door:
    """A router's process and its policy."""

    router: str
    policy: str

    @property
    def is_ours(self) -> bool:
        return self.router == "ours"


OURS: Final = (Door("ours", "autellix"), Door("ours", "round-robin"))
PEERS: Final = (Door("sglang-router", "cache_aware"), Door("sglang-router", "round_robin"))


def measure(
    programs: Sequence[TraceProgram],
    rate: float,
    *,
    num_replicas: int = 4,
    repeats: int = 2,
    seed: int = 1,
    peer_python: str | None = None,
) -> list[dict[str, Any]]:
    """One row per door, that of `autellix` first: medians over the repeats.

    `rate` is in programs per second. `peer_python` is a Python with sglang-router; by default
    this one, if it has it.
    """
    arrivals_s = poisson_arrivals(len(programs), rate, seed)
    peer = peer_command(peer_python)
    doors = (*OURS, *(PEERS if peer else ()))
    found: dict[Door, list[dict[str, object]]] = {door: [] for door in doors}
    for repeat in range(repeats):
        for door in doors:
            say(f"{door.router}, {door.policy}: run {repeat + 1} of {repeats}")
            found[door].append(_run(door, peer, programs, arrivals_s, num_replicas))
    rows = [(door, combine(runs)) for door, runs in found.items()]
    return [
        {"router": door.router, "policy": door.policy, "replicas": num_replicas,
         "rate": rate, **{key: row[key] for key in KEPT}}
        for door, row in rows
    ]  # fmt: skip


def capacity(programs: Sequence[TraceProgram]) -> float:
    """Programs per second that keep one replica in full batches, at speed 1."""
    busy_s = 0.0
    for plan in map(blueprint, programs):
        output = sum(call.output_tokens for call in plan.trace.calls)
        busy_s += output * (TIMING.step_s / TIMING.num_slots + TIMING.step_call_s)
        busy_s += sum(plan.fresh_tokens) / TIMING.prefill_tokens_per_s
    return len(programs) / busy_s


def peer_command(python: str | None) -> list[str] | None:
    """How sglang-router is started, None and a line where it is not installed."""
    command = [python or sys.executable, "-m", "sglang_router.launch_router"]
    if shutil.which(command[0]) and _is_installed(command[0]):
        return command
    say("sglang-router is not installed: no peer to compare with")
    return None


def _is_installed(python: str) -> bool:
    return subprocess.run([python, "-c", "import sglang_router"], check=False).returncode == 0


def _run(
    door: Door,
    peer: Sequence[str] | None,
    programs: Sequence[TraceProgram],
    arrivals_s: Sequence[float],
    num_replicas: int,
) -> dict[str, object]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if door.is_ours:
            server = _start_ours(stack, directory, door, num_replicas)
        else:
            assert peer is not None
            server = _start_peer(stack, directory, door, peer, num_replicas)
        _wait_for_workers(server, num_replicas)
        options = ReplayOptions(base_url=server.base_url, gap_scale=1 / SPEED)
        return summarize(asyncio.run(replay(door.policy, programs, arrivals_s, options)))


def _start_ours(stack: ExitStack, directory: Path, door: Door, num_replicas: int) -> Server:
    endpoint = f"ipc://{directory}/router.sock"
    join = ("--router-endpoint", endpoint)
    for index in range(num_replicas):
        _start_replica(stack, directory, index, *join, "--worker-name", f"w{index}")
    port = free_port()
    flags = ["--port", str(port), "--endpoint", endpoint, "--policy", door.policy]
    command = [sys.executable, "-m", "autellix_sglang.router", *flags]
    return _start(stack, Server("router", command, port, directory))


def _start_peer(
    stack: ExitStack, directory: Path, door: Door, peer: Sequence[str], num_replicas: int
) -> Server:
    ports = [free_port() for _ in range(num_replicas)]
    replicas = [
        _start_replica(stack, directory, index, "--port", str(port), port=port)
        for index, port in enumerate(ports)
    ]
    for replica in replicas:
        replica.wait_ready(timeout_s=READY_S)
    port = free_port()
    flags = [
        "--host", "127.0.0.1", "--port", str(port), "--policy", door.policy,
        "--balance-abs-threshold", str(TIMING.num_slots),
        "--log-level", "error", "--prometheus-port", str(free_port()),
        "--worker-urls", *(replica.base_url for replica in replicas),
    ]  # fmt: skip
    return _start(stack, Server("peer", [*peer, *flags], port, directory))


def _start_replica(
    stack: ExitStack, directory: Path, index: int, *flags: str, port: int = 0
) -> Server:
    command = [
        sys.executable, "-m", "autellix_sglang.router.testing", "--speed", str(SPEED),
        "--slots", str(TIMING.num_slots), "--kv-tokens", str(TIMING.kv_tokens), *flags,
    ]  # fmt: skip
    return _start(stack, Server(f"replica-{index}", command, port, directory))


def _start(stack: ExitStack, server: Server) -> Server:
    server.start()
    stack.callback(server.stop)
    return server


def _wait_for_workers(server: Server, count: int) -> None:
    """Until a router says that all take calls; raises `ServerError` if it does not."""
    deadline_s = time.monotonic() + READY_S
    while _num_workers(server) < count:
        server.check_alive()
        if time.monotonic() > deadline_s:
            raise ServerError(f"not {count} workers behind {server.base_url} in {READY_S:g} s")
        time.sleep(0.2)


def _num_workers(server: Server) -> int:
    """Workers that may take calls, as our router or sglang-router tells it."""
    try:
        with urllib.request.urlopen(server.base_url + "/workers", timeout=5) as reply:
            workers = json.load(reply)["workers"]
    except (urllib.error.URLError, OSError):
        return 0
    return sum(w["is_healthy"] if "is_healthy" in w else w["state"] == "ready" for w in workers)
