"""Settings of the router and of the worker agent, each default written once."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from autellix_sglang.errors import ConfigError
from autellix_sglang.router.balance import POLICIES

WORKER_ENV_VAR: Final = "AUTELLIX_SGLANG_WORKER"
MAX_SETTING: Final = 10**12
MAX_CREDIT_BYTES: Final = 2**30  # a socket's buffer is told them


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Settings of the router; field `x_y` is the flag `--x-y`."""

    host: str = _setting("127.0.0.1", "address that clients connect to")
    port: int = _setting(30000, "port that clients connect to")
    endpoint: str = _setting(
        "tcp://127.0.0.1:30500", "ZMQ endpoint that workers dial: ipc://PATH or tcp://HOST:PORT"
    )
    policy: str = _setting("autellix", "placement of calls: " + ", ".join(POLICIES))
    keys: str = _setting("", "directory with CURVE keys; needed off the loopback")
    admin_key: str = _setting(
        "", "bearer token that POST /workers/... needs; without one only this machine may"
    )
    insecure: bool = _setting(False, "accept plain tcp:// off the loopback")
    heartbeat_s: float = _setting(0.5, "seconds between heartbeats")
    timeout_s: float = _setting(5.0, "seconds of silence after which a worker counts as lost")
    worker_wait_s: float = _setting(5.0, "seconds a call waits for a worker before HTTP 503")
    request_timeout_s: float = _setting(3600.0, "deadline of a call in seconds")
    retries: int = _setting(
        1, "times a call without a first byte is tried elsewhere after its worker died"
    )
    credit_bytes: int = _setting(262_144, "answer bytes in flight per stream")
    max_calls: int = _setting(16_384, "calls at once; more are answered with HTTP 503")
    max_body_bytes: int = _setting(67_108_864, "size of a request body; more is HTTP 413")
    max_buffer_bytes: int = _setting(1_073_741_824, "request bodies held at once, else HTTP 503")
    prefill_tokens_per_s: float = _setting(
        5000.0, "assumed prefill rate while no worker has measured its own"
    )
    stop_s: float = _setting(30.0, "seconds that a stop waits for running calls")

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first field whose value cannot work."""
        if self.policy not in POLICIES:
            raise ConfigError("--policy", f"{self.policy!r} is not one of {', '.join(POLICIES)}")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and not (value > 0 or (f.name in ("retries", "port") and value == 0)):
                raise ConfigError(flag_of(f.name), f"{value!r} is not allowed; it must be above 0")
            most = MAX_CREDIT_BYTES if f.name == "credit_bytes" else MAX_SETTING
            if is_number and value > most:
                raise ConfigError(flag_of(f.name), f"{value!r} is not allowed; at most {most:g}")
        check_port_number(self.port)
        if self.timeout_s < 3 * self.heartbeat_s:
            raise ConfigError("--timeout-s", "must be at least three heartbeats")


def check_port_number(port: int) -> None:
    """Raise `ConfigError` for what is no TCP port; 0 lets the system choose one."""
    if not 0 <= port <= 65_535:
        raise ConfigError("--port", f"{port} is not allowed; it must be from 0 to 65535")


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of `RouterConfig`, defaults read from it."""
    for f in dataclasses.fields(RouterConfig):
        text = f"{f.metadata['help']} (default: {f.default})"
        if isinstance(f.default, bool):
            parser.add_argument(flag_of(f.name), action="store_true", help=text)
        else:
            kind = type(f.default)
            parser.add_argument(flag_of(f.name), type=kind, default=f.default, help=text)


def from_arguments(namespace: argparse.Namespace) -> RouterConfig:
    """Read back what `add_arguments` defined; raises `ConfigError`."""
    names = [f.name for f in dataclasses.fields(RouterConfig)]
    return RouterConfig(**{name: getattr(namespace, name) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """How a replica joins routers. Travels to SGLang's HTTP process in an environment variable."""

    endpoints: tuple[str, ...]
    name: str = ""  # "": made from host and process
    keys: str = ""
    insecure: bool = False

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> WorkerConfig | None:
        """What a launcher left for this process; None for a replica without a router."""
        text = environ.get(WORKER_ENV_VAR)
        if not text:
            return None
        values = json.loads(text)
        return cls(**{**values, "endpoints": tuple(values["endpoints"])})


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags with which a replica joins routers."""
    group = parser.add_argument_group("joining a router")
    group.add_argument(
        "--router-endpoint", action="append", default=[], metavar="URL",
        help="ZMQ endpoint of a router to work for; repeat it for several routers",
    )  # fmt: skip
    group.add_argument(
        "--worker-name", default="", help="name of this replica there (default: host and process)"
    )
    group.add_argument(
        "--router-keys", default="", help="directory with CURVE keys; needed off the loopback"
    )
    group.add_argument(
        "--router-insecure", action="store_true", help="dial plain tcp:// off the loopback"
    )


def worker_from_arguments(namespace: argparse.Namespace) -> WorkerConfig | None:
    """Read back what `add_worker_arguments` defined; None without a router; `ConfigError`."""
    if not namespace.router_endpoint:
        return None
    config = WorkerConfig(
        endpoints=tuple(namespace.router_endpoint),
        name=namespace.worker_name,
        keys=namespace.router_keys,
        insecure=namespace.router_insecure,
    )
    for endpoint in config.endpoints:
        check_endpoint("--router-endpoint", endpoint, is_safe=bool(config.keys) or config.insecure)
    return config


def add_fleet_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that start several replicas behind a router."""
    group = parser.add_argument_group("several replicas")
    group.add_argument(
        "--replicas", type=int, default=0, metavar="N",
        help="start N replicas on this machine behind a router (default: one, without a router)",
    )  # fmt: skip
    group.add_argument(
        "--router-policy", choices=tuple(POLICIES), default=RouterConfig().policy,
        help="which replica a call runs on (default: %(default)s)",
    )  # fmt: skip


def check_endpoint(flag: str, endpoint: str, *, is_safe: bool) -> None:
    """Raise `ConfigError` for what is no endpoint, and for plain TCP off the loopback."""
    scheme, _, address = endpoint.partition("://")
    if scheme == "ipc" and address:
        return
    host, _, port = address.rpartition(":")
    if scheme != "tcp" or not host or not port.isdigit():
        raise ConfigError(flag, f"{endpoint!r} is neither ipc://PATH nor tcp://HOST:PORT")
    if not is_safe and not (host == "localhost" or host.startswith("127.") or host == "[::1]"):
        raise ConfigError(
            flag, f"{endpoint} is not on the loopback: give CURVE keys, or --insecure on a network "
            "where everyone may read prompts and send answers",
        )  # fmt: skip
