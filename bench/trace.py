"""Recorded workloads: programs as DAGs of LLM calls, in numbers only.

A trace is a `.jsonl` or `.jsonl.gz` file with one program per line:

    {"id", "kind", "arrival_s", "prefix_group",
     "calls": [{"id", "parents", "thread", "prompt_tokens", "new_tokens", "output_tokens",
                "gap_s", "issue_s", "shared_prefix_tokens", "op", "same_prompt_as", "extends"}]}

Only `id` and `calls` of a program, and `id`, `prompt_tokens` and `output_tokens` of a call, have to
be there; other keys may be absent or null, and keys not listed are ignored. Calls refer to calls
listed before them. Ids and threads may be numbers or strings; they are kept as strings.

Where two numbers of a file disagree (a `same_prompt_as` sibling of another length, a prefix longer
than the call it comes from) the relation wins and the call's prompt is built from it.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import random
import sys
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Literal, TypeGuard

Marks = tuple[tuple[int, int], ...]


class TraceError(ValueError):
    """A trace file breaks the format; the message names the file, the line and the field."""


@dataclass(frozen=True, slots=True)
class TraceCall:
    """One recorded LLM call.

    `prompt_tokens` is the whole input; `new_tokens` the part of it that is not inherited from the
    prompt and output of the call it continues. `gap_s` is the time from the parents' completion to
    this call's issue, `issue_s` the offset from the program's arrival; None means not recorded.
    """

    id: str
    prompt_tokens: int
    new_tokens: int
    output_tokens: int
    parents: tuple[str, ...] = ()
    thread: str = "0"
    gap_s: float | None = None
    issue_s: float | None = None
    shared_prefix_tokens: int = 0
    op: str | None = None
    same_prompt_as: str | None = None
    extends: str | None = None

    @property
    def reused_tokens(self) -> int:
        """Leading prompt tokens that come from the call this one continues."""
        return self.prompt_tokens - self.new_tokens


@dataclass(frozen=True)
class TraceProgram:
    """One program: calls in an order where every reference points backwards.

    `corpus` names where the program comes from; programs share prompt prefixes only inside one
    corpus, and there only where `prefix_group` and the call's `op` agree.
    """

    id: str
    corpus: str
    kind: str
    calls: tuple[TraceCall, ...]
    arrival_s: float | None = None
    prefix_group: str | None = None

    @cached_property
    def call_by_id(self) -> dict[str, TraceCall]:
        return {call.id: call for call in self.calls}

    @property
    def output_tokens(self) -> int:
        return sum(call.output_tokens for call in self.calls)

    @property
    def max_context_tokens(self) -> int:
        """Prompt plus output of the largest call: the context an engine must offer."""
        return max(call.prompt_tokens + call.output_tokens for call in self.calls)

    def prompt_leader(self, call: TraceCall) -> TraceCall:
        """The call that defines this call's prompt: itself, or the sibling it copies."""
        while call.same_prompt_as is not None:
            call = self.call_by_id[call.same_prompt_as]
        return call

    def base(self, call: TraceCall) -> TraceCall | None:
        """The call whose prompt and output begin this call's prompt; None for a fresh prompt.

        Without an explicit `extends` it is the parent on the same thread, else the longest parent.
        """
        if call.reused_tokens == 0:
            return None
        if call.extends is not None:
            return self.call_by_id[call.extends]
        parents = [self.call_by_id[parent] for parent in call.parents]
        rank = {p.id: (p.thread == call.thread, p.prompt_tokens + p.output_tokens) for p in parents}
        return max(parents, key=lambda parent: rank[parent.id], default=None)

    def waits_for(self, call: TraceCall) -> tuple[str, ...]:
        """Ids of the calls that must complete first: the parents, and the source of the prompt.

        A prompt that holds another call's output cannot be issued before that output exists, also
        where the trace does not list that call as a parent.
        """
        base = self.base(self.prompt_leader(call))
        extra = () if base is None or base.id in call.parents else (base.id,)
        return (*call.parents, *extra)


@dataclass(frozen=True, slots=True)
class Mix:
    """A sample of programs, and how many candidates were left out because they do not fit."""

    programs: tuple[TraceProgram, ...]
    skipped: int
    candidates: int


# --- loading ------------------------------------------------------------------------------------


def load(path: str | Path) -> tuple[TraceProgram, ...]:
    """All programs of a trace file.

    Raises `TraceError` for a file that breaks the format, `OSError` for one that cannot be read.
    """
    path = Path(path)
    corpus = path.name.removesuffix(".gz").removesuffix(".jsonl")
    programs = [_parse_program(line, where, corpus) for where, line in read_lines(path)]
    if not programs:
        raise TraceError(f"{path}: no programs in the file")
    return tuple(programs)


def save(programs: Iterable[TraceProgram], path: str | Path) -> None:
    """Write a trace file, gzipped where the name ends so; `load` gives the same programs back.

    The corpus is the file's name, so it is not written.
    """
    with _open(Path(path), "wt") as file:
        for program in programs:
            file.write(json.dumps(_as_record(program)) + "\n")


def _as_record(program: TraceProgram) -> dict[str, object]:
    record = {f.name: getattr(program, f.name) for f in dataclasses.fields(program)}
    del record["corpus"]
    return record | {"calls": [dataclasses.asdict(call) for call in program.calls]}


def _open(path: Path, mode: Literal["rt", "wt"] = "rt") -> IO[str]:
    return (
        gzip.open(path, mode, encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(mode, encoding="utf-8")
    )


def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """(where it is, text) of every line that is not empty; raises `TraceError` or `OSError`."""
    path = Path(path)
    with _open(path) as lines:
        for number, line in enumerate(_lines(lines, path), start=1):
            if line.strip():
                yield f"{path}:{number}", line


def _lines(lines: IO[str], path: Path) -> Iterator[str]:
    try:
        yield from lines
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: not readable as (gzipped) UTF-8 text: {error}") from error


def parse_record(line: str, where: str) -> Record:
    """One line as a JSON object; raises `TraceError`."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # also of too many digits, or too deep
        raise TraceError(f"{where}: not JSON: {error}") from error
    return Record(value, where)


def _parse_program(line: str, where: str, corpus: str) -> TraceProgram:
    record = parse_record(line, where)
    calls = record.items("calls")
    return TraceProgram(
        id=record.label("id"),
        corpus=corpus,
        kind=record.optional_label("kind") or "unknown",
        calls=_parse_calls(calls),
        arrival_s=record.seconds("arrival_s"),
        prefix_group=record.optional_label("prefix_group"),
    )


def _parse_calls(records: list[Record]) -> tuple[TraceCall, ...]:
    calls: dict[str, TraceCall] = {}
    for record in records:
        call = _parse_call(record, calls)
        if call.id in calls:
            raise record.error("id", f"{call.id!r} is used by an earlier call")
        calls[call.id] = call
    return tuple(calls.values())


def _parse_call(record: Record, earlier: dict[str, TraceCall]) -> TraceCall:
    parents = record.references("parents", earlier)
    prompt = record.count("prompt_tokens")
    parent_tokens = max((_total(earlier[parent]) for parent in parents), default=0)
    new = record.optional_count("new_tokens")
    if new is None:
        new = max(0, prompt - parent_tokens)
    if new > prompt:
        raise record.error("new_tokens", f"{new} of a prompt of {prompt} tokens")
    return TraceCall(
        id=record.label("id"),
        prompt_tokens=prompt,
        new_tokens=new,
        output_tokens=record.count("output_tokens"),
        parents=parents,
        thread=record.optional_label("thread") or "0",
        gap_s=record.seconds("gap_s"),
        issue_s=record.seconds("issue_s"),
        shared_prefix_tokens=min(record.optional_count("shared_prefix_tokens") or 0, prompt),
        op=record.optional_label("op"),
        same_prompt_as=record.reference("same_prompt_as", earlier),
        extends=record.reference("extends", earlier),
    )


def _total(call: TraceCall) -> int:
    return call.prompt_tokens + call.output_tokens


class Record:
    """One JSON object of a trace, read field by field; every error says where it is."""

    def __init__(self, value: object, where: str, prefix: str = "") -> None:
        if not isinstance(value, dict):
            raise TraceError(f"{where}: {prefix or 'line'}: expected a JSON object")
        self._value = value
        self._where = where
        self._prefix = prefix

    def error(self, field: str, reason: str) -> TraceError:
        dot = "." if self._prefix else ""
        return TraceError(f"{self._where}: {self._prefix}{dot}{field}: {reason}")

    def has(self, field: str) -> bool:
        return self._value.get(field) is not None

    def raw(self, field: str) -> object:
        """What is there, unchecked; None where nothing is."""
        return self._value.get(field)

    def part(self, field: str) -> Record:
        """The JSON object in a field."""
        prefix = f"{self._prefix}.{field}" if self._prefix else field
        return Record(self._value.get(field), self._where, prefix)

    def items(self, field: str) -> list[Record]:
        values = self._value.get(field)
        if not isinstance(values, list) or not values:
            raise self.error(field, "expected a list of one or more calls")
        return [Record(v, self._where, f"{field}[{i}]") for i, v in enumerate(values)]

    def optional_label(self, field: str) -> str | None:
        value = self._value.get(field)
        return None if value is None else self._as_label(field, value)

    def label(self, field: str) -> str:
        value = self.optional_label(field)
        if value is None:
            raise self.error(field, "is missing")
        return value

    def optional_count(self, field: str) -> int | None:
        value = self._value.get(field)
        if value is None:
            return None
        if not _is_number(value) or value < 0 or value != int(value):
            raise self.error(field, f"expected a whole number >= 0, got {value!r}")
        return int(value)

    def count(self, field: str) -> int:
        value = self.optional_count(field)
        if value is None:
            raise self.error(field, "is missing")
        return value

    def seconds(self, field: str) -> float | None:
        value = self._value.get(field)
        if value is None:
            return None
        if not _is_number(value):
            raise self.error(field, f"expected seconds or null, got {value!r}")
        return float(value)

    def reference(self, field: str, earlier: dict[str, TraceCall]) -> str | None:
        value = self._value.get(field)
        return None if value is None else self._as_reference(field, value, earlier)

    def references(self, field: str, earlier: dict[str, TraceCall]) -> tuple[str, ...]:
        values = self._value.get(field) or []
        if not isinstance(values, list):
            raise self.error(field, f"expected a list of call ids, got {values!r}")
        return tuple(dict.fromkeys(self._as_reference(field, v, earlier) for v in values))

    def _as_reference(self, field: str, value: object, earlier: dict[str, TraceCall]) -> str:
        name = self._as_label(field, value)
        if name not in earlier:
            raise self.error(field, f"{name!r} is not the id of an earlier call of this program")
        return name

    def _as_label(self, field: str, value: object) -> str:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.error(field, f"expected a string or an integer, got {value!r}")
        return str(value)


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is one that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


# --- scaling ------------------------------------------------------------------------------------


def scale(program: TraceProgram, factor: float) -> TraceProgram:
    """The same program with token counts times `factor`; structure and times unchanged.

    Relations survive the rounding: a call that continued all of another call's prompt and output
    still does, one that continued up to the end of an ancestor's prompt still ends there, copies
    of a prompt stay equal. Every call keeps at least 1 prompt token and 1 output token.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"scale factor must be a number above 0, got {factor!r}")
    scaled: dict[str, TraceCall] = {}
    marks: dict[str, Marks] = {}
    for call in program.calls:
        leader = program.prompt_leader(call)
        base = program.base(leader)
        base_marks = marks[base.id] if base is not None else ()
        scaled[call.id] = _scale_call(call, leader, base_marks, factor)
        marks[call.id] = _extend_marks(base_marks, call, leader, scaled[call.id])
    return dataclasses.replace(program, calls=tuple(scaled.values()))


def _scale_call(call: TraceCall, leader: TraceCall, base: Marks, factor: float) -> TraceCall:
    reused = _scale_offset(base, leader.reused_tokens, factor)
    new = _shrink(leader.new_tokens, factor)
    if reused + new == 0:
        new = 1
    return dataclasses.replace(
        call,
        prompt_tokens=reused + new,
        new_tokens=new,
        output_tokens=max(1, _shrink(call.output_tokens, factor)),
        shared_prefix_tokens=min(_round(leader.shared_prefix_tokens * factor), reused + new),
    )


def _shrink(count: int, factor: float) -> int:
    # A part that was there stays there: two prompts that differed must not become equal.
    return max(1, _round(count * factor)) if count else 0


def _round(value: float) -> int:
    return math.floor(value + 0.5)


def _scale_offset(marks: Marks, offset: int, factor: float) -> int:
    """Where an offset into a call's prompt + output lies after scaling.

    `marks` are the (original, scaled) offsets of the boundaries inside that sequence, ascending;
    an offset on a boundary maps to the boundary, one between two of them stays between them.
    """
    i = bisect_right(marks, (offset, math.inf)) - 1
    original, scaled = marks[i] if i >= 0 else (0, 0)
    inside = scaled + _round((offset - original) * factor)
    return inside if i + 1 >= len(marks) else min(inside, marks[i + 1][1])


def _extend_marks(base: Marks, call: TraceCall, leader: TraceCall, scaled: TraceCall) -> Marks:
    """The boundaries of a call's own prompt + output: the inherited ones, then its own."""
    end = scaled.prompt_tokens + scaled.output_tokens
    inherited = tuple(mark for mark in base if mark[0] < leader.reused_tokens)
    own = (
        (leader.reused_tokens, scaled.reused_tokens),
        (leader.prompt_tokens, scaled.prompt_tokens),
        (leader.prompt_tokens + call.output_tokens, end),
    )
    return inherited + tuple(dict(own).items())


def truncate(program: TraceProgram, max_calls: int) -> TraceProgram:
    """The program's first `max_calls` calls; a whole program, as references point backwards."""
    if max_calls < 1:
        raise ValueError(f"max_calls must be at least 1, got {max_calls}")
    return dataclasses.replace(program, calls=program.calls[:max_calls])


# --- mixing -------------------------------------------------------------------------------------


def mix(
    paths: Sequence[str | Path],
    num_programs: int,
    seed: int,
    *,
    factor: float = 1.0,
    max_calls: int | None = None,
    max_prompt_tokens: int | None = None,
) -> Mix:
    """Sample programs equally from several files, in random order.

    `factor` scales token counts, `max_calls` cuts programs off, and programs with a call whose
    prompt and output together exceed `max_prompt_tokens` (after scaling) are skipped.
    """
    corpora = [load(path) for path in paths]
    return sample(
        corpora,
        num_programs,
        seed,
        factor=factor,
        max_calls=max_calls,
        max_prompt_tokens=max_prompt_tokens,
    )


def sample(
    corpora: Sequence[Sequence[TraceProgram]],
    num_programs: int,
    seed: int,
    *,
    factor: float = 1.0,
    max_calls: int | None = None,
    max_prompt_tokens: int | None = None,
) -> Mix:
    """`mix` of programs already in memory, one sequence per source.

    Each source gives the same number (the remainder goes to the first ones). A source is drawn
    without replacement while it lasts; later copies get `#2`, `#3`, ... appended to their id.
    """
    fitting = [
        [p for p in _prepare(corpus, factor, max_calls) if _fits(p, max_prompt_tokens)]
        for corpus in corpora
    ]
    candidates = sum(len(corpus) for corpus in corpora)
    for corpus, fit in zip(corpora, fitting, strict=True):
        if not fit:
            source = corpus[0].corpus if corpus else "a source"
            raise ValueError(f"no program of {source} fits in {max_prompt_tokens} tokens")
    rng = random.Random(seed)
    drawn = []
    for i, fit in enumerate(fitting):
        quota = num_programs // len(fitting) + (i < num_programs % len(fitting))
        drawn += _draw(fit, quota, rng)
    rng.shuffle(drawn)
    return Mix(tuple(drawn), candidates - sum(map(len, fitting)), candidates)


def _prepare(
    corpus: Sequence[TraceProgram], factor: float, max_calls: int | None
) -> Iterator[TraceProgram]:
    for program in corpus:
        short = program if max_calls is None else truncate(program, max_calls)
        yield scale(short, factor)


def _fits(program: TraceProgram, max_tokens: int | None) -> bool:
    return max_tokens is None or program.max_context_tokens <= max_tokens


def _draw(programs: list[TraceProgram], count: int, rng: random.Random) -> list[TraceProgram]:
    drawn: list[TraceProgram] = []
    copy = 1
    while len(drawn) < count:
        deck = rng.sample(programs, len(programs))[: count - len(drawn)]
        drawn += [p if copy == 1 else dataclasses.replace(p, id=f"{p.id}#{copy}") for p in deck]
        copy += 1
    return drawn
