"""SGLang's frontend language on a `ProgramEndpoint`, as a recording server sees it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.client.conftest import Recorder

sgl = pytest.importorskip("sglang")


@pytest.fixture
def backend(registered: Recorder) -> Any:
    from autellix_sglang.client import ProgramEndpoint

    return ProgramEndpoint(registered.url)


def edges(recorder: Recorder) -> list[tuple[str, set[int]]]:
    """Thread and indices of parents of each call, in order of arrival; all of one program."""
    calls = [seen.body["sampling_params"]["custom_params"] for seen in recorder.calls]
    assert len({ids["program_id"] for ids in calls}) == 1
    index = {ids["call_id"]: i for i, ids in enumerate(calls)}
    return [(ids["thread_id"], {index[p] for p in ids["parent_call_ids"]}) for ids in calls]


@pytest.mark.parametrize("use_thread", [True, False])
def test_a_run_is_a_program(registered: Recorder, backend: Any, use_thread: bool) -> None:
    """Two turns are two calls in a row, between a start and an end."""
    example = importlib.import_module("examples.chatbot_sglang")
    state = example.chat.run(questions=["a", "b"], backend=backend, use_thread=use_thread)
    assert state["answer1"] == " hi"
    if use_thread:
        state.stream_executor.worker.join()
    assert edges(registered) == [("0", set()), ("0", {0})]
    assert [method for method, _ in registered.sessions] == ["POST", "DELETE"]


def test_fork_makes_threads_and_join_makes_parents(registered: Recorder, backend: Any) -> None:
    """A fork caches its prefix with one call; its branches wait for that, the join for them."""

    @sgl.function
    def fan_out(s: Any) -> None:
        s += "Some text.\n"
        s.sync()  # SGLang's fork caches the prefix if the text is there by then
        forks = s.fork(3)
        forks += sgl.gen("line")
        forks.join()
        s += sgl.gen("summary")

    assert fan_out.run(backend=backend)["summary"]
    first, *maps, last = edges(registered)
    assert (first, last) == (("0", set()), ("0", {1, 2, 3}))
    assert sorted(maps) == [("1", {0}), ("2", {0}), ("3", {0})]


def test_reading_a_fork_makes_parents(registered: Recorder, backend: Any) -> None:
    """The example's answer waited for the last call of each branch that it read."""
    example = importlib.import_module("examples.tree_search_sglang")
    assert example.search.run(question="q", width=2, depth=1, backend=backend)["answer"]
    found = edges(registered)
    last_of = {thread: i for i, (thread, _) in enumerate(found[:-1]) if thread != "0"}
    assert found[-1] == ("0", set(last_of.values()))
    assert len(last_of) == 2


def test_select_is_a_chain(registered: Recorder, backend: Any) -> None:
    """`select` first caches the prefix, then scores all choices with one request."""

    @sgl.function
    def choose(s: Any) -> None:
        s += "It is " + sgl.select("grade", ["bad", "good"]) + sgl.gen("why")

    assert choose.run(backend=backend)["why"]
    assert edges(registered) == [("0", set()), ("0", {0}), ("0", {1})]


def test_a_batch_is_a_program_of_each(registered: Recorder, backend: Any) -> None:
    """Runs of a batch are programs of their own."""
    example = importlib.import_module("examples.chatbot_sglang")
    states = example.chat.run_batch([{"questions": ["a"]}] * 3, backend=backend, num_threads=3)
    assert all(state["answer0"] for state in states)
    calls = [seen.body["sampling_params"]["custom_params"] for seen in registered.calls]
    assert len({ids["program_id"] for ids in calls}) == 3


def test_other_backends_send_no_ids(registered: Recorder, backend: Any) -> None:
    """Beside a `ProgramEndpoint`, SGLang's own backend does what it did."""
    example = importlib.import_module("examples.chatbot_sglang")
    assert example.chat.run(questions=["a"], backend=sgl.RuntimeEndpoint(registered.url))["answer0"]
    [call] = registered.calls
    assert "custom_params" not in call.body["sampling_params"]


def test_a_state_that_outlives_its_run_is_anonymous(registered: Recorder, backend: Any) -> None:
    """What is generated after the program's end is no call of it."""

    @sgl.function
    def ask(s: Any) -> None:
        s += "Why?" + sgl.gen("answer")

    state = ask.run(backend=backend, use_thread=False)
    state += sgl.gen("more")
    first, second = (seen.body["sampling_params"] for seen in registered.calls)
    assert "custom_params" in first
    assert "custom_params" not in second
