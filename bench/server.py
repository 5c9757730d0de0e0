"""Start the servers under test, wait for them, read their state, and stop exactly them.

A server is `python -m autellix_sglang.launch --program-policy P` in a process group of its own. One
serves all of our policies (`PATCH /program_config` changes the policy of a live server); each of
SGLang's own orders (`STOCK`) needs a server to itself.
Its log goes to a file whose tail is shown if it dies. Several may be started at once; idle ones
sleep (`--sleep-on-idle`) and one thread each (`OMP_NUM_THREADS=1`) keeps them off each other's
cores. They run with `--enable-metrics`, the only way to learn a call's queueing time from stock
SGLang.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from autellix_sglang.router.fleet import free_ports
from bench.common import ROOT

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.25
LOG_TAIL_LINES = 40
IDLE_TIMEOUT_S = 30.0
EMPTY = ("programs", "live_calls", "waiting_calls", "running_calls")
COUNTED = (  # of `program_stats`
    "num_preemptions", "retracted_calls", "recomputed_tokens", "swaps_out", "swaps_in",
    "dropped_for_full_pool", "swaps_lost", "prefetches", "prefetch_hits",
)  # fmt: skip
LEAKS = ("leaked_programs", "leaked_kv_tokens", "leaked_host_bytes")
COMMON_FLAGS = ("--host", "127.0.0.1", "--sleep-on-idle", "--enable-metrics")
# SGLang untouched, by the name that benchmarks give to its order of waiting calls.
STOCK: Mapping[str, tuple[str, ...]] = {
    "off": (),
    **{name: ("--schedule-policy", name) for name in ("lpm", "hrrn")},
}


class ServerError(RuntimeError):
    """A server did not start, died, or did not do what it was asked; shows its log's tail."""


def launch_command(policy: str, port: int, flags: Sequence[str] = ()) -> list[str]:
    """The command that starts a server; `flags` come last, so they win over ours."""
    stock = STOCK.get(policy)
    program_policy = policy if stock is None else "off"
    launch = [sys.executable, "-m", "autellix_sglang.launch", "--program-policy", program_policy]
    return [*launch, "--port", str(port), *COMMON_FLAGS, *(stock or ()), *flags]


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    return free_ports(1)[0]


class Server:
    """A server process of ours: `start`, `wait_ready`, `stop`; as a context manager all three."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        log_directory: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self.base_url = f"http://127.0.0.1:{port}"
        self.log_path = log_directory / f"{name}-{port}.log"
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Spawn the process and return at once."""
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(
        self,
        timeout_s: float = START_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Return once `/health` answers 200; raises `ServerError` if it dies or takes too long."""
        deadline = clock() + timeout_s
        while not is_healthy(self.base_url):
            self.check_alive()
            if clock() > deadline:
                raise ServerError(
                    f"{self._title()} not ready after {timeout_s:.0f} s{self._tail()}"
                )
            sleep(POLL_S)

    def check_alive(self) -> None:
        """Raise `ServerError` with the log's tail if the process has ended."""
        assert self._process is not None, "start() comes first"
        status = self._process.poll()
        if status is not None:
            raise ServerError(f"{self._title()} ended with status {status}{self._tail()}")

    @property
    def pid(self) -> int:
        """The root of the server's process tree, once started."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End the whole process group: SIGTERM, then SIGKILL for what is left after `timeout_s`."""
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        # Reap the leader on the way, or its zombie would keep the group alive.
        while process.poll() is None or _signal_group(process.pid, 0):
            if time.monotonic() > deadline:
                _signal_group(process.pid, signal.SIGKILL)
                break
            time.sleep(0.05)
        process.wait()

    def restart(self) -> None:
        """Stop, start and wait: a server that has seen nothing."""
        self.stop()
        self.start()
        self.wait_ready()

    def __enter__(self) -> Server:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _title(self) -> str:
        return f"server {self.name!r} ({' '.join(self._command)})"

    def _tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return f"; end of {self.log_path}:\n" + "\n".join(f"    {line}" for line in lines)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group of ours; False if nobody is left in it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a policy is served. `server` is None where the server is not ours.

    `is_shared` is True where one server serves several policies, one at a time.
    """

    policy: str
    base_url: str
    server: Server | None = None
    is_shared: bool = False

    def select(self) -> None:
        """Make the server run this policy, where it may be running another."""
        if self.is_shared:
            configure(self.base_url, policy=self.policy)


@contextmanager
def policy_servers(
    policies: Sequence[str], flags: Sequence[str] = ()
) -> Iterator[dict[str, Endpoint]]:
    """An endpoint per policy, on servers with identical flags, stopped at the end.

    They are started side by side: one for each of `STOCK`, one for all other policies together.
    """
    ours = [policy for policy in policies if policy not in STOCK]
    started = [policy for policy in policies if policy in STOCK or policy == ours[0]]
    directory = Path(tempfile.mkdtemp(prefix="autellix-bench-"))
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for policy in started:
            port = free_port()
            servers[policy] = Server(policy, launch_command(policy, port, flags), port, directory)
            stack.callback(servers[policy].stop)
            servers[policy].start()
        for server in servers.values():
            server.wait_ready()
        yield {
            policy: _endpoint(policy, servers[policy if policy in STOCK else ours[0]], len(ours))
            for policy in policies
        }


def _endpoint(policy: str, server: Server, num_ours: int) -> Endpoint:
    is_shared = policy not in STOCK and num_ours > 1
    return Endpoint(policy, server.base_url, server, is_shared)


# --- asking a server, ours or not ---------------------------------------------------------------


def is_healthy(base_url: str) -> bool:
    try:
        _request(f"{base_url}/health", timeout_s=5.0)
    except OSError:
        return False
    return True


def server_info(base_url: str) -> Mapping[str, Any]:
    """SGLang's `/server_info`: its settings and state; raises `ServerError`."""
    try:
        info = json.loads(_request(f"{base_url}/server_info"))
    except (OSError, ValueError) as error:
        raise ServerError(f"{base_url}/server_info: {error}") from error
    return info if isinstance(info, dict) else {}


def flush_cache(
    base_url: str, timeout_s: float = 30.0, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Empty the prefix cache; waits for a busy server to come to rest, raises `ServerError`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            _request(f"{base_url}/flush_cache", method="POST")
            return
        except OSError as error:
            # SGLang refuses with 400 while calls are still being cleaned up.
            if time.monotonic() > deadline or not isinstance(error, urllib.error.HTTPError):
                raise ServerError(f"{base_url}/flush_cache: {error}") from error
        sleep(POLL_S)


# --- asking a program server --------------------------------------------------------------------


def program_stats(base_url: str) -> dict[str, Any]:
    """The scheduler's counters and settings; raises `ServerError`."""
    return _ask(base_url, "/program_stats")


def configure(base_url: str, **settings: Any) -> dict[str, Any]:
    """Change settings of a live scheduler; returns its counters. Raises `ServerError`."""
    return _ask(base_url, "/program_config", "PATCH", settings)


def wait_empty(server: Server, timeout_s: float = IDLE_TIMEOUT_S) -> dict[str, Any]:
    """The server's counters once it holds no program and no call, or after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        state = program_stats(server.base_url)
        if not any(state[key] for key in EMPTY) or time.monotonic() > deadline:
            server.check_alive()
            return state
        time.sleep(0.1)


def leaks(state: Mapping[str, Any]) -> dict[str, int]:
    """What an idle server should not hold, by the names in `LEAKS`."""
    free = state["kv_available_tokens"] + state["kv_evictable_tokens"]
    return {
        "leaked_programs": max(state[key] for key in EMPTY) + state["orphaned_calls"],
        "leaked_kv_tokens": state["kv_total_tokens"] - free,
        "leaked_host_bytes": state["host_pool_used_bytes"],
    }


def _ask(
    base_url: str, path: str, method: str = "GET", body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    try:
        reply = json.loads(_request(base_url + path, method, body=body))
    except OSError as error:
        raise ServerError(f"{method} {base_url}{path} {body or ''}: {error}") from error
    assert isinstance(reply, dict)
    return reply


def _request(
    url: str,
    method: str = "GET",
    timeout_s: float = 30.0,
    body: Mapping[str, Any] | None = None,
) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    headers = {} if body is None else {"content-type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        reply: bytes = response.read()
    return reply
