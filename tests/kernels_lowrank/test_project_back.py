"""Back-projection into weights: the update against float64, what becomes of weights bit for bit."""

import pytest
import torch
from tests.kernels_lowrank.launcher import BFLOAT16, QUANTIZE, Back, Basis, Schedule, key
from tests.kernels_lowrank.test_project import ORDERS, quantized, rounding

from gradpress.ops import lowrank, quant

#: Rows, columns, rank. Tiles have 32 x 256 elements.
SHAPES = [(70, 300, 5), (300, 70, 17), (40, 512, 32), (1, 1, 1), (33, 96, 33)]
KEEP, ALPHA = 1 - 0.01, 0.25


def make(rows, columns, rank, tensor=0, scale=1.0):
    generator = torch.Generator().manual_seed(rows * columns + rank)
    short = min(rows, columns)
    update = torch.randn(lowrank.projected_shape(rows, columns, rank), generator=generator)
    basis = torch.randn(short, rank, generator=generator) / short**0.5
    back = Back(rows, columns, rank, 0.1 * scale * update, Basis(basis), tensor)
    return back, torch.randn(rows, columns, generator=generator) * scale


def factors(back):
    update, basis = back.update.double(), back.basis.values.double()
    return (update, basis.T) if back.rows >= back.columns else (basis, update)


def weight(w, bits, group_size, symmetric):
    q = quant.quantize_blockwise(
        w, bits=bits, group_size=group_size, symmetric=symmetric, rounding="nearest"
    )
    return [q.codes, q.scale, q.zero_point]


def on_cpu(parts, shape, updates, bases, bits, group_size, stochastic):
    codes, scale, zero_point = (None if t is None else t.clone() for t in parts)
    lowrank.project_back_requantize(
        [codes], [scale], [] if zero_point is None else [zero_point], [shape], updates, bases,
        bits=bits, group_size=group_size, scale=ALPHA, decay=0.01, stochastic=stochastic, seed=5,
        tensor_ids=[3], steps=[9],
    )  # fmt: skip
    return [codes, scale, zero_point]


def on_device(run, back, parts, bits, group_size, stochastic, **options):
    parts = [None if t is None else t.clone() for t in parts]
    where = key(5, QUANTIZE, 3, 9)
    back.requantize(run, *parts, bits, group_size, KEEP, ALPHA, stochastic, where, **options)
    return parts


def same(a, b):
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tensor", [0, 1])
def test_update(tensor, order):
    for shape, scale in zip(SHAPES, [1.0, 1e-30, 1e25, 1.0, 1.0], strict=True):
        back, _ = make(*shape, tensor, scale)
        left, right = factors(back)
        # Three products of halves leave out less than 2^-16 of an element.
        bound = (rounding(back.rank) + tensor * 3 * 2.0**-17) * (left.abs() @ right.abs())
        assert ((back.dense(Schedule(order)) - left @ right).abs() <= bound).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_requantized_as_on_the_cpu(bits, order):
    """Given the same updates, every bit: in one pass, and in two (7, 300, 1000)."""
    for number, shape in enumerate(SHAPES):
        back, w = make(*shape)
        update = back.dense(Schedule())
        for group_size in (7, 32, 256, 300, 1000):
            for symmetric, stochastic in ((False, True), (True, number % 2 == 0)):
                size = min(group_size, w.numel())
                before = weight(w, bits, size, symmetric)
                expected = on_cpu(before, w.shape, [update], [], bits, size, stochastic)
                run = Schedule(order)
                got = on_device(run, back, before, bits, size, stochastic)
                assert same(got, expected), (shape, size, symmetric, stochastic)


def test_requantized_from_factors_as_on_the_cpu():
    """Updates that differ in their last bits move a code by a step where it is at the brink."""
    for tensor, share in ((0, 0.999), (1, 0.99)):
        for shape in [(40, 512, 32), (300, 256, 17)]:
            back, w = make(*shape, tensor)
            before = weight(w, 8, 256, False)
            factored = [[back.update], [back.basis.values]]
            expected = on_cpu(before, w.shape, *factored, 8, 256, True)
            got = on_device(Schedule("random"), back, before, 8, 256, True)
            steps = (got[0].int() - expected[0].int()).abs()
            assert steps.max() <= 1
            assert (steps == 0).float().mean() >= share


def test_groups_in_which_nothing_changes_keep_their_bits():
    for bits, group_size in ((8, 64), (4, 7), (4, 32)):
        back, w = make(300, 64, 4)
        back.update[1:] = 0
        before = weight(w, bits, group_size, False)
        # Grids that nothing would be rounded onto anew: only kept ones stay.
        before[1] *= 1.5
        after = [t.clone() for t in before]
        where = key(5, QUANTIZE, 3, 9)
        back.requantize(Schedule("random"), *after, bits, group_size, 1.0, 1.0, True, where)
        groups = -(-64 // group_size)
        assert torch.equal(after[1][groups:], before[1][groups:])
        assert torch.equal(after[2][groups:], before[2][groups:])
        codes = (groups * group_size + 1) * bits // 8 + 1
        flat, old = after[0].view(-1), before[0].view(-1)
        assert torch.equal(flat[codes:], old[codes:])
        assert not torch.equal(after[1][:groups], before[1][:groups])


def test_updates_that_are_not_finite_count_as_zero():
    back, w = make(100, 64, 4)
    back.update[7, 1], back.update[50, 0] = float("nan"), float("inf")
    update = back.dense(Schedule())
    for group_size in (32, 7):
        before = weight(w, 8, group_size, False)
        expected = on_cpu(before, w.shape, [update], [], 8, group_size, True)
        got = on_device(Schedule("reverse"), back, before, 8, group_size, True)
        assert same(got, expected)
        assert torch.equal(got[0][7, 32:33], before[0][7, 32:33])


def test_codes_of_the_basis_are_the_numbers_that_they_stand_for():
    cases = [((70, 300, 5), 4, 7), ((300, 70, 17), 4, 256), ((40, 512, 32), 8, 64)]
    for (shape, bits, group_size), tensor in zip(cases, (0, 0, 1), strict=True):
        back, _ = make(*shape, tensor)
        codes, values = quantized(back.basis.values, bits, group_size, False)
        back.basis = Basis(values)
        expected = back.dense(Schedule())
        back.basis = codes
        assert torch.equal(back.dense(Schedule("random")), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_added_to_parameters(dtype, order):
    for shape in SHAPES:
        back, w = make(*shape)
        param = w.to(dtype)
        update = back.dense(Schedule())
        keep, alpha = torch.tensor(KEEP), torch.tensor(ALPHA)
        exact = param.float() * keep + alpha * update
        where = key(5, BFLOAT16, 3, 9)
        got = param.clone()
        back.add(Schedule(order), got, KEEP, ALPHA, False, where)
        assert torch.equal(got, exact.to(dtype))
        if dtype != torch.bfloat16:
            continue
        expected = quant.round_bf16_stochastic(exact, seed=5, tensor_id=3, step=9)
        got = param.clone()
        back.add(Schedule(order), got, KEEP, ALPHA, True, where)
        assert torch.equal(got, expected)


def test_parameters_keep_what_an_update_would_spoil():
    back, w = make(100, 64, 4)
    back.update[7, 1] = float("nan")
    got = w.clone()
    back.add(Schedule("random"), got, 1.0, ALPHA, False, key(0, BFLOAT16, 0, 0))
    assert torch.equal(got[7], w[7])
    assert (got != w).any(dim=1).sum() == 99


def test_nothing_happens_after_an_overflow_elsewhere():
    back, w = make(70, 300, 5)
    found = torch.ones(1)
    got = w.clone()
    back.add(Schedule(), got, KEEP, ALPHA, False, key(0, BFLOAT16, 0, 0), found_inf=found)
    assert torch.equal(got, w)
    for group_size in (100, 300):
        before = weight(w, 4, group_size, True)
        after = on_device(Schedule(), back, before, 4, group_size, True, found_inf=found)
        assert same(after, before)
    found.zero_()
    assert not same(on_device(Schedule(), back, before, 4, 300, True, found_inf=found), before)
