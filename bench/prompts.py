"""Token ids for the calls of a trace: deterministic, and with the trace's prefix relations.

- A call that continues another one starts with exactly that call's prompt ids and the output ids
  the engine *actually* produced, then adds new tokens.
- Programs that share a prefix (same corpus, prefix group and op) start with the same ids.
- Siblings with the same prompt get the identical prompt.
- All else is unique to the program: drawn from a stream named by seed, program and call.

A stream is SHAKE-256 of its name: no state, the same on every machine, and a longer draw begins
with the shorter one, which is what makes prefixes of different length agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import shake_256

import numpy as np

from bench.trace import TraceCall, TraceProgram


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The token ids to draw from: `first` .. `first + size - 1`. Default: the plain bytes."""

    first: int = 0
    size: int = 256

    def __post_init__(self) -> None:
        if self.first < 0 or self.size < 1:
            raise ValueError(f"no token ids in a vocabulary from {self.first}, size {self.size}")

    def stream(self, count: int, *name: object) -> list[int]:
        """The first `count` token ids of the stream called `name`."""
        digest = shake_256(repr(name).encode()).digest(4 * count)
        words = np.frombuffer(digest, dtype="<u4")
        ids: list[int] = (self.first + words % self.size).tolist()
        return ids


class ProgramPrompts:
    """The prompts of one run of one program.

    `instance` tells two runs of the same recorded program apart. The caller asks for a prompt when
    the call is issued and hands in the output when it is done.
    """

    def __init__(
        self,
        program: TraceProgram,
        *,
        instance: str = "",
        seed: int = 0,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self._program = program
        self._name = (seed, program.corpus, program.id, instance)
        self._seed = seed
        self._vocabulary = vocabulary or Vocabulary()
        self._prompts: dict[str, list[int]] = {}
        self._outputs: dict[str, list[int]] = {}

    def prompt(self, call: TraceCall) -> list[int]:
        """The input ids of a call all of whose `waits_for` calls have completed."""
        leader = self._program.prompt_leader(call)
        if leader.id not in self._prompts:
            self._prompts[leader.id] = self._build(leader)
        return self._prompts[leader.id]

    def complete(self, call: TraceCall, output_ids: Sequence[int]) -> None:
        """Note what the engine produced for a call; later prompts may begin with it."""
        self._outputs[call.id] = list(output_ids)

    def _build(self, call: TraceCall) -> list[int]:
        head = self._inherited(call)
        if not head:
            head = self._shared(call)
        # An engine takes no empty prompt.
        missing = max(call.prompt_tokens - len(head), 0 if head else 1)
        return head + self._vocabulary.stream(missing, "own", *self._name, call.id)

    def _inherited(self, call: TraceCall) -> list[int]:
        base = self._program.base(call)
        if base is None:
            return []
        history = self.prompt(base) + self._outputs[base.id]
        is_whole = call.reused_tokens >= base.prompt_tokens + base.output_tokens
        return history if is_whole else history[: call.reused_tokens]

    def _shared(self, call: TraceCall) -> list[int]:
        program = self._program
        name = ("shared", self._seed, program.corpus, program.prefix_group, call.op)
        return self._vocabulary.stream(min(call.shared_prefix_tokens, call.prompt_tokens), *name)
