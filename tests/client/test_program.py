"""Programs start and end, whatever happens, and their servers are told."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import requests

from autellix_sglang.client import (
    ThreadPool,
    carry,
    current_program,
    flush,
    program,
    register,
)  # fmt: skip
from autellix_sglang.client.program import CREDENTIALS, issue_call, registry
from autellix_sglang.errors import IdentityError
from tests.client.conftest import Recorder


def sessions_of(program_id: str) -> list[tuple[str, str]]:
    return [("POST", "/v1/programs"), ("DELETE", f"/v1/programs/{program_id}")]


def test_start_and_end_are_sent(registered: Recorder) -> None:
    """A session starts with the program's id and ends under it."""
    with program("swe agent") as running:
        assert running.id.startswith("swe-agent-")
        assert registered.sessions == sessions_of(running.id)[:1]
    assert registered.sessions == sessions_of(running.id)
    assert registered.seen[0].body == {"id": running.id}


def test_an_exception_ends_the_program(registered: Recorder) -> None:
    """The end is sent when the block is left by an exception, which goes on."""
    with pytest.raises(KeyError), program(id="ticket/17"):
        raise KeyError
    assert registered.sessions == sessions_of("ticket%2F17")


async def test_cancellation_ends_the_program(registered: Recorder) -> None:
    """So it is when the task is cancelled."""

    async def agent() -> None:
        with program(id="cancelled"):
            await asyncio.sleep(60)

    task = asyncio.create_task(agent())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert registered.sessions == sessions_of("cancelled")


def test_a_generator_that_is_closed_elsewhere_ends_its_program(registered: Recorder) -> None:
    """A block left in another context than it was entered in still ends."""

    def steps() -> Iterator[None]:
        with program(id="P"):
            yield

    running = steps()
    contextvars.copy_context().run(next, running)
    running.close()
    assert registered.sessions == sessions_of("P")
    assert current_program() is None


def test_a_run_is_entered_once() -> None:
    """A context manager that was used makes no second run in silence."""
    run = program("agent")
    with run:
        pass
    with pytest.raises(RuntimeError, match="entered before"), run:
        pass


@pytest.mark.parametrize("leave", ["sys.exit(3)", "raise ValueError", "pass"])
@pytest.mark.parametrize("entered", ["with program(id='P'): {}", "program(id='P').__enter__(); {}"])
def test_interpreter_exit_ends_the_program(recorder: Recorder, entered: str, leave: str) -> None:
    """Programs that are open when the interpreter exits are ended, and the end arrives."""
    script = f"""
        import sys
        from autellix_sglang.client import program, register
        register({recorder.url!r})
        {entered.format(leave)}
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert recorder.sessions == sessions_of("P")


def test_a_forked_process_does_not_end_its_parents_program(recorder: Recorder) -> None:
    """A child made by fork leaves the session to the process that started it."""
    script = f"""
        import os, sys, warnings
        warnings.simplefilter("ignore")
        from autellix_sglang.client import flush, program, register
        register({recorder.url!r})
        with program(id="P"):
            flush()
            if (pid := os.fork()) == 0:
                sys.exit()
            os.waitpid(pid, 0)
            print("still here")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    assert recorder.sessions == sessions_of("P")


def test_a_forked_process_has_nothing_to_wait_for(recorder: Recorder) -> None:
    """What was being sent when it was forked is its parent's, and `flush` says so at once."""
    script = f"""
        import os, sys, warnings
        warnings.simplefilter("ignore")
        from autellix_sglang.client import flush, program, register
        register({recorder.url!r})
        with program(id="P"):
            if (pid := os.fork()) == 0:
                os._exit(not flush(1.0))
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


async def test_first_calls_of_a_wide_gather_do_not_look_at_each_other() -> None:
    """Each of thousands of tasks takes as long as each of a hundred."""
    server = register("http://127.0.0.1:8")

    async def one() -> None:
        issued, _ = issue_call("http", "127.0.0.1", 8, "/generate", {})
        await asyncio.sleep(0)
        issued.complete()

    async def seconds_each(num_tasks: int) -> float:
        with program("wide"):
            started = time.perf_counter()
            await asyncio.gather(*(one() for _ in range(num_tasks)))
            return (time.perf_counter() - started) / num_tasks

    few, many = await seconds_each(100), await seconds_each(4000)
    registry.discard(server)
    assert many < 6 * few, f"{1e6 * few:.0f} us and {1e6 * many:.0f} us"


def test_the_end_uses_the_key_of_the_calls(registered: Recorder) -> None:
    """A program is ended as the tenant whose calls made it."""
    keys = {"authorization": "Bearer K", "x-tenant-id": "org"}
    with program(id="P"):
        requests.post(registered.url + "/generate", json={}, headers=keys)
    flush()
    end = registered.seen[-1]
    assert end.method == "DELETE"
    assert {name: end.headers[name] for name in CREDENTIALS} == keys


def test_a_key_can_be_registered(recorder: Recorder) -> None:
    """The start of a session can carry a key of its own."""
    server = register(recorder.url, api_key="K")
    with program(id="P"):
        flush()
    flush()
    registry.discard(server)
    assert [seen.headers["authorization"] for seen in recorder.seen] == ["Bearer K"] * 2


@pytest.mark.parametrize("evidence", ["no route", "no header"])
def test_a_server_that_is_not_ours_is_named_once(
    registered: Recorder, caplog: pytest.LogCaptureFixture, evidence: str
) -> None:
    """Calls to another server work unchanged, and one line says that they are not scheduled."""
    registered.names_programs = False
    registered.status["/v1/programs"] = 404 if evidence == "no route" else 401
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with program("agent"):
                flush()
                for _ in range(2):
                    assert httpx.post(registered.url + "/generate", json={}).status_code == 200
    assert [("does not schedule programs" in text) for text in caplog.messages] == [True]
    annotated = [bool(seen.ids) for seen in registered.calls]
    assert annotated == [evidence == "no header", *[False] * 5]


def test_a_server_that_is_down_costs_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits for a server that cannot be reached; it is said once."""
    server = register("http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with program("agent"):
                pass
        assert flush()
    registry.discard(server)
    assert [("could not be told" in text) for text in caplog.messages] == [True]


def test_a_session_message_follows_no_redirect(registered: Recorder) -> None:
    """Where a server points to is not where ids go."""
    registered.redirects["/v1/programs"] = registered.url + "/elsewhere"
    with program(id="P"):
        pass
    assert registered.sessions == sessions_of("P")
    assert not [seen for seen in registered.seen if seen.url == "/elsewhere"]


async def test_a_task_factory_need_not_take_a_context(registered: Recorder) -> None:
    """Tasks of a program's own factory are its threads like all others."""
    loop = asyncio.get_running_loop()

    async def call(client: httpx.AsyncClient) -> None:
        await client.post(registered.url + "/generate", json={})

    loop.set_task_factory(lambda loop, coro: asyncio.Task(coro, loop=loop))
    try:
        async with httpx.AsyncClient() as client:
            with program("agent") as running:
                await asyncio.gather(call(client), call(client))
                assert len(running.root.frontier) == 2
    finally:
        loop.set_task_factory(None)
    assert {seen.ids["x-thread-id"] for seen in registered.calls} == {"1", "2"}


# -- decorator and context -----------------------------------------------------------------------


def test_each_call_of_a_decorated_function_is_a_run() -> None:
    """The bare decorator names runs after the function, and each has an id of its own."""

    @program
    def agent(x: int) -> tuple[str, int]:
        """Does it."""
        running = current_program()
        assert running is not None
        return running.id, x + 1

    first, second = agent(1), agent(x=2)
    assert (first[1], second[1], agent.__doc__) == (2, 3, "Does it.")
    assert first[0] != second[0]
    assert first[0].startswith("agent-")


async def test_coroutine_functions_can_be_decorated() -> None:
    """Runs of a coroutine function that overlap are different programs."""

    @program("planner")
    async def agent() -> str:
        await asyncio.sleep(0)
        running = current_program()
        assert running is not None
        return running.id

    ids = await asyncio.gather(*(agent() for _ in range(10)))
    assert len(set(ids)) == 10
    assert all(name.startswith("planner-") for name in ids)
    assert current_program() is None


def test_generators_cannot_be_decorated() -> None:
    """It cannot be told when a generator is over, and the error says what to do instead."""

    def steps() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="use `with program"):
        program(steps)


@pytest.mark.parametrize("bad", ["", "a\nb", "x" * 257, "agent-é"])
def test_an_id_that_no_header_can_hold_is_refused(bad: str) -> None:
    """An id is checked where it is given, not when the first call fails."""
    with pytest.raises(IdentityError, match="program id"):
        program(id=bad)
    with program("agent") as running, pytest.raises(IdentityError), running.thread(bad):
        pass


def test_a_name_may_be_anything() -> None:
    """Of a name an id keeps what a header can hold."""
    for name in ("Ünïcode agent", "", "x" * 1000, "\n"):
        with program(name) as running:
            assert running.id.isascii()
            assert len(running.id) <= 256


def test_explicit_threads_are_named(registered: Recorder) -> None:
    """`p.thread()` makes a thread, whose calls its parent then waited for."""
    with program("agent") as running:
        with running.thread("critic"):
            requests.post(registered.url + "/generate", json={})
        requests.post(registered.url + "/generate", json={})
    first, second = (seen.ids for seen in registered.calls)
    assert (first["x-thread-id"], second["x-thread-id"]) == ("critic", "0")
    assert second["x-parent-call-ids"] == first["x-call-id"]


def test_nested_programs_are_separate(registered: Recorder) -> None:
    """A program inside another has its own calls; afterwards the outer one goes on."""
    url = registered.url + "/generate"
    with program("outer") as outer:
        requests.post(url, json={})
        with program("inner") as inner:
            requests.post(url, json={})
        requests.post(url, json={})
    first, second, third = (seen.ids for seen in registered.calls)
    assert [ids["x-program-id"] for ids in (first, second, third)] == [outer.id, inner.id, outer.id]
    assert second["x-parent-call-ids"] == ""
    assert third["x-parent-call-ids"] == first["x-call-id"]


def test_os_threads_carry_the_program() -> None:
    """`carry` and `ThreadPool` take the program along; a plain thread has none."""
    found = []

    def look() -> None:
        found.append(current_program())

    with program("agent") as running:
        for target in (carry(look), look):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        with ThreadPool() as pool:
            pool.submit(look).result()
    with ThreadPool() as pool:
        pool.submit(look).result()
    assert found == [running, None, running, None]
