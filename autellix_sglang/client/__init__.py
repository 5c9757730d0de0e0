"""One line to join: tell an autellix_sglang server which calls belong to one program.

    from autellix_sglang.client import program, register

    register("http://localhost:30000")          # or AUTELLIX_BASE_URL in the environment
    with program("swe-agent"):
        ...                                     # openai, anthropic, httpx, requests, aiohttp, ...

Calls inside the block that go to a registered server carry the program, its thread, and the calls
they waited for; nothing is added to any other request. `ProgramEndpoint` does the same for SGLang's
frontend language. Needs the standard library only.

dag.py      threads, frontiers, fork and join: pure
program.py  the context, the decorator, what crosses tasks and OS threads
servers.py  which URLs are registered     sessions.py  start and end, in the background
hooks.py    where HTTP libraries are annotated     frontend.py  SGLang's frontend language
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autellix_sglang.client import hooks
from autellix_sglang.client.program import (
    Program,
    ThreadPool,
    carry,
    current_program,
    program,
    registry,
)
from autellix_sglang.client.program import sessions as _sessions
from autellix_sglang.client.servers import Server, urls_from_env

if TYPE_CHECKING:
    from autellix_sglang.client.frontend import ProgramEndpoint as ProgramEndpoint

__all__ = [  # not ProgramEndpoint: `import *` would import the engine
    "Program",
    "ThreadPool",
    "carry",
    "current_program",
    "flush",
    "program",
    "register",
]


def register(base_url: str, api_key: str | None = None) -> Server:
    """Annotate calls to this server from now on; raises `ConfigError` for what is no URL.

    `api_key` is for the start of a session only: calls carry their own, and the end uses theirs.
    """
    hooks.install()
    return registry.add(base_url, api_key)


def flush(timeout_s: float = 5.0) -> bool:
    """Wait until the servers were told of all starts and ends so far; False if it takes longer."""
    return _sessions.flush(timeout_s)


def __getattr__(name: str) -> Any:
    if name == "ProgramEndpoint":  # imports sglang, so only when asked for
        from autellix_sglang.client.frontend import ProgramEndpoint

        return ProgramEndpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


for _url in urls_from_env():
    register(_url)
