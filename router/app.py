"""The HTTP front door: an ASGI app that gives every request to a worker, and a few to itself.

    GET  /health                  200 while some worker takes calls, else 503
    GET  /workers                 each worker's state, load, programs and cache use
    GET  /router_metrics          the same for Prometheus
    POST /workers/{id}/drain      finish what runs there and send no more
    POST /workers/{id}/undrain    take that back
    any other path                the replica's own endpoint, on the worker that placement chooses

Requests about a program go to its home; listing programs, metrics and settings concern all
workers (`everywhere.py`). A request is read whole, because it may be sent twice; an answer is
passed on as it comes. Three headers are for the router: `x-router-worker` names the worker,
`x-prompt-tokens` says how long the prompt is, `x-request-timeout-s` sets a deadline.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import json
import logging
import math
import secrets
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from hashlib import blake2b
from http import HTTPStatus
from typing import Any, Final, Protocol
from urllib.parse import unquote

import msgspec
from starlette.types import Message, Receive, Scope, Send

from autellix_sglang.errors import IdentityError
from autellix_sglang.identity import PROGRAM_HEADER, TENANT_HEADER, HeaderIdentity, parse_id
from autellix_sglang.router import metrics
from autellix_sglang.router.balance import BEGINNING_BYTES
from autellix_sglang.router.everywhere import (
    JSON,
    PRIVATE,
    Merge,
    Reply,
    best,
    merge_for,
    merge_programs,
    next_pages,
    worst,
)
from autellix_sglang.router.hub import (
    Answer,
    Hub,
    NoWorkerError,
    Request,
    RouterError,
    WorkerLostError,
)
from autellix_sglang.router.messages import Headers

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN: Final = 4  # of a request body, about
WORKER_HEADER: Final = b"x-router-worker"
TOKENS_HEADER: Final = b"x-prompt-tokens"
TIMEOUT_HEADER: Final = b"x-request-timeout-s"
END_S: Final = 5.0  # after its deadline, for a call to end in order with a client that reads
RETRY_AFTER_S: Final = b"1"
PROGRAMS_PATH: Final = "/v1/programs"
OWN_PATHS: Final = frozenset({"/health", "/workers", "/router_metrics"})
INFERENCE_PATHS: Final = frozenset(
    {"/generate", "/invocations", "/vertex_generate", "/api/chat", "/api/generate"}
)
NO_INFERENCE: Final = ("/v1/models", "/v1/loads", PROGRAMS_PATH)
# Between two hops only, or made anew by the server that sends them.
HOP_HEADERS: Final = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"content-length", b"expect",
    }
)  # fmt: skip
HOP_ANSWER_HEADERS: Final = HOP_HEADERS - {b"content-length"}


class _Ids(msgspec.Struct):
    """The fields of a body that can name a program; all else is skipped, not kept."""

    custom_params: Any = None
    session_id: Any = None
    id: Any = None


class _Disconnected(Exception):
    """The client is gone."""


class Service(Protocol):
    """What lives as long as the app: the hub, and a fleet where there is one."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class RouterApp:
    """The app; its lifespan starts the hub and then `fleet`, and stops them in reverse."""

    def __init__(
        self,
        hub: Hub,
        fleet: Service | None = None,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self.hub = hub
        self._services: list[Service] = [hub] if fleet is None else [hub, fleet]
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await self._handle(scope, receive, send)
            case "lifespan":
                await self._live(receive, send)
            case "websocket":  # refused before it is accepted: HTTP 403
                await receive()
                await send({"type": "websocket.close", "code": 1011, "reason": "not supported"})

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            for service in self._services:
                await service.start()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for service in reversed(self._services):
            await service.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        try:
            if path in OWN_PATHS or path.startswith("/workers/"):
                await self._answer_itself(scope, send)
            else:
                await self._forward(scope, receive, send)
        except RouterError as error:
            await _send_error(send, path, error.status, str(error))
        except _Disconnected:
            return

    # -- the router's own routes -----------------------------------------------------------------

    async def _answer_itself(self, scope: Scope, send: Send) -> None:
        # Of the path as it was sent: a worker's name may have a slash, which is quoted there.
        parts = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1").strip("/")
        match scope["method"], [unquote(part) for part in parts.split("/")]:
            case "GET" | "HEAD", ["health"]:
                num_ready = self.hub.num_ready
                status = HTTPStatus.OK if num_ready else HTTPStatus.SERVICE_UNAVAILABLE
                await _send_json(send, status, {"ready_workers": num_ready})
            case "GET" | "HEAD", ["workers"]:
                await _send_json(send, HTTPStatus.OK, self._overview())
            case "GET" | "HEAD", ["router_metrics"]:
                headers = [(b"content-type", metrics.CONTENT_TYPE)]
                text = metrics.exposition(self._overview())
                await _send_reply(send, Reply("", HTTPStatus.OK, headers, text))
            case "POST", ["workers", _, "drain" | "undrain"] if not self._is_admin(scope):
                await _send_error(send, "", HTTPStatus.FORBIDDEN, "this needs the admin key")
            case "POST", ["workers", name, "drain" | "undrain" as verb]:
                is_known = self.hub.drain(name, is_draining=verb == "drain")
                status = HTTPStatus.OK if is_known else HTTPStatus.NOT_FOUND
                await _send_json(send, status, {"id": name, "known": is_known})
            case _:
                await _send_json(send, HTTPStatus.NOT_FOUND, {"detail": "Not Found"})

    def _is_admin(self, scope: Scope) -> bool:
        """Who has the admin key; without one, who is on this machine and speaks for itself."""
        key = self.hub.config.admin_key
        if not key:
            client = scope.get("client")
            is_here = client is not None and _is_loopback(client[0])
            return is_here and not _is_for_another(scope["headers"])
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, f"Bearer {key}".encode())

    def _overview(self) -> dict[str, Any]:
        hub = self.hub
        return {
            "policy": hub.config.policy,
            "open_calls": hub.num_open,
            "buffered_bytes": hub.num_buffered_bytes,
            "retries": hub.num_retries,
            "spills": hub.num_spills,
            "programs": len(hub.programs),
            "workers": hub.describe(),
        }

    # -- everything else -------------------------------------------------------------------------

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        hub = self.hub
        if hub.num_open >= hub.config.max_calls:
            raise NoWorkerError(f"{hub.num_open} calls are open, as many as may be")
        hub.num_open += 1
        body = _Body(hub)
        try:
            await body.read(receive)
            request = self._request(scope, body.data)
            requests, merge = self._everywhere(request)
            # The hub keeps the deadline; past it only a client that takes nothing is waited for.
            async with asyncio.timeout(hub.timeout_s(request) + END_S):
                if merge is None:
                    await self._forward_one(request, body, receive, send)
                else:
                    await _send_reply(send, merge(await self._ask(requests, merge)))
        except TimeoutError:
            raise ConnectionAbortedError("the client takes nothing of its answer") from None
        finally:
            body.release()
            hub.num_open -= 1

    async def _forward_one(
        self, request: Request, body: _Body, receive: Receive, send: Send
    ) -> None:
        """Relay the answer in this task, and stop when the client goes away."""
        relaying = asyncio.current_task()
        assert relaying is not None
        gone = asyncio.create_task(_disconnection(receive))
        gone.add_done_callback(lambda task: task.cancelled() or relaying.cancel())
        try:
            await self._relay(request, body, send)
        except asyncio.CancelledError:
            if not gone.done():
                raise
            relaying.uncancel()
            raise _Disconnected from None
        finally:
            gone.cancel()

    async def _relay(self, request: Request, body: _Body, send: Send) -> None:
        answer = await self.hub.open(request)
        body.release()
        try:
            await send(_start(answer))
            async with aclosing(answer.pieces()) as pieces:
                async for piece, is_last in pieces:
                    await send(_body(piece, more=not is_last))
        except RouterError as error:
            await self._end_badly(request, answer, send, error)
        finally:
            answer.close()

    async def _end_badly(
        self, request: Request, answer: Answer, send: Send, error: RouterError
    ) -> None:
        """An answer that has begun ends with an error that its reader cannot mistake."""
        logger.warning("%s %s ended early: %s", request.method, request.path, error)
        if _is_event_stream(answer.headers):
            await send(_body(_error_event(request.path, error), more=False))
        else:  # the connection breaks off: the server sees an app that fails
            raise ConnectionAbortedError(str(error)) from error

    # -- requests --------------------------------------------------------------------------------

    def _request(self, scope: Scope, body: bytes) -> Request:
        path, method = scope["path"], scope["method"]
        headers: Headers = [(k, v) for k, v in scope["headers"] if k not in HOP_HEADERS]
        found = dict(headers)
        if body or method in ("POST", "PUT", "PATCH"):
            headers.append((b"content-length", str(len(body)).encode()))
        is_inference = method == "POST" and _is_inference(path)
        is_opening = method == "POST" and path == PROGRAMS_PATH
        program_id = _program_id(path, headers, body)
        if program_id is None and is_opening:
            # Named here, so that the program's calls find the worker that knows it.
            program_id = self._new_id()
            headers.append((PROGRAM_HEADER.encode(), program_id.encode()))
        return Request(
            method=method,
            path=path,
            raw_path=scope.get("raw_path") or path.encode(),
            query=scope["query_string"],
            headers=headers,
            body=body,
            client=tuple(scope["client"]) if scope.get("client") else None,
            program=None if program_id is None else _key(program_id, found),
            num_tokens=_num_tokens(found, body) if is_inference or is_opening else 0,
            beginnings=_beginnings(body) if is_inference else (),
            worker=found[WORKER_HEADER].decode(errors="replace")
            if WORKER_HEADER in found
            else None,
            can_retry=is_inference or method != "POST",
            timeout_s=_seconds(found.get(TIMEOUT_HEADER)),
        )

    # -- requests that concern several workers ---------------------------------------------------

    def _everywhere(self, request: Request) -> tuple[list[Request], Merge | None]:
        """What to ask which workers, and how to merge their answers; no merge if one will do.

        Raises `RouterError` for what concerns a single worker that is not named.
        """
        if request.worker is not None:
            return [], None
        if request.path in PRIVATE and len(self.hub.workers) > 1:
            raise _WhichWorkerError(
                f"{request.path} concerns one replica: name it by the header x-router-worker, here "
                "and in what follows from it (GET /workers lists them)"
            )
        merge = merge_for(request.method, request.path)
        if merge is merge_programs:
            return self._pages(request), merge
        if merge is not None:
            return _one_each(request, self.hub.workers), merge
        if not request.path.startswith(PROGRAMS_PATH + "/"):
            return [], None
        known = self.hub.programs.get(request.program)
        if request.method == "DELETE" and request.program is not None:
            self.hub.programs.forget(request.program)
        places = [name for name in known.places if name in self.hub.workers]
        places.sort(key=lambda name: name != known.home)  # the last calls are there
        return _one_each(request, places or self.hub.workers), best

    def _pages(self, request: Request) -> list[Request]:
        """The next page of each worker that has one; raises `RouterError` on a bad cursor."""
        try:
            queries = next_pages(request.query)
        except ValueError as error:
            raise _BadCursorError(str(error)) from None
        if queries is None:
            return _one_each(request, self.hub.workers)
        return [
            dataclasses.replace(request, worker=worker, query=query)
            for worker, query in queries.items()
            if worker in self.hub.workers
        ]

    async def _ask(self, requests: Sequence[Request], merge: Merge) -> list[Reply]:
        """The workers' answers; raises `RouterError` if there is none to ask or one has none.

        What all have to do (`worst`) all have to answer; of the rest, lost workers are left out.
        """
        requests = [_plain(request) for request in requests]
        if merge is worst:
            found = list(await asyncio.gather(*map(self._ask_one, requests)))
        else:
            maybe = await asyncio.gather(*map(self._ask_if_there, requests))
            found = [reply for reply in maybe if reply is not None]
        if not found:
            raise NoWorkerError("no worker is there")
        return found

    async def _ask_if_there(self, request: Request) -> Reply | None:
        try:
            return await self._ask_one(dataclasses.replace(request, can_retry=False))
        except (WorkerLostError, NoWorkerError) as error:
            what = f"{request.method} {request.path}"
            logger.warning("%s leaves out worker %r: %s", what, request.worker, error)
            return None

    async def _ask_one(self, request: Request) -> Reply:
        answer = await self.hub.open(request)
        try:
            async with aclosing(answer.pieces()) as pieces:
                body = b"".join([piece async for piece, _ in pieces])
        finally:
            answer.close()
        headers = [(k, v) for k, v in answer.headers if k.lower() not in HOP_HEADERS]
        return Reply(answer.worker, answer.status, headers, body)


class _Body:
    """A request's body while it is held; counts against the router's bound."""

    def __init__(self, hub: Hub) -> None:
        self.data = b""
        self._hub = hub
        self._held_bytes = 0

    async def read(self, receive: Receive) -> None:
        """Read it whole; raises `RouterError` if it is too large or late, `_Disconnected`."""
        try:
            async with asyncio.timeout(self._hub.config.request_timeout_s):
                self.data = await self._read(receive)
        except TimeoutError:
            raise _LateBodyError("the request's body did not arrive in time") from None

    async def _read(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        is_more = True
        while is_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            parts.append(message.get("body", b""))
            self._hold(len(parts[-1]))
            is_more = message.get("more_body", False)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _hold(self, num_bytes: int) -> None:
        hub = self._hub
        self._held_bytes += num_bytes
        hub.num_buffered_bytes += num_bytes
        if self._held_bytes > hub.config.max_body_bytes:
            raise _TooLargeError(f"a body may have {hub.config.max_body_bytes} bytes")
        if hub.num_buffered_bytes > hub.config.max_buffer_bytes:
            raise NoWorkerError("the router holds as many request bodies as it may")

    def release(self) -> None:
        """Hold it no longer, now or at the latest when the call has ended."""
        self.data = b""
        self._hub.num_buffered_bytes -= self._held_bytes
        self._held_bytes = 0


class _TooLargeError(RouterError):
    status = 413


class _LateBodyError(RouterError):
    status = 408


class _BadCursorError(RouterError):
    status = 400


class _WhichWorkerError(RouterError):
    status = 400


# -- what a request says -------------------------------------------------------------------------


def _plain(request: Request) -> Request:
    """The same, for an answer that we read: not compressed."""
    headers = [(k, v) for k, v in request.headers if k != b"accept-encoding"]
    return dataclasses.replace(request, headers=headers)


def _one_each(request: Request, workers: Iterable[str]) -> list[Request]:
    return [dataclasses.replace(request, worker=worker) for worker in workers]


def _is_inference(path: str) -> bool:
    is_openai = path.startswith("/v1/") and not path.startswith(NO_INFERENCE)
    return is_openai or path in INFERENCE_PATHS


def _program_id(path: str, headers: Headers, body: bytes) -> str | None:
    """The program that a request belongs to, by the precedence of `identity`, or is about.

    None for a malformed id, which is left for the replica to answer: nothing of any size gets
    into our tables or a worker's.
    """
    try:
        named = _named(path, headers, body)
        return None if named is None else parse_id("program", named)
    except IdentityError:
        return None


def _named(path: str, headers: Headers, body: bytes) -> str | None:
    """The id as it is given; raises `IdentityError` for a malformed header."""
    if path.startswith(PROGRAMS_PATH + "/"):
        return path[len(PROGRAMS_PATH) + 1 :]
    header = HeaderIdentity.from_headers(headers)
    if path == PROGRAMS_PATH:
        return _text(_ids(body).id) or header.program_id
    if header.program_id is not None or not _may_name_program(body):
        return header.program_id or header.agent_program_id
    ids = _ids(body)
    params = ids.custom_params if isinstance(ids.custom_params, dict) else {}
    return _text(params.get("program_id")) or header.agent_program_id or _text(ids.session_id)


def _may_name_program(body: bytes) -> bool:
    return b'"custom_params"' in body or b'"session_id"' in body


def _ids(body: bytes) -> _Ids:
    try:
        return msgspec.json.decode(body, type=_Ids)
    except (msgspec.MsgspecError, RecursionError):  # the latter for thousands of brackets
        return _Ids()


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _key(program_id: str, headers: Mapping[bytes, bytes]) -> str:
    """A program's name among all clients': two API keys or tenants never share one."""
    authorization = headers.get(b"authorization", b"")
    owner = blake2b(authorization, digest_size=6).hexdigest() if authorization else ""
    tenant = headers.get(TENANT_HEADER.encode(), b"").decode("latin-1")
    return f"{owner}/{tenant}/{program_id}"


def _num_tokens(headers: Mapping[bytes, bytes], body: bytes) -> int:
    given = headers.get(TOKENS_HEADER, b"")
    if given.isdigit() and len(given) < 10:
        return max(1, int(given))
    return max(1, len(body) // BYTES_PER_TOKEN)


def _beginnings(body: bytes) -> tuple[tuple[str, int], ...]:
    """Names of the body's first parts, alike for the same tools and instructions."""
    named, start, digest = [], 0, blake2b(digest_size=12)
    for end in BEGINNING_BYTES:
        if end > len(body):
            break
        digest.update(body[start:end])
        named.append((digest.hexdigest(), end // BYTES_PER_TOKEN))
        start = end
    return tuple(named)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_for_another(headers: Headers) -> bool:
    """Whether a proxy passes this on, or a browser sends it for some page."""
    return any(k in (b"origin", b"forwarded") or k.startswith(b"x-forwarded-") for k, _ in headers)


def _seconds(value: bytes | None) -> float | None:
    try:
        seconds = float(value) if value is not None else 0.0
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# -- what is sent back ---------------------------------------------------------------------------


def _start(answer: Answer) -> Message:
    headers = [(k, v) for k, v in answer.headers if k.lower() not in HOP_ANSWER_HEADERS]
    headers.append((WORKER_HEADER, answer.worker.encode()))
    return {"type": "http.response.start", "status": answer.status, "headers": headers}


def _body(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _is_event_stream(headers: Headers) -> bool:
    return any(
        k.lower() == b"content-type" and v.startswith(b"text/event-stream") for k, v in headers
    )


def _error_of(path: str, status: int, message: str) -> dict[str, Any]:
    """An error in the form that this endpoint's clients expect: Anthropic's or OpenAI's."""
    kind = "overloaded_error" if status == HTTPStatus.SERVICE_UNAVAILABLE else "api_error"
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": kind, "message": message}}
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _error_event(path: str, error: RouterError) -> bytes:
    """A server-sent event; the blank line before it ends an event that was cut off."""
    if path.startswith("/v1/responses"):
        value = {"type": "error", "code": str(error.status), "message": str(error), "param": None}
    else:
        value = _error_of(path, error.status, str(error))
    name = "event: error\n" if path.startswith(("/v1/messages", "/v1/responses")) else ""
    return f"\n\n{name}data: {json.dumps(value)}\n\n".encode()


async def _send_error(send: Send, path: str, status: int, message: str) -> None:
    body = json.dumps(_error_of(path, status, message)).encode()
    headers = list(JSON)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", RETRY_AFTER_S))
    await _send_reply(send, Reply("", status, headers, body))


async def _send_json(send: Send, status: int, value: object) -> None:
    await _send_reply(send, Reply("", status, JSON, json.dumps(value).encode()))


async def _send_reply(send: Send, reply: Reply) -> None:
    headers = [*reply.headers, (b"content-length", str(len(reply.body)).encode())]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send(_body(reply.body, more=False))
