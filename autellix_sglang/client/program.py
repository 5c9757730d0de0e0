"""Programs: `with program("name"):`, `@program`, explicit threads, and what carries them along.

The running thread of the running program is one context variable. Context variables follow
coroutines, `asyncio.to_thread` and callbacks by themselves; `fork_task` forks a thread for each new
asyncio task, and `carry` or `ThreadPool` do so for OS threads, which Python gives no context.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import inspect
import os
import re
import secrets
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token, copy_context
from multiprocessing import util
from types import TracebackType
from typing import Any, Final, ParamSpec, TypeVar, overload

from autellix_sglang.client.dag import Call, Dag, Thread
from autellix_sglang.client.servers import Registry, Server, log
from autellix_sglang.client.sessions import Sessions
from autellix_sglang.errors import IdentityError
from autellix_sglang.identity import TENANT_HEADER, parse_id

P = ParamSpec("P")
T = TypeVar("T")

registry: Final = Registry()
sessions: Final = Sessions()
CREDENTIALS: Final = ("authorization", TENANT_HEADER)
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")
_current: ContextVar[Thread | None] = ContextVar("autellix_thread", default=None)
_open: weakref.WeakSet[Program] = weakref.WeakSet()


class Program(Dag):
    """One run of an agent: everything called between its start and its end."""

    def __init__(self, program_id: str) -> None:
        super().__init__(prefix=secrets.token_hex(4))
        self.id = parse_header_id("program id", program_id)
        self.is_ended = False
        self._pid = os.getpid()
        # What its calls authenticated with, to end it as the same tenant.
        self._servers: dict[Server, dict[str, str] | None] = {}

    def start(self) -> None:
        """Tell every registered server; returns at once."""
        _open.add(self)
        servers = registry.all()
        if not servers:
            _warn_unregistered()
        for server in servers:
            self._servers[server] = None
            sessions.start(server, self.id)

    def end(self) -> None:
        """Tell the servers that it is over; a second time, or in a forked process, does nothing."""
        if self.is_ended or self._pid != os.getpid():
            return
        self.is_ended = True
        _open.discard(self)
        for server, credentials in list(self._servers.items()):  # a thread may call another yet
            sessions.end(server, self.id, credentials or {})

    def note_call(self, server: Server, headers: Mapping[str, Any]) -> None:
        """Remember how the first call to a server authenticated."""
        if self._servers.get(server) is None:
            found = ((name, headers.get(name)) for name in CREDENTIALS)
            self._servers[server] = {name: _text(value) for name, value in found if value}

    @contextmanager
    def thread(self, name: str | None = None) -> Iterator[Thread]:
        """A thread of this program for the calls inside the block, joined at its end."""
        if name is not None:
            parse_header_id("thread name", name)
        here = _current.get()
        parent = here if here is not None and here.dag is self else self.root
        child = parent.fork(name)
        token = _current.set(child)
        try:
            yield child
        finally:
            child.end()
            _leave(token)


def _leave(token: Token[Thread | None]) -> None:
    """Restore the context before the block, unless a generator is closed in another one."""
    with suppress(ValueError):
        _current.reset(token)


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def parse_header_id(field: str, value: str) -> str:
    """`value` if each HTTP library can send it in a header; raises `IdentityError`."""
    if not parse_id(field, value).isascii():
        raise IdentityError(field, "has a character outside ASCII, which not every library sends")
    return value


def current_thread() -> Thread | None:
    """The thread of the running code; None outside of programs."""
    return _current.get()


def current_program() -> Program | None:
    """The program of the running code; None outside of programs."""
    thread = _current.get()
    return None if thread is None else program_of(thread)


def program_of(thread: Thread) -> Program:
    """The program of a thread; every `Dag` of a client is one."""
    assert isinstance(thread.dag, Program)
    return thread.dag


@contextmanager
def suspended() -> Iterator[None]:
    """Inside the block nothing is annotated."""
    token = _current.set(None)
    try:
        yield
    finally:
        _leave(token)


@functools.cache
def _warn_unregistered() -> None:
    log.warning(
        "a program started, but no server is registered: call register(base_url), or set "
        "AUTELLIX_BASE_URL; until then nothing is annotated"
    )


# -- program(...) as context manager and decorator -----------------------------------------------


class _Run:
    """What `program("name")` returns: enter it for one run, or decorate with it for many."""

    def __init__(self, name: str, program_id: str | None) -> None:
        self._name = name
        self._id = program_id
        self._program: Program | None = None
        self._token: Token[Thread | None] | None = None

    def __enter__(self) -> Program:
        if self._program is not None:
            raise RuntimeError("this run was entered before; program(...) makes another")
        self._program = Program(self._id or new_id(self._name))
        self._token = _current.set(self._program.root)
        self._program.start()
        return self._program

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._program is not None and self._token is not None
        self._program.end()
        _leave(self._token)

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        return _decorate(function, self._name, self._id)


@overload
def program(name: Callable[P, T], /) -> Callable[P, T]: ...
@overload
def program(name: str = ..., /, *, id: str | None = ...) -> _Run: ...
def program(name: Any = "program", /, *, id: str | None = None) -> Any:
    """One run of an agent is one program.

    with program("swe-agent") as p: ...        its id is the name and a random part
    with program(id="ticket-17") as p: ...     or exactly what you say

    @program                                   each call of the function is a run;
    async def agent(task): ...                 also @program("name")
    """
    if callable(name):
        return _decorate(name, getattr(name, "__name__", "program"), None)
    if id is not None:
        parse_header_id("program id", id)
    return _Run(name, id)


def new_id(name: str) -> str:
    """A fresh program id that starts with what a header can hold of `name`."""
    readable = _UNSAFE.sub("-", name).strip("-")[:200] or "program"
    return f"{readable}-{secrets.token_hex(8)}"


def _decorate(function: Callable[P, T], name: str, program_id: str | None) -> Callable[P, T]:
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"@program cannot tell when the generator {function.__name__}() is over; "
            "use `with program(...)` around the loop that reads it"
        )
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def run_async(*args: P.args, **kwargs: P.kwargs) -> Any:
            with _Run(name, program_id):
                return await function(*args, **kwargs)

        return run_async  # type: ignore[return-value]

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with _Run(name, program_id):
            value = function(*args, **kwargs)
        if inspect.iscoroutine(value):
            value.close()
            raise TypeError(
                f"@program is over when {name}() returns, before the coroutine that it returned "
                "runs; put it on the `async def` itself, or use `with program(...)`"
            )
        return value

    return run


# -- OS threads ----------------------------------------------------------------------------------


def carry(function: Callable[P, T]) -> Callable[P, T]:
    """`function` bound to a new thread of the running program that forks off here and now.

    For `threading.Thread(target=carry(work))` and foreign pools; call it once.
    """
    here = _current.get()
    return function if here is None else bind(function, here.fork())


def bind(function: Callable[P, T], child: Thread) -> Callable[P, T]:
    """`function` as the work of `child`, whichever OS thread runs it; call it once."""
    context = copy_context()
    context.run(_current.set, child)

    @functools.wraps(function)
    def bound(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return context.run(function, *args, **kwargs)
        finally:
            child.end()

    return bound


class ThreadPool(ThreadPoolExecutor):
    """A `ThreadPoolExecutor` whose jobs are threads of the program that submits them."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        here = _current.get()
        if here is None:
            return super().submit(fn, *args, **kwargs)
        child = here.fork(group=self)
        future = super().submit(bind(fn, child), *args, **kwargs)
        result = future.result

        def joined_result(timeout: float | None = None) -> T:
            try:
                return result(timeout)
            finally:
                if future.done():
                    here.join(child)  # whoever submits the next job has waited for this one

        future.result = joined_result  # type: ignore[method-assign]
        return future


# -- asyncio -------------------------------------------------------------------------------------


def fork_task(
    create: Callable[..., asyncio.Task[T]], coroutine: Coroutine[Any, Any, T], kwargs: Any
) -> asyncio.Task[T]:
    """Create a task as a new thread of the running program.

    A context that the caller gives is left alone: `asyncio.run` does so for its main task, which is
    a continuation of the code around it.
    """
    here = _current.get()
    if here is None or kwargs.get("context") is not None:
        return create(coroutine, **kwargs)
    child = here.fork()
    parent = _running_task()
    token = _current.set(child)  # the task copies it; not every factory takes a context
    try:
        task = create(coroutine, **kwargs)
    finally:
        _current.reset(token)
    child.end_when(task.done)
    if parent is not None:
        child.continue_if(functools.partial(_waits_for, parent, task))
    return task


def _running_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # the task is made for a loop that is not running yet
        return None


def _waits_for(parent: asyncio.Task[Any], task: asyncio.Task[Any]) -> bool:
    """Whether a task is suspended until another one is done: by `await task` or by `gather`.

    asyncio tells this in private attributes only. Without them the answer is no, and each task has
    a thread id of its own.
    """
    waiter = getattr(parent, "_fut_waiter", None)
    return waiter is task or task in getattr(waiter, "_children", ())


# -- calls ---------------------------------------------------------------------------------------


def issue_call(
    scheme: str, host: str, port: int | None, path: str, headers: Mapping[str, Any]
) -> tuple[Call, Server] | None:
    """A new call of the running program, if that is where this POST goes and says no id itself."""
    thread = _current.get()
    if thread is None or program_of(thread).is_ended:  # a worker task may outlive its program
        return None
    server = registry.find(scheme, host, port, path)
    if server is None or server.is_refusing or "x-program-id" in headers:
        return None
    program_of(thread).note_call(server, headers)
    return thread.issue(), server


def headers_of(call: Call, given: Mapping[str, Any]) -> dict[str, str]:
    """The identity headers of a call, but for those that its caller has given."""
    ours = {
        "x-program-id": program_of(call.thread).id,
        "x-thread-id": call.thread_id,
        "x-call-id": call.call_id,
        "x-parent-call-ids": ",".join(call.parents),  # empty: it has none, which is not "not told"
    }
    return {name: value for name, value in ours.items() if name not in given}


def _in_forked_process() -> None:
    """What was open goes on here too: under call ids and a lock that the parent does not share."""
    for running in list(_open):
        running.prefix, running.lock = secrets.token_hex(4), threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_process)


@atexit.register
def _end_open_programs() -> None:
    for left in list(_open):
        left.end()
    if sessions_in_use():
        sessions.flush()


def sessions_in_use() -> bool:
    """Whether this process (and not the one it was forked from) has a sender."""
    worker = sessions._worker
    return worker is not None and worker.is_alive()


def _in_multiprocessing_worker(_: object) -> None:
    """Its process skips `atexit`, and forgets the finalizers of before it was started."""
    util.Finalize(None, _end_open_programs, exitpriority=0)


util.register_after_fork(sessions, _in_multiprocessing_worker)
