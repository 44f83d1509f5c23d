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


def test_select_matrix_of_many_blocks(parity):
    """Ties across the blocks of a grid, and ranks of every digit."""
    weight = matrices(3, 9001, torch.float32)[0]
    parity(prune.select_matrix, weight, drop=13_000)
    coarse = weight.mul(2).round()
    for drop in (1, 5000, 13_000, 27_002):
        parity(prune.select_matrix, coarse, drop=drop, given=True)
    parity(prune.select_matrix, coarse, drop=13_000, through=True)
    parity(prune.select_matrix, torch.ones(2, 9000, dtype=torch.bfloat16), drop=8192)


def ordered(scores):
    """The keys of float32 scores, as integers."""
    bits = scores.flatten().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFF_FFFF), bits) + 2**31


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_histogram(parity, dtype):
    for rows, columns in SHAPES:
        for i, (args, options) in enumerate(scored(rows, columns, dtype)):
            counts, state = torch.arange(2048), torch.tensor([0, 5, 7])
            if rows * columns:
                key = int(ordered(prune.score_weights(args[0]))[0])
                state[0] = key >> 21 << 21
            given = {"state": state, "counts": counts, "shift": prune.SHIFTS[i % 3]}
            parity(prune.score_histogram, *args, **options, **given)
    weight = matrices(3, 9001, dtype)[0]
    keys = ordered(weight.float())
    key = int(keys[17])
    for shift, bits in zip(prune.SHIFTS, (11, 11, 10), strict=True):
        counts = torch.zeros(2048, dtype=torch.int64)
        prefix = key >> (shift + bits) << (shift + bits)
        state = torch.tensor([prefix, 0, 0])
        given = {"state": state, "counts": counts, "shift": shift, "given": True}
        parity(prune.score_histogram, weight, **given)
        prune.score_histogram(weight, **given)
        mine = keys[keys >> (shift + bits) == key >> (shift + bits)] >> shift
        assert torch.equal(counts, torch.bincount(mine % 2**bits, minlength=2048))


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_below(parity, dtype):
    for rows, columns in SHAPES:
        for args, options in scored(rows, columns, dtype):
            state = torch.tensor([2**31 + 0x3F80_0000, 3, 9])
            parity(prune.select_below, *args, **options, state=state)
    # 18,000 ties in three blocks of a grid, of 20,000 in all.
    ones = torch.ones(2, 9000, dtype=dtype)
    ones[1, ::7], ones[0, ::5] = 2.0, 0.5
    count = int((ones == 1).sum())
    for dropped, equal in [
        *((0, 20_000), (1, 20_000), (8192, 20_000), (count, 20_000), (count + 5, 20_000)),
        *((20_000, 20_000), (count, count), (0, 0)),
    ]:
        state = torch.tensor([2**31 + 0x3F80_0000, dropped, equal])
        mask, _ = parity(prune.select_below, ones, state=state)
        ties = ones == 1
        want = (ones > 1) | (ties & (ties.flatten().cumsum(0).view(ties.shape) > dropped))
        assert torch.equal(mask, want)
        prune.select_below(ones, state=state)
        decided = dropped in (0, equal)
        left = [dropped, equal] if decided else [max(dropped - count, 0), equal - count]
        assert state.tolist()[1:] == left


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate_gradients(parity, dtype):
    for shape in [(2, 300), (1, 1), (3, 31), (0, 8), (3, 0), (5, 1001)]:
        total, part = torch.rand(shape), torch.randn(shape).to(dtype)
        parity(prune.accumulate_gradients, total, part)
        for scale in (100.0, -0.3):
            parity(prune.accumulate_gradients, total, part, True, scale)
        rows = slice(1, None)  # 31 columns: aligned to one element only
        parity(prune.accumulate_gradients, total[rows], part[rows])
    part[:, ::3], part[:, 1::5], part[:, 2::7] = float("nan"), float("-inf"), 6e4
    counter = torch.tensor([3])
    for squared, scale in [(False, 1.0), (True, 1e16)]:
        parity(prune.accumulate_gradients, total, part, squared, scale, nonfinite=counter)


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
