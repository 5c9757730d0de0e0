"""A prefix cache in token counts: a radix tree whose nodes know lengths and no tokens.

A node is a piece of some call's prompt or output, its `parent` the piece before it. Which pieces
two calls share is known from the trace, so nothing is compared. As in SGLang: what a running call
stands on is locked, the rest can be evicted, leaves first, least recently used first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Node:
    """Tokens up to position `end` of every sequence through this node."""

    parent: Node | None
    end: int
    is_resident: bool = False
    num_locks: int = 0
    num_children: int = 0  # resident ones
    used_at: int = 0

    @property
    def num_tokens(self) -> int:
        return self.end - (self.parent.end if self.parent is not None else 0)


def cut(leaf: Node, end: int) -> Node:
    """The node on the way to `leaf` that ends at `end` (at most the leaf's own); splits one."""
    node = leaf
    while node.parent is not None and node.parent.end >= end:
        node = node.parent
    if node.end == end or node.parent is None:
        return node
    upper = Node(
        node.parent, end, node.is_resident, node.num_locks, int(node.is_resident), node.used_at
    )
    node.parent = upper
    return upper


class PrefixCache:
    """Owns the resident nodes. `num_evictable` of its `num_tokens` are locked by nobody."""

    def __init__(self) -> None:
        self.root = Node(None, 0, is_resident=True)
        self.num_tokens = 0
        self.num_evictable = 0
        self.num_evicted = 0
        self._tick = 0
        self._leaves: list[tuple[int, int, Node]] = []  # heap; entries may be out of date
        self._num_pushed = 0

    def match(self, leaf: Node) -> Node:
        """The deepest resident node on the way to `leaf`."""
        node = leaf
        while not node.is_resident:
            assert node.parent is not None
            node = node.parent
        return node

    def num_unlocked(self, node: Node) -> int:
        """Tokens that locking a resident node would make unevictable."""
        count = 0
        while node.num_locks == 0 and node.parent is not None:
            count += node.num_tokens
            node = node.parent
        return count

    def num_held_alone(self, node: Node) -> int:
        """Tokens that become evictable when one lock on a node goes."""
        count = 0
        while node.num_locks == 1 and node.parent is not None:
            count += node.num_tokens
            node = node.parent
        return count

    def lock(self, node: Node) -> None:
        """Keep a resident node and all before it; takes as many unlocks."""
        for each in upwards(node):
            if each.num_locks == 0:
                self.num_evictable -= each.num_tokens
            each.num_locks += 1

    def unlock(self, node: Node) -> None:
        self._tick += 1
        for each in upwards(node):
            each.num_locks -= 1
            if each.num_locks == 0:
                self.num_evictable += each.num_tokens
                each.used_at = self._tick
        self._offer(node)

    def insert(self, leaf: Node) -> int:
        """Make all nodes up to `leaf` resident; returns how many tokens that adds."""
        missing = [node for node in upwards(leaf) if not node.is_resident]
        for node in reversed(missing):
            assert node.parent is not None
            node.is_resident = True
            node.parent.num_children += 1
        added = sum(node.num_tokens for node in missing)
        self.num_tokens += added
        self.num_evictable += added
        self._tick += 1
        leaf.used_at = self._tick
        self._offer(leaf)
        return added

    def evict(self, num_tokens: int) -> None:
        """Free at least this much, or all that nobody holds."""
        target = self.num_tokens - num_tokens
        while self.num_tokens > target and self._leaves:
            used_at, _, node = heapq.heappop(self._leaves)
            if node.used_at == used_at and is_evictable(node):
                self.drop(node)

    def drop(self, node: Node) -> None:
        """Forget one evictable leaf."""
        assert is_evictable(node)
        assert node.parent is not None
        node.is_resident = False
        node.parent.num_children -= 1
        self.num_tokens -= node.num_tokens
        self.num_evictable -= node.num_tokens
        self.num_evicted += node.num_tokens
        self._offer(node.parent)

    def drop_branch(self, leaf: Node) -> None:
        """Forget an unlocked leaf, and what nobody else needs before it."""
        node = leaf
        while is_evictable(node):
            assert node.parent is not None
            self.drop(node)
            node = node.parent

    def _offer(self, node: Node) -> None:
        if is_evictable(node):
            self._num_pushed += 1
            heapq.heappush(self._leaves, (node.used_at, self._num_pushed, node))


def is_evictable(node: Node) -> bool:
    return (
        node.is_resident
        and node.num_locks == 0
        and node.num_children == 0
        and node.parent is not None
    )


def upwards(node: Node) -> Iterator[Node]:
    """A node and those before it, without the root."""
    while node.parent is not None:
        yield node
        node = node.parent
