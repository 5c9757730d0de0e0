"""Calls that send no id find their program by the tokens of its history."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autellix_sglang.core.infer import BLOCK_TOKENS, History, HistoryIndex, Origin

LONG = list(range(100, 100 + 3 * BLOCK_TOKENS))


class Lab:
    """An index and the programs that are over."""

    def __init__(self, max_histories: int = 1000) -> None:
        self.ended: set[str] = set()
        self.index = HistoryIndex(lambda o: o.program_id not in self.ended, max_histories)

    def find(self, tokens: list[int], tenant: str = "") -> str | None:
        origin = self.index.find(History(tenant, tokens), tokens)
        return None if origin is None else f"{origin.program_id}/{origin.call_id}"

    def add(self, tokens: list[int], program: str, call: str = "c", tenant: str = "") -> None:
        self.index.add(History(tenant, tokens), Origin(tenant, program, call))


@pytest.fixture
def lab() -> Lab:
    return Lab()


@pytest.mark.parametrize("extra", [0, 1, BLOCK_TOKENS - 1, BLOCK_TOKENS, 5 * BLOCK_TOKENS + 3])
@pytest.mark.parametrize("cut", [0, 1, BLOCK_TOKENS - 1, BLOCK_TOKENS])
def test_a_prompt_that_continues_a_history_is_found(lab: Lab, cut: int, extra: int) -> None:
    """Wherever the history ends in its block, and however much the prompt adds."""
    history = LONG[: len(LONG) - cut]
    lab.add(history, "p")
    assert lab.find(history + [7] * extra) == "p/c"


@given(st.integers(0, len(LONG) - 1), st.integers(0, 40))
def test_one_other_token_is_another_history(position: int, extra: int) -> None:
    """The whole of a history has to be there, to its last token."""
    lab = Lab()
    lab.add(LONG, "p")
    changed = [*LONG, *range(extra)]
    changed[position] += 1
    assert lab.find(changed) is None
    assert lab.find(LONG[:position]) is None


def test_the_longest_history_wins(lab: Lab) -> None:
    """Of a conversation's turns the latest is the parent, also within one block."""
    for length in (40, 50, 64, 65):
        lab.add(LONG[:length], "p", str(length))
    assert lab.find(LONG[:60]) == "p/50"
    assert lab.find(LONG[:64]) == "p/64"
    assert lab.find(LONG) == "p/65"


def test_a_history_of_two_programs_answers_nothing(lab: Lab) -> None:
    """The same question with the same answer could be either's, until one of them is over."""
    lab.add(LONG, "p", "1")
    lab.add(LONG, "p", "2")
    assert lab.find(LONG) == "p/2"
    lab.add(LONG, "q")
    assert lab.find(LONG) is None
    lab.add(LONG, "q")
    assert lab.find(LONG) is None
    lab.ended.add("q")
    assert lab.find(LONG) is None
    lab.add(LONG, "r")
    assert lab.find(LONG) == "r/c"


def test_a_program_that_is_over_is_not_joined(lab: Lab) -> None:
    """A history leads nowhere once its program was ended or forgotten."""
    lab.add(LONG, "p")
    lab.ended.add("p")
    assert lab.find(LONG) is None


def test_tenants_do_not_meet(lab: Lab) -> None:
    """The same tokens of another tenant are another history, to find and to share."""
    lab.add(LONG, "p", tenant="a")
    lab.add(LONG, "q", tenant="b")
    assert lab.find(LONG, "a") == "p/c"
    assert lab.find(LONG, "b") == "q/c"
    assert lab.find(LONG, "") is None


def test_short_histories_are_not_kept(lab: Lab) -> None:
    """Less than one block says too little about who sent it."""
    lab.add(LONG[: BLOCK_TOKENS - 1], "p")
    assert len(lab.index) == 0
    assert lab.find(LONG) is None


def test_memory_is_bounded() -> None:
    """The longest unused histories go first, and leave nothing behind."""
    lab = Lab(max_histories=3)
    for i in range(3):
        lab.add([i] * 40, f"p{i}")
    assert lab.find([0] * 41) == "p0/c"
    lab.add([3] * 40, "p3")
    assert [lab.find([i] * 41) for i in range(4)] == ["p0/c", None, "p2/c", "p3/c"]
    for i in range(100):
        lab.add([9] * 32 + [i], "p")
    assert len(lab.index) == 3
    assert lab.index._num_by_head.total() == 3


@given(st.lists(st.lists(st.integers(0, 2**40), max_size=50), max_size=6))
def test_a_history_grows_as_it_would_be_read_at_once(parts: list[list[int]]) -> None:
    """Prompt first and output later, in any pieces, give the same digests."""
    grown = History("t")
    for part in parts:
        grown.extend(part)
    whole = History("t", [token for part in parts for token in part])
    assert (grown.heads, grown.rest) == (whole.heads, whole.rest)


def test_finds_what_a_plain_search_finds() -> None:
    """Against all histories in a list: the same answers on sequences that often agree."""
    rng = random.Random(1)
    lab = Lab()
    known: list[tuple[list[int], str]] = []
    num_found = 0
    for i in range(400):
        base = rng.choice(known)[0] if known and rng.random() < 0.7 else []
        base = base[: rng.randint(0, len(base))] if rng.random() < 0.3 else base
        prompt = (
            base + [rng.randrange(2) for _ in range(rng.randint(0, 3))] + [1] * rng.randrange(30)
        )
        fits = [
            (len(tokens), {q for other, q in known if other == tokens})
            for tokens, _ in known
            if len(tokens) >= BLOCK_TOKENS and prompt[: len(tokens)] == tokens
        ]
        _, programs = max(fits, key=lambda fit: fit[0], default=(0, set()))
        found = lab.find(prompt)
        assert found == (f"{programs.pop()}/c" if len(programs) == 1 else None)
        num_found += found is not None
        name = f"p{i % 20}"
        lab.add(prompt, name)
        known.append((prompt, name))
    assert num_found > 100
