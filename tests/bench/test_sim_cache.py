"""The prefix cache in token counts: sharing, splitting, locks, and what is evicted first."""

import random

from bench.sim_cache import Node, PrefixCache, cut, is_evictable


def grown(cache, parent, *lengths):
    """A chain of resident nodes below `parent`; returns the last."""
    node = parent
    for length in lengths:
        node = Node(node, node.end + length)
    cache.insert(node)
    return node


def test_a_prefix_inside_a_node_splits_it_and_keeps_its_locks():
    """After the cut both halves are resident and locked, and an unlock frees both."""
    cache = PrefixCache()
    leaf = grown(cache, cache.root, 10)
    cache.lock(leaf)
    upper = cut(leaf, 4)

    assert (upper.num_tokens, leaf.num_tokens) == (4, 6)
    assert upper.num_locks == leaf.num_locks == 1
    cache.unlock(leaf)
    assert cache.num_evictable == cache.num_tokens == 10


def test_a_cut_at_a_boundary_makes_no_node():
    """The node that ends there is returned, the root for an empty prefix."""
    cache = PrefixCache()
    leaf = grown(cache, cache.root, 3, 5)

    assert cut(leaf, 8) is leaf
    assert cut(leaf, 3) is leaf.parent
    assert cut(leaf, 0) is cache.root


def test_leaves_go_first_and_the_least_recently_used_of_them():
    """A used leaf outlives an unused one, and a parent outlives its children."""
    cache = PrefixCache()
    trunk = grown(cache, cache.root, 10)
    old, used = grown(cache, trunk, 5), grown(cache, trunk, 5)
    cache.lock(old)
    cache.unlock(old)

    cache.evict(1)
    assert not used.is_resident
    assert old.is_resident
    cache.evict(6)
    assert not old.is_resident
    assert not trunk.is_resident
    assert cache.num_tokens == cache.num_evictable == 0


def test_what_is_locked_stays():
    """Eviction takes what it can get and leaves the way to a locked node alone."""
    cache = PrefixCache()
    trunk = grown(cache, cache.root, 10)
    held, free = grown(cache, trunk, 5), grown(cache, trunk, 7)
    cache.lock(held)
    cache.evict(1000)

    assert cache.num_tokens == 15
    assert not free.is_resident
    assert cache.match(free) is trunk


def test_counts_agree_with_the_tree_after_many_random_operations():
    """Token counts and evictability equal a recount over all nodes, whatever was done before."""
    rng = random.Random(1)
    cache = PrefixCache()
    nodes, locked = [cache.root], []
    for _ in range(3000):
        match rng.randrange(5):
            case 0:
                nodes.append(grown(cache, rng.choice(nodes), rng.randint(1, 9)))
            case 1:
                leaf = rng.choice(nodes)
                nodes.append(cut(leaf, rng.randint(0, leaf.end)))
            case 2:
                locked.append(cache.match(rng.choice(nodes)))
                cache.lock(locked[-1])
            case 3 if locked:
                cache.unlock(locked.pop(rng.randrange(len(locked))))
            case 4:
                cache.evict(rng.randint(1, 20))
    known = {id(node): node for node in nodes if node.parent is not None}.values()
    resident = [node for node in known if node.is_resident]

    assert cache.num_tokens == sum(node.num_tokens for node in resident)
    assert cache.num_evictable == sum(n.num_tokens for n in resident if n.num_locks == 0)
    assert all(node.parent.is_resident for node in resident)
    cache.evict(10**9)
    assert not any(is_evictable(node) for node in known)
