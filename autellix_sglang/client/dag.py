"""What a program's calls waited for: threads, their frontiers, fork and join.

A thread's *frontier* is the smallest set of completed calls that everything before in it (and in
the child threads that ended) leads up to. A new call's parents are its thread's frontier.

    issue      parents = frontier
    complete   frontier = frontier - the call's parents + the call
    fork       the child starts with a copy of the frontier
    join       frontier = frontier - what the child started with + the child's frontier

What is taken away is an ancestor of what is put in its place, so parents are direct ones. A child
is joined when it has ended, at its parent's next call or fork: nothing need be told who waits for
whom, and a child that still runs is nobody's parent. No clock, no I/O; safe for any OS thread.

A thread's id is settled at its first call. A child that was forked for its own sake gets a new one;
a child that only runs what its parent waits for (libraries make a task of each call) goes on under
its parent's, so that a chain of calls through such a library is one thread.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from autellix_sglang.identity import MAX_PARENTS

Frontier = tuple[str, ...]


class Dag:
    """Hands out the names of one program's threads and calls, and the lock over them.

    `prefix` keeps call ids apart when several processes continue the same program.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._num_calls = itertools.count(1)
        self._num_threads = itertools.count()
        # Re-entrant, because a garbage-collected response completes its call wherever that happens.
        self.lock = threading.RLock()
        self.root = Thread(self, None)
        self.root.name()

    def next_call_id(self) -> str:
        return f"{self.prefix}-{next(self._num_calls)}"

    def next_thread_id(self) -> str:
        return str(next(self._num_threads))


@dataclass(slots=True, eq=False)
class Call:
    """One call from its issue to its completion; a failed call is just never completed.

    Read its answer in a `with` block: an exception fails the call, and a reader that lets go of a
    stream (which closes the generator it reads) has what it waited for.
    """

    call_id: str
    thread_id: str
    waited_for: Frontier = field(repr=False)
    thread: Thread = field(repr=False)
    is_over: bool = False

    @property
    def parents(self) -> Frontier:
        """What is told of `waited_for`: the latest, if they are too many."""
        return self.waited_for[-MAX_PARENTS:]

    def complete(self) -> None:
        """The answer has arrived; once the call is over this changes nothing."""
        if not self.is_over:
            self.is_over = True
            self.thread.completed(self)

    def fail(self) -> None:
        """The answer will not arrive whole."""
        self.is_over = True

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or kind is GeneratorExit:
            self.complete()
        else:
            self.fail()


class Thread:
    """A chain of dependent calls. One for each task, pool job or explicit thread that calls.

    It has ended when `is_over` says so, or after `end()`. Threads that never call leave no trace.
    """

    __slots__ = (
        "__weakref__", "_children", "_fork", "_forks", "_frontier", "_group", "_is_awaited",
        "_is_ended", "_is_over", "_is_registered", "_last", "_parent", "dag", "thread_id",
    )  # fmt: skip

    def __init__(
        self,
        dag: Dag,
        parent: Thread | None,
        thread_id: str | None = None,
        group: object | None = None,
    ) -> None:
        self.dag = dag
        self.thread_id = thread_id  # None until its first call
        self._parent = parent
        self._group = group
        self._frontier: Frontier = () if parent is None else parent._frontier
        self._fork = self._frontier
        # Those that have called and were not joined yet, by group: of its own a fork looks at none.
        self._children: dict[object, list[Thread]] = {}
        self._forks: weakref.WeakSet[Thread] | None = None  # all children, also silent ones
        self._last: Call | None = None
        self._is_awaited: Callable[[], bool] | None = None
        self._is_registered = parent is None
        self._is_ended = False
        self._is_over: Callable[[], bool] | None = None

    @property
    def is_ended(self) -> bool:
        if not self._is_ended and self._is_over is not None and self._is_over():
            self._is_ended = True
            self._is_over = None  # do not keep a finished task alive
        return self._is_ended

    @property
    def frontier(self) -> Frontier:
        """What the next call's parents would be."""
        with self.dag.lock:
            self._join_ended()
            return self._frontier

    def name(self) -> str:
        """Its id, given at its first call so that tasks which never call use none up."""
        if self.thread_id is None:
            parent = self._parent
            if parent is not None and self._continues(parent):
                self.thread_id = parent.name()
            else:
                self.thread_id = self.dag.next_thread_id()
            self._is_awaited = None
        return self.thread_id

    def fork(self, thread_id: str | None = None, group: object | None = None) -> Thread:
        """A child that starts from here; it counts only once it calls.

        Of the same `group` it takes after no sibling that nobody waited for (see `join`): jobs of a
        pool do not depend on each other because one was over before the other was submitted.
        """
        with self.dag.lock:
            self._join_ended(group)
            self._parent = self._living_parent()  # a chain of tasks must not be a chain of memory
            child = Thread(self.dag, self, thread_id, group)
            if self._forks is None:
                self._forks = weakref.WeakSet()
            self._forks.add(child)
            return child

    def join(self, child: Thread) -> None:
        """Wait for what a child has completed so far; it may go on after that."""
        with self.dag.lock:
            self._join(child)

    def end(self) -> None:
        """No more calls will come from this thread."""
        self._is_ended = True

    def end_when(self, is_over: Callable[[], bool]) -> None:
        """It has ended once `is_over()`; asked at the parent's calls and forks."""
        self._is_over = is_over

    def continue_if(self, is_awaited: Callable[[], bool]) -> None:
        """Go on under the parent's id if `is_awaited()` and it is the only child that calls.

        `is_awaited` says whether the parent waits for this thread and does nothing else until it
        has ended; it is asked once, at the first call.
        """
        self._is_awaited = is_awaited

    def issue(self) -> Call:
        """A new call of this thread, with its parents."""
        with self.dag.lock:
            self._join_ended()
            self._register()
            self._last = Call(self.dag.next_call_id(), self.name(), self._frontier, self)
            return self._last

    def completed(self, call: Call) -> None:
        with self.dag.lock:
            self._advance(call.waited_for, (call.call_id,))

    def _advance(self, ancestors: Iterable[str], calls: Collection[str]) -> None:
        gone = {*ancestors, *calls}
        self._frontier = (*(c for c in self._frontier if c not in gone), *calls)

    def _continues(self, parent: Thread) -> bool:
        """Whether its calls carry on the parent's chain, alone and with nothing of it in flight."""
        siblings = itertools.chain(*parent._children.values())
        if self._is_awaited is None or any(child is not self for child in siblings):
            return False
        # Up to the first: among the tasks of a wide `gather` each would look at all others.
        if any(fork is not self and not fork.is_ended for fork in parent._forks or ()):
            return False
        return self._is_awaited() and (parent._last is None or parent._last.is_over)

    def _join_ended(self, but_group: object | None = None) -> None:
        ended: list[Thread] = []
        for group in [g for g in self._children if g is None or g is not but_group]:
            running: list[Thread] = []
            for child in self._children.pop(group):
                (ended if child.is_ended else running).append(child)
            if running:
                self._children[group] = running
        if ended:
            self._join(*ended)

    def _join(self, *children: Thread) -> None:
        forks: dict[int, Frontier] = {}  # by identity: those of one fan-out started from the same
        calls: dict[str, None] = {}
        for child in children:
            child._join_ended()
            if child.is_ended:
                for orphan in itertools.chain(*child._children.values()):  # they still run
                    self._adopt(orphan)
                child._children = {}
            if child._frontier != child._fork:
                forks[id(child._fork)] = child._fork
                calls.update(dict.fromkeys(child._frontier))
                child._fork = child._frontier  # taken over: an ancestor of what follows
        if calls:
            self._advance(itertools.chain(*forks.values()), calls)

    def _register(self) -> None:
        """Make the parent look out for this thread's end."""
        if self._is_registered:
            return
        self._is_registered = True
        parent = self._living_parent()
        assert parent is not None, "only the root has no parent, and it is registered"
        parent._adopt(self)
        parent._register()

    def _adopt(self, child: Thread) -> None:
        """Look out for its end from now on, to join it."""
        child._parent = self
        self._children.setdefault(child._group, []).append(child)

    def _living_parent(self) -> Thread | None:
        """The nearest ancestor that still runs; the root never ends before its program."""
        parent = self._parent
        while parent is not None and parent._parent is not None and parent.is_ended:
            parent = parent._parent
        return parent
