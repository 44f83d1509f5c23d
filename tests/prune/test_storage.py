"""Packed pruned tensors: the same bits back, and exactly the bytes of the formulas."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradpress import prune

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def same_bits(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    got, want = (x.contiguous().flatten().view(torch.uint8) for x in (got, want))
    assert torch.equal(got, want)


@given(
    shape=st.sampled_from([(0,), (1,), (3, 5), (2, 0), (7, 9, 2), (4, 64), (33, 31)]),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_bitmask(shape, dtype, sparsity, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g).to(dtype)
    weight[torch.rand(shape, generator=g) < sparsity] = 0
    packed = prune.pack_sparse(weight)
    same_bits(prune.unpack_sparse(packed), weight)
    kept, numel = int((weight != 0).sum()), weight.numel()
    assert packed.nbytes == kept * dtype.itemsize + math.ceil(numel / 8)
    assert packed.nbytes == prune.packed_bytes(numel, kept, dtype.itemsize)


@given(
    rows=st.integers(0, 9),
    groups=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    fewer=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_two_of_four(rows, groups, dtype, fewer, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 4 * groups, generator=g).to(dtype)
    weight[~prune.select(weight, pattern="2:4")] = 0
    if fewer:
        weight[torch.rand(weight.shape, generator=g) < 0.5] = 0
    packed = prune.pack_sparse(weight, "2:4")
    same_bits(prune.unpack_sparse(packed), weight)
    numel = weight.numel()
    assert packed.nbytes == numel // 2 * dtype.itemsize + math.ceil(numel / 8)
    assert packed.nbytes == prune.packed_bytes(numel, 0, dtype.itemsize, "2:4")


def test_half_of_the_weights_take_nine_bits():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for pattern, format in (("unstructured", "bitmask"), ("4:8", "bitmask"), ("2:4", "2:4")):
        pruned = weight * prune.select(weight, sparsity=0.5, pattern=pattern)
        pruned[pruned == 0] = 0  # no negative zeros
        assert 8 * prune.pack_sparse(pruned, format).nbytes == 9 * weight.numel()


def test_layout():
    weight = torch.tensor([[0.0, 1, 2, 0, 3, 0, 0, 4]])
    packed = prune.pack_sparse(weight)
    assert packed.values.tolist() == [1, 2, 3, 4]
    assert packed.places.tolist() == [0b1001_0110]
    packed = prune.pack_sparse(weight, "2:4")
    assert packed.values.tolist() == [1, 2, 3, 4]
    assert packed.places.tolist() == [0b11_00_10_01]
    single = prune.pack_sparse(torch.tensor([5.0, 0, 0, 0, 0, 0, 0, 6]), "2:4")
    assert single.values.tolist() == [5, 0, 0, 6]
    assert single.places.tolist() == [0b11_00_01_00]


def test_every_bit_comes_back():
    odd = [-0.0, 0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-40, 1.0]
    for dtype in DTYPES:
        weight = torch.tensor(odd).to(dtype)
        same_bits(prune.unpack_sparse(prune.pack_sparse(weight)), weight)
    assert prune.pack_sparse(torch.tensor(odd)).values.numel() == 7
    array = np.array([[0, 1.5, 0, -2.0]], dtype=np.float16)
    for format in ("bitmask", "2:4"):
        packed = prune.pack_sparse(array, format)
        back = prune.unpack_sparse(packed)
        assert isinstance(packed.values, np.ndarray)
        assert isinstance(packed.places, np.ndarray)
        assert isinstance(back, np.ndarray)
        assert back.dtype == array.dtype
        assert back.tobytes() == array.tobytes()
    strided = torch.eye(6)[:, ::2]
    same_bits(prune.unpack_sparse(prune.pack_sparse(strided)), strided.contiguous())


def test_errors():
    with pytest.raises(ValueError, match='pack_sparse: format must be "bitmask" or "2:4"'):
        prune.pack_sparse(torch.ones(4), "csr")
    with pytest.raises(ValueError, match="last dimension that 4 divides, got shape"):
        prune.pack_sparse(torch.zeros(2, 6), "2:4")
    with pytest.raises(
        ValueError, match="at most 2 of 4 elements that are not zero, got 3 in group 1"
    ):
        prune.pack_sparse(torch.tensor([0.0, 0, 1, 1, 1, 0, 1, 1]), "2:4")
    with pytest.raises(TypeError, match="weight must have dtype float32, float16 or bfloat16"):
        prune.pack_sparse(torch.ones(4, dtype=torch.int8))
    packed = prune.pack_sparse(torch.tensor([0.0, 1, 2, 0]))
    with pytest.raises(ValueError, match="unpack_sparse: values must hold 2 elements, got 1"):
        prune.unpack_sparse(replace(packed, values=packed.values[:1]))
    with pytest.raises(ValueError, match="unpack_sparse: places must have 2 bytes"):
        prune.unpack_sparse(replace(packed, shape=(9,)))
    with pytest.raises(ValueError, match="unpack_sparse: format must be"):
        prune.unpack_sparse(replace(packed, format="2:8"))
