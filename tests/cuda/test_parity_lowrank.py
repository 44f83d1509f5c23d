"""The low-rank family on CUDA: products within rounding, weights bit for bit given the update."""

import math

import numpy as np
import pytest
import torch
from tests.cuda.devices import emulator

from gradpress import _core
from gradpress.ops import lowrank, quant

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Rows, columns, rank: both sides, sizes that divide nothing, one, rank one, rank of the gradient,
#: and sums that are cut into runs.
SHAPES = [
    (150, 70, 66), (70, 150, 66), (1, 1, 1), (5, 300, 1), (300, 5, 5), (64, 128, 64), (20, 20, 4),
    (40, 1200, 3), (1100, 1050, 2),
]  # fmt: skip
#: Relative to an element, what tensor cores leave out of a float32 that goes in as two halves; of
#: the product of two such sums the smallest of four terms is left out as well.
HALVES = {torch.float32: 0.0, torch.float16: 2.0**-22, torch.bfloat16: 2.0**-17}
TWO_HALVES = 3 * 2.0**-17


def make(rows, columns, rank, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(rows * columns + seed)
    short = min(rows, columns)
    grad = torch.randn(rows, columns, generator=generator).to(dtype)
    return grad, torch.randn(short, rank, generator=generator) / short**0.5


def exact(grad, basis):
    """The projection and that of the magnitudes, in float64."""
    wide, narrow = grad.double(), basis.double()
    if grad.shape[0] >= grad.shape[1]:
        return wide @ narrow, wide.abs() @ narrow.abs()
    return narrow.T @ wide, narrow.T.abs() @ wide.abs()


def back(update, basis, shape):
    """The update of a weight, and that of the magnitudes, in float64."""
    update, basis = update.double(), basis.double()
    if shape[0] >= shape[1]:
        return update @ basis.T, update.abs() @ basis.T.abs()
    return basis @ update, basis.abs() @ update.abs()


def rounding(terms):
    """Of a float32 sum, relative to the sum of magnitudes (Higham 2002, equation 3.5)."""
    return (terms + 2) * 2.0**-24


def packed(bases, bits, group_size, symmetric=False):
    """Bases as codes, and the numbers that these stand for."""
    layout = {"bits": bits, "group_size": group_size}
    parts = [
        quant.quantize_blockwise(b, **layout, symmetric=symmetric, rounding="nearest")
        for b in bases
    ]
    numbers = [
        quant.dequantize_blockwise(*part[:3], shape=tuple(b.shape), **layout)
        for part, b in zip(parts, bases, strict=True)
    ]
    codes, scales, zero_points = (
        [part[i] for part in parts if part[i] is not None] for i in range(3)
    )
    return lowrank.PackedBases(codes, scales, zero_points, bits, group_size), numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_project(parity, dtype):
    grads, bases = zip(*(make(*shape, dtype) for shape in SHAPES), strict=True)
    grads, bases = list(grads), list(bases)
    outs = [torch.full(lowrank.projected_shape(*shape), math.nan) for shape in SHAPES]
    want, runs = parity.runs(lowrank.project, grads, bases, outs)
    for i, (grad, basis) in enumerate(zip(grads, bases, strict=True)):
        expected, magnitudes = exact(grad, basis)
        bound = (rounding(basis.shape[0]) + HALVES[dtype]) * magnitudes
        bound += 2.0**-32 * (dtype == torch.float16) * exact(grad, torch.ones_like(basis))[1]
        for _, got in [("cpu", want), *runs]:
            assert ((got[3][i] - expected).abs() <= bound).all(), SHAPES[i]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_project_with_packed_bases(parity, bits, dtype):
    """The same bits as with the numbers that the codes stand for."""
    for group_size, symmetric in [(256, False), (7, False), (64, True), (1 << 40, True)]:
        shapes = [(140, 70, 66), (40, 90, 13), (1, 1, 1)]
        grads, bases = zip(*(make(*shape, dtype) for shape in shapes), strict=True)
        codes, numbers = packed(bases, bits, group_size, symmetric)
        outs = [torch.full(lowrank.projected_shape(*shape), math.nan) for shape in shapes]
        want, runs = parity.runs(lowrank.project, list(grads), codes, outs)
        plain, plain_runs = parity.runs(lowrank.project, list(grads), numbers, outs)
        pairs = zip([("cpu", want), *runs], [("cpu", plain), *plain_runs], strict=True)
        for (where, one), (_, other) in pairs:
            # Where two float32 matrices meet on a GPU, the vendor's library sums in its own order.
            rtol = 1e-5 if where == "cuda" and dtype == torch.float32 else 0
            for a, b in zip(one[3], other[3], strict=True):
                torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def test_project_keeps_what_is_not_finite_in_its_row(parity):
    grad, basis = make(150, 40, 8)
    grad[3, 5], grad[77, 0], grad[149, 39] = math.nan, math.inf, -math.inf
    hit = torch.zeros(150, dtype=torch.bool)
    hit[[3, 77, 149]] = True
    want, runs = parity.runs(lowrank.project, [grad], [basis], [torch.zeros(150, 8)])
    for _, got in [("cpu", want), *runs]:
        assert not got[3][0][hit].isfinite().any()
        assert got[3][0][~hit].isfinite().all()


BACK_SHAPES = [(70, 300, 5), (300, 70, 17), (40, 512, 32), (1, 1, 1), (33, 96, 33)]
WHERE = {"seed": 5, "tensor_ids": [3, 1, 0, 9, 2], "steps": [9, 9, 9, 1, 2]}


def updates_of(shapes, bits=32, size=64):
    """Weights, low-rank updates, bases as the ops take them, bases as numbers."""
    weights = [make(*shape, seed=1)[0] for shape in shapes]
    bases = [make(*shape)[1] for shape in shapes]
    updates = [0.1 * make(*lowrank.projected_shape(*shape), 1, seed=2)[0] for shape in shapes]
    return weights, updates, *((bases, bases) if bits == 32 else packed(bases, bits, size))


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_project_back_add(parity, dtype, bits):
    params, updates, bases, numbers = updates_of(BACK_SHAPES, bits)
    params = [p.to(dtype) for p in params]
    keep, alpha = 1 - 0.01, 0.25
    options = {"scale": alpha, "decay": 0.01}
    want, runs = parity.runs(lowrank.project_back_add, params, updates, bases, **options, **WHERE)
    digit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    loss = TWO_HALVES * (dtype != torch.float32)
    for i, shape in enumerate(BACK_SHAPES):
        update, magnitudes = back(updates[i], numbers[i], shape)
        expected = params[i].double() * keep + alpha * update
        bound = alpha * (rounding(shape[2]) + loss) * magnitudes
        bound = bound + (digit + 2.0**-23) * (expected.abs() + bound) + 2.0**-24
        for where, got in [("cpu", want), *runs]:
            assert ((got[1][i].double() - expected).abs() <= bound).all(), (where, shape)


def test_project_back_add_rounds_stochastically_as_the_cpu(parity):
    """The products' last bits move a bfloat16 only where the dither is at the brink."""
    params, updates, bases, _ = updates_of(BACK_SHAPES[:3])
    params = [p.bfloat16() for p in params]
    options = {"scale": 0.01, "stochastic_rounding": True}
    where = {name: value[:3] if name != "seed" else value for name, value in WHERE.items()}
    want, runs = parity.runs(lowrank.project_back_add, params, updates, bases, **options, **where)
    for _, got in runs:
        for one, other, before in zip(got[1], want[1], params, strict=True):
            assert (one == other).float().mean() > 0.99
            assert (one != before).any()


def test_project_back_add_keeps_what_an_update_would_spoil(parity):
    (param,), (update,), (basis,), _ = updates_of([(100, 64, 4)])
    update[7, 1] = math.nan
    where = {"seed": 0, "tensor_ids": [0], "steps": [1], "scale": 1.0}
    for flag, changed in ((0.0, 99), (1.0, 0)):
        given = {**where, "found_inf": torch.tensor(flag)}
        want, runs = parity.runs(lowrank.project_back_add, [param], [update], [basis], **given)
        for _, got in [("cpu", want), *runs]:
            assert torch.equal(got[1][0][7], param[7])
            assert (got[1][0] != param).any(dim=1).sum() == changed


def weights_of(weights, bits, size, symmetric):
    layout = {"bits": bits, "group_size": size, "symmetric": symmetric}
    parts = [quant.quantize_blockwise(w, **layout, rounding="nearest") for w in weights]
    return [[part[i] for part in parts if part[i] is not None] for i in range(3)]


@pytest.mark.parametrize("basis_bits", [32, 4])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [32, 256, 7, 300, 1000])
def test_project_back_requantize_from_factors(parity, size, bits, basis_bits):
    """In one pass (32, 256) and in two: a code moves by a step where it is at the brink."""
    weights, updates, bases, _ = updates_of(BACK_SHAPES, basis_bits)
    shapes = [tuple(w.shape) for w in weights]
    for symmetric in (False, True):
        lists = weights_of(weights, bits, size, symmetric)
        options = {"bits": bits, "group_size": size, "scale": 0.25, "decay": 0.01}
        arguments = [*lists, shapes, updates, bases]
        want, runs = parity.runs(lowrank.project_back_requantize, *arguments, **options, **WHERE)
        for where, got in runs:
            for i, shape in enumerate(shapes):
                one, other = unpacked(got[1][i], bits, shape), unpacked(want[1][i], bits, shape)
                steps = (one - other).abs()
                # Grids may differ by rounding too, and then move the zero point.
                assert (steps == 0).float().mean() >= 0.9, (where, shape)
                torch.testing.assert_close(got[2][i], want[2][i], rtol=1e-3, atol=1e-7)
        empty = {**options, **WHERE, "found_inf": torch.tensor(1.0)}
        parity(lowrank.project_back_requantize, *arguments, **empty)


def unpacked(codes, bits, shape):
    if bits == 4:
        codes = quant.unpack_int4(codes, math.prod(shape))
    return codes.view(shape).int()


def test_project_back_requantize_keeps_groups_in_which_nothing_changes(parity):
    for bits, size in ((8, 64), (4, 7), (4, 32)):
        (weight,), (update,), bases, _ = updates_of([(300, 64, 4)])
        update[1:] = 0
        codes, scale, zero_point = weights_of([weight], bits, size, False)
        scale[0] *= 1.5  # grids that nothing would be rounded onto anew: only kept ones stay
        options = {"bits": bits, "group_size": size, "scale": 1.0}
        where = {"seed": 5, "tensor_ids": [3], "steps": [9]}
        arguments = [codes, scale, zero_point, [(300, 64)], [update], bases]
        want, runs = parity.runs(lowrank.project_back_requantize, *arguments, **options, **where)
        groups = -(-64 // size)
        for _, got in [("cpu", want), *runs]:
            assert torch.equal(got[2][0][groups:], scale[0][groups:])
            assert torch.equal(got[3][0][groups:], zero_point[0][groups:])
            kept = (groups * size + 1) * bits // 8 + 1
            assert torch.equal(got[1][0].view(-1)[kept:], codes[0].view(-1)[kept:])
            assert not torch.equal(got[2][0][:groups], scale[0][:groups])


def decaying(m, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=g, dtype=torch.float64))
    s = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -0.7
    return ((u * s) @ v.T).float()


def low_rank(m, n, rank):
    g = torch.Generator().manual_seed(rank)
    return torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)


def orthogonality(q):
    q = q.double()
    return float((q.T @ q - torch.eye(q.shape[1])).abs().max())


def captured(x, basis):
    x = x.double() if x.shape[0] >= x.shape[1] else x.double().T
    return float((x @ basis.double()).square().sum() / x.square().sum())


REFRESH = {"seed": 7, "tensor_ids": [3], "steps": [5]}


def refreshed(parity, x, basis, vector, warm, **where):
    """Outcome, basis, vector: on the CPU, and of the device's runs."""
    options = {"warm": [warm], **REFRESH, **where}
    want, runs = parity.runs(lowrank.refresh_basis, [x], [basis], [vector], **options)
    return [(run[0][0], run[2][0], run[3][0]) for run in (want, *(got for _, got in runs))]


REFRESH_CASES = {
    "tall": (decaying(150, 90), 12),
    "wide": (decaying(90, 150), 12),
    "long": (decaying(700, 20), 4),
    "bf16": (decaying(90, 70).bfloat16(), 20),
    "f16": (decaying(70, 90).half(), 20),
    "tiny": (decaying(120, 80) * 1e-30, 8),
    "huge": (decaying(120, 80) * 1e25, 8),
    "full rank": (decaying(40, 30), 30),
    "one": (torch.tensor([[-3.0]]), 1),
    "a row": (decaying(1, 7), 1),
    "odd": (decaying(7, 3), 2),
}


@pytest.mark.parametrize("name", REFRESH_CASES)
def test_refresh_basis(parity, name):
    """Where singular values are apart, both find the same directions, by other arithmetic.

    Both start from the same random numbers. Float32 leaves 1e-6 of a column, over gaps of a
    fortieth; a bfloat16 gradient's products on tensor cores leave out 2^-17 of an element.
    """
    x, rank = REFRESH_CASES[name]
    short = min(x.shape)
    basis, vector = torch.randn(short, rank), torch.randn(short)  # memory of any content
    for warm in (False, True):
        (expected, cpu, leading), *runs = refreshed(parity, x, basis, vector, warm)
        assert runs
        for outcome, got, first in runs:
            assert outcome.status == expected.status == lowrank.REFRESHED
            atol = 1e-3 if x.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(got, cpu, rtol=0, atol=atol)
            assert torch.equal(first, got[:, 0])
            assert outcome.cosine == pytest.approx(expected.cosine, abs=1e-5, nan_ok=True)
            assert outcome.energy == pytest.approx(expected.energy, rel=1e-3)
            assert orthogonality(got) <= 1e-6
            largest = got.gather(0, got.abs().argmax(dim=0, keepdim=True))
            assert (largest > 0).all()
        basis, vector = cpu, leading


def test_refresh_basis_of_several_gradients(parity):
    """One workspace serves all of them, whatever their order."""
    shapes = [(90, 70), (20, 30), (150, 40)]
    grads = [decaying(*shape) for shape in shapes]
    bases = [torch.empty(min(shape), 6) for shape in shapes]
    vectors = [torch.empty(min(shape)) for shape in shapes]
    options = {"warm": [False] * 3, "seed": 7, "tensor_ids": [1, 2, 3], "steps": [5, 5, 5]}
    want, runs = parity.runs(lowrank.refresh_basis, grads, bases, vectors, **options)
    for _, got in runs:
        assert [outcome.status for outcome in got[0]] == [lowrank.REFRESHED] * 3
        for one, other in zip(got[2], want[2], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_refresh_basis_keeps_up_with_a_gradient_that_drifts(parity):
    """Random columns let new directions in: nearly the best of each step is captured."""
    rank, x = 12, decaying(90, 70)
    basis, vector = torch.empty(70, rank), torch.empty(70)
    for step in range(3):
        runs = refreshed(parity, x, basis, vector, step > 0, steps=[step])
        best = np.linalg.svd(x.double().numpy(), compute_uv=False) ** 2
        for outcome, got, _ in runs:
            assert outcome.status == lowrank.REFRESHED
            assert captured(x, got) >= 0.95 * best[:rank].sum() / best.sum()
        _, basis, vector = runs[0]
        x = 0.7 * x + 0.3 * decaying(90, 70, seed=9 + step)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
@pytest.mark.parametrize("rank_of_gradient", [1, 3, 8])
def test_refresh_basis_of_lower_rank(parity, rank_of_gradient, scale):
    x = low_rank(40, 30, rank_of_gradient) * scale
    basis, vector = torch.empty(30, 8), torch.empty(30)
    for warm in (False, True):
        runs = refreshed(parity, x, basis, vector, warm)
        for outcome, got, _ in runs:
            assert outcome.status == lowrank.REFRESHED
            assert orthogonality(got) <= 1e-6
            wide = got.double()
            outside = x.double() - x.double() @ wide @ wide.T
            assert outside.norm() <= 2e-6 * x.double().norm()
            assert outcome.energy == pytest.approx(1, abs=1e-5)
        _, basis, vector = runs[0]


def test_refresh_basis_that_misses_the_gradient(parity):
    x = torch.zeros(60, 50)
    x[:, 20:] = decaying(60, 30)
    best = np.linalg.svd(x.double().numpy(), compute_uv=False) ** 2
    for outcome, basis, _ in refreshed(parity, x, torch.eye(50, 10), torch.eye(50)[0], True):
        assert outcome.status == lowrank.REFRESHED
        assert abs(outcome.cosine) < 1e-6
        assert captured(x, basis) >= 0.95 * best[:10].sum() / best.sum()


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("warm", [False, True])
def test_refresh_basis_without_a_subspace(parity, value, warm):
    x = torch.zeros(40, 50)
    x[3, 4] = value
    expected = torch.randn(40, 8) if warm else torch.eye(40, 8)
    basis = expected.clone() if warm else torch.full((40, 8), math.nan)
    for outcome, got, vector in refreshed(parity, x, basis, torch.ones(40), warm):
        assert outcome.status == (lowrank.ZERO_GRADIENT if value == 0 else lowrank.KEPT)
        assert math.isnan(outcome.cosine)
        assert math.isnan(outcome.energy)
        assert torch.equal(got, expected)
        assert torch.equal(vector, torch.ones(40))


SVD_CASES = {
    "tall": (decaying(90, 60), 10, 2),
    "wide": (decaying(60, 90), 10, 1),
    "sketch only": (decaying(60, 50), 10, 0),
    "all": (decaying(30, 40), 30, 3),
    "one": (torch.tensor([[-2.0]]), 1, 2),
    "bf16": (decaying(40, 30).bfloat16(), 5, 2),
}


@pytest.mark.parametrize("name", SVD_CASES)
def test_svd(parity, name):
    x, rank, n_iter = SVD_CASES[name]
    options = {"rank": rank, "n_iter": n_iter, "oversample": 8, "seed": 7}
    want, runs = parity.runs(lowrank.svd, x, **options)
    for _, got in runs:
        for a, b in zip(got[0], want[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        assert orthogonality(got[0][0]) <= 1e-6
        assert orthogonality(got[0][2].T) <= 1e-6


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e25])
@pytest.mark.parametrize("rank", [6, 40])
def test_svd_of_low_rank_and_any_scale(parity, scale, rank):
    """Rank 40 asks for all directions of a matrix that has three."""
    x = low_rank(60, 40, 3) * scale
    _, runs = parity.runs(lowrank.svd, x, rank=rank, n_iter=2, oversample=8, seed=3)
    for _, got in runs:
        u, s, vh = (t.double() for t in got[0])
        assert torch.linalg.norm((u * s) @ vh - x.double()) <= 1e-5 * torch.linalg.norm(x.double())
        assert (s[3:] <= 1e-5 * s[0]).all()
        assert max(orthogonality(u), orthogonality(vh.T)) <= 1e-6


def test_svd_of_what_is_not_finite():
    x = decaying(20, 10)
    x[1, 2] = math.nan
    with emulator(), pytest.raises(ValueError, match="svd: x must be finite"):
        lowrank.svd(x, rank=3, n_iter=1, oversample=4, seed=0)


def test_workspaces_are_checked_before_anything_is_written():
    x, basis, vector = decaying(60, 50), torch.zeros(50, 4), torch.zeros(50)
    need = _core.refresh_basis_workspace([(60, 50, 4)])
    outcomes = torch.zeros(1, 3, dtype=torch.float64)
    space = torch.empty(need // 2, dtype=torch.uint8)
    given = [[x], [basis], [vector], outcomes, [False], 0, [0], [0]]
    with emulator():
        with pytest.raises(
            ValueError, match=r"refresh_basis: workspace must be at least \d+ bytes"
        ):
            _core.refresh_basis(*given, space)
        with pytest.raises(ValueError, match=r"workspace must be at least \d+ bytes, got 0 bytes"):
            _core.refresh_basis(*given)
        with pytest.raises(TypeError, match="workspace must have dtype uint8"):
            _core.refresh_basis(*given, torch.empty(need))
        assert not basis.any()
        assert not outcomes.any()
        _core.refresh_basis(*given, torch.empty(need, dtype=torch.uint8))
    assert basis.any()


def test_workspaces_are_as_large_as_the_work():
    assert _core.project_workspace([(50_000, 512, 128)], False) == 0
    assert _core.project_workspace([(50_000, 512, 128)], True) >= 32 << 20
    assert _core.project_workspace([(1100, 1050, 2), (10, 10, 1)], False) >= 3 * 1100 * 2 * 4
    assert _core.project_back_requantize_workspace([(4096, 4096)], 8, 256) == 0
    two_passes = _core.project_back_requantize_workspace([(4096, 4096)], 8, 300)
    assert 4 * (1 << 22) <= two_passes < 4 * (1 << 22) * 1.01
    assert _core.svd_workspace(600, 400, 10, 8) > _core.refresh_basis_workspace([(600, 400, 10)])
    # What the ops refuse takes none.
    assert _core.project_workspace([(4, 4, 5)], True) == 0
    assert _core.refresh_basis_workspace([(1 << 62, 1 << 62, 5)]) == 0


def test_packed_bases_are_checked():
    grad, basis = make(20, 12, 4)
    good, _ = packed([basis], 8, 16)
    out = [torch.zeros(20, 4)]
    for field, value, kind, message in [
        ("codes", [good.codes[0].view(torch.int8)], TypeError, r"bases\[0\] must have dtype uint8"),
        ("codes", [good.codes[0][:6]], ValueError, r"bases\[0\] must have shape \[12, 4\]"),
        ("scales", [], ValueError, "basis_scales must hold 1 tensors"),
        ("scales", [good.scales[0][:1]], ValueError, "scale must have shape"),
        ("zero_points", good.zero_points * 2, ValueError, "basis_zero_points must hold 1"),
        ("bits", 3, ValueError, "basis_bits must be 4 or 8"),
        ("group_size", 0, ValueError, "group_size must be at least 1"),
    ]:
        with pytest.raises(kind, match=f"project: .*{message}"):
            lowrank.project([grad], good._replace(**{field: value}), out)
    assert not out[0].any()
