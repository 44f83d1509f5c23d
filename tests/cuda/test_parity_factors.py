"""Gradients that are products, on CUDA: what the CPU finds, and float64."""

import math

import pytest
import torch
from tests.cuda.test_parity_lowrank import DTYPES, HALVES, exact, orthogonality, packed, rounding

from gradpress import _core
from gradpress.ops import lowrank

#: Tokens, rows, columns, rank.
SHAPES = [
    (40, 90, 70, 20), (25, 70, 150, 66), (1, 1, 1, 1), (600, 33, 20, 4), (3, 5, 300, 5),
    (1100, 40, 64, 3),
]  # fmt: skip


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(dtype, shapes, scale=1.0):
    grad_outputs = [(randn(t, m, seed=i) * scale).to(dtype) for i, (t, m, *_) in enumerate(shapes)]
    inputs = [(randn(t, n, seed=50 + i)).to(dtype) for i, (t, _, n, _) in enumerate(shapes)]
    bases = [randn(min(m, n), r, seed=90 + i) / 7 for i, (_, m, n, r) in enumerate(shapes)]
    outs = [torch.full(lowrank.projected_shape(m, n, r), math.nan) for _, m, n, r in shapes]
    return grad_outputs, inputs, bases, outs


def check(dtype, shapes, factors, bases, results):
    for (t, m, n, _), dy, x, basis, out in zip(shapes, *factors, bases, results, strict=True):
        grad = dy.double().T @ x.double()
        expected, _ = exact(grad, basis)
        magnitudes = exact(dy.double().abs().T @ x.double().abs(), basis.abs())[0]
        # Two products, one after the other; halves on tensor cores in both.
        bound = (rounding(t) + rounding(min(m, n)) + 2 * HALVES[dtype]) * magnitudes
        bound += 2.0**-30 * (dtype == torch.float16) * magnitudes.max()
        assert ((out.double() - expected).abs() <= 1.01 * bound + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_project_factors(parity, dtype):
    dys, xs, bases, outs = make(dtype, SHAPES, scale=300.0)
    want, runs = parity.runs(lowrank.project_factors, dys, xs, bases, outs)
    for got in (want, *(got for _, got in runs)):
        check(dtype, SHAPES, (dys, xs), bases, got[4])


@pytest.mark.parametrize("bits", [8, 4])
def test_project_factors_into_packed_bases(parity, bits):
    dys, xs, bases, outs = make(torch.bfloat16, SHAPES)
    codes, numbers = packed(bases, bits, 64)
    want, runs = parity.runs(lowrank.project_factors, dys, xs, codes, outs)
    for got in (want, *(got for _, got in runs)):
        check(torch.bfloat16, SHAPES, (dys, xs), numbers, got[4])


def decaying(tokens, m, n, dtype=torch.float32, scale=1.0):
    """Factors of a gradient whose singular values are apart."""
    count = min(tokens, m, n)
    u, v, q = (
        torch.linalg.qr(randn(size, count, seed=seed).double())[0]
        for seed, size in enumerate((m, n, tokens))
    )
    roots = torch.arange(1, count + 1, dtype=torch.float64) ** -0.35
    dy, x = (q * roots) @ u.T * scale, (q * roots) @ v.T
    return dy.to(dtype).contiguous(), x.to(dtype).contiguous()


REFRESH = {
    "tall": (decaying(200, 150, 90), 12),
    "wide": (decaying(120, 90, 150), 12),
    "few tokens": (decaying(30, 60, 70), 8),
    "bf16": (decaying(100, 90, 70, torch.bfloat16), 20),
    "f16": (decaying(100, 70, 90, torch.float16), 20),
    "tiny": (decaying(90, 120, 80, scale=1e-25), 8),
    "one": ((torch.tensor([[-3.0]]), torch.tensor([[2.0]])), 1),
    "fewer directions than the rank": (decaying(5, 40, 30), 9),
}


@pytest.mark.parametrize("name", REFRESH)
def test_refresh_basis_factors(parity, name):
    (dy, x), rank = REFRESH[name]
    grad = dy.double().T @ x.double()
    upright = grad if grad.shape[0] >= grad.shape[1] else grad.T
    short = upright.shape[1]
    basis, vector = torch.randn(short, rank), torch.randn(short)
    best = torch.linalg.svdvals(grad)[:rank].square().sum()
    for warm in (False, True):
        options = {"warm": [warm], "seed": 7, "tensor_ids": [3], "steps": [5]}
        want, runs = parity.runs(
            lowrank.refresh_basis_factors, [dy], [x], [basis], [vector], **options
        )
        for run in (want, *(got for _, got in runs)):
            (outcome,), got, first = run[0], run[3][0], run[4][0]
            assert outcome.status == lowrank.REFRESHED
            assert orthogonality(got) <= 1e-6
            assert torch.equal(first, got[:, 0])
            captured = (upright @ got.double()).square().sum()
            assert captured > 0.9 * best
            # Four random vectors on both sides.
            share = float(captured / grad.square().sum())
            assert abs(outcome.energy - share) < 0.25
            assert outcome.energy == pytest.approx(want[0][0].energy, rel=1e-2)
            assert outcome.cosine == pytest.approx(want[0][0].cosine, abs=1e-4, nan_ok=True)
            if "fewer" not in name:
                atol = 1e-3 if x.dtype == torch.bfloat16 else 1e-4
                torch.testing.assert_close(got, want[3][0], rtol=0, atol=atol)
        basis, vector = want[3][0], want[4][0]


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("warm", [False, True])
def test_refresh_basis_factors_without_a_subspace(parity, value, warm):
    dy, x = randn(30, 60, seed=0), randn(30, 40, seed=1)
    dy = dy * 0 if value == 0.0 else dy.index_fill(0, torch.tensor([3]), value)
    before = torch.linalg.qr(randn(40, 4, seed=2))[0].contiguous()
    options = {"warm": [warm], "seed": 7, "tensor_ids": [3], "steps": [5]}
    want, runs = parity.runs(
        lowrank.refresh_basis_factors, [dy], [x], [before], [torch.ones(40)], **options
    )
    for run in (want, *(got for _, got in runs)):
        status = lowrank.ZERO_GRADIENT if value == 0.0 else lowrank.KEPT
        assert run[0][0].status == status
        assert torch.equal(run[3][0], before if warm else torch.eye(40, 4))


def test_workspaces_are_checked(parity):
    if parity.device == "cpu":
        return
    assert _core.project_factors_workspace([(1100, 40, 64, 3)], False) > 0
    assert _core.refresh_basis_factors_workspace([(1100, 40, 64, 3)]) > 0
    # What cannot exist takes none; the op says what is wrong.
    assert _core.project_factors_workspace([(1, 1, 1, 2)], False) == 0
    assert _core.refresh_basis_factors_workspace([(1 << 62, 4, 4, 2)]) == 0
