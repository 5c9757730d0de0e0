"""The servers that may be told about programs, and no others.

A request is annotated only if its scheme, host and port equal those of a registered base URL, its
path lies under that URL's, and it is one of the endpoints where an engine generates. Names are
compared as written: who registers `localhost` has not registered `127.0.0.1`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from autellix_sglang.errors import ConfigError

log = logging.getLogger("autellix_sglang.client")

ENV_VAR: Final = "AUTELLIX_BASE_URL"  # registered at import, several separated by commas
REFUSAL_S: Final = 60.0
SILENCE_S: Final = 30.0
DEFAULT_PORTS: Final = {"http": 80, "https": 443}
CALL_PATHS: Final = frozenset(
    {
        "/generate", "/invocations", "/vertex_generate", "/api/chat", "/api/generate",
        "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses",
    }
)  # fmt: skip

Origin = tuple[str, str, int]  # scheme, host, port


class Server:
    """One registered base URL and what we found out about it."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self.origin, self.prefix = parse_base_url(base_url)
        self.headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.is_ours = False  # it has said so
        self._refuses_until = 0.0
        self._silent_until = 0.0
        self._said: set[str] = set()

    @property
    def url(self) -> str:
        scheme, host, port = self.origin
        host = f"[{host}]" if ":" in host else host
        return f"{scheme}://{host}:{port}{self.prefix}"

    def takes_call(self, path: str) -> bool:
        """Whether a POST to this path of its origin is a call to the engine."""
        return path.startswith(self.prefix) and path[len(self.prefix) :] in CALL_PATHS

    @property
    def is_refusing(self) -> bool:
        """Whether it has said less than a minute ago that it is not ours."""
        return time.monotonic() < self._refuses_until

    @property
    def is_deaf(self) -> bool:
        """Whether it is told of no starts and ends just now."""
        return self.is_refusing or time.monotonic() < self._silent_until

    def note_answer(self, is_ours: bool, evidence: str) -> None:
        """A yes is for good, a no for a minute: the server may only be starting."""
        if is_ours:
            self.is_ours, self._refuses_until = True, 0.0
        elif not self.is_ours:
            self._refuses_until = time.monotonic() + REFUSAL_S
            self.say_once(
                f"{self.url} does not schedule programs ({evidence}): "
                "calls go there unchanged, without ids"
            )

    def note_silence(self) -> None:
        """A session message timed out; the next ones must not hold up those to other servers."""
        self._silent_until = time.monotonic() + SILENCE_S

    def ask_again(self) -> None:
        """Forget what speaks against it."""
        self._refuses_until = self._silent_until = 0.0

    def say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


def parse_base_url(base_url: str) -> tuple[Origin, str]:
    """Origin and path prefix; a trailing `/v1` is the API's and no prefix. `ConfigError`."""
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError as error:
        raise ConfigError("base_url", f"{base_url!r}: {error}") from None
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise ConfigError("base_url", f"{base_url!r} is not like http://host:port")
    prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return (parts.scheme, parts.hostname, port or DEFAULT_PORTS[parts.scheme]), prefix


class Registry:
    """The registered servers, by origin."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._servers: dict[Origin, tuple[Server, ...]] = {}

    def add(self, base_url: str, api_key: str | None = None) -> Server:
        """The server of this URL, made if need be; a key given later replaces the one before."""
        server = Server(base_url, api_key)
        with self._lock:
            known = self._servers.get(server.origin, ())
            for other in known:
                if other.prefix == server.prefix:
                    other.headers = server.headers or other.headers
                    other.ask_again()
                    return other
            # The longest prefix first, so that it wins.
            both = sorted((*known, server), key=lambda s: -len(s.prefix))
            self._servers[server.origin] = tuple(both)
        return server

    def discard(self, server: Server) -> None:
        with self._lock:
            left = tuple(s for s in self._servers.get(server.origin, ()) if s is not server)
            self._servers[server.origin] = left

    def all(self) -> list[Server]:
        return [server for servers in self._servers.values() for server in servers]

    def find(self, scheme: str, host: str, port: int | None, path: str) -> Server | None:
        """The server that a POST to this URL is a call to; None for everybody else."""
        servers = self._servers.get((scheme, host, port or DEFAULT_PORTS.get(scheme, 0)))
        if servers:
            for server in servers:
                if server.takes_call(path):
                    return server
        return None


def urls_from_env(environ: Mapping[str, str] = os.environ) -> list[str]:
    return [url.strip() for url in environ.get(ENV_VAR, "").split(",") if url.strip()]
