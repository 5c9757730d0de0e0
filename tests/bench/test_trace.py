"""Loading, scaling and mixing of recorded workloads."""

import gzip
import json
import math
from pathlib import Path

import pytest

from bench.trace import (
    TraceCall,
    TraceError,
    TraceProgram,
    load,
    mix,
    sample,
    scale,
    truncate,
)

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FACTORS = (0.07, 0.25, 0.5, 1.0)
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"recorded workloads are not part of the project: no {DATA}"
)


def call(id_: int, prompt: int, new: int, output: int, **more: object) -> dict[str, object]:
    return {
        "id": id_,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "output_tokens": output,
        "parents": [],
        **more,
    }


CHAIN = {
    "id": "chain",
    "kind": "react",
    "arrival_s": 3.5,
    "calls": [
        call(0, 101, 101, 33, shared_prefix_tokens=80),
        call(1, 155, 21, 36, parents=[0], gap_s=0.5),
        call(2, 202, 11, 7, parents=[1], gap_s=None),
        # A new turn: only the first prompt is kept.
        call(3, 118, 17, 9, parents=[2]),
    ],
}
TREE = {
    "id": "tree",
    "kind": "tree",
    "arrival_s": None,
    "unknown_key": {"is": "ignored"},
    "calls": [
        call(0, 55, 55, 20, op="propose", shared_prefix_tokens=40),
        call(1, 60, 60, 5, parents=[0], thread=1, op="value", shared_prefix_tokens=50),
        call(2, 60, 60, 9, parents=[0], thread=2, op="value", same_prompt_as=1),
        call(3, 94, 19, 9, parents=[1, 2], extends=0),
    ],
}


def write(path: Path, *programs: object) -> Path:
    text = "\n".join(json.dumps(program) for program in programs) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def program_of(tmp_path: Path, value: object) -> TraceProgram:
    return load(write(tmp_path / "t.jsonl", value))[0]


# --- loading ---


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz"])
def test_plain_and_gzipped_files_load_alike(tmp_path, name):
    """A trace loads the same from text and from gzip, and is named after its file."""
    chain, tree = load(write(tmp_path / name, CHAIN, TREE))

    assert (chain.corpus, chain.kind, chain.arrival_s) == ("mine", "react", 3.5)
    assert [c.gap_s for c in chain.calls] == [None, 0.5, None, None]
    assert tree.calls[3].extends == "0"


def test_only_ids_and_token_counts_are_required(tmp_path):
    """Optional keys may be absent, and then parents are none and a prompt continues its parent."""
    value = {
        "id": 7,
        "calls": [
            {"id": "a", "prompt_tokens": 10, "output_tokens": 4},
            {"id": "b", "prompt_tokens": 20, "output_tokens": 4, "parents": ["a"]},
        ],
    }

    program = program_of(tmp_path, value)

    assert program.id == "7"
    assert program.calls[0] == TraceCall("a", 10, 10, 4)
    assert program.calls[1] == TraceCall("b", 20, 6, 4, parents=("a",))


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"prompt_tokens": -1}, "calls[1].prompt_tokens", "got -1"),
        ({"prompt_tokens": None}, "calls[1].prompt_tokens", "is missing"),
        ({"output_tokens": True}, "calls[1].output_tokens", "got True"),
        ({"output_tokens": 2.5}, "calls[1].output_tokens", "got 2.5"),
        ({"new_tokens": 999}, "calls[1].new_tokens", "999 of a prompt of 155"),
        ({"parents": [2]}, "calls[1].parents", "'2' is not the id of an earlier call"),
        ({"parents": 0}, None, None),
        ({"parents": "0"}, "calls[1].parents", "expected a list"),
        ({"extends": 9}, "calls[1].extends", "'9' is not the id of an earlier call"),
        ({"same_prompt_as": 1}, "calls[1].same_prompt_as", "'1' is not the id"),
        ({"gap_s": "soon"}, "calls[1].gap_s", "expected seconds or null"),
        ({"gap_s": math.nan}, "calls[1].gap_s", "expected seconds or null"),
        ({"id": 0}, "calls[1].id", "'0' is used by an earlier call"),
        ({"thread": [1]}, "calls[1].thread", "expected a string or an integer"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, change, field, reason):
    """A broken value is reported with the file, the line, the field and what is wrong."""
    broken = {**CHAIN, "calls": [CHAIN["calls"][0], {**CHAIN["calls"][1], **change}]}
    path = write(tmp_path / "bad.jsonl", CHAIN, broken)
    if field is None:
        assert len(load(path)) == 2
        return

    with pytest.raises(TraceError) as error:
        load(path)

    assert str(error.value).startswith(f"{path}:2: {field}: ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ":1: not JSON"),
        ("[]", ":1: line: expected a JSON object"),
        ('{"id": "x"}', ":1: calls: expected a list of one or more calls"),
        ('{"id": "x", "calls": []}', ":1: calls: expected a list of one or more calls"),
        ('{"calls": [{"id": 0, "prompt_tokens": 1, "output_tokens": 1}]}', ":1: id: is missing"),
        ("", ": no programs in the file"),
        ("[" * 100_000, ":1: not JSON"),
        (f'{{"id": {"9" * 5000}}}', ":1: not JSON"),
        (
            f'{{"id": 0, "calls": [{{"id": 0, "prompt_tokens": {"9" * 400}}}]}}',
            ":1: calls[0].prompt_tokens: expected a whole number",
        ),
    ],
)
def test_lines_that_are_no_programs_are_errors(tmp_path, line, words):
    """A line that is not a program with calls is an error, as is a file without programs."""
    path = tmp_path / "bad.jsonl"
    path.write_text(line)

    with pytest.raises(TraceError) as error:
        load(path)

    assert f"{path}{words}" in str(error.value)


def test_a_truncated_gzip_file_is_an_error(tmp_path):
    """A damaged archive names the file and is not taken for a short trace."""
    path = write(tmp_path / "t.jsonl.gz", *[CHAIN] * 50)
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(TraceError, match=r"t\.jsonl\.gz: not readable"):
        load(path)


def test_a_damaged_gzip_file_is_an_error(tmp_path):
    """Bytes that cannot be inflated are no traceback."""
    path = write(tmp_path / "t.jsonl.gz", *[CHAIN] * 50)
    content = bytearray(path.read_bytes())
    content[10 + len("t.jsonl") + 1] ^= 0xFF
    path.write_bytes(content)

    with pytest.raises(TraceError, match=r"t\.jsonl\.gz: not readable"):
        load(path)


# --- relations ---


def test_a_prompt_continues_the_named_call_the_same_thread_or_the_longest_parent():
    """The source of a prefix is `extends`, else the parent on the thread, else the longest."""
    first, second = TraceCall("a", 50, 50, 10, thread="1"), TraceCall("b", 90, 90, 10, thread="2")

    def base(**more: object) -> str | None:
        third = TraceCall("c", 200, 20, 5, **more)
        found = TraceProgram("p", "x", "tree", (first, second, third)).base(third)
        return found.id if found else None

    assert base(parents=("a", "b"), thread="1") == "a"
    assert base(parents=("a", "b"), thread="9") == "b"
    assert base(parents=("b",), extends="a") == "a"
    assert base() is None


def test_a_call_waits_for_the_source_of_its_prompt(tmp_path):
    """A prompt made of another call's output waits for that call, parent or not."""
    tree = program_of(tmp_path, TREE)

    assert tree.waits_for(tree.calls[3]) == ("1", "2", "0")
    assert tree.waits_for(tree.calls[2]) == ("0",)


# --- scaling ---


def assert_scaled(before: TraceProgram, after: TraceProgram, factor: float) -> None:
    for old, new in zip(before.calls, after.calls, strict=True):
        assert (old.id, old.parents, old.thread, old.gap_s) == (
            new.id,
            new.parents,
            new.thread,
            new.gap_s,
        )
        assert new.output_tokens >= 1
        assert 0 <= new.new_tokens <= new.prompt_tokens
        assert new.prompt_tokens >= 1
        assert 0 <= new.shared_prefix_tokens <= new.prompt_tokens
        assert (new.new_tokens > 0) == (old.new_tokens > 0) or new.prompt_tokens == 1
        assert abs(new.output_tokens - old.output_tokens * factor) <= 1
        base = before.base(before.prompt_leader(old))
        if base is not None:
            assert_prefix_kept(base, old, after.call_by_id[base.id], new)
        if old.same_prompt_as is not None:
            sibling = after.call_by_id[old.same_prompt_as]
            assert new.prompt_tokens == sibling.prompt_tokens


def assert_prefix_kept(
    old_base: TraceCall, old: TraceCall, new_base: TraceCall, new: TraceCall
) -> None:
    whole = old_base.prompt_tokens + old_base.output_tokens
    assert new.reused_tokens <= new_base.prompt_tokens + new_base.output_tokens or (
        old.reused_tokens > whole
    )
    if old.reused_tokens == whole:
        assert new.reused_tokens == new_base.prompt_tokens + new_base.output_tokens
    if old.reused_tokens == old_base.prompt_tokens:
        assert new.reused_tokens == new_base.prompt_tokens


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("value", [CHAIN, TREE], ids=["chain", "tree"])
def test_scaling_keeps_the_relations_between_prompts(tmp_path, value, factor):
    """After scaling a call still continues what it continued, and copies are still equal."""
    program = program_of(tmp_path, value)

    assert_scaled(program, scale(program, factor), factor)


def test_a_prefix_that_ends_at_an_ancestors_prompt_still_ends_there(tmp_path):
    """A new turn that keeps the first prompt keeps exactly the scaled first prompt."""
    chain = scale(program_of(tmp_path, CHAIN), 0.25)

    assert chain.calls[3].reused_tokens == chain.calls[0].prompt_tokens == 25


def test_scaling_by_one_changes_nothing_but_empty_outputs(tmp_path):
    """Factor 1 is the identity, except that every call generates at least one token."""
    program = program_of(tmp_path, CHAIN)

    assert scale(program, 1.0) == program
    assert scale(TraceProgram("p", "x", "chat", (TraceCall("0", 5, 5, 0),)), 1.0).calls[
        0
    ] == TraceCall("0", 5, 5, 1)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_factor_must_be_positive(tmp_path, factor):
    """A factor that would make no program is refused."""
    with pytest.raises(ValueError, match="scale factor"):
        scale(program_of(tmp_path, CHAIN), factor)


@needs_data
@pytest.mark.parametrize("path", sorted(DATA.glob("*.jsonl.gz")), ids=lambda path: path.name[:12])
def test_scaling_holds_on_recorded_workloads(path):
    """The scaling invariants hold for every program of the recorded files."""
    for program in load(path)[:400]:
        assert scale(program, 1.0).calls == tuple(
            c if c.output_tokens else TraceCall(**{**_fields(c), "output_tokens": 1})
            for c in program.calls
        )
        assert_scaled(program, scale(program, 0.25), 0.25)


def _fields(call_: TraceCall) -> dict[str, object]:
    return {name: getattr(call_, name) for name in TraceCall.__slots__}


# --- sampling ---


def programs(corpus: str, count: int, prompt: int = 10) -> list[TraceProgram]:
    return [
        TraceProgram(f"{corpus}{i}", corpus, "chat", (TraceCall("0", prompt + i, prompt + i, 5),))
        for i in range(count)
    ]


def test_a_mix_takes_equally_from_each_file_without_replacement(tmp_path):
    """Each file gives the same share, no program comes twice, and the seed decides the order."""
    paths = [
        write(tmp_path / f"{name}.jsonl", *({**CHAIN, "id": f"{name}{i}"} for i in range(9)))
        for name in "ab"
    ]

    first = mix(paths, 10, seed=1)

    ids = [program.id for program in first.programs]
    assert sorted(id_[0] for id_ in ids) == ["a"] * 5 + ["b"] * 5
    assert len(set(ids)) == 10
    assert mix(paths, 10, seed=1) == first
    assert [p.id for p in mix(paths, 10, seed=2).programs] != ids


def test_a_source_that_runs_out_gives_numbered_copies():
    """Beyond its programs a source starts over, and the copies have ids of their own."""
    drawn = sample([programs("a", 2)], 5, seed=0).programs

    assert sorted(program.id for program in drawn)[:4] == ["a0", "a0#2", "a1", "a1#2"]
    assert len({program.id for program in drawn}) == 5


def test_programs_that_do_not_fit_are_skipped_and_counted():
    """Programs whose largest call exceeds the limit are left out; the mix says how many."""
    chosen = sample([programs("a", 10)], 4, seed=0, max_prompt_tokens=18)

    assert (chosen.skipped, chosen.candidates) == (6, 10)
    assert all(program.max_context_tokens <= 18 for program in chosen.programs)


def test_a_source_in_which_nothing_fits_is_an_error():
    """A mix that would silently lack one of its files is refused."""
    with pytest.raises(ValueError, match="no program of b fits in 18 tokens"):
        sample([programs("a", 3), programs("b", 3, prompt=100)], 4, seed=0, max_prompt_tokens=18)


def test_a_cap_on_calls_keeps_the_first_ones(tmp_path):
    """Cutting a program off leaves a program whose references all resolve."""
    short = truncate(program_of(tmp_path, TREE), 2)

    assert [c.id for c in short.calls] == ["0", "1"]
    assert len(sample([[short]], 1, seed=0, max_calls=1).programs[0].calls) == 1
