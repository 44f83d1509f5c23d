"""The ops of the family prune on CUDA: masks, scores and the column kernel, every bit."""

import pytest
import torch

from gradpress.ops import prune

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2, 300), (1, 1), (3, 31), (0, 8), (3, 0)]


def matrices(rows, columns, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g).to(dtype)
    return weight, torch.rand(columns, generator=g), torch.rand(rows, columns, generator=g)


def scored(rows, columns, dtype):
    """Every kind of score, of values with and without ties, and with what is not a number."""
    weight, scale, grad = matrices(rows, columns, dtype)
    yield (weight,), {}
    yield (weight,), {"given": True}
    if not weight.numel():
        return  # nothing is launched
    yield (weight, scale), {}
    yield (weight, scale, grad), {"alpha": 1.7}
    yield (weight, None, grad), {"alpha": 0.3}
    yield (weight, scale, grad), {"half": True}
    yield (weight, None, grad), {"half": True}
    yield (weight.round(),), {"given": True}
    odd = weight.clone()
    odd[:, ::5], odd[:, 1::7], odd[:, 2::9] = float("nan"), float("inf"), -0.0
    yield (odd,), {"given": True}
    yield (odd, scale), {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_weights(parity, dtype):
    for rows, columns in SHAPES:
        for args, options in scored(rows, columns, dtype):
            if "given" not in options and not args[0].isnan().any():
                parity(prune.score_weights, *args, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_rows(parity, dtype):
    for rows, columns in SHAPES:
        for args, options in scored(rows, columns, dtype):
            parity(prune.select_rows, *args, **options, drop=columns // 3)
    weight, scale, _ = matrices(2, 2049, dtype)
    for drop in (0, 1, 2048, 2049):
        parity(prune.select_rows, weight, scale, drop=drop)
    parity(prune.select_rows, torch.ones(3, 700, dtype=dtype), drop=333)


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_matrix(parity, dtype):
    for rows, columns in SHAPES[1:]:
        for args, options in scored(rows, columns, dtype):
            parity(prune.select_matrix, *args, **options, drop=rows * columns // 2)
    weight, scale, _ = matrices(2, 301, dtype)
    for drop in (0, 1, 601, 602):
        for through in (False, True):
            parity(prune.select_matrix, weight, scale, drop=drop, through=through)
    for through in (False, True):
        ones = torch.ones(3, 300, dtype=dtype)
        parity(prune.select_matrix, ones, drop=433, through=through)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "drop"), [(4, 2), (8, 4), (1, 0), (7, 3), (16, 16), (100, 41)])
def test_select_groups(parity, size, drop, dtype):
    for rows, groups in [(3, 5), (1, 1), (0, 4)]:
        for args, options in scored(rows, groups * size, dtype):
            parity(prune.select_groups, *args, **options, size=size, drop=drop)


@pytest.mark.parametrize("width", [1, 2, 32, 40, 128, 144, 256, 0])
def test_prune_columns(parity, width):
    g = torch.Generator().manual_seed(width)
    for rows in (1, 9):
        weight = torch.randn(rows, width, generator=g)
        factor = torch.randn(width, width, generator=g).triu(1) * 0.1
        factor += torch.rand(width, generator=g).add(0.5).diag()
        mask = torch.rand(rows, width, generator=g) < 0.5
        parity(prune.prune_columns, weight, factor, mask)
        for size, drop in [(2, 1), (4, 2), (8, 3), (36, 20)]:
            if width % size == 0:
                unset = torch.zeros(rows, width, dtype=torch.bool)
                parity(prune.prune_columns, weight, factor, unset, group=(size, drop))
