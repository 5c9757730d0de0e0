"""Rows go out and come back bit for bit: the reference, the kernel's source on the CPU, the GPU.

The same tests for all of them; what a machine cannot run is skipped with the reason.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import torch

from autellix_sglang.engine.swap_kernel import DirectMover, StagedMover, kernel_mover
from autellix_sglang.engine.swap_op import (
    HostChunk,
    KVPool,
    Mover,
    ReferenceMover,
    swap_in,
    swap_out,
)
from autellix_sglang.errors import SwapError
from tests.engine.kernel_on_cpu import CpuLauncher, compile_for_cpu, compiler

NUM_SLOTS = 400
SENTINEL = 0xA5
MOVERS = [
    "reference",
    pytest.param("direct, on the CPU", marks=pytest.mark.skipif(not compiler(), reason="no g++")),
    pytest.param("staged, on the CPU", marks=pytest.mark.skipif(not compiler(), reason="no g++")),
    pytest.param("direct, on the GPU", marks=pytest.mark.gpu),
    pytest.param("staged, on the GPU", marks=pytest.mark.gpu),
]
# Rows of one slot in each buffer: several layers of K and V, MLA's single one, V narrower than K.
ROWS = {
    "mha": [(2, 64)] * 4,
    "mla": [(1, 576)] * 2,
    "narrow v": [(2, 24), (2, 24), (2, 16), (2, 16)],
    "odd": [(3, 7), (3, 7)],  # no width but bytes or elements divides these
}
DTYPES = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_for_cpu(tmp_path_factory.mktemp("kernel"))


@pytest.fixture(params=MOVERS)
def mover(request) -> Mover:
    name, _, place = request.param.partition(", on the ")
    if name == "reference":
        return ReferenceMover()
    if place == "GPU":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return kernel_mover(torch.device("cuda", 0), is_staged=name == "staged")
    launcher = CpuLauncher(request.getfixturevalue("library"))
    # A small staging buffer, so that the long moves take several fillings of it.
    return StagedMover(launcher, staging_bytes=2**18) if name == "staged" else DirectMover(launcher)


@pytest.fixture
def device(request, mover) -> torch.device:
    is_gpu = isinstance(mover, DirectMover) and "GPU" in request.node.name
    return torch.device("cuda", 0) if is_gpu else torch.device("cpu")


@functools.cache
def random_bytes(num_slots, row_bytes, seed) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(2**62, (num_slots, -(-row_bytes // 8)), generator=generator)
    return words.view(torch.uint8)[:, :row_bytes].contiguous()


def make_pool(rows, dtype, device, num_slots=NUM_SLOTS) -> KVPool:
    """Buffers of random bytes."""
    width = torch.empty(0, dtype=dtype).element_size()
    buffers = []
    for seed, (heads, dim) in enumerate(rows):
        data = random_bytes(num_slots, heads * dim * width, seed).clone()
        buffers.append(data.view(dtype).view(num_slots, heads, dim).to(device))
    return KVPool(tuple(buffers))


def some_slots(num_tokens, dtype, device, num_slots=NUM_SLOTS, seed=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_slots, generator=generator)[:num_tokens].to(device, dtype)


def bytes_of(pool) -> list[torch.Tensor]:
    return [rows.cpu().clone() for rows in pool.byte_rows]


@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 4096])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("width", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_round_trip_is_exact_and_leaves_other_rows_alone(
    mover, device, rows, width, index, num_tokens
):
    """Out, then into other slots of a pool of sentinels: moved rows equal, all others unchanged."""
    num_slots = num_tokens + 50
    source = make_pool(ROWS[rows], DTYPES[width], device, num_slots)
    before = bytes_of(source)
    slots = some_slots(num_tokens, index, device, num_slots)
    chunk = swap_out(source, slots, mover=mover)
    assert all(torch.equal(a, b) for a, b in zip(before, bytes_of(source), strict=True))

    target = KVPool(tuple(buffer.clone() for buffer in source.buffers))
    for buffer in target.byte_rows:
        buffer.fill_(SENTINEL)
    places = some_slots(num_tokens, index, device, num_slots, seed=2)
    swap_in(chunk, target, places, mover=mover)
    for found, original in zip(bytes_of(target), before, strict=True):
        expected = torch.full_like(original, SENTINEL)
        expected[places.cpu().long()] = original[slots.cpu().long()]
        assert torch.equal(found, expected)


def test_records_are_the_references(mover, device):
    """A chunk holds byte for byte what the reference puts there, at scattered records, no more."""
    pool = make_pool(ROWS["narrow v"], torch.bfloat16, device)
    slots = some_slots(100, torch.int64, device)
    records = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:100]
    storages = [torch.full((300, pool.record_bytes), SENTINEL, dtype=torch.uint8) for _ in range(2)]
    if device.type == "cuda":
        storages[0] = storages[0].pin_memory()
    swap_out(pool, slots, HostChunk(storages[0], records), mover=mover)
    if device.type == "cuda":
        torch.cuda.synchronize()
    on_cpu = KVPool(tuple(buffer.cpu() for buffer in pool.buffers))
    swap_out(on_cpu, slots.cpu(), HostChunk(storages[1], records))
    assert torch.equal(storages[0], storages[1])


def test_many_victims_move_at_once(mover, device):
    """Joined chunks of one storage and concatenated slots are the same as one call per victim."""
    pool = make_pool(ROWS["mha"], torch.float32, device)
    lengths = [0, 5, 64, 1, 200]
    whole = HostChunk.new(pool, sum(lengths))
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    chunks = [whole.part(start, stop) for start, stop in pairwise(edges)]
    slots = some_slots(sum(lengths), torch.int32, device)
    swap_out(pool, slots, HostChunk.joined(chunks[::-1]), mover=mover)
    first = slots[: lengths[-1]]  # the last chunk's tokens came first
    alone = swap_out(pool, first, mover=mover)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(chunks[-1].storage[chunks[-1].records], alone.storage)


def test_slots_of_a_strided_pool(mover, device):
    """K and V as slices of one allocation: rows apart from each other, and not 16-byte aligned."""
    base = make_pool([(2, 38)], torch.bfloat16, device).buffers[0]
    pool = KVPool((base[:, 0, :19], base[:, 1, :]))
    slots = some_slots(50, torch.int64, device)
    before = base.cpu().clone()
    chunk = swap_out(pool, slots, mover=mover)
    base.view(torch.uint8)[slots] = SENTINEL
    swap_in(chunk, pool, slots, mover=mover)
    expected = before.clone()
    expected.view(torch.uint8)[slots.cpu(), 0, 38:] = SENTINEL
    assert torch.equal(base.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("is_staged", [False, True])
def test_moves_keep_the_order_of_a_side_stream(is_staged):
    """Slow work before the move on the same stream is seen by it, with no synchronisation."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", 0)
    mover = kernel_mover(device, is_staged=is_staged)
    pool = make_pool(ROWS["mha"], torch.float32, device)
    slots = some_slots(300, torch.int64, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for rows in pool.byte_rows:
            rows.fill_(7)
        chunk = swap_out(pool, slots, mover=mover, is_checked=True)
        for rows in pool.byte_rows:
            rows.fill_(9)
        swap_in(chunk, pool, slots, mover=mover, is_checked=True)
    stream.synchronize()
    for rows in bytes_of(pool):
        assert rows[slots.cpu()].eq(7).all() and rows.eq(7).sum() == 300 * rows.shape[1]


# --- what is refused, before anything moves -----------------------------------------------------


@pytest.fixture
def pool() -> KVPool:
    return make_pool(ROWS["mha"], torch.float32, torch.device("cpu"), num_slots=8)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.tensor([0.0]), "int32 or int64"),
        (torch.tensor([0], dtype=torch.int16), "int32 or int64"),
        (torch.zeros(2, 2, dtype=torch.int64), "int32 or int64"),
        (torch.arange(8)[::2], "contiguous"),
        (torch.tensor([1, 8]), "0..7"),
        (torch.tensor([-1, 3], dtype=torch.int32), "0..7"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), "meta"),
    ],
)
def test_bad_slots_are_refused(pool, slots, message):
    """Wrong dtype, shape, layout, bounds or device is an error that moves nothing, either way."""
    before = bytes_of(pool)
    chunk = HostChunk.new(pool, len(slots))
    chunk.storage.fill_(SENTINEL)
    with pytest.raises(SwapError, match=message):
        swap_out(pool, slots, chunk)
    with pytest.raises(SwapError, match=message):
        swap_in(chunk, pool, slots)
    assert chunk.storage.eq(SENTINEL).all()
    assert all(torch.equal(a, b) for a, b in zip(before, bytes_of(pool), strict=True))


def test_a_chunk_must_fit_the_slots_and_the_pool(pool):
    """Another number of tokens, or records of another pool, are refused."""
    with pytest.raises(SwapError, match="3 tokens"):
        swap_in(HostChunk.new(pool, 3), pool, torch.arange(2))
    other = make_pool(ROWS["mla"], torch.float32, torch.device("cpu"), num_slots=8)
    with pytest.raises(SwapError, match="bytes"):
        swap_in(HostChunk.new(other, 2), pool, torch.arange(2))


@pytest.mark.parametrize(
    ("storage", "records", "message"),
    [
        (torch.zeros(4, 32), torch.arange(2), "uint8"),
        (torch.zeros(4, 64, dtype=torch.uint8)[:, ::2], torch.arange(2), "not contiguous"),
        (torch.zeros(33, dtype=torch.uint8)[1:].view(1, 32), torch.arange(1), "aligned"),
        (torch.zeros(4, 32, dtype=torch.uint8), torch.arange(2).int(), "int64"),
        (torch.zeros(4, 32, dtype=torch.uint8), torch.tensor([4]), "0..3"),
    ],
)
def test_bad_chunks_cannot_be_built(storage, records, message):
    """A chunk whose records are not where it says is never made."""
    with pytest.raises(SwapError, match=message):
        HostChunk(storage, records)


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ((), "at least one"),
        ((torch.zeros(8),), "num_slots"),
        ((torch.zeros(8, 2), torch.zeros(9, 2)), "9 slots"),
        ((torch.zeros(8, 2), torch.zeros(8, 2, device="meta")), "meta"),
        ((torch.zeros(8, 4, 2).transpose(1, 2),), "not contiguous"),
    ],
)
def test_bad_pools_cannot_be_built(buffers, message):
    """Buffers that are not rows of the same slots on one device are no pool."""
    with pytest.raises(SwapError, match=message):
        KVPool(buffers)


@pytest.mark.gpu
def test_a_gpu_needs_pinned_memory():
    """Pageable host memory is refused where a GPU would have to reach it."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pool = make_pool(ROWS["mha"], torch.float32, torch.device("cuda", 0), num_slots=8)
    storage = torch.zeros(2, pool.record_bytes, dtype=torch.uint8)
    slots = torch.arange(2, device="cuda")
    with pytest.raises(SwapError, match="pinned"):
        swap_out(pool, slots, HostChunk(storage, torch.arange(2)))
