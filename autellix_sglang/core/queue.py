"""Waiting calls in admission order, cheap to keep when little changes.

The specification is `sorted(calls, key=Call.order_key)`; a test holds this class to it. Single
changes cost a binary search each; when many keys changed at once one sort is cheaper.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autellix_sglang.core.program import Call

Key = tuple[int, float, int]
_Entry = tuple[Key, "Call"]
_RESORT_SHARE = 16  # a full sort beats single moves once 1/16 of the entries are stale


class CallQueue:
    """A set of calls that iterates in order of their `order_key`.

    `version` grows whenever the order that a reader saw may no longer hold.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._keys: dict[Call, Key] = {}  # the key each call is filed under
        self._stale: set[Call] = set()
        self.version = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, call: Call) -> bool:
        return call in self._keys

    def push(self, call: Call) -> None:
        """Add a call that is not in the queue."""
        assert call not in self._keys, f"call {call.rid} is queued already"
        key = call.order_key
        self._keys[call] = key
        insort(self._entries, (key, call))
        self.version += 1

    def discard(self, call: Call) -> None:
        """Remove a call if it is there; the order of the others stands."""
        key = self._keys.pop(call, None)
        if key is not None:
            self._stale.discard(call)
            del self._entries[bisect_left(self._entries, (key,))]

    def touch(self, call: Call) -> None:
        """Note that the key of a queued call has changed."""
        if call in self._keys:
            self._stale.add(call)
            self.version += 1

    def first(self) -> Call | None:
        """The call to admit next, or None."""
        self._settle()
        return self._entries[0][1] if self._entries else None

    def __getitem__(self, index: int) -> Call:
        self._settle()
        return self._entries[index][1]

    def __iter__(self) -> Iterator[Call]:
        self._settle()
        return (call for _, call in self._entries)

    def _settle(self) -> None:
        """File every stale call under its present key."""
        if not self._stale:
            return
        if len(self._stale) * _RESORT_SHARE > len(self._entries):
            self._keys = {call: call.order_key for call in self._keys}
            self._entries = sorted((key, call) for call, key in self._keys.items())
        else:
            for call in self._stale:
                del self._entries[bisect_left(self._entries, (self._keys[call],))]
                self._keys[call] = call.order_key
                insort(self._entries, (call.order_key, call))
        self._stale.clear()
