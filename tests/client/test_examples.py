"""The examples make the programs they say, as a recording server sees them."""

from __future__ import annotations

import importlib

import openai

from tests.client.conftest import Recorder


def edges(recorder: Recorder) -> list[tuple[str, set[int]]]:
    """Thread and indices of parents of each call, in order of arrival; all of one program."""
    calls = [seen.ids for seen in recorder.calls]
    assert len({ids["x-program-id"] for ids in calls}) == 1
    index = {ids["x-call-id"]: i for i, ids in enumerate(calls)}
    parents = [ids.get("x-parent-call-ids", "").split(",") for ids in calls]
    return [
        (ids["x-thread-id"], {index[parent] for parent in above if parent})
        for ids, above in zip(calls, parents, strict=True)
    ]


def test_a_chatbot_is_a_chain(registered: Recorder) -> None:
    """Each turn waited for the one before."""
    example = importlib.import_module("examples.chatbot")
    with openai.OpenAI(base_url=registered.url + "/v1", api_key="none") as client:
        assert len(example.chat(client, ["a", "b", "c"])) == 3
    assert edges(registered) == [("0", set()), ("0", {0}), ("0", {1})]


def test_a_react_agent_is_a_chain(registered: Recorder) -> None:
    """So is an agent that calls a tool in between."""
    example = importlib.import_module("examples.react")
    with openai.OpenAI(base_url=registered.url + "/v1", api_key="none") as client:
        messages = example.react(client, "What is a quantum?", max_turns=2)
    assert edges(registered) == [("0", set()), ("0", {0})]
    assert messages[-1]["content"].startswith("Result: ")


async def test_map_reduce(registered: Recorder) -> None:
    """Every map is on a thread of its own, and all are parents of the reduce."""
    example = importlib.import_module("examples.map_reduce")
    async with openai.AsyncOpenAI(base_url=registered.url + "/v1", api_key="none") as client:
        await example.summarise(client, ["a", "b", "c"])
    *maps, last = edges(registered)
    assert sorted(maps) == [("1", set()), ("2", set()), ("3", set())]
    assert last[1] == {0, 1, 2}


async def test_tree_search(registered: Recorder) -> None:
    """Branches of two calls, which waited for all branches of the round before."""
    example = importlib.import_module("examples.tree_search")
    async with openai.AsyncOpenAI(base_url=registered.url + "/v1", api_key="none") as client:
        await example.Search(client, "a", width=2, rounds=2).run()
    found = edges(registered)
    chains: dict[str, list[tuple[int, set[int]]]] = {}
    for i, (thread, parents) in enumerate(found):
        chains.setdefault(thread, []).append((i, parents))
    first, second, *_ = chains.values()
    ends = {first[1][0], second[1][0]}
    assert [chain[0][1] for chain in chains.values()] == [set(), set(), ends, ends]
    assert all(len(chain) == 2 and chain[1][1] == {chain[0][0]} for chain in chains.values())
