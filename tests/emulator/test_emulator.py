"""Kernels that are right: their results, in every order of threads and blocks."""

import threading

import numpy as np
import pytest
import torch
from tests.emulator.build import EmulatedModule
from tests.emulator.conftest import FIXTURES

ORDERS = [
    {"order": "forward"},
    {"order": "reverse"},
    {"order": "random", "seed": 1},
    {"order": "random", "seed": 2, "shuffle_blocks": True},
]
FULL = 0xFFFFFFFF


@pytest.fixture(params=ORDERS, ids=lambda o: "-".join(map(str, o.values())))
def order(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_elementwise(basics, order, rng):
    x = torch.from_numpy(rng.standard_normal(1003).astype(np.float32))
    y = torch.empty_like(x)
    basics.launch("scale", 4, 256, [x, y, 1.7, x.numel()], **order)
    assert torch.equal(y, x * np.float32(1.7))


@pytest.mark.parametrize(("grid", "block"), [((3, 2, 4), (5, 3, 2)), ((2,), (33,)), (1, (1, 1, 7))])
def test_indices_in_three_dimensions(basics, order, grid, block):
    full = [np.pad(np.atleast_1d(d), (0, 3 - np.size(d)), constant_values=1) for d in (grid, block)]
    extents = [*full[0][::-1], *full[1][::-1]]
    expected = np.indices(extents)[[2, 1, 0, 5, 4, 3]].reshape(6, -1).T
    out = np.zeros(expected.shape, np.uint32)
    basics.launch("whoami", grid, block, [out], **order)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 31), (19, 33), (8, 257)])
def test_warp_reduction_of_odd_sizes(basics, order, rng, rows, columns):
    x = rng.integers(-50, 50, (rows, columns)).astype(np.float32)
    y = np.zeros(rows, np.float32)
    basics.launch("row_sum", (rows + 3) // 4, 128, [x, y, rows, columns], **order)
    np.testing.assert_array_equal(y, x.sum(1))


@pytest.mark.parametrize("threads", [1, 31, 77, 256, 1000, 1024])
def test_block_reduction_in_dynamic_shared_memory(basics, order, rng, threads):
    x = rng.integers(-50, 50, 10_007).astype(np.float32)
    y = np.zeros(1, np.float32)
    args = [x, y, x.size]
    basics.launch("block_sum", 3, threads, args, shared_bytes=4 * threads, **order)
    assert y[0] == x.sum()


@pytest.mark.parametrize(("m", "k", "n"), [(16, 16, 16), (40, 33, 50), (1, 100, 3)])
def test_tiled_product(basics, order, rng, m, k, n):
    a, b = rng.standard_normal((2, 50, 100)).astype(np.float32)
    a, b = a.ravel()[: m * k].reshape(m, k), b.ravel()[: k * n].reshape(k, n)
    c = np.zeros((m, n), np.float32)
    basics.launch("matmul", (-(-n // 16), -(-m // 16)), (16, 16), [a, b, c, m, k, n], **order)
    np.testing.assert_allclose(c, a.astype(np.float64) @ b, rtol=0, atol=1e-4)


def test_histogram(basics, order, rng):
    x = rng.integers(0, 256, 9_999).astype(np.uint8)
    counts = np.zeros(256, np.uint32)
    basics.launch("histogram", 5, 96, [x, counts, x.size], **order)
    np.testing.assert_array_equal(counts, np.bincount(x, minlength=256))


def test_atomics(basics, order):
    t = np.arange(100)
    i, u = np.zeros(4, np.int32), np.zeros(10, np.uint32)
    i[3] = u[2] = 1000
    u[4], u[7] = FULL, 5
    wide, f, d = np.zeros(2, np.uint64), np.zeros(2, np.float32), np.zeros(1)
    basics.launch("atomics", 1, t.size, [i, u, wide, f, d], **order)
    assert i.tolist() == [t.sum(), -t.sum(), 92, -7]
    # atomicInc counts 0 .. 9; atomicDec falls from 5 and starts again at 9.
    assert u.tolist() == [300, 99, 5, FULL, 0, np.bitwise_xor.reduce(t), 0, 5, 1, t.sum()]
    assert wide.tolist() == [100 << 33, 99 << 40]
    assert f.tolist() == [50, 7]
    assert d.tolist() == [25]


@pytest.mark.parametrize("width", [1, 2, 8, 16, 32])
@pytest.mark.parametrize("by", [0, 1, 3, 5, 9, 17, 31])
def test_shuffles(warps, by, width):
    x = np.arange(32, dtype=np.int32) * 3 - 40
    out = np.zeros((6, 32), np.int32)
    warps.launch("shuffles", 1, 32, [x, out, by, width])
    lane, group = np.arange(32), np.arange(32) // width * width
    direct = group + by % width
    up = np.where(lane - by >= group, lane - by, lane)
    down = np.where(lane + by < group + width, lane + by, lane)
    swap = np.where(lane ^ by < group + width, lane ^ by, lane)
    expected = [x[direct], x[up], x[down], x[swap], 3 * x[lane ^ 1], np.full(32, x[5])]
    np.testing.assert_array_equal(out, expected)


def test_votes(warps, order, rng):
    x = rng.integers(-9, 9, 32).astype(np.int32)
    out = np.zeros((5, 32), np.uint32)
    warps.launch("votes", 1, 32, [x, out], **order)
    bits = 1 << np.arange(32)
    same = np.fmod(x[:, None], 4) == np.fmod(x, 4)
    np.testing.assert_array_equal(out[0], bits[x & 1 == 1].sum())
    np.testing.assert_array_equal(out[1], 2)
    np.testing.assert_array_equal(out[2], 1)
    np.testing.assert_array_equal(out[3], (same * bits).sum(1))
    np.testing.assert_array_equal(out[4], x > 0)  # __activemask


def test_masks_that_are_not_full(warps, order):
    x = np.arange(32, dtype=np.int32)
    out = np.zeros(32, np.int32)
    warps.launch("halves", 1, 32, [x, out], **order)
    np.testing.assert_array_equal(out, np.repeat([2 * 120, 20 + 120], 16))


def test_reductions(warps, order, rng):
    x = rng.integers(-(2**31), 2**31, 32).astype(np.int32)
    u, out = x.view(np.uint32), np.zeros((8, 32), np.int32)
    warps.launch("reductions", 1, 32, [x, out], **order)
    unsigned = [u.min(), u.max(), *(f.reduce(u) for f in (np.bitwise_and, np.bitwise_or))]
    unsigned.append(np.bitwise_xor.reduce(u))
    expected = [x.sum(dtype=np.int32), x.min(), x.max(), *np.array(unsigned).view(np.int32)]
    np.testing.assert_array_equal(out, np.repeat(np.array(expected)[:, None], 32, 1))


@pytest.mark.parametrize("threads", [20, 64, 97])
def test_block_votes(warps, order, rng, threads):
    x = rng.integers(-5, 5, threads).astype(np.int32)
    out = np.zeros((4, threads), np.int32)
    warps.launch("block_votes", 1, threads, [x, out], **order)
    np.testing.assert_array_equal(out[:, 0], [(x > 0).sum(), 1, 1, 0])
    np.testing.assert_array_equal(out, np.repeat(out[:, :1], threads, 1))


def test_without_our_own_switch(rng):
    module = EmulatedModule(FIXTURES / "basics.cu", {"CUEMU_UCONTEXT": "1"})
    x = rng.integers(-50, 50, 1000).astype(np.float32)
    y = np.zeros(1, np.float32)
    module.launch("block_sum", 2, 50, [x, y, x.size], shared_bytes=200, order="random")
    assert y[0] == x.sum()


def test_launches_from_several_threads(basics, rng):
    x = rng.integers(-50, 50, (4, 5000)).astype(np.float32)
    y = np.zeros((4, 1), np.float32)

    def work(i):
        for _ in range(5):
            args = [x[i], y[i], x[i].size]
            basics.launch("block_sum", 4, 64, args, shared_bytes=256, order="random", seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(y[:, 0], 5 * x.sum(1))


def test_subnormals_whatever_torch_has_set(basics):
    x, y = np.full(1, 1e-40, np.float32), np.zeros(1, np.float32)
    torch.set_flush_denormal(True)
    try:
        basics.launch("scale", 1, 1, [x, y, 0.5, 1])
    finally:
        torch.set_flush_denormal(False)
    assert y.view(np.uint32)[0] == x.view(np.uint32)[0] // 2
