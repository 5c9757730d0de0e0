"""Where HTTP libraries are annotated: at the lowest level, one HTTP request at a time.

| library | hook | call is complete when |
|---|---|---|
| httpx, httpx2 (openai, anthropic) | `Client._send_single_request` | its stream is read or closed |
| requests | `HTTPAdapter.send`, `Response.iter_content`, `close` | its body is read or closed |
| aiohttp | `ClientRequest.send`, `ClientResponse.start`, `read` | its connection is released |
| asyncio, uvloop | `create_task` of their loops | (forks a thread per task) |
| langchain | `ContextThreadPoolExecutor` | (forks a thread per job) |

Reading that raises an error completes no call, whatever is closed after it. A reader that lets go
of a stream midway has what it waited for.

Below all of them redirects are separate requests, so each is looked up for itself; our headers are
on the request only while it is sent, so that a redirect to another host has nothing to copy.
A library is hooked when it is imported, or at once if it was imported before.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Final

from autellix_sglang.client.dag import Call
from autellix_sglang.client.program import (
    bind,
    current_thread,
    fork_task,
    headers_of,
    issue_call,
)
from autellix_sglang.client.servers import Server, log

Pending = tuple[Call, Server]


def note_response(pending: Pending, status: int, headers: Mapping[str, str]) -> Call | None:
    """The call to complete later; None where the answer is an error or a redirect."""
    call, server = pending
    if not 200 <= status < 300:
        return None
    if not server.is_ours:
        server.note_answer("x-program-id" in headers, "its answer names no program")
    return call


# -- httpx and httpx2 ----------------------------------------------------------------------------


def hook_httpx(httpx: ModuleType) -> None:
    """Hook a module that is httpx or its successor."""
    streams = _watched_streams(httpx)
    httpx.Client._send_single_request = _httpx_send(httpx.Client._send_single_request, streams[0])
    httpx.AsyncClient._send_single_request = _httpx_send_async(
        httpx.AsyncClient._send_single_request, streams[1]
    )


def _watched_streams(httpx: ModuleType) -> tuple[type, type]:
    """Response streams that complete a call when they are read or closed."""

    class WatchedStream(httpx.SyncByteStream):  # type: ignore[name-defined, misc]
        def __init__(self, inner: Any, call: Call) -> None:
            self._inner, self._call = inner, call

        def __iter__(self) -> Iterator[bytes]:
            with self._call:
                yield from self._inner

        def close(self) -> None:
            self._inner.close()
            self._call.complete()

    class WatchedAsyncStream(httpx.AsyncByteStream):  # type: ignore[name-defined, misc]
        def __init__(self, inner: Any, call: Call) -> None:
            self._inner, self._call = inner, call

        async def __aiter__(self) -> AsyncIterator[bytes]:
            with self._call:
                async for part in self._inner:
                    yield part

        async def aclose(self) -> None:
            await self._inner.aclose()
            self._call.complete()

    return WatchedStream, WatchedAsyncStream


def _issue_httpx(request: Any) -> Pending | None:
    if current_thread() is None or request.method != "POST":
        return None
    url = request.url
    return issue_call(url.scheme, url.host, url.port, url.path, request.headers)


def _with_ids(headers: Any, call: Call) -> Any:
    """A copy of httpx headers with ours; a new object is many times cheaper than updating one."""
    ours = ((name.encode(), value.encode()) for name, value in headers_of(call, headers).items())
    return type(headers)([*headers.raw, *ours])


def _watched(response: Any, pending: Pending, stream: type) -> Any:
    call = note_response(pending, response.status_code, response.headers)
    if call is not None and response.is_closed:  # a transport in this process had it all at once
        call.complete()
    elif call is not None:
        response.stream = stream(response.stream, call)
    return response


def _httpx_send(original: Callable[..., Any], stream: type) -> Callable[..., Any]:
    @functools.wraps(original)
    def send(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        pending = _issue_httpx(request)
        if pending is None:
            return original(self, request, *args, **kwargs)
        headers = request.headers
        request.headers = _with_ids(headers, pending[0])
        try:
            response = original(self, request, *args, **kwargs)
        finally:
            request.headers = headers
        return _watched(response, pending, stream)

    return send


def _httpx_send_async(original: Callable[..., Any], stream: type) -> Callable[..., Any]:
    @functools.wraps(original)
    async def send(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        pending = _issue_httpx(request)
        if pending is None:
            return await original(self, request, *args, **kwargs)
        headers = request.headers
        request.headers = _with_ids(headers, pending[0])
        try:
            response = await original(self, request, *args, **kwargs)
        finally:
            request.headers = headers
        return _watched(response, pending, stream)

    return send


# -- requests ------------------------------------------------------------------------------------


def hook_requests(requests: ModuleType) -> None:
    adapter, response = requests.adapters.HTTPAdapter, requests.Response
    adapter.send = _requests_send(adapter.send, requests.compat.urlsplit)
    response.iter_content = _requests_iter_content(response.iter_content)
    response.close = _requests_close(response.close)


def _requests_send(original: Callable[..., Any], urlsplit: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def send(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        pending = None
        if current_thread() is not None and request.method == "POST":
            url = urlsplit(request.url)
            pending = issue_call(url.scheme, url.hostname, url.port, url.path, request.headers)
        if pending is None:
            return original(self, request, *args, **kwargs)
        headers = request.headers
        request.headers = headers.copy()
        request.headers.update(headers_of(pending[0], headers))
        try:
            response = original(self, request, *args, **kwargs)
        finally:
            request.headers = headers
        response._autellix_call = note_response(pending, response.status_code, response.headers)
        return response

    return send


def _requests_iter_content(original: Callable[..., Any]) -> Callable[..., Any]:
    """What everything else of a response reads its body with."""

    @functools.wraps(original)
    def iter_content(self: Any, *args: Any, **kwargs: Any) -> Any:
        body = original(self, *args, **kwargs)
        call = getattr(self, "_autellix_call", None)
        return body if call is None else _read(body, call)

    return iter_content


def _read(body: Any, call: Call) -> Iterator[Any]:
    with call:
        yield from body


def _requests_close(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def close(self: Any) -> None:
        original(self)
        call = getattr(self, "_autellix_call", None)
        if call is not None:
            call.complete()

    return close


# -- aiohttp -------------------------------------------------------------------------------------


def hook_aiohttp(aiohttp: ModuleType) -> None:
    request, response = aiohttp.ClientRequest, aiohttp.ClientResponse
    request.send = _aiohttp_send(request.send)
    response.start = _aiohttp_start(response.start, aiohttp.ClientConnectionError)
    response.read = _aiohttp_read(response.read)


def _aiohttp_send(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def send(self: Any, *args: Any, **kwargs: Any) -> Any:
        pending = None
        if current_thread() is not None and self.method == "POST":
            url = self.url
            pending = issue_call(url.scheme, url.host, url.port, url.path, self.headers)
        if pending is None:
            return await original(self, *args, **kwargs)
        ours = headers_of(pending[0], self.headers)
        self.headers.update(ours)
        try:
            response = await original(self, *args, **kwargs)
        finally:
            for name in ours:  # a middleware may send the same request again
                del self.headers[name]
        response._autellix_pending = pending
        return response

    return send


def _aiohttp_start(original: Callable[..., Any], closed: type) -> Callable[..., Any]:
    """`closed` is the error that aiohttp leaves in a body which its reader has let go of."""

    @functools.wraps(original)
    async def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        await original(self, *args, **kwargs)
        pending = getattr(self, "_autellix_pending", None)
        call = pending and note_response(pending, self.status, self.headers)

        def released() -> None:
            error = self.content.exception()
            if self._autellix_call is not None and (error is None or type(error) is closed):
                self._autellix_call.complete()

        if call is not None:
            self._autellix_call = call
            if self.connection is None:  # the whole body came with the headers
                released()
            else:
                self.connection.add_callback(released)
        return self

    return start


def _aiohttp_read(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def read(self: Any) -> Any:
        call = getattr(self, "_autellix_call", None)
        if call is None:
            return await original(self)
        self._autellix_call = None  # released on success and failure alike: only we know which
        with call:
            return await original(self)

    return read


# -- event loops ---------------------------------------------------------------------------------


def hook_loop(loop: Any) -> None:
    """Hook a class of event loops."""
    original = loop.create_task

    @functools.wraps(original)
    def create_task(self: Any, coro: Any, **kwargs: Any) -> Any:
        return fork_task(functools.partial(original, self), coro, kwargs)

    loop.create_task = create_task


# -- langchain -----------------------------------------------------------------------------------


def hook_langchain(config: ModuleType) -> None:
    """Its pool takes contexts along, and with them the one thread of whoever submits the jobs."""
    pool = config.ContextThreadPoolExecutor
    pool.submit, pool.map = _forking(pool.submit), _forking(pool.map)


def _forking(original: Callable[..., Any]) -> Callable[..., Any]:
    """`submit` or `map` of a pool, each run of the job a thread of its own."""

    @functools.wraps(original)
    def with_forks(self: Any, job: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        here = current_thread()
        if here is None:
            return original(self, job, *args, **kwargs)

        def forked(*job_args: Any, **job_kwargs: Any) -> Any:
            return bind(job, here.fork(group=self))(*job_args, **job_kwargs)

        return original(self, forked, *args, **kwargs)

    return with_forks


# -- installation --------------------------------------------------------------------------------

HOOKS: Final[Mapping[str, Callable[[ModuleType], None]]] = {
    "httpx": hook_httpx,
    "httpx2": hook_httpx,
    "requests": hook_requests,
    "aiohttp": hook_aiohttp,
    "uvloop": lambda uvloop: hook_loop(uvloop.Loop),
    "langchain_core.runnables.config": hook_langchain,
}
_hooked: set[str] = set()


def install() -> None:
    """Hook what is imported, and watch for the import of the rest; again does nothing."""
    if any(isinstance(finder, _HookFinder) for finder in sys.meta_path):
        return
    hook_loop(asyncio.BaseEventLoop)
    sys.meta_path.insert(0, _HookFinder())
    for name in HOOKS:
        if name in sys.modules:
            _hook(name, sys.modules[name])


def _hook(name: str, module: ModuleType) -> None:
    if name not in _hooked:
        _hooked.add(name)
        try:
            HOOKS[name](module)
        except AttributeError as error:  # a release that has moved what we hook
            version = getattr(module, "__version__", "of this version")
            log.warning("%s %s is not annotated: %s", name, version, error)


class _HookFinder:
    """Finds the libraries of `HOOKS` where the others do, and hooks them once they are loaded."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in HOOKS or fullname in _hooked or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _HookLoader(spec.loader)
        return spec


class _HookLoader(Loader):
    """The library's own loader, and then our hook."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._inner.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        _hook(module.__name__, module)
