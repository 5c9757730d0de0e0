"""An HTTP server that writes down every request, also as the forward proxy of whole hosts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from autellix_sglang.client import flush, register
from autellix_sglang.client.program import registry

OURS = "http://ours.test"
THIRD = "http://third.test"
IDENTITY = ("x-program-id", "x-thread-id", "x-call-id", "x-parent-call-ids")
CHAT_REPLY = {
    "id": "1", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}
    ],
}  # fmt: skip
GENERATE_REPLY = {
    "text": " hi",
    "meta_info": {
        "prompt_tokens": 5, "output_token_logprobs": [],
        "input_token_logprobs": [[-1.0, 3, " a"], [-2.0, 4, " b"]],
    },
}  # fmt: skip
MESSAGES_REPLY = {
    "id": "1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
    "content": [{"type": "text", "text": "hi"}], "usage": {"input_tokens": 1, "output_tokens": 1},
}  # fmt: skip


@dataclass
class Seen:
    """One request as it arrived; `url` has its host if it came to us as a proxy."""

    method: str
    url: str
    headers: dict[str, str]
    body: Any

    @property
    def ids(self) -> dict[str, str]:
        return {name: self.headers[name] for name in IDENTITY if name in self.headers}


@dataclass
class Recorder:
    """What arrived, and how to answer: `status` by path, `redirect` of calls with that host.

    The first `num_broken` calls get half an answer, and the connection ends `stall_s` later.
    """

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    status: dict[str, int] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    names_programs: bool = True
    num_broken: int = 0
    stall_s: float = 0.0

    @property
    def calls(self) -> list[Seen]:
        return [s for s in self.seen if s.method == "POST" and "/v1/programs" not in s.url]

    @property
    def sessions(self) -> list[tuple[str, str]]:
        flush()
        return [(s.method, s.url) for s in self.seen if "/v1/programs" in s.url]


def _reply(path: str, body: Any) -> Any:
    if path == "/get_model_info":
        return {"model_path": "m"}
    if path == "/generate":
        is_batch = isinstance(body.get("text"), list)
        return [GENERATE_REPLY] * len(body["text"]) if is_batch else GENERATE_REPLY
    return MESSAGES_REPLY if "messages" in path else CHAT_REPLY


def _handler(recorder: Recorder) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            recorder.seen.append(
                Seen(self.command, self.path, headers, json.loads(body) if body else None)
            )
            path = (
                "/" + self.path.partition("://")[2].partition("/")[2]
                if "://" in self.path
                else self.path
            )
            status = recorder.status.get(path, 200)
            target = recorder.redirects.get(self.path)
            reply = json.dumps(_reply(path, recorder.seen[-1].body)).encode()
            self.send_response(307 if target else status)
            if target:
                self.send_header("location", target)
            if recorder.names_programs:
                self.send_header("x-program-id", headers.get("x-program-id", "none"))
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            if "programs" not in path and 0 < len(recorder.calls) <= recorder.num_broken:
                self.wfile.write(reply[: len(reply) // 2])
                time.sleep(recorder.stall_s)
                self.close_connection = True
            else:
                self.wfile.write(reply)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *args: Any) -> None:
            return

    return Handler


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """A recording server on the loopback; as a proxy it answers for every host."""
    made = Recorder()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(made))
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def registered(recorder) -> Iterator[Recorder]:
    """The recording server, registered for the time of one test."""
    server = register(recorder.url)
    yield recorder
    flush()
    registry.discard(server)


@pytest.fixture
def ours() -> Iterator[str]:
    """The base URL of a registered host that exists behind the proxy only."""
    server = register(OURS)
    server.is_ours = True  # its sessions cannot be sent: there is no such host
    yield OURS
    flush()
    registry.discard(server)
