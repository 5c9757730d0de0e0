"""Token ids of calls, and the prefix relations between them."""

import pytest

from bench.prompts import ProgramPrompts, Vocabulary
from bench.trace import TraceCall, TraceProgram


def chain(corpus: str = "c", id_: str = "p", group: str | None = None) -> TraceProgram:
    calls = (
        TraceCall("0", 12, 12, 4, shared_prefix_tokens=6),
        TraceCall("1", 21, 5, 3, parents=("0",)),
        TraceCall("2", 15, 3, 2, parents=("1",)),
    )
    return TraceProgram(id_, corpus, "react", calls, prefix_group=group)


def first_prompt(program: TraceProgram, **more: object) -> list[int]:
    return ProgramPrompts(program, **more).prompt(program.calls[0])


def test_a_continued_prompt_is_the_parents_prompt_its_actual_output_and_new_tokens():
    """What the engine really produced, not what was recorded, is part of the next prompt."""
    program = chain()
    prompts = ProgramPrompts(program)
    first = prompts.prompt(program.calls[0])
    prompts.complete(program.calls[0], [900, 901, 902, 903])

    second = prompts.prompt(program.calls[1])

    assert second[:16] == [*first, 900, 901, 902, 903]
    assert len(second) == 21


def test_a_prompt_that_drops_history_keeps_only_the_leading_tokens():
    """A call that reuses less than its parent's whole text starts with exactly that much of it."""
    program = chain()
    prompts = ProgramPrompts(program)
    for call, output in zip(program.calls[:2], ([1] * 4, [2] * 3), strict=True):
        prompts.prompt(call)
        prompts.complete(call, output)

    third = prompts.prompt(program.calls[2])

    assert third[:12] == prompts.prompt(program.calls[0])
    assert len(third) == 15


@pytest.mark.parametrize(
    ("other", "is_shared"),
    [
        (chain(id_="q"), True),
        (chain(corpus="d"), False),
        (chain(id_="r", group="g"), False),
    ],
)
def test_programs_share_a_prefix_only_in_one_corpus_and_group(other, is_shared):
    """Shared tokens agree between programs of one file and group, and nowhere else."""
    mine, theirs = first_prompt(chain()), first_prompt(other)

    assert (mine[:6] == theirs[:6]) == is_shared
    assert mine[6:] != theirs[6:]


def test_shared_prefixes_of_different_length_agree_as_far_as_they_go():
    """A longer shared prefix begins with the shorter one; other ops have other ones."""

    def prompt(op: str, shared: int) -> list[int]:
        call = TraceCall("0", 40, 40, 1, op=op, shared_prefix_tokens=shared)
        return first_prompt(TraceProgram(f"{op}{shared}", "c", "tree", (call,)))

    assert prompt("value", 30)[:20] == prompt("value", 20)[:20]
    assert prompt("value", 30)[:20] != prompt("propose", 30)[:20]


def test_siblings_with_the_same_prompt_get_the_identical_prompt():
    """A copy has its sibling's prompt, whichever of the two is asked for first."""
    calls = (TraceCall("0", 9, 9, 1), TraceCall("1", 9, 9, 1, same_prompt_as="0"))
    program = TraceProgram("p", "c", "tree", calls)
    one, other = ProgramPrompts(program), ProgramPrompts(program)

    assert one.prompt(calls[1]) == other.prompt(calls[0]) == one.prompt(calls[0])


def test_prompts_depend_on_seed_and_instance_and_on_nothing_else():
    """The same seed and instance give the same ids on every call; others give others."""
    assert first_prompt(chain(), seed=1) == first_prompt(chain(), seed=1)
    assert first_prompt(chain(), seed=1) != first_prompt(chain(), seed=2)
    assert first_prompt(chain(), instance="1")[6:] != first_prompt(chain(), instance="2")[6:]


def test_ids_stay_inside_the_vocabulary():
    """Ids come from the configured range; by default it is the plain bytes."""
    wide = Vocabulary(first=1000, size=3).stream(500, "name")

    assert set(wide) == {1000, 1001, 1002}
    assert set(Vocabulary().stream(20000, "name")) == set(range(256))


@pytest.mark.parametrize(("first", "size"), [(-1, 10), (0, 0)])
def test_a_vocabulary_without_ids_is_refused(first, size):
    """A range that holds no valid token id is an error."""
    with pytest.raises(ValueError, match="no token ids"):
        Vocabulary(first, size)


def test_no_prompt_is_empty():
    """A recorded prompt of no tokens becomes one token, as engines take no empty prompt."""
    program = TraceProgram("p", "c", "chat", (TraceCall("0", 0, 0, 1),))

    assert len(first_prompt(program)) == 1
