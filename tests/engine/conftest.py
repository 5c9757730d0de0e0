"""The real engine, started once per session on the CPU with the built-in model."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from bench.server import Server, free_port, launch_command

TTL_S = 2.0
# A small batch, a small KV pool and short quanta: every mechanism is at work.
FLAGS = [
    "--max-running-requests", "4", "--max-total-tokens", "3000", "--program-quantum", "8",
    "--program-min-run", "2", "--program-schedule-interval", "1", "--program-beta", "4",
    "--program-ttl", str(TTL_S),
    "--program-prefill-weight", "0.02", "--context-length", "2048", "--enable-metrics",
]  # fmt: skip
EMPTY = ("programs", "live_calls", "waiting_calls", "running_calls")


@dataclass(frozen=True)
class Engine:
    """A running server, asked in plain HTTP."""

    server: Server
    router_endpoint: str  # that it dials

    @property
    def url(self) -> str:
        return self.server.base_url

    def request(
        self,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
        method: str | None = None,
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers in lower case, and the decoded body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path,
            data=data,
            headers={"content-type": "application/json", **(headers or {})},
            method=method or ("GET" if data is None else "POST"),
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                found = {key.lower(): value for key, value in response.headers.items()}
                return response.status, found, _decoded(response.read())
        except urllib.error.HTTPError as error:
            with error:
                found = {key.lower(): value for key, value in error.headers.items()}
                return error.code, found, _decoded(error.read())

    def generate(self, prompt: str = "hello", num_tokens: int = 4, **headers: str) -> Any:
        """A greedy completion of exactly `num_tokens`; header x-program-id is `x_program_id=`."""
        params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        status, _, reply = self.request(
            "/generate", {"text": prompt, "sampling_params": params}, names
        )
        assert status == 200, reply
        return reply

    def stats(self) -> dict[str, Any]:
        status, _, reply = self.request("/program_stats")
        assert status == 200, reply
        assert isinstance(reply, dict)
        return reply

    def wait_until_empty(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """The statistics once no program, call or KV token is held; fails after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            stats = self.stats()
            held = stats["kv_total_tokens"] - stats["kv_available_tokens"]
            held -= stats["kv_evictable_tokens"]
            if not held and not any(stats[key] for key in EMPTY):
                return stats
            assert time.monotonic() < deadline, f"{held} KV tokens held, {stats}"
            time.sleep(0.1)


def _decoded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The default policy with the settings above; it must still be alive at the end."""
    port = free_port()
    directory = tmp_path_factory.mktemp("engine")
    endpoint = f"ipc://{directory}/router.sock"
    flags = [*FLAGS, "--router-endpoint", endpoint, "--worker-name", "engine"]
    with Server("plas", launch_command("plas", port, flags), port, directory) as server:
        yield Engine(server, endpoint)
        server.check_alive()
