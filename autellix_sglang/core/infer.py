"""Which program is a call of, if it does not say? That of the call whose text it continues.

An agent sends its history again with every call. A call whose prompt begins with all tokens of an
earlier call's prompt and output, as the engine itself had them, is taken to be of that call's
program; the longest such history wins. Rather no answer than a wrong one:

- the whole history must be there, token by token (of the output, a stop token need not be);
- a history that calls of two programs have in common, such as the same question with the same
  greedy answer, answers nothing;
- a history of less than one block is not kept, and a tenant finds none but its own.

Histories are kept as digests, the most recently used `max_histories` of them: a digest at the end
of the last whole block of tokens, and the tokens after it. A prompt is hashed once, a block at a
time, and looked up at the end of each. No clock and no randomness: every tensor-parallel rank sees
the same tokens in the same order and answers alike.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

MAX_HISTORIES: Final = 65_536  # some 500 bytes each
BLOCK_TOKENS: Final = 32
_TOKEN_BYTES: Final = 8
_BLOCK_BYTES: Final = BLOCK_TOKENS * _TOKEN_BYTES
_DIGEST_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Origin:
    """The call that left a history behind."""

    tenant: str
    program_id: str
    call_id: str


class History:
    """A sequence of tokens as its blocks' digests and what follows the last of them."""

    __slots__ = ("_hash", "heads", "rest")

    def __init__(self, tenant: str, tokens: Sequence[int] = ()) -> None:
        self._hash = blake2b(_digest(tenant.encode()), digest_size=_DIGEST_BYTES)
        self.heads: list[bytes] = []  # of all tokens up to the end of each whole block
        self.rest = b""
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        data = self.rest + _pack(tokens)
        num_whole = len(data) - len(data) % _BLOCK_BYTES
        for start in range(0, num_whole, _BLOCK_BYTES):
            self._hash.update(data[start : start + _BLOCK_BYTES])
            self.heads.append(self._hash.digest())
        self.rest = data[num_whole:]


@dataclass(slots=True)
class _Entry:
    origin: Origin  # the latest
    is_shared: bool = False  # calls of several programs ended with it


class HistoryIndex:
    """The histories that finished calls left behind. `is_open` says if a program still goes on."""

    def __init__(
        self, is_open: Callable[[Origin], bool], max_histories: int = MAX_HISTORIES
    ) -> None:
        self._is_open = is_open
        self._max_histories = max_histories
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the longest unused first
        self._num_by_head: Counter[bytes] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, prompt: History, tokens: Sequence[int]) -> Origin | None:
        """The call that a prompt of these `tokens` continues, if there is exactly one."""
        for i in reversed(range(len(prompt.heads))):
            if prompt.heads[i] in self._num_by_head:
                entry = self._entry_after(prompt.heads[i], tokens, (i + 1) * BLOCK_TOKENS)
                if entry is not None:
                    is_sure = not entry.is_shared and self._is_open(entry.origin)
                    return entry.origin if is_sure else None
        return None

    def add(self, history: History, origin: Origin) -> None:
        """Remember the prompt and output of a call that is over."""
        if not history.heads:
            return
        key = history.heads[-1] + history.rest
        entry = self._entries.get(key)
        if entry is None:
            self._entries[key] = _Entry(origin)
            self._num_by_head[history.heads[-1]] += 1
            self._forget_excess()
            return
        self._entries.move_to_end(key)
        if self._is_open(entry.origin):
            entry.is_shared |= _program(entry.origin) != _program(origin)
        else:
            entry.is_shared = False
        entry.origin = origin

    def _entry_after(self, head: bytes, tokens: Sequence[int], start: int) -> _Entry | None:
        """The longest history with this head that goes on like `tokens` from `start`."""
        following = _pack(tokens[start : start + BLOCK_TOKENS - 1])
        for end in range(len(following), -1, -_TOKEN_BYTES):
            key = head + following[:end]
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        return None

    def _forget_excess(self) -> None:
        if len(self._entries) > self._max_histories:
            key, _ = self._entries.popitem(last=False)
            head = key[:_DIGEST_BYTES]
            self._num_by_head[head] -= 1
            if not self._num_by_head[head]:
                del self._num_by_head[head]


def _program(origin: Origin) -> tuple[str, str]:
    return origin.tenant, origin.program_id


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _pack(tokens: Sequence[int]) -> bytes:
    return array("q", tokens).tobytes()
