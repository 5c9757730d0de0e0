"""SGLang's frontend language: a backend on which each `.run()` is a program.

    state = tree_search.run(backend=ProgramEndpoint("http://localhost:30000"))

`fork` makes threads; `join`, and reading a fork's variable or text, make parents. Inside of a
`with program(...)` a run is a thread of that program instead. A call is one request to the engine:
`gen` is one, `select` a chain of two or three, `fork` into several one that caches the prefix.

Importing this module imports sglang, and puts a subclass in the place of the interpreter's
`StreamExecutor`, for other backends the same in all it does: SGLang's backends are never told who
forked whom (`fork_program` and `begin_program` are declared there, and not called).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sglang.lang import interpreter
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglSamplingParams

from autellix_sglang.client import register
from autellix_sglang.client.dag import Call, Thread
from autellix_sglang.client.program import Program, current_thread, new_id, program_of, suspended


class Run:
    """One `.run()`: its program ends when the last of its executors has nothing left to do."""

    def __init__(self, name: str = "sglang") -> None:
        self.caller = current_thread()
        self._program = Program(new_id(name)) if self.caller is None else None
        self._lock = threading.Lock()
        self._num_executors = 0
        if self._program is not None:
            self._program.start()

    def root(self) -> Thread:
        if self.caller is not None:
            return self.caller.fork()
        assert self._program is not None
        return self._program.root

    def enter(self) -> None:
        with self._lock:
            self._num_executors += 1

    def leave(self) -> None:
        with self._lock:
            self._num_executors -= 1
            is_over = self._num_executors == 0
        if is_over and self._program is not None:
            self._program.end()


_forking: ContextVar[ProgramExecutor | None] = ContextVar("autellix_forking", default=None)


class ProgramExecutor(StreamExecutor):  # type: ignore[misc]
    """A `StreamExecutor` that knows its thread, if its backend is a `ProgramEndpoint`."""

    def __init__(self, backend: Any, *args: Any, **kwargs: Any) -> None:
        self.thread: Thread | None = None
        self._parent: Thread | None = None
        self._run: Run | None = None
        if isinstance(backend, ProgramEndpoint):
            self._attach(_forking.get())
        super().__init__(backend, *args, **kwargs)

    def _attach(self, source: ProgramExecutor | None) -> None:
        if source is not None and source.thread is not None:
            self._run, self._parent = source._run, source.thread
            self.thread = source.thread.fork()
        else:
            self._run = Run()
            self._parent = self._run.caller
            self.thread = self._run.root()
        assert self._run is not None
        self._run.enter()

    def fork(self, *args: Any, **kwargs: Any) -> Any:
        token = _forking.set(self)
        try:
            return super().fork(*args, **kwargs)
        finally:
            _forking.reset(token)

    def sync(self) -> None:
        super().sync()
        self._join()

    def get_var(self, name: str) -> Any:
        value = super().get_var(name)
        if name in self.variable_event:
            self._join()
        return value

    def end(self) -> None:
        super().end()
        if not self.use_thread:
            self._finish()

    def _thread_worker_func(self) -> None:
        try:
            super()._thread_worker_func()
        finally:
            self._finish()

    def _join(self) -> None:
        """The code that forked this has waited for it."""
        if self._parent is not None and self.thread is not None:
            self._parent.join(self.thread)

    def _finish(self) -> None:
        run, self._run = self._run, None
        if run is not None and self.thread is not None:
            self.thread.end()
            run.leave()


class Tagged(SglSamplingParams):  # type: ignore[misc]
    """Sampling parameters with a call's ids, which `/generate` takes as `custom_params`."""

    custom_params: dict[str, Any]

    def to_srt_kwargs(self) -> dict[str, Any]:
        return {**super().to_srt_kwargs(), "custom_params": self.custom_params}


class ProgramEndpoint(RuntimeEndpoint):  # type: ignore[misc]
    """`RuntimeEndpoint`, with each run a program and each request a call of it."""

    def __init__(self, base_url: str, api_key: str | None = None, **kwargs: Any) -> None:
        super().__init__(base_url, api_key=api_key, **kwargs)
        self.server = register(base_url, api_key)

    def generate(self, s: Any, sampling_params: Any) -> Any:
        with self._call(s) as ids:
            return super().generate(s, _tagged(sampling_params, ids))

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[Any]:
        with self._call(s) as ids:
            yield from super().generate_stream(s, _tagged(sampling_params, ids))

    def commit_lazy_operations(self, s: Any) -> None:
        self._generate_http_request(s, {"text": s.text_, "sampling_params": {"max_new_tokens": 0}})

    fill_image = commit_lazy_operations

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        """Also what `select` sends its requests with."""
        with self._call(s) as ids:
            if ids:
                data["sampling_params"] = {**data["sampling_params"], "custom_params": ids}
            return super()._generate_http_request(s, data)

    @contextmanager
    def _call(self, s: Any) -> Iterator[dict[str, Any]]:
        """A call of the executor's thread, complete at the end of the block unless it raises."""
        thread = s.thread if isinstance(s, ProgramExecutor) else None
        if thread is None or program_of(thread).is_ended or self.server.is_refusing:
            yield {}
            return
        call = thread.issue()
        with call, suspended():  # `requests`, which streams use, would name a call of its own
            yield ids_of(call)


def _tagged(sampling_params: Any, ids: dict[str, Any]) -> Any:
    if not ids:
        return sampling_params
    tagged = Tagged(**vars(sampling_params))
    tagged.custom_params = ids
    return tagged


def ids_of(call: Call) -> dict[str, Any]:
    """The identity of a call as body fields."""
    return {
        "program_id": program_of(call.thread).id,
        "thread_id": call.thread_id,
        "call_id": call.call_id,
        "parent_call_ids": list(call.parents),
    }


interpreter.StreamExecutor = ProgramExecutor
