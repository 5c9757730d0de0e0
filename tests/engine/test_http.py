"""The middleware and the routes, on a small app that behaves as SGLang's does."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.middleware import Middleware

from autellix_sglang.core.kv import HOST_LIMIT_GIB
from autellix_sglang.engine import http
from autellix_sglang.errors import ControlError, IdentityError
from autellix_sglang.identity import BodyIdentity, CallTag, HeaderIdentity
from autellix_sglang.messages import (
    CONFIGURE,
    END,
    GET,
    LIST,
    OPEN,
    STATS,
    ProgramControl,
    ProgramReply,
)

OUTCOME = {"queue_steps": 2.5, "service_steps": 7.25, "level": 1, "preemptions": 3}
NOW_S = 12.0


class FakeScheduler:
    """Answers control messages from a dictionary of programs and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[ProgramControl] = []
        self.programs: dict[str, str] = {"known": ""}  # id to tenant
        self.is_silent = False

    async def __call__(self, control: ProgramControl) -> ProgramReply:
        self.asked.append(control)
        if self.is_silent:
            raise ControlError("the scheduler did not answer")
        if control.op in (GET, END) and not self._is_visible(control):
            return ProgramReply(ok=False, error="unknown")
        if control.op == CONFIGURE and "host_memory" in control.config:
            return ProgramReply(ok=False, error="keeps its size", field="--program-host-memory")
        if control.op == OPEN:
            self.programs[control.program_id] = control.tenant
        return ProgramReply(ok=True, body={"op": control.op, "id": control.program_id})

    def _is_visible(self, control: ProgramControl) -> bool:
        tenant = self.programs.get(control.program_id)
        return tenant is not None and (control.all_tenants or tenant == control.tenant)


async def generate(request: Request) -> Response:
    """Like SGLang's: ids are looked at when work begins, for streams after the response's start."""
    body = await request.json()
    if body.get("stream"):
        return StreamingResponse(_stream(body), media_type="text/event-stream")
    try:
        _look_at_ids(body)
    except ValueError as error:
        return JSONResponse({"stock": str(error)}, status_code=400)
    http.current_request().outcomes.extend([OUTCOME] * body.get("n", 1))
    return JSONResponse({"text": "hello"})


async def _stream(body: dict[str, Any]):
    for _ in range(body.get("early_events", 0)):
        yield "data: created\n\n"
    try:
        _look_at_ids(body)
    except ValueError as error:
        yield f"data: {error}\n\n"
        return
    for i in range(3):
        await asyncio.sleep(0)
        yield f"data: {i}\n\n"


def _look_at_ids(body: dict[str, Any]) -> None:
    context = http.current_request()
    try:
        ids = BodyIdentity.from_body(body.get("custom_params"))
        context.settle(CallTag.resolve(context.identity, ids, "rid"))
    except IdentityError as error:
        context.reject(error)
        raise


def build_app(scheduler: FakeScheduler, keys: http.ApiKeys | None = None) -> FastAPI:
    """An app with SGLang's kinds of routes and ours installed."""
    app = FastAPI()
    for path in ("/generate", "/v1/chat/completions", "/v1/messages"):
        app.add_api_route(path, generate, methods=["POST"])
    app.add_api_route("/health", lambda: {"ok": True})
    app.add_api_route("/v1/models", lambda: {"data": []})
    http.install(app, scheduler, keys, clock=lambda: NOW_S)
    return app


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture
async def client(scheduler):
    async with client_of(build_app(scheduler)) as made:
        yield made


def ours(response: httpx.Response) -> dict[str, str]:
    """The response headers that the middleware adds."""
    return {k: v for k, v in response.headers.items() if k.startswith(("x-program", "x-call"))}


# -- middleware ----------------------------------------------------------------------------------


async def test_response_names_program_and_call(client):
    """A response carries its ids and what the scheduler said about the call."""
    headers = {"x-program-id": "P", "x-call-id": "C"}
    response = await client.post("/generate", json={}, headers=headers)
    assert response.json() == {"text": "hello"}
    assert ours(response) == {
        "x-program-id": "P",
        "x-call-id": "C",
        "x-program-queue-steps": "2.5",
        "x-program-service-steps": "7.25",
        "x-program-level": "1",
        "x-program-preemptions": "3",
    }


async def test_samples_of_one_request_add_up(client):
    """Several samples report the longest wait and the worst level, and sum the rest."""
    response = await client.post("/generate", json={"n": 2})
    assert ours(response) == {
        "x-program-id": "rid",
        "x-call-id": "rid",
        "x-program-queue-steps": "2.5",
        "x-program-service-steps": "14.5",
        "x-program-level": "1",
        "x-program-preemptions": "6",
    }


async def test_stream_names_ids_from_its_body(client):
    """The headers of a stream know an id that only the body has."""
    body = {"stream": True, "custom_params": {"program_id": "B"}}
    response = await client.post("/generate", json=body)
    assert response.text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert ours(response) == {"x-program-id": "B", "x-call-id": "rid"}


async def test_ids_go_back_as_they_came(client):
    """An id outside ASCII comes back as the bytes that were sent."""
    raw = "program-中".encode()
    response = await client.post("/generate", json={}, headers={b"x-program-id": raw})
    assert dict(response.headers.raw)[b"x-program-id"] == raw


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
async def test_malformed_header_is_a_400(client, path):
    """A malformed header is answered in OpenAI's form before the endpoint sees it."""
    response = await client.post(path, content=b"not json", headers={"x-program-id": ""})
    message = "x-program-id: is empty; an id has 1 to 256 characters"
    error = {"message": message, "type": "invalid_request_error", "param": "x-program-id"}
    assert (response.status_code, response.json()) == (400, {"error": {**error, "code": 400}})


async def test_malformed_header_on_anthropic_route(client):
    """The Messages route gets Anthropic's form of the error."""
    response = await client.post("/v1/messages", json={}, headers={"x-program-end": "?"})
    assert response.status_code == 400
    assert response.json()["type"] == "error"
    assert "x-program-end" in response.json()["error"]["message"]


async def test_malformed_header_does_not_matter_elsewhere(client):
    """Health checks and the like do not read the headers."""
    response = await client.get("/health", headers={"x-program-id": ""})
    assert (response.status_code, ours(response)) == (200, {})


@pytest.mark.parametrize("early_events", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_malformed_body_id_is_a_400(client, stream, early_events):
    """A bad id in the body is an HTTP 400, even where the stream had begun."""
    body = {"stream": stream, "custom_params": {"thread_id": 5}, "early_events": early_events}
    response = await client.post("/generate", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "custom_params.thread_id"


async def test_get_requests_are_not_held(client):
    """A route that generates nothing passes through and echoes the program only."""
    response = await client.get("/v1/models", headers={"x-program-id": "P"})
    assert (response.json(), ours(response)) == ({"data": []}, {"x-program-id": "P"})


async def test_stream_starts_as_soon_as_ids_are_known():
    """A stream's headers leave when the ids are settled, not with the first token."""
    sent: list[str] = []
    first_token = asyncio.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sent.append("held")
        http.current_request().settle(CallTag.anonymous_call("r"))
        await first_token.wait()
        await send({"type": "http.response.body", "body": b"x", "more_body": False})

    async def send(message):
        sent.append(message["type"])

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    middleware = http.ProgramMiddleware(app, http.ApiKeys())
    task = asyncio.create_task(middleware(scope, None, send))
    await asyncio.sleep(0.01)
    assert sent == ["held", "http.response.start"]
    first_token.set()
    await task
    assert sent == ["held", "http.response.start", "http.response.body"]


async def test_requests_do_not_share_context(client):
    """Concurrent requests each answer with their own ids."""
    ids = [f"p{i}" for i in range(20)]
    calls = (client.post("/generate", json={}, headers={"x-program-id": i}) for i in ids)
    responses = await asyncio.gather(*calls)
    assert [response.headers["x-program-id"] for response in responses] == ids


# -- routes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "headers", "expected"),
    [(b'{"id": "a/b"}', {}, "a/b"), (b"", {"x-program-id": "H"}, "H"), (b"{}", {}, None)],
)
async def test_open_program(client, scheduler, content, headers, expected):
    """POST starts the program of the body, else of the header, else a new one."""
    response = await client.post("/v1/programs", content=content, headers=headers)
    asked = scheduler.asked[0]
    assert response.json()["id"] == asked.program_id == (expected or asked.program_id)
    assert (asked.op, asked.now_s, len(asked.program_id) > 0) == (OPEN, NOW_S, True)


@pytest.mark.parametrize("content", [b"[1]", b"{", b'{"id": 5}', b'{"id": ""}', b'{"ttl": 5}'])
async def test_open_refuses_a_bad_body(client, scheduler, content):
    """A body that is no object with an id is a 400, and the scheduler is not asked."""
    response = await client.post("/v1/programs", content=content)
    assert (response.status_code, scheduler.asked) == (400, [])


async def test_list_passes_its_query_on(client, scheduler):
    """GET /v1/programs pages through the caller's programs."""
    await client.get("/v1/programs?state=idle&limit=5&after=7")
    await client.get("/v1/programs")
    first, second = scheduler.asked
    assert (first.op, first.state, first.limit, first.after) == (LIST, "idle", 5, 7)
    assert (second.state, second.limit, second.after) == (None, http.DEFAULT_LIMIT, None)


@pytest.mark.parametrize(
    "query", ["state=done", "limit=0", "limit=1001", "limit=x", "after=", "after=p"]
)
async def test_list_refuses_a_bad_query(client, query):
    """A query that cannot be meant is a 400 that names its parameter."""
    response = await client.get(f"/v1/programs?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]


async def test_get_and_end(client, scheduler):
    """GET and DELETE address a program by any id, slashes included."""
    scheduler.programs["a/b c"] = ""
    got = await client.get("/v1/programs/a%2Fb%20c")
    ended = await client.delete("/v1/programs/a%2Fb%20c")
    assert (got.json()["op"], ended.json()["op"]) == (GET, END)
    assert [asked.program_id for asked in scheduler.asked] == ["a/b c", "a/b c"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_unknown_program_is_a_404(client, method):
    """A program that the tenant does not have is not found."""
    response = await client.request(method, "/v1/programs/nobody")
    assert response.status_code == 404
    assert "nobody" in response.json()["error"]["message"]


async def test_another_tenants_program_is_a_404(client):
    """A tenant can neither read nor end a program of another."""
    headers = {"x-tenant-id": "other"}
    for method in ("GET", "DELETE"):
        response = await client.request(method, "/v1/programs/known", headers=headers)
        assert response.status_code == 404


async def test_id_too_long_is_a_400(client):
    """An id that cannot exist is refused rather than looked for."""
    response = await client.get("/v1/programs/" + "x" * 257)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "id")


async def test_silent_scheduler_is_a_503(client, scheduler):
    """When the scheduler does not answer, the service is unavailable."""
    scheduler.is_silent = True
    response = await client.get("/v1/programs")
    assert (response.status_code, response.json()["error"]["code"]) == (503, 503)


async def test_stats(client):
    """GET /program_stats passes the scheduler's totals on."""
    assert (await client.get("/program_stats")).json()["op"] == STATS


async def test_an_open_pool_size_is_settled_before_the_ranks_hear_of_it(client, scheduler):
    """-1 becomes this machine's share, one number for all ranks; other changes go on as sent."""
    await client.patch("/program_config", json={"kv": "swap", "host_memory": -1})
    told = scheduler.asked[-1].config
    assert told["kv"] == "swap" and 0 < told["host_memory"] <= HOST_LIMIT_GIB


async def test_a_setting_that_the_scheduler_refuses_is_a_400_with_its_reason(client):
    """The answer names the setting, not a program."""
    response = await client.patch("/program_config", json={"host_memory": 2})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "--program-host-memory")
    assert error["message"] == "--program-host-memory: keeps its size"


# -- keys and installation -----------------------------------------------------------------------


def test_install_is_idempotent(scheduler):
    """Installing twice adds nothing the second time."""
    app = build_app(scheduler)
    before = (len(app.user_middleware), len(app.router.routes))
    http.install(app, scheduler)
    assert (len(app.user_middleware), len(app.router.routes)) == before


def test_middleware_is_innermost(scheduler):
    """What SGLang adds, before or after, stands between the client and us."""
    app = FastAPI(middleware=[Middleware(object)])
    http.install(app, scheduler)
    app.add_middleware(dict)
    assert app.user_middleware[-1].cls is http.ProgramMiddleware


@pytest.mark.parametrize(
    ("keys", "authorization", "expected"),
    [
        (http.ApiKeys(), "Bearer K", None),
        (http.ApiKeys("K"), "Bearer K", "api"),
        (http.ApiKeys("K", "A"), "bearer A", "admin"),
        (http.ApiKeys(None, "A"), "", "open"),
        (http.ApiKeys(None, "A"), "Basic A", "open"),
        (http.ApiKeys("K"), "Bearer é", "open"),
    ],
)
def test_key_names(keys, authorization, expected):
    """A request is named after the key that it carries."""
    assert keys.name_of(authorization) == expected


def guarded_app(scheduler: FakeScheduler) -> FastAPI:
    """An app behind SGLang's own API-key check with both kinds of keys."""
    auth = pytest.importorskip("sglang.srt.utils.auth")
    app = build_app(scheduler, http.ApiKeys("K", "A"))
    auth.add_api_key_middleware(app, api_key="K", admin_api_key="A")
    return app


# SGLang's API-key check answers with a response class that FastAPI has deprecated.
ignore_orjson = pytest.mark.filterwarnings("ignore:ORJSONResponse is deprecated")


@ignore_orjson
@pytest.mark.parametrize("key", [None, "wrong"])
async def test_api_keys_protect_our_routes(scheduler, key):
    """Without a valid key our routes are as closed as SGLang's, even for malformed requests."""
    headers = {"x-program-id": ""} | ({"authorization": f"Bearer {key}"} if key else {})
    async with client_of(guarded_app(scheduler)) as client:
        for method, path in (("POST", "/v1/programs"), ("GET", "/program_stats")):
            response = await client.request(method, path, headers=headers)
            assert response.status_code == 401
    assert scheduler.asked == []


async def test_tenants_are_named_under_their_key(scheduler):
    """With keys on, x-tenant-id cannot lead out of the key's own tenants."""
    headers = {"authorization": "Bearer K", "x-tenant-id": "admin"}
    async with client_of(guarded_app(scheduler)) as client:
        await client.post("/v1/programs", headers=headers)
    assert (scheduler.asked[0].tenant, scheduler.asked[0].all_tenants) == ("api/admin", False)


@ignore_orjson
async def test_admin_key_sees_all_tenants(scheduler):
    """The admin key opens our routes too, over all tenants."""
    scheduler.programs["theirs"] = "api/org"
    async with client_of(guarded_app(scheduler)) as client:
        client.headers["authorization"] = "Bearer A"
        for path in ("/v1/programs", "/v1/programs/theirs", "/program_stats"):
            assert (await client.get(path)).status_code == 200
        assert (await client.delete("/v1/programs/theirs")).status_code == 200
        assert (await client.post("/generate", json={})).status_code == 401
    assert [asked.all_tenants for asked in scheduler.asked] == [True] * 4


@pytest.mark.parametrize("rid", ["a\nb", "a\r\nx-evil: 1", " a ", "r" * 70_000, ""])
def test_a_request_id_that_no_header_can_hold_is_left_out(rid):
    """The answer arrives without it: SGLang takes any text for a `rid`."""
    context = http.RequestContext(HeaderIdentity())
    context.settle(CallTag.resolve(HeaderIdentity(), BodyIdentity(), rid))
    assert http.response_headers(context) == []
