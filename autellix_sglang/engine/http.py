"""The HTTP side of programs: a middleware around SGLang's endpoints, and the routes of our own.

SGLang's FastAPI app stays as it is. `install` adds to it

    POST   /v1/programs         {"id"?}          -> {"id"}
    GET    /v1/programs         ?state&limit&after -> {"programs": [...], "next": position | null}
    GET    /v1/programs/{id}                     -> the program with its calls
    DELETE /v1/programs/{id}                     -> {"id", "state": "ended"}
    GET    /program_stats                        -> settings and counters
    PATCH  /program_config      {"policy"?, ...} -> the same, with changed settings

and `ProgramMiddleware` as the innermost middleware, so that API keys, CORS and metrics treat these
routes and its answers as they do SGLang's own. Nothing here imports SGLang at module level.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, TypeVar

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.middleware import Middleware
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autellix_sglang import messages
from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.program import STATES
from autellix_sglang.engine.plugin import with_host_memory
from autellix_sglang.errors import ConfigError, ControlError, IdentityError, UnknownProgramError
from autellix_sglang.identity import CallTag, HeaderIdentity, parse_id
from autellix_sglang.messages import ProgramControl, ProgramReply

T = TypeVar("T")
Control = Callable[[ProgramControl], Awaitable[ProgramReply]]
Clock = Callable[[], float]

INFERENCE_PATHS: Final = frozenset(
    {"/generate", "/invocations", "/vertex_generate", "/api/chat", "/api/generate"}
)
STATS_PATH: Final = "/program_stats"
CONFIG_PATH: Final = "/program_config"
OWN_PATHS: Final = frozenset({STATS_PATH, CONFIG_PATH})
DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 1000
_LIMIT: Final = re.compile("[1-9][0-9]{0,2}|1000")
_POSITION: Final = re.compile("[0-9]{1,18}")
ADMIN: Final = "admin"


# -- what is known about the request at hand -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The keys SGLang runs with. It knows two at most, so their names are given here."""

    api_key: str | None = None
    admin_api_key: str | None = None

    def name_of(self, authorization: str) -> str | None:
        """The name of the key in an Authorization header; None on a server without keys.

        Whether the request is let in is decided by SGLang's own middleware, before ours.
        """
        if not (self.api_key or self.admin_api_key):
            return None
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() == "bearer":
            if _is_same(token, self.admin_api_key):
                return ADMIN
            if _is_same(token, self.api_key):
                return "api"
        return "open"


def _is_same(token: str, key: str | None) -> bool:
    return bool(key) and secrets.compare_digest(token.encode(), str(key).encode())


@dataclass(slots=True)
class RequestContext:
    """One HTTP request, shared by the middleware (headers) and the tokenizer manager (calls)."""

    identity: HeaderIdentity
    is_admin: bool = False
    may_configure: bool = True  # with API keys, only the admin key changes settings
    tag: CallTag | None = None  # of its first call
    error: IdentityError | None = None
    outcomes: list[Mapping[str, Any]] = field(default_factory=list)  # one per finished call
    on_settled: Callable[[], None] | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the body's ids have been looked at."""
        return self.tag is not None or self.error is not None

    def settle(self, tag: CallTag) -> None:
        """The ids are good; the response may start."""
        if not self.is_settled:
            self.tag = tag
            if self.on_settled is not None:
                self.on_settled()

    def reject(self, error: IdentityError) -> None:
        """An id in the body is malformed; the response becomes an HTTP 400."""
        if not self.is_settled:
            self.error = error


_current: ContextVar[RequestContext | None] = ContextVar("autellix_request", default=None)


def current_request() -> RequestContext | None:
    """The HTTP request that the running task serves; None outside of one."""
    return _current.get()


# -- middleware ----------------------------------------------------------------------------------


class ProgramMiddleware:
    """Reads the identity headers, answers malformed ones, adds ours to the response.

    Plain ASGI: bodies pass through untouched and unread.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _path(scope) if scope["type"] == "http" else ""
        if not _is_ours(path):
            await self.app(scope, receive, send)
            return
        key_name = self.keys.name_of(_authorization(scope))
        try:
            identity = HeaderIdentity.from_headers(scope["headers"], key_name)
        except IdentityError as error:
            await _send_rejection(send, path, error)
            return
        context = RequestContext(
            identity, is_admin=key_name == ADMIN, may_configure=key_name in (None, ADMIN)
        )
        token = _current.set(context)
        responder = _Responder(send, context, scope)
        try:
            await self.app(scope, receive, responder)
        finally:
            _current.reset(token)
            await responder.close()


class _Responder:
    """ASGI `send` that can still change the response's start once the ids are known.

    SGLang starts a streamed response, and some streams' first events, before it looks at the
    request. They are held back until the tokenizer manager has settled the ids, a moment later;
    then they go out with the ids in the headers, or an HTTP 400 goes out in their place.
    """

    def __init__(self, send: Send, context: RequestContext, scope: Scope) -> None:
        self._send = send
        self._context = context
        self._path = _path(scope)
        self._has_call = scope["method"] in ("POST", "PUT")
        self._held: list[Message] = []
        self._is_started = False
        self._is_rejected = False
        self._lock = asyncio.Lock()  # what was held leaves before what follows it
        self._release: asyncio.Task[None] | None = None
        context.on_settled = self._release_soon

    async def __call__(self, message: Message) -> None:
        if self._is_started:
            await self._send(message)
            return
        async with self._lock:
            if self._is_rejected:
                return
            self._held.append(message)
            if self._context.error is not None:
                self._is_rejected = True
                await _send_rejection(self._send, self._path, self._context.error)
            elif self._context.is_settled or not self._has_call or _is_last(message):
                await self._send_held()

    async def close(self) -> None:
        if self._release is not None:
            await asyncio.gather(self._release, return_exceptions=True)

    def _release_soon(self) -> None:
        if self._held:
            self._release = asyncio.get_running_loop().create_task(self._send_held_in_turn())

    async def _send_held_in_turn(self) -> None:
        async with self._lock:
            await self._send_held()

    async def _send_held(self) -> None:
        for message in self._held:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), *response_headers(self._context)]
                message = {**message, "headers": headers}
            await self._send(message)
        self._is_started = self._is_started or bool(self._held)
        self._held.clear()


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


def response_headers(context: RequestContext) -> list[tuple[bytes, bytes]]:
    """What we tell a client about its call so far; ids go back as the bytes they came in.

    A request id that a program or a call is named by may be what no header can hold: left out.
    """
    tag, outcomes = context.tag, context.outcomes
    program_id = context.identity.program_id if tag is None else tag.program_id
    values: dict[str, Any] = {"x-program-id": program_id}
    if tag is not None:
        values["x-call-id"] = tag.call_id
    if outcomes:  # several for n > 1 and for batches
        values |= {
            "x-program-id": outcomes[0].get("program_id", program_id),  # it may have joined one
            "x-program-queue-steps": max(_numbers(outcomes, "queue_steps")),
            "x-program-service-steps": round(sum(_numbers(outcomes, "service_steps")), 3),
            "x-program-level": max(_numbers(outcomes, "level")),
            "x-program-preemptions": sum(_numbers(outcomes, "preemptions")),
        }
    return [(k.encode(), str(v).encode()) for k, v in values.items() if _fits_header(v)]


def _fits_header(value: object) -> bool:
    try:
        parse_id("", "" if value is None else str(value))
    except IdentityError:
        return False
    return True


def _numbers(outcomes: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [outcome.get(key, 0) for outcome in outcomes]


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _is_ours(path: str) -> bool:
    return path.startswith("/v1/") or path in INFERENCE_PATHS or path in OWN_PATHS


def _authorization(scope: Scope) -> str:
    found = (value for name, value in scope["headers"] if name == b"authorization")
    value: bytes = next(found, b"")
    return value.decode("latin-1")


# -- errors --------------------------------------------------------------------------------------


def error_response(status: HTTPStatus, kind: str, message: str, param: str | None) -> JSONResponse:
    """An error in OpenAI's form."""
    error = {"message": message, "type": kind, "param": param, "code": status.value}
    return JSONResponse({"error": error}, status_code=status.value)


def bad_request(error: IdentityError | ConfigError) -> JSONResponse:
    return error_response(HTTPStatus.BAD_REQUEST, "invalid_request_error", str(error), error.field)


async def _send_rejection(send: Send, path: str, error: IdentityError) -> None:
    response = bad_request(error)
    if path.startswith("/v1/messages"):  # Anthropic's form
        detail = {"type": "invalid_request_error", "message": str(error)}
        response = JSONResponse({"type": "error", "error": detail}, HTTPStatus.BAD_REQUEST.value)
    start = {
        "type": "http.response.start",
        "status": response.status_code,
        "headers": response.raw_headers,
    }
    await send(start)
    await send({"type": "http.response.body", "body": response.body, "more_body": False})


# -- routes --------------------------------------------------------------------------------------


class _OpenRequest(msgspec.Struct, forbid_unknown_fields=True):
    id: str | None = None


class ProgramRoutes:
    """The endpoints; each asks the scheduler through `control` about its own tenant's programs.

    Whoever holds the admin key sees, and may end, every tenant's.
    """

    def __init__(self, control: Control, clock: Clock = time.monotonic) -> None:
        self._control = control
        self._clock = clock

    async def open(self, request: Request) -> Response:
        """Start a program: `{"id"}` from the body, else `x-program-id`, else a new one."""

        async def answer() -> dict[str, Any]:
            named = _parse_open(await request.body())
            program_id = named or _context().identity.program_id or uuid.uuid4().hex
            return await self._ask(messages.OPEN, program_id=program_id)

        return await _respond(answer)

    async def list(self, request: Request) -> Response:
        """A page of programs."""

        async def answer() -> dict[str, Any]:
            return await self._ask(messages.LIST, **_parse_page(request.query_params))

        return await _respond(answer)

    async def get(self, request: Request) -> Response:
        """One program with its calls."""
        return await self._respond_about(request, messages.GET)

    async def end(self, request: Request) -> Response:
        """End a program; its live calls finish."""
        return await self._respond_about(request, messages.END)

    async def stats(self, request: Request) -> Response:
        """Settings and counters of the scheduler, over all tenants."""

        async def answer() -> dict[str, Any]:
            return await self._ask(messages.STATS)

        return await _respond(answer)

    async def configure(self, request: Request) -> Response:
        """Change settings while serving: `{"policy": "fcfs"}` and the like; not to `off`."""

        async def answer() -> dict[str, Any]:
            return await self._ask(messages.CONFIGURE, config=_parse_config(await request.body()))

        if not _context().may_configure:
            return error_response(
                HTTPStatus.FORBIDDEN, "permission_error", "this needs the admin API key", None
            )
        return await _respond(answer)

    async def _respond_about(self, request: Request, op: str) -> Response:
        async def answer() -> dict[str, Any]:
            program_id = parse_id("id", request.path_params["program_id"])
            return await self._ask(op, program_id=program_id)

        return await _respond(answer)

    async def _ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """The body of the scheduler's reply.

        Raises `UnknownProgramError`, `ConfigError` or `ControlError`.
        """
        context = _context()
        reply = await self._control(
            ProgramControl(
                op=op,
                now_s=self._clock(),
                tenant=context.identity.tenant,
                all_tenants=context.is_admin,
                **fields,
            )
        )
        if reply.ok:
            return reply.body
        if reply.field is not None:
            raise ConfigError(reply.field, reply.error)
        raise UnknownProgramError(fields["program_id"])


def _context() -> RequestContext:
    context = current_request()
    assert context is not None, "ProgramMiddleware is not installed"
    return context


def _parse_open(body: bytes) -> str | None:
    if not body.strip():
        return None
    named = _decoded(body, _OpenRequest).id
    return None if named is None else parse_id("id", named)


def _parse_config(body: bytes) -> dict[str, Any]:
    """The changes in a request's body; raises `IdentityError` or `ConfigError`.

    What -1 stands for as the host pool's size is settled here, so that all ranks get one number.
    """
    changes = _decoded(body, dict[str, Any])
    config = ProgramConfig().replace(**changes)
    if not config.is_enabled:
        raise ConfigError("policy", "'off' needs a server started with --program-policy off")
    if "host_memory" in changes:
        changes["host_memory"] = with_host_memory(config).host_memory
    return changes


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:  # the latter for deep nesting
        raise IdentityError("body", str(error)) from None


def _parse_page(query: Mapping[str, str]) -> dict[str, Any]:
    state, limit, after = query.get("state"), query.get("limit"), query.get("after")
    if state is not None and state not in STATES:
        raise IdentityError("state", f"must be one of {', '.join(STATES)}")
    if limit is not None and not _LIMIT.fullmatch(limit):
        raise IdentityError("limit", f"must be an integer from 1 to {MAX_LIMIT}")
    if after is not None and not _POSITION.fullmatch(after):
        raise IdentityError("after", "must be the 'next' of the page before")
    return {
        "state": state,
        "limit": DEFAULT_LIMIT if limit is None else int(limit),
        "after": None if after is None else int(after),
    }


async def _respond(answer: Callable[[], Awaitable[dict[str, Any]]]) -> Response:
    try:
        return JSONResponse(await answer())
    except (IdentityError, ConfigError) as error:
        return bad_request(error)
    except UnknownProgramError as error:
        return error_response(HTTPStatus.NOT_FOUND, "not_found_error", str(error), "id")
    except ControlError as error:
        return error_response(
            HTTPStatus.SERVICE_UNAVAILABLE, "service_unavailable_error", str(error), None
        )


# -- installation --------------------------------------------------------------------------------


def install(
    app: FastAPI, control: Control, keys: ApiKeys | None = None, clock: Clock = time.monotonic
) -> None:
    """Add middleware and routes to an app that has not started; a second call changes nothing."""
    if any(getattr(entry, "cls", None) is ProgramMiddleware for entry in app.user_middleware):
        return
    keys = keys or ApiKeys()
    # Last in this list is innermost: SGLang's API-key check stands before us.
    app.user_middleware.append(Middleware(ProgramMiddleware, keys=keys))
    routes = ProgramRoutes(control, clock)
    if keys.admin_api_key:
        _add_routes(app, routes, _admin_route_class(keys), _for_admin)
    _add_routes(app, routes, APIRoute, lambda endpoint: endpoint)


Endpoint = Callable[[Request], Awaitable[Response]]


def _add_routes(
    app: FastAPI,
    routes: ProgramRoutes,
    route_class: type[APIRoute],
    mark: Callable[[Endpoint], Endpoint],
) -> None:
    table: tuple[tuple[str, str, Endpoint], ...] = (
        ("POST", "/v1/programs", routes.open),
        ("GET", "/v1/programs", routes.list),
        ("GET", "/v1/programs/{program_id:path}", routes.get),
        ("DELETE", "/v1/programs/{program_id:path}", routes.end),
        ("GET", STATS_PATH, routes.stats),
        ("PATCH", CONFIG_PATH, routes.configure),
    )
    for method, path, endpoint in table:
        app.router.add_api_route(
            path,
            mark(endpoint),
            methods=[method],
            response_model=None,
            route_class_override=route_class,
            include_in_schema=route_class is APIRoute,
        )


def _for_admin(endpoint: Endpoint) -> Endpoint:
    """The endpoint as SGLang's API-key check wants it to take the admin key and no other."""
    from sglang.srt.utils.auth import AuthLevel, auth_level

    async def admin(request: Request) -> Response:
        return await endpoint(request)

    marked: Endpoint = auth_level(AuthLevel.ADMIN_OPTIONAL)(admin)
    return marked


def _admin_route_class(keys: ApiKeys) -> type[APIRoute]:
    """A route that exists only for requests with the admin key.

    SGLang's check wants one kind of key per route. With two routes on one path, the key that a
    request carries chooses the kind, and the check itself remains SGLang's.
    """

    class AdminRoute(APIRoute):
        def matches(self, scope: Scope) -> tuple[Match, Scope]:
            if scope["type"] == "http" and keys.name_of(_authorization(scope)) == ADMIN:
                return super().matches(scope)
            return Match.NONE, {}

    return AdminRoute
