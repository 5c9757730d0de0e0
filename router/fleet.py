"""Local replicas: start them, watch them, start them again, and put their logs into one.

    python -m autellix_sglang.launch --replicas 4 ...      this process: router and fleet
      python -m autellix_sglang.launch --worker-name replica-0 --base-gpu-id 0 ...
      python -m autellix_sglang.launch --worker-name replica-1 --base-gpu-id 1 ...

Each replica is a process group of its own, dials the router's ipc:// socket, and keeps a private
HTTP port. It goes down with this process, however that ends.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import io
import logging
import os
import random
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Final

from autellix_sglang.errors import ConfigError
from autellix_sglang.router.config import RouterConfig

logger = logging.getLogger(__name__)

PROGRESS_S: Final = 10.0
DRAIN_S: Final = 1.0  # for the rest of its log, once it has ended
STOP_S: Final = 30.0  # from SIGTERM to SIGKILL: SGLang takes up to 20 s to free a GPU's memory
FIRST_PAUSE_S: Final = 1.0  # before a replica is started again; doubles with every early death
MAX_PAUSE_S: Final = 60.0
EARLY_S: Final = 60.0  # a replica that lives longer has recovered
USAGE_STATUS: Final = ConfigError.exit_status  # at the first start: starting again is no use
PR_SET_PDEATHSIG: Final = 1
PORTS: Final = (20_000, 30_000)  # of replicas and of our tests' servers
TP_FLAGS: Final = ("--tp", "--tp-size", "--tensor-parallel-size")
PP_FLAGS: Final = ("--pp", "--pp-size", "--pipeline-parallel-size")
NOT_SHARED: Final = {
    "--dist-init-addr": "all replicas would have it",
    "--nccl-port": "all replicas would have it",
    "--ssl-": "the router has no TLS: put a proxy that has in front of it",
}


class Replica:
    """One local engine: its command, and the process that runs it."""

    def __init__(self, name: str, command: Sequence[str], environ: dict[str, str]) -> None:
        self.name = name
        self.num_starts = 0
        self._command = list(command)
        self._environ = environ
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Its process while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def run(self, write: Callable[[str], None]) -> int:
        """Run it once, each line of its log given to `write`; returns its exit status.

        Raises `OSError` if no process can be had. All but the first run have a new `--port`.
        """
        if self.num_starts:  # another process may have its port by now
            self._command = _on_free_port(self._command)
        # A pipe of our own: asyncio's waits for whatever else holds its other end.
        ours, theirs = os.pipe()
        log = asyncio.StreamReader(limit=1 << 20)
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(log), os.fdopen(ours, "rb", 0)
        )
        reading = asyncio.create_task(self._copy_log(log, write))
        self._process = None
        try:
            self._process = process = await self._start(theirs)
            self.num_starts += 1
            return await process.wait()
        finally:
            self.kill()  # what it started and left behind
            await asyncio.wait({reading}, timeout=DRAIN_S)
            reading.cancel()
            pipe.close()

    async def _start(self, log: int) -> asyncio.subprocess.Process:
        """The process, with this descriptor for its log, which is closed here."""
        try:
            return await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        finally:
            os.close(log)

    async def _copy_log(self, stream: asyncio.StreamReader, write: Callable[[str], None]) -> None:
        async for line in _lines(stream):
            with suppress(OSError, ValueError):  # nobody can read our log: the replica runs on
                write(f"[{self.name}] {line}")

    def terminate(self) -> None:
        """Ask it to end; what it started is for it to end, or for `kill`."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End its whole process group, if there is one."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


async def _lines(stream: asyncio.StreamReader) -> Any:
    """Decoded lines; one too long for the buffer comes in parts."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # the reader has thrown away what it held
            yield "(a line too long to show)"
            continue
        if not line:
            return
        yield line.decode(errors="replace").rstrip("\n")


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """In a child before it becomes another program: this signal when our process is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


class Fleet:
    """Keeps its replicas running between `start` and `stop`.

    `num_ready` says how many of them the router may use, for the progress lines; `note_end` is told
    the name of each whose process ended; `give_up` is called when a replica refuses its arguments
    at its first start, which no restart would change.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        num_ready: Callable[[], int],
        note_end: Callable[[str], None],
        give_up: Callable[[], None],
        write: Callable[[str], None] = lambda line: print(line, flush=True),
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self.replicas = list(replicas)
        self._num_ready = num_ready
        self._note_end = note_end
        self._give_up = give_up
        self._write = write
        self._first_pause_s = first_pause_s
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopping = False

    async def start(self) -> None:
        """Start every replica; returns at once."""
        self._tasks = [asyncio.create_task(self._keep(replica)) for replica in self.replicas]
        self._tasks.append(asyncio.create_task(self._show_progress()))

    async def stop(self) -> None:
        """End every replica: SIGTERM, and SIGKILL for what is left after `STOP_S`."""
        self._is_stopping = True
        for replica in self.replicas:
            replica.terminate()
        running = [task for task in self._tasks if not task.done()]
        if running:
            self._tasks[-1].cancel()  # progress
            await asyncio.wait(running, timeout=STOP_S)
        for replica in self.replicas:
            replica.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep(self, replica: Replica) -> None:
        """Run a replica again and again, with longer pauses while it dies early."""
        loop = asyncio.get_running_loop()
        pause_s = self._first_pause_s
        while not self._is_stopping:
            started_s = loop.time()
            try:
                status = await replica.run(self._write)
                end = f"ended with status {status}"
            except OSError as error:
                status, end = None, f"could not be started: {error}"
            self._note_end(replica.name)
            if self._is_stopping:
                return
            if status == USAGE_STATUS and replica.num_starts == 1:
                logger.error("%s refused its arguments, stopping", replica.name)
                self._give_up()
                return
            lived_s = loop.time() - started_s
            pause_s = self._first_pause_s if lived_s > EARLY_S else min(2 * pause_s, MAX_PAUSE_S)
            logger.warning(
                "%s %s after %.0f s, starting it again in %.0f s",
                replica.name, end, lived_s, pause_s,
            )  # fmt: skip
            await asyncio.sleep(pause_s)

    async def _show_progress(self) -> None:
        """A line now and then until all replicas are ready, and one when they are."""
        loop = asyncio.get_running_loop()
        started_s = told_s = loop.time()
        while self._num_ready() < len(self.replicas):
            await asyncio.sleep(0.25)
            if loop.time() - told_s >= PROGRESS_S:
                told_s = loop.time()
                self._tell(f"after {told_s - started_s:.0f} s")
        self._tell(f"after {loop.time() - started_s:.0f} s: serving")

    def _tell(self, text: str) -> None:
        logger.info("%d of %d replicas ready %s", self._num_ready(), len(self.replicas), text)


# -- command lines -------------------------------------------------------------------------------


def replica_commands(
    namespace: argparse.Namespace,
    sglang_argv: Sequence[str],
    argv: Sequence[str],
    router: RouterConfig,
) -> list[list[str]]:
    """One command per replica: the user's own flags, then those that set it apart.

    `sglang_argv` are the flags that are not ours, `argv` all of them; the last of a repeated flag
    counts. Raises `ConfigError`.
    """
    for arg in sglang_argv:
        for flag, why in NOT_SHARED.items():
            if arg.startswith(flag):
                raise ConfigError(arg.partition("=")[0], f"not supported with --replicas: {why}")
    num_gpus = _number(sglang_argv, TP_FLAGS, 1) * _number(sglang_argv, PP_FLAGS, 1)
    num_gpus *= _number(sglang_argv, ("--gpu-id-step",), 1)
    first_gpu = _number(sglang_argv, ("--base-gpu-id",), 0)
    shared = _without(argv, "--replicas", "--router-policy", "--port", "--host", "--base-gpu-id")
    return [
        [
            sys.executable, "-m", "autellix_sglang.launch", *shared,
            "--host", "127.0.0.1", "--port", str(port),
            "--base-gpu-id", str(first_gpu + i * num_gpus),
            "--router-endpoint", router.endpoint, "--worker-name", f"replica-{i}",
        ]
        for i, port in enumerate(free_ports(namespace.replicas, besides=router.port))
    ]  # fmt: skip


def _without(argv: Sequence[str], *flags: str) -> list[str]:
    """The command line without these flags and their values."""
    rest: list[str] = []
    skips = False
    for arg in argv:
        if skips:
            skips = False
        elif arg in flags:
            skips = True
        elif arg.partition("=")[0] not in flags:
            rest.append(arg)
    return rest


def _value(argv: Sequence[str], flags: Sequence[str]) -> str | None:
    """The last value given for any of these spellings of a flag."""
    found = None
    for i, arg in enumerate(argv):
        name, equals, value = arg.partition("=")
        if name in flags:
            found = value if equals else (argv[i + 1] if i + 1 < len(argv) else None)
    return found


def _number(argv: Sequence[str], flags: Sequence[str], default: int) -> int:
    value = _value(argv, flags)
    if value is None:
        return default
    if not value.isdigit():
        raise ConfigError(flags[0], f"{value!r} is not a whole number")
    return int(value)


def free_ports(count: int, besides: int = 0) -> list[int]:
    """Ports of the loopback that were free a moment ago, all different.

    They are below those that systems give to outgoing connections: a server takes a minute to bind
    its port, and until then one of those would be gone now and then.
    """
    ports: list[int] = []
    with ExitStack() as probes:
        while len(ports) < count:
            port = random.randrange(*PORTS)
            if port == besides:
                continue
            with suppress(OSError):
                probes.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
    return ports


def _on_free_port(command: Sequence[str]) -> list[str]:
    """The command with another `--port`, where it has one."""
    made = list(command)
    if "--port" in made:
        made[made.index("--port") + 1] = str(free_ports(1)[0])
    return made


def serve(namespace: argparse.Namespace, sglang_argv: Sequence[str], argv: Sequence[str]) -> int:
    """Run router and replicas until stopped; returns the exit status. Raises `ConfigError`."""
    with tempfile.TemporaryDirectory(prefix="autellix-router-") as directory:
        config = RouterConfig(
            host=_value(sglang_argv, ("--host",)) or RouterConfig().host,
            port=_number(sglang_argv, ("--port",), RouterConfig().port),
            endpoint=f"ipc://{directory}/router.sock",
            policy=namespace.router_policy,
            admin_key=_value(sglang_argv, ("--admin-api-key",)) or "",
        )
        commands = replica_commands(namespace, sglang_argv, argv, config)
        return _run(config, commands)


def _run(config: RouterConfig, commands: Sequence[Sequence[str]]) -> int:
    from autellix_sglang.router.__main__ import serve as route
    from autellix_sglang.router.hub import Hub

    hub = Hub(config)
    refused: list[bool] = []

    def give_up() -> None:
        refused.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    if isinstance(sys.stdout, io.TextIOWrapper):  # a replica's log may hold what ours cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    replicas = [Replica(f"replica-{i}", c, environ) for i, c in enumerate(commands)]
    status = route(hub, Fleet(replicas, lambda: hub.num_ready, hub.expect_end, give_up))
    return USAGE_STATUS if refused else status
