"""Start and end of a program, told to servers in the background.

One daemon thread sends the messages in order, so that `with program():` never waits for a network
and never blocks an event loop. What cannot be delivered is said once per server: the server forgets
a silent program by itself, after its TTL. A server that lets a message time out is told nothing for
a while, so that the others need not wait for it each time.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

from autellix_sglang.client.servers import Server

TIMEOUT_S: Final = 5.0
MAX_QUEUED: Final = 100_000
NO_SUCH_ROUTE: Final = (404, 405, 501)


@dataclass(frozen=True, slots=True)
class Message:
    """One request about a program."""

    server: Server
    method: str
    program_id: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_request(self) -> urllib.request.Request:
        path, data = "/v1/programs", None
        if self.method == "POST":
            data = json.dumps({"id": self.program_id}).encode()
        else:
            path += "/" + quote(self.program_id, safe="")
        headers = {"content-type": "application/json", **self.headers}
        url = self.server.url + path
        return urllib.request.Request(url, data=data, headers=headers, method=self.method)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead to a host that nobody registered."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Sessions:
    """Sends messages in order from a thread of its own, which starts with the first."""

    def __init__(self) -> None:
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._begin()
        if hasattr(os, "register_at_fork"):  # what waits then is sent by the parent
            os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._queue: queue.Queue[Message] = queue.Queue(MAX_QUEUED)
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None

    def start(self, server: Server, program_id: str) -> None:
        self._put(Message(server, "POST", program_id, server.headers))

    def end(self, server: Server, program_id: str, headers: Mapping[str, str]) -> None:
        self._put(Message(server, "DELETE", program_id, {**server.headers, **headers}))

    def flush(self, timeout_s: float = TIMEOUT_S) -> bool:
        """Wait until everything is sent; False if that takes longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._queue.all_tasks_done:
            while self._queue.unfinished_tasks:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                self._queue.all_tasks_done.wait(left_s)
        return True

    def _put(self, message: Message) -> None:
        if message.server.is_deaf:
            return
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            message.server.say_once(f"{message.server.url} is too slow for starts and ends")
            return
        with self._lock:
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(
                    target=self._work, name="autellix-sessions", daemon=True
                )
                self._worker.start()

    def _work(self) -> None:
        while True:
            message = self._queue.get()
            try:
                if not message.server.is_deaf:
                    self._send(message)
            finally:
                self._queue.task_done()

    def _send(self, message: Message) -> None:
        server = message.server
        try:
            with self._opener.open(message.to_request(), timeout=TIMEOUT_S):
                server.note_answer(True, "")
        except urllib.error.HTTPError as error:
            error.close()
            # For a DELETE, 404 may mean that the program has been forgotten already.
            if message.method == "POST" and error.code in NO_SUCH_ROUTE:
                server.note_answer(False, f"POST /v1/programs: HTTP {error.code}")
        except Exception as error:  # whatever it is, the messages behind it must go out
            server.say_once(f"{server.url} could not be told of a program: {error}")
            if isinstance(getattr(error, "reason", error), TimeoutError):
                server.note_silence()
