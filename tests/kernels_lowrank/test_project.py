"""Products of gradients with bases: against float64, against the CPU, and bit for bit."""

import pytest
import torch
from tests.kernels_lowrank.launcher import Basis, Schedule, product, project

from gradpress.ops import lowrank, quant

ORDERS = ["forward", "reverse", "random"]
#: Rows, columns, rank: both sides, sizes that divide nothing, one, rank one, rank of the gradient.
SHAPES = [(150, 70, 66), (70, 150, 66), (1, 1, 1), (5, 300, 1), (300, 5, 5), (64, 128, 64)]


def make(rows, columns, rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * columns)
    short = min(rows, columns)
    grad = torch.randn(rows, columns, generator=generator).to(dtype)
    return grad, torch.randn(short, rank, generator=generator) / short**0.5


def exact(grad, basis):
    """The product and that of the magnitudes, in float64."""
    wide, narrow = grad.double(), basis.double()
    if grad.shape[0] >= grad.shape[1]:
        return wide @ narrow, wide.abs() @ narrow.abs()
    return narrow.T @ wide, narrow.T.abs() @ wide.abs()


def rounding(terms):
    """Of a float32 sum, relative to the sum of magnitudes (Higham 2002, equation 3.5)."""
    return (terms + 2) * 2.0**-24


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_project(dtype, order):
    for rows, columns, rank in SHAPES:
        grad, basis = make(rows, columns, rank, dtype)
        expected, magnitudes = exact(grad, basis)
        bound = rounding(basis.shape[0]) * magnitudes
        on_cpu = torch.empty(lowrank.projected_shape(rows, columns, rank))
        lowrank.project([grad], [basis], [on_cpu])
        for runs_of_k in (1, 3):
            out = project(Schedule(order), grad, Basis(basis), rank, runs_of_k=runs_of_k)
            assert ((out - expected).abs() <= bound).all()
            assert ((out - on_cpu).abs() <= 2 * bound).all()


#: What one element may lose on tensor cores, relative, and absolute below the smallest normal
#: number: a sum of two halves has two halves' digits; f16 halves are lifted by 256, and 2^-24 is
#: their smallest number. Of float32 gradients the product of the two small halves is left out.
LOSSES = {
    (torch.bfloat16, 2): (2.0**-17, 0.0),
    (torch.bfloat16, 1): (2.0**-8, 0.0),
    (torch.float16, 2): (2.0**-22, 2.0**-32),
    (torch.float32, 2): (3 * 2.0**-17, 0.0),
}


@pytest.mark.parametrize(("dtype", "parts"), LOSSES)
def test_project_on_tensor_cores(dtype, parts):
    relative, absolute = LOSSES[dtype, parts]
    for order, (rows, columns, rank) in zip(ORDERS * 2, SHAPES, strict=True):
        grad, basis = make(rows, columns, rank, dtype)
        expected, magnitudes = exact(grad, basis)
        bound = (rounding(basis.shape[0]) + relative) * magnitudes
        bound += absolute * exact(grad, torch.ones_like(basis))[1]
        for runs_of_k in (1, 2):
            options = {"tensor": 1, "parts": parts, "runs_of_k": runs_of_k}
            out = project(Schedule(order), grad, Basis(basis), rank, **options)
            assert ((out - expected).abs() <= bound).all()


def quantized(basis, bits, group_size, symmetric):
    q = quant.quantize_blockwise(
        basis, bits=bits, group_size=group_size, symmetric=symmetric, rounding="nearest"
    )
    values = quant.dequantize_blockwise(
        q.codes, q.scale, q.zero_point, shape=tuple(basis.shape), bits=bits, group_size=group_size
    )
    return Basis(q.codes, q.scale, q.zero_point, bits, group_size), values


@pytest.mark.parametrize(("bits", "tensor"), [(4, 0), (8, 1)])
def test_codes_are_the_numbers_that_they_stand_for(bits, tensor):
    dtype = torch.bfloat16 if tensor else torch.float32
    cases = zip([256, 7, 64, 6, 1000], [False, False, True, True, False], ORDERS * 2, strict=False)
    for group_size, symmetric, order in cases:
        for rows, columns, rank in [(150, 70, 64), (40, 90, 13), (1, 1, 1)]:
            grad, basis = make(rows, columns, rank, dtype)
            codes, values = quantized(basis, bits, group_size, symmetric)
            run = Schedule(order)
            out = project(run, grad, codes, rank, tensor=tensor)
            assert torch.equal(out, project(run, grad, Basis(values), rank, tensor=tensor))


def test_neither_order_nor_alignment_changes_a_bit():
    grad, basis = make(140, 72, 40, torch.bfloat16)
    shifted = torch.empty(grad.numel() + 1, dtype=grad.dtype)[1:].view(grad.shape).copy_(grad)
    for tensor in (0, 1):
        outs = [
            project(Schedule(order, seed), x, Basis(basis), 40, tensor=tensor, runs_of_k=2)
            for order, seed, x in [
                ("forward", 0, grad), ("reverse", 0, grad), ("random", 1, grad),
                ("random", 2, shifted),
            ]
        ]  # fmt: skip
        assert all(torch.equal(outs[0], out) for out in outs)


@pytest.mark.parametrize("tensor", [0, 1])
def test_what_is_not_finite_stays_in_its_row(tensor):
    grad, basis = make(150, 40, 8)
    clean = project(Schedule(), grad, Basis(basis), 8, tensor=tensor)
    grad[3, 5], grad[77, 0], grad[149, 39] = float("nan"), float("inf"), -float("inf")
    out = project(Schedule("random"), grad, Basis(basis), 8, tensor=tensor)
    hit = torch.zeros(150, dtype=torch.bool)
    hit[[3, 77, 149]] = True
    assert not out[hit].isfinite().any()
    assert torch.equal(out[~hit], clean[~hit])


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_any_scale(scale):
    grad, basis = make(90, 40, 8)
    grad = grad * scale
    for tensor, loss in ((0, 0.0), (1, 3 * 2.0**-17)):
        expected, magnitudes = exact(grad, basis)
        out = project(Schedule(), grad, Basis(basis), 8, tensor=tensor)
        assert ((out - expected).abs() <= (rounding(40) + loss) * magnitudes).all()


def test_a_stage_that_does_not_run_leaves_everything():
    grad, basis = make(150, 70, 66)
    out = torch.full((150, 66), 7.0)
    flags = torch.tensor([2, 0, 0, 0, 0, 0, 0, 0], dtype=torch.int32)
    run = Schedule()
    product(run, grad, Basis(basis), 66, out=out, runs_of_k=2, active=flags, stages=2 | 4)
    assert run.launches == ["project", "project_reduce"]
    assert (out == 7).all()
    product(run, grad, Basis(basis), 66, out=out, active=flags, stages=2)
    assert torch.equal(out, project(run, grad, Basis(basis), 66))
