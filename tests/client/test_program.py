"""Programs start and end, whatever happens, and their servers are told."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import socket
import subprocess
import sys
import tempfile
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
from autellix_sglang.client.servers import Server
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


def test_a_forked_process_has_call_ids_of_its_own(registered: Recorder) -> None:
    """Two processes on one program, and all of their calls have different names."""
    script = f"""
        import os, sys, warnings
        warnings.simplefilter("ignore")
        import requests
        from autellix_sglang.client import program, register
        register({registered.url!r})
        def call():
            requests.post({registered.url!r} + "/generate", json={{}})
        with program(id="P"):
            call()
            pids = [os.fork() for _ in range(2)]
            call()
            if all(pids):
                for pid in pids: os.waitpid(pid, 0)
                call()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    ids = [seen.ids["x-call-id"] for seen in registered.calls]
    assert len(ids) == len(set(ids)) == 1 + 4 + 1
    assert {seen.ids["x-program-id"] for seen in registered.calls} == {"P"}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_multiprocessing_end_their_programs(recorder: Recorder, method: str) -> None:
    """They leave without `atexit`, and their ends arrive all the same."""
    script = f"""
        import multiprocessing, warnings
        warnings.simplefilter("ignore")
        from autellix_sglang.client import program, register
        register({recorder.url!r})
        def work(i):
            with program(id=f"W{{i}}"):
                pass
        if __name__ == "__main__":
            context = multiprocessing.get_context({method!r})
            made = [context.Process(target=work, args=(i,)) for i in range(3)]
            for process in made: process.start()
            for process in made: process.join()
    """
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:  # spawned ones import it
        file.write(textwrap.dedent(script))
        file.flush()
        subprocess.run([sys.executable, file.name], check=True)
    ends = {url for sent, url in recorder.sessions if sent == "DELETE"}
    assert ends == {f"/v1/programs/W{i}" for i in range(3)}


async def test_a_task_that_outlives_its_program_is_anonymous(registered: Recorder) -> None:
    """A worker that the first program started serves later ones, and charges nobody's account."""
    over = asyncio.Event()

    async def work(client: httpx.AsyncClient) -> None:
        await client.post(registered.url + "/generate", json={})
        await over.wait()
        await client.post(registered.url + "/generate", json={})

    async with httpx.AsyncClient() as client:
        with program("agent"):
            worker = asyncio.create_task(work(client))
            while not registered.calls:
                await asyncio.sleep(0.01)
        over.set()
        await worker
    assert [bool(seen.ids) for seen in registered.calls] == [True, False]


def test_a_server_first_called_while_its_program_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that goes on calling does not disturb the end."""
    made = [register(f"http://127.0.0.1:{port}") for port in (8, 9)]
    monkeypatch.setattr("autellix_sglang.client.sessions.Sessions._put", lambda *_: None)
    with program("agent") as running:
        monkeypatch.setattr(
            "autellix_sglang.client.sessions.Sessions.end",
            lambda *_: running.note_call(Server("http://127.0.0.1:7"), {}),
        )
    assert len(running._servers) > len(made)
    for server in made:
        registry.discard(server)


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


@pytest.fixture
def bad_server() -> Iterator[tuple[socket.socket, str]]:
    """A port that takes connections, and whatever the test then does with them."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = register(url)
        yield listening, url
        registry.discard(server)


def test_a_server_that_speaks_no_http_costs_a_line(
    registered: Recorder, bad_server, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a port answers, the other servers are told, and the log has one line."""
    listening, url = bad_server

    def talk() -> None:
        for _ in range(4):
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

    talking = threading.Thread(target=talk)
    talking.start()
    for name in ("P", "Q"):
        with program(id=name):
            pass
    assert registered.sessions == sessions_of("P") + sessions_of("Q")
    talking.join()
    assert [url in text for text in caplog.messages] == [True]


def test_a_server_that_never_answers_holds_up_no_other(
    registered: Recorder, bad_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first message that timed out it is left out for a while."""
    monkeypatch.setattr("autellix_sglang.client.sessions.TIMEOUT_S", 0.5)
    started = time.monotonic()
    for i in range(9):
        with program(id=str(i)):
            pass
    assert len(registered.sessions) == 18
    assert time.monotonic() - started < 2


def test_a_server_that_was_not_ours_is_asked_again(registered: Recorder) -> None:
    """One 404 is no verdict for good: it holds for a minute, or until `register` is called."""

    def has_ids() -> bool:
        with program("agent"):
            flush()
            requests.post(registered.url + "/generate", json={})
        return bool(registered.calls[-1].ids)

    registered.status["/v1/programs"] = 404
    assert not has_ids()
    registered.status.clear()
    assert not has_ids()
    register(registered.url)
    assert has_ids()
    registered.status["/v1/programs"] = 404
    assert has_ids()  # it was seen to be ours


def test_what_was_not_ours_is_asked_again_by_itself(
    registered: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a minute programs are told to it again."""
    monkeypatch.setattr("autellix_sglang.client.servers.REFUSAL_S", 0.3)
    registered.status["/v1/programs"] = 404
    with program("agent"):
        assert len(registered.sessions) == 1
    with program("agent"):
        assert len(registered.sessions) == 1
    registered.status.clear()
    time.sleep(0.3)
    with program("agent"):
        assert len(registered.sessions) == 2


def test_a_session_message_follows_no_redirect(registered: Recorder) -> None:
    """Where a server points to is not where ids go."""
    registered.redirects["/v1/programs"] = registered.url + "/elsewhere"
    with program(id="P"):
        pass
    assert registered.sessions == sessions_of("P")
    assert not [seen for seen in registered.seen if seen.url == "/elsewhere"]


def test_a_task_factory_need_not_take_a_context(registered: Recorder) -> None:
    """Tasks of a loop's own factory are threads of the program like all others."""

    async def call(client: httpx.AsyncClient) -> None:
        await client.post(registered.url + "/generate", json={})

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(lambda loop, coro: asyncio.Task(coro, loop=loop))
        async with httpx.AsyncClient() as client:
            with program("agent") as running:
                await asyncio.gather(call(client), call(client))
                assert len(running.root.frontier) == 2

    # asyncio's own loop, whatever policy another library has set: uvloop's gives a context always
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(main())
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


def test_a_function_that_returns_a_coroutine_is_refused() -> None:
    """What decorators make of a coroutine function is over before it runs: that is an error."""

    async def agent() -> None:
        return

    with pytest.raises(TypeError, match="put it on the `async def` itself"):
        program(lambda: agent())()


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


def test_a_job_of_a_pool_that_failed_was_waited_for(registered: Recorder) -> None:
    """Whose `result()` raises has been waited for like one that returns."""

    def job(fails: bool) -> None:
        requests.post(registered.url + "/generate", json={})
        if fails:
            raise KeyError

    with program("agent"), ThreadPool(1) as pool:
        with pytest.raises(KeyError):
            pool.submit(job, True).result()
        pool.submit(job, False).result()
    first, second = (seen.ids for seen in registered.calls)
    assert second["x-parent-call-ids"] == first["x-call-id"]


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
