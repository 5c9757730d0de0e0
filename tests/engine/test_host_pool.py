"""Host memory in pages: nothing is lost, nothing is lent twice, and nothing fragments."""

from __future__ import annotations

import random

import pytest
import torch

from autellix_sglang.engine.host_pool import PAGE_TOKENS, HostPool
from autellix_sglang.engine.swap_op import KVPool, swap_in, swap_out
from autellix_sglang.errors import ConfigError

KV = KVPool((torch.zeros(4, 8), torch.zeros(4, 8)))  # records of 64 bytes


def test_size_is_rounded_down_to_whole_pages():
    """Memory for two and a half pages is two pages; none at all is a pool that is always full."""
    assert HostPool.sized(KV, 64 * 10, page_tokens=4).total_bytes == 2 * 4 * 64
    empty = HostPool.sized(KV, 0)
    assert (empty.allocate(1), empty.total_bytes, empty.can_allocate(0)) == (None, 0, True)


@pytest.mark.parametrize("num_bytes", [2**60, 10**300])
def test_memory_that_is_not_there_is_an_error_of_the_setting(num_bytes):
    """What a user asked too much of is said by the name of the flag."""
    with pytest.raises(ConfigError, match=r"--program-host-memory: \d+ bytes cannot be allocated"):
        HostPool.sized(KV, num_bytes)


def test_a_full_pool_says_no_and_changes_nothing():
    """None, never an error, and what is free stays free."""
    pool = HostPool(KV, num_pages=3, page_tokens=4)
    held = pool.allocate(5)
    assert held is not None and pool.used_bytes == 2 * 4 * 64
    assert pool.allocate(5) is None
    assert pool.used_bytes == 2 * 4 * 64
    pool.free(held)
    pool.check_integrity()
    assert pool.used_bytes == 0


def test_scattered_pages_serve_a_large_chunk():
    """Every other page free: a chunk of all of them still fits, its tokens at their records."""
    pool = HostPool(KV, num_pages=8, page_tokens=4)
    single = [pool.allocate(1) for _ in range(8)]
    for chunk in single[::2]:
        pool.free(chunk)
    large = pool.allocate(15)
    assert large.pages == (0, 2, 4, 6)
    assert large.records.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26]
    assert [run[1:] for run in large.runs()] == [(0, 4), (8, 4), (16, 4), (24, 3)]


def test_a_fresh_pool_lends_in_one_piece():
    """Neighbouring pages are one run, which is one bulk copy."""
    chunk = HostPool(KV, num_pages=8, page_tokens=4).allocate(15)
    assert list(chunk.runs()) == [(0, 0, 15)]


@pytest.mark.parametrize("seed", range(3))
def test_random_use_never_leaks_or_fragments(seed):
    """It fits exactly if enough pages are free; records of live chunks never overlap."""
    rng = random.Random(seed)
    pool = HostPool(KV, num_pages=40, page_tokens=4)
    live = {}
    for _ in range(2000):
        if live and rng.random() < 0.5:
            pool.free(live.pop(rng.choice(list(live))))
        else:
            num_tokens = rng.randint(0, 60)
            num_pages = -(-num_tokens // 4)
            num_free = 40 - sum(len(chunk.pages) for chunk in live.values())
            chunk = pool.allocate(num_tokens)
            assert (chunk is not None) == (num_pages <= num_free)
            if chunk is not None:
                live[id(chunk)] = chunk
        pool.check_integrity()
        records = [record for chunk in live.values() for record in chunk.records.tolist()]
        assert len(records) == len(set(records))
    for chunk in live.values():
        pool.free(chunk)
    pool.check_integrity()
    assert pool.used_bytes == 0


def test_a_chunk_is_freed_once():
    """The second time is a bug of ours, and is caught."""
    pool = HostPool(KV, num_pages=2, page_tokens=4)
    chunk = pool.allocate(4)
    pool.free(chunk)
    with pytest.raises(AssertionError, match="twice"):
        pool.free(chunk)


@pytest.mark.gpu
def test_on_a_gpu_it_is_pinned_and_of_the_size_asked_for():
    """A chunk of it goes out and comes back; nothing is rounded up."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pool = KVPool((torch.arange(64 * 16, device="cuda").view(64, 16),))
    host = HostPool(pool, num_pages=3)
    assert host.total_bytes == 3 * PAGE_TOKENS * pool.record_bytes
    slots = torch.arange(40, device="cuda")
    chunk = host.allocate(40)
    before = pool.buffers[0].clone()
    swap_out(pool, slots, chunk)
    pool.buffers[0].zero_()
    swap_in(chunk, pool, slots)
    assert torch.equal(pool.buffers[0][:40], before[:40]) and not pool.buffers[0][40:].any()
