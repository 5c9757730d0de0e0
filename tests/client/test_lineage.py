"""The parents that the client works out are the true ones."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autellix_sglang.client import ThreadPool, carry, current_program, program, register
from autellix_sglang.client.dag import Dag
from autellix_sglang.client.program import registry
from autellix_sglang.identity import MAX_PARENTS

URL = "http://lineage.test/v1/completions"
# How children of a node are run. Those in PARALLEL wait for all of them at the end.
IN_ASYNC = ("seq", "gather", "group", "one_by_one", "wait_for", "to_thread", "thread")
IN_SYNC = ("seq", "pool", "threads", "thread", "run")
PARALLEL = frozenset({"gather", "group", "one_by_one", "pool", "threads"})
# On Python 3.11 asyncio.wait_for makes a task of what it is given.
FORKS = PARALLEL | {"thread"} | ({"wait_for"} if sys.version_info < (3, 12) else set())
# A single task that is awaited like this is no fork: the thread waits for it and goes on.
AWAITED = frozenset({"gather", "one_by_one"})


@dataclass(frozen=True)
class Node:
    """A piece of a program: a call (no kind), or children run in a certain way."""

    kind: str = ""
    children: tuple[Node, ...] = ()

    @property
    def calls(self) -> bool:
        return not self.kind or any(child.calls for child in self.children)

    @property
    def forks(self) -> bool:
        return self.kind in FORKS and not (self.kind in AWAITED and len(self.children) == 1)


def nodes(is_async: bool, depth: int) -> st.SearchStrategy[Node]:
    """Random programs that a coroutine, or else a plain function, can run."""
    call = st.just(Node())
    if depth == 0:
        return call
    kinds = st.sampled_from(IN_ASYNC if is_async else IN_SYNC)

    def of_kind(kind: str) -> st.SearchStrategy[Node]:
        inner = (is_async and kind != "to_thread") or kind == "run"
        most = 1 if kind in ("wait_for", "to_thread", "run", "thread") else 4
        children = st.lists(nodes(inner, depth - 1), max_size=most).map(tuple)
        if kind in AWAITED:  # beside a task without calls it is a matter of time who is alone
            children = children.map(lambda made: tuple(child for child in made if child.calls))
        return children.map(lambda made: Node(kind, made))

    return call | kinds.flatmap(of_kind)


@dataclass
class Truth:
    """Parents and flow of each call, read off the structure alone."""

    parents: dict[str, set[str]] = field(default_factory=dict)
    flows: dict[str, int] = field(default_factory=dict)
    num_flows: Iterator[int] = field(default_factory=itertools.count)

    def walk(self, node: Node, label: str, before: frozenset[str], flow: int) -> frozenset[str]:
        """The calls that everything in `node` leads up to, `before` if it has no call."""
        if not node.kind:
            self.parents[label], self.flows[label] = set(before), flow
            return frozenset({label})
        ends = []
        for i, child in enumerate(node.children):
            own = next(self.num_flows) if node.forks else flow
            end = self.walk(child, f"{label}.{i}", before, own)
            if node.kind in PARALLEL:
                ends.append(end)
            else:
                before = end
        called = [end for end in ends if end != before]
        return frozenset().union(*called) if called else before


T = TypeVar("T")


def _run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on asyncio's own loop, whatever policy another library has set by now."""
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(main)


class Lab:
    """Runs programs against a transport that answers late and in no order, and records ids."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.sent: dict[str, dict[str, str]] = {}
        self.sync_client = httpx.Client(transport=httpx.MockTransport(self._answer))
        self.async_client = httpx.AsyncClient(transport=httpx.MockTransport(self._answer_async))

    def _note(self, request: httpx.Request) -> None:
        self.sent[request.read().decode()] = dict(request.headers)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self._note(request)

        def body() -> Iterator[bytes]:
            time.sleep(self.rng.random() / 1e3)
            yield b"x"

        return httpx.Response(200, content=body())

    async def _answer_async(self, request: httpx.Request) -> httpx.Response:
        self._note(request)

        async def body() -> Any:
            for _ in range(self.rng.randrange(4)):
                await asyncio.sleep(0)
            yield b"x"

        await asyncio.sleep(0)
        return httpx.Response(200, content=body())

    async def run_async(self, node: Node, label: str) -> None:
        for _ in range(self.rng.randrange(6)):
            await asyncio.sleep(0)  # a tool, of any length
        if not node.kind:
            await self.async_client.post(URL, content=label)
            return
        parts = [(child, f"{label}.{i}") for i, child in enumerate(node.children)]
        match node.kind:
            case "gather":
                await asyncio.gather(*(self.run_async(*part) for part in parts))
            case "group":
                async with asyncio.TaskGroup() as group:
                    for part in parts:
                        group.create_task(self.run_async(*part))
            case "one_by_one":
                for task in [asyncio.create_task(self.run_async(*part)) for part in parts]:
                    await task
            case _:
                for part in parts:
                    await self._run_one_async(node.kind, part)

    async def _run_one_async(self, kind: str, part: tuple[Node, str]) -> None:
        match kind:
            case "wait_for":
                await asyncio.wait_for(self.run_async(*part), 60)
            case "to_thread":
                await asyncio.to_thread(self.run_sync, *part)
            case "thread":
                with current_program().thread():
                    await self.run_async(*part)
            case _:
                await self.run_async(*part)

    def run_sync(self, node: Node, label: str) -> None:
        if not node.kind:
            self.sync_client.post(URL, content=label)
            return
        parts = [(child, f"{label}.{i}") for i, child in enumerate(node.children)]
        match node.kind:
            case "pool":
                with ThreadPool(2) as pool:
                    list(pool.map(lambda part: self.run_sync(*part), parts))
            case "threads":
                made = [threading.Thread(target=carry(self.run_sync), args=part) for part in parts]
                for thread in made:
                    thread.start()
                for thread in made:
                    thread.join()
            case _:
                for part in parts:
                    self._run_one_sync(node.kind, part)

    def _run_one_sync(self, kind: str, part: tuple[Node, str]) -> None:
        if kind == "run":
            _run(self.run_async(*part))
        elif kind == "thread":
            with current_program().thread():
                self.run_sync(*part)
        else:
            self.run_sync(*part)

    def check(self, node: Node, program_id: str) -> None:
        """What was sent is the truth: program, parents, and which calls share a thread."""
        truth = Truth()
        truth.walk(node, "r", frozenset(), next(truth.num_flows))
        labels = {headers["x-call-id"]: label for label, headers in self.sent.items()}
        assert {headers["x-program-id"] for headers in self.sent.values()} <= {program_id}
        found = {
            label: {
                labels[call] for call in headers.get("x-parent-call-ids", "").split(",") if call
            }
            for label, headers in self.sent.items()
        }
        assert found == truth.parents
        threads = {label: headers["x-thread-id"] for label, headers in self.sent.items()}
        pairs = {(truth.flows[label], threads[label]) for label in threads}
        assert len(pairs) == len(set(threads.values())) == len({flow for flow, _ in pairs})


@pytest.fixture(autouse=True, scope="module")
def server() -> Iterator[None]:
    """A registered server that no connection is ever made to."""
    made = register(URL.removesuffix("/completions"))
    made.is_ours = True
    yield
    registry.discard(made)


@pytest.fixture(autouse=True)
def no_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no server to be told of starts and ends."""
    monkeypatch.setattr("autellix_sglang.client.sessions.Sessions._put", lambda *_: None)


SETTINGS = settings(
    max_examples=120, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


@SETTINGS
@given(node=nodes(True, 4), seed=st.integers(0, 2**32))
def test_parents_in_asyncio_are_the_true_ones(node: Node, seed: int) -> None:
    """Random programs of tasks, groups, threads and awaits have exactly their own DAG."""
    lab = Lab(seed)

    async def main() -> str:
        with program("random") as running:
            await lab.run_async(node, "r")
        return running.id

    lab.check(node, _run(main()))


@SETTINGS
@given(node=nodes(False, 4), seed=st.integers(0, 2**32))
def test_parents_in_os_threads_are_the_true_ones(node: Node, seed: int) -> None:
    """So have programs of thread pools, plain threads and event loops of their own."""
    lab = Lab(seed)
    with program("random") as running:
        lab.run_sync(node, "r")
    lab.check(node, running.id)


@pytest.mark.parametrize("where", ["inside", "around"])
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(node=nodes(True, 3), seed=st.integers(0, 2**32))
def test_parents_on_uvloop(where: str, node: Node, seed: int) -> None:
    """A loop that is not asyncio's own is followed, also where it runs inside of the program."""
    uvloop = pytest.importorskip("uvloop")
    lab = Lab(seed)

    async def main() -> str:
        with program("random") as running:
            await lab.run_async(node, "r")
        return running.id

    if where == "inside":
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            program_id = runner.run(main())
    else:
        with (
            program("random") as running,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(lab.run_async(node, "r"))
        program_id = running.id
    lab.check(node, program_id)


# -- the rules one by one ------------------------------------------------------------------------


def completed(thread: Any) -> str:
    """A call of this thread that is over; its id."""
    call = thread.issue()
    call.complete()
    return str(call.call_id)


def test_a_chain() -> None:
    """Each call of a thread has the one before as its parent."""
    root = Dag("d").root
    first = completed(root)
    second = root.issue()
    assert (root.thread_id, second.parents) == ("0", (first,))


def test_a_failed_call_is_nobodys_parent() -> None:
    """What was never completed leaves the frontier as it was."""
    root = Dag("d").root
    first = completed(root)
    root.issue()
    assert root.issue().parents == (first,)


def test_a_call_of_which_reading_failed_is_nobodys_parent() -> None:
    """Closing the connection after an error completes no call; letting go of a stream does."""
    root = Dag("d").root
    failed, dropped = root.issue(), root.issue()
    with pytest.raises(ConnectionError), failed:
        raise ConnectionError
    failed.complete()
    with pytest.raises(GeneratorExit), dropped:
        raise GeneratorExit
    assert root.issue().parents == (dropped.call_id,)


def test_after_more_parents_than_can_be_told() -> None:
    """A call is told the latest of them, and the next one has that call as its only parent."""
    root = Dag("d").root
    for child in [root.fork() for _ in range(2 * MAX_PARENTS)]:
        completed(child)
        child.end()
    joining = root.issue()
    assert len(joining.parents) == MAX_PARENTS
    joining.complete()
    assert root.issue().parents == (joining.call_id,)


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Times are not those of the garbage collector, which visits all that other tests left."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
def test_joining_a_wide_fan_out_takes_as_long_for_each() -> None:
    """Two of thousands in a row, each of them joined by one call, whose caller holds a loop up."""

    def seconds_each(width: int) -> float:
        root = Dag("d").root
        seconds = 0.0
        for _ in range(2):
            for child in [root.fork() for _ in range(width)]:
                completed(child)
                child.end()
            started = time.perf_counter()
            joined = root.frontier
            seconds += time.perf_counter() - started
            assert len(joined) == width
        return seconds / width

    few = min(seconds_each(100) for _ in range(5))
    assert seconds_each(4000) < 10 * few


@pytest.mark.usefixtures("no_gc")
def test_submitting_to_a_pool_takes_as_long_for_each() -> None:
    """Jobs that nobody has asked about yet do not slow down the next ones."""

    def seconds_each(num_jobs: int) -> float:
        root, pool = Dag("d").root, object()
        started = time.perf_counter()
        for _ in range(num_jobs):
            child = root.fork(group=pool)
            completed(child)
            child.end()
        return (time.perf_counter() - started) / num_jobs

    few = min(seconds_each(100) for _ in range(5))
    assert seconds_each(5000) < 10 * few


def test_a_running_child_is_not_waited_for() -> None:
    """A background thread counts from its end on, beside what its parent did meanwhile."""
    root = Dag("d").root
    first = completed(root)
    child = root.fork()
    behind = completed(child)
    second = root.issue()
    assert second.parents == (first,)
    second.complete()
    child.end()
    assert set(root.issue().parents) == {second.call_id, behind}


def test_a_sibling_that_ended_before_the_fork_is_a_parent() -> None:
    """Two fan-outs in a row: the second one waited for the first."""
    root = Dag("d").root
    first, second = root.fork(), root.fork()
    early = completed(first)
    first.end()
    later = root.fork()
    assert later.issue().parents == (early,)
    assert second.issue().parents == ()


def test_orphans_are_joined_by_the_next_living_ancestor() -> None:
    """A thread outlives the one that forked it, and still counts when it ends."""
    root = Dag("d").root
    child = root.fork()
    grandchild = child.fork()
    own, late = completed(child), completed(grandchild)
    child.end()
    assert root.issue().parents == (own,)
    grandchild.end()
    assert set(root.issue().parents) == {own, late}


def test_a_child_can_be_joined_again() -> None:
    """Waiting for a thread that goes on takes over what is new."""
    root = Dag("d").root
    child = root.fork()
    completed(child)
    root.join(child)
    second = completed(child)
    root.join(child)
    assert root.frontier == (second,)


def test_a_chain_of_tasks_is_no_chain_of_memory() -> None:
    """Threads that ended are let go of, however long each starts the next one."""
    root = Dag("d").root
    thread = root
    for _ in range(1000):
        child = thread.fork()
        completed(child)
        if thread is not root:
            thread.end()
        thread = child
    assert len(thread.issue().parents) == 1
    depth = 0
    while thread is not None:
        thread, depth = thread._parent, depth + 1
    assert depth < 5


def test_threads_that_never_call_leave_no_trace() -> None:
    """Tasks of libraries use up no thread id and are not remembered."""
    dag = Dag("d")
    for _ in range(10):
        dag.root.fork().end()
    child = dag.root.fork()
    completed(child)
    assert child.thread_id == "1"
    assert dag.root._children == {None: [child]}
