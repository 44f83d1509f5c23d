"""SparseGPT and its statistics beside float64 transcriptions, and the laws they keep."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.prune.golden import INPUT_SQ, INPUTS, WEIGHT
from tests.reference import prune as reference

from gradpress import prune
from gradpress.prune._factor import inverse_factor

HESSIAN = 2 * INPUTS.T @ INPUTS
DAMPED = HESSIAN + 0.0675 * torch.eye(4)
#: The chain of float32 operations that a weight goes through, relative to the largest.
NEAR = 2e-4


def problem(rows, columns, tokens, seed=0):
    """Weights, and the Hessian of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=g) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=g) @ mix
    hessian = prune.Hessian(columns)
    hessian.update(inputs)
    return torch.randn(rows, columns, generator=g), hessian.matrix


def loss_of(change, hessian, damp=0.01):
    damped, _ = reference.inverse_factor(hessian, damp)
    change = reference.array(change)
    return np.einsum("ij,jk,ik->", change, damped, change) / 2


def test_golden_factor():
    expected = torch.tensor(
        [
            [3.221353, 0.480411, -1.097138, -1.715815],
            [0, 0.494124, -0.116563, -0.046313],
            [0, 0, 0.343437, 0.136454],
            [0, 0, 0, 0.315166],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(inverse_factor(HESSIAN, 0.01), expected, rtol=0, atol=1e-6)
    # Only the upper triangle counts.
    upper = inverse_factor(HESSIAN.triu(), 0.01)
    torch.testing.assert_close(upper, expected, rtol=0, atol=1e-6)


def test_golden_results():
    result = prune.sparsegpt(WEIGHT, HESSIAN, sparsity=0.5, reference=True)
    expected = torch.tensor([[0, -1.074567, 0, 2.09933], [0, 0, -1.502902, 0]])
    torch.testing.assert_close(result.weight, expected, rtol=0, atol=2e-6)
    assert (~result.mask).sum() == 5
    assert result.loss == pytest.approx(2.228409, rel=1e-5)
    result = prune.sparsegpt(WEIGHT, HESSIAN, pattern="2:4")
    expected = torch.tensor([[0, -1.074567, 0, 2.09933], [0, 0.84474, -1.702175, 0]])
    torch.testing.assert_close(result.weight, expected, rtol=0, atol=2e-6)
    assert result.loss == pytest.approx(0.783196, rel=1e-5)
    assert result.loss == pytest.approx(loss_of(result.weight - WEIGHT, HESSIAN), rel=1e-5)
    assert loss_of(WEIGHT * result.mask - WEIGHT, HESSIAN) == pytest.approx(0.806422, rel=1e-5)
    exact = prune.sparsegpt(WEIGHT, HESSIAN, sparsity=0.5)
    assert (~exact.mask).sum() == 4


@given(
    rows=st.integers(1, 20),
    columns=st.sampled_from([1, 8, 40, 136, 264]),
    pattern=st.sampled_from(["unstructured", "2:4", "4:8", "1:2"]),
    sparsity=st.sampled_from([0.0, 1.0, 0.5, 0.37]),
    block=st.sampled_from([8, 40, 128, 256]),
    damp=st.sampled_from([0.01, 0.1, 1.0]),
    seed=st.integers(0, 100),
)
def test_matches_float64(rows, columns, pattern, sparsity, block, damp, seed):
    grouped = pattern != "unstructured"
    if grouped and columns == 1:
        columns = 16
    weight, hessian = problem(rows, columns, 2 * columns, seed)
    keep, size = (int(n) for n in pattern.split(":")) if grouped else (0, 0)
    wanted = None if grouped else sparsity
    options = {"sparsity": wanted, "block_size": block, "damp": damp}
    result = prune.sparsegpt(weight, hessian, pattern=pattern, **options)
    want, kept, loss = reference.sparsegpt(
        weight, hessian, wanted, size, keep, block=block, damp=damp
    )
    assert (result.mask.numpy() == kept).all()
    assert not result.weight[~result.mask].any()
    np.testing.assert_allclose(result.weight.numpy(), want, atol=NEAR * np.abs(want).max() + 1e-12)
    assert result.loss == pytest.approx(loss, rel=1e-4, abs=1e-12)
    change = result.weight.double() - weight.double()
    assert result.loss == pytest.approx(loss_of(change, hessian, damp), rel=1e-3, abs=1e-9)
    if grouped:
        assert (result.mask.reshape(-1, size).sum(1) == keep).all()
    else:
        parts = [part.numel() for part in result.mask.split(block, 1)]
        assert (~result.mask).sum() == sum(int(n * sparsity) for n in parts)


def test_threshold_of_the_reference():
    weight, hessian = problem(12, 96, 200)
    for sparsity in (0.3, 0.5):
        result = prune.sparsegpt(weight, hessian, sparsity=sparsity, block_size=32, reference=True)
        want, kept, _ = reference.sparsegpt(weight, hessian, sparsity, block=32, through=True)
        assert (result.mask.numpy() == kept).all()
        assert (~result.mask).sum() == 3 * (int(12 * 32 * sparsity) + 1)
        np.testing.assert_allclose(result.weight.numpy(), want, atol=NEAR * np.abs(want).max())


def test_factor_is_that_of_the_inverse():
    for columns in (1, 7, 100, 517):
        hessian = problem(1, columns, 3 * columns)[1]
        damped, upper = reference.inverse_factor(hessian, 0.01)
        factor = inverse_factor(hessian, 0.01)
        assert torch.equal(factor, factor.triu())
        assert (factor.diagonal() > 0).all()
        np.testing.assert_allclose(factor.numpy(), upper, rtol=1e-9, atol=1e-12)
        identity = factor.numpy().T @ factor.numpy() @ damped
        np.testing.assert_allclose(identity, np.eye(columns), atol=1e-9)
        single = inverse_factor(hessian, 0.01, "float32")
        np.testing.assert_allclose(single.numpy(), upper, rtol=0, atol=1e-4 * np.abs(upper).max())


def test_float32_is_used_as_long_as_it_is_precise():
    hessian = problem(1, 530, 1200)[1]
    double = inverse_factor(hessian, 0.01)
    factor = inverse_factor(hessian, 0.01, "auto")
    assert factor.dtype == torch.float32
    assert torch.equal(factor, factor.triu())
    # Condition 1e3, times the unit roundoff.
    torch.testing.assert_close(factor.double(), double, rtol=0, atol=1e-4 * float(double.max()))
    small = hessian[:200, :200]
    assert torch.equal(inverse_factor(small, 0.01, "auto"), inverse_factor(small, 0.01))
    # Of condition 1e10 float32 knows no digit of the inverse.
    basis = torch.linalg.qr(problem(530, 530, 2)[0].double())[0]
    steep = (basis * torch.logspace(0, -10, 530, dtype=torch.float64)) @ basis.T
    steep = (steep + steep.T) / 2
    factor = inverse_factor(steep, 0.0, "auto")
    assert factor.dtype == torch.float64
    identity = factor.numpy().T @ factor.numpy() @ steep.numpy()
    np.testing.assert_allclose(identity, np.eye(530), atol=1e-4)
    for bad in (-hessian, hessian * float("nan")):
        with pytest.raises(ValueError, match="positive definite"):
            inverse_factor(bad, 0.01, "auto")


def test_precision_does_not_change_the_result_much():
    weight, hessian = problem(24, 530, 1200)
    double = prune.sparsegpt(weight, hessian, sparsity=0.5, dtype="float64")
    auto = prune.sparsegpt(weight, hessian, sparsity=0.5)
    assert (auto.mask != double.mask).float().mean() < 1e-3
    assert auto.loss == pytest.approx(double.loss, rel=1e-3)


def test_without_correlation_nothing_is_made_up_for():
    weight, _ = problem(10, 24, 48)
    result = prune.sparsegpt(weight, torch.eye(24) * 3, sparsity=0.5)
    assert torch.equal(result.weight, weight * result.mask)
    assert torch.equal(result.mask, prune.select(weight, sparsity=0.5, group="matrix"))
    lonely = problem(10, 24, 48)[1]
    lonely[5, :5] = lonely[5, 6:] = lonely[:5, 5] = lonely[6:, 5] = 0
    result = prune.sparsegpt(weight, lonely, sparsity=0.5)
    assert torch.equal(result.weight[:, 5], weight[:, 5] * result.mask[:, 5])


def test_making_up_for_losses_pays():
    gains = []
    for seed in range(20):
        weight, hessian = problem(8, 32, 64, seed)
        result = prune.sparsegpt(weight, hessian, pattern="2:4")
        gains.append(loss_of(weight * result.mask - weight, hessian) - result.loss)
    assert np.mean(gains) > 0
    # Of a single column dropped in each row it always does.
    for seed in range(20):
        weight, hessian = problem(1, 16, 64, seed)
        result = prune.sparsegpt(weight, hessian, sparsity=1 / 16)
        assert result.loss <= loss_of(weight * result.mask - weight, hessian) * (1 + 1e-5)


def test_columns_without_inputs():
    weight, hessian = problem(6, 16, 40)
    hessian[3] = hessian[:, 3] = 0
    result = prune.sparsegpt(weight, hessian, pattern="2:4")
    assert not result.weight[:, 3].any()
    assert torch.isfinite(result.weight).all()
    assert not prune.sparsegpt(weight, torch.zeros(16, 16), sparsity=0.5).weight.any()


def test_scale_and_block_size_do_not_matter():
    weight, hessian = problem(9, 64, 128)
    want = prune.sparsegpt(weight, hessian, pattern="4:8")
    scaled = prune.sparsegpt(weight, hessian * 16, pattern="4:8")
    assert torch.equal(scaled.mask, want.mask)
    torch.testing.assert_close(scaled.weight, want.weight, rtol=1e-4, atol=1e-5)
    for block in (8, 16, 64, 256):
        other = prune.sparsegpt(weight, hessian, pattern="4:8", block_size=block)
        assert torch.equal(other.mask, want.mask)
        torch.testing.assert_close(other.weight, want.weight, rtol=1e-4, atol=1e-5)


def test_kinds_of_arrays_and_empty_ones():
    weight, hessian = problem(4, 8, 30)
    before = weight.clone(), hessian.clone()
    want = prune.sparsegpt(weight, hessian, sparsity=0.5)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    same = prune.sparsegpt(weight.numpy(), hessian.double().numpy(), sparsity=0.5)
    assert isinstance(same.weight, np.ndarray)
    assert isinstance(same.mask, np.ndarray)
    np.testing.assert_array_equal(same.weight, want.weight.numpy())
    half = prune.sparsegpt(weight.bfloat16(), hessian, sparsity=0.5)
    assert half.weight.dtype == torch.bfloat16
    folded = prune.sparsegpt(torch.nn.Parameter(weight.view(4, 2, 2, 2)), hessian, sparsity=0.5)
    assert torch.equal(folded.weight.view(4, 8), want.weight)
    single = prune.sparsegpt(weight, hessian, sparsity=0.5, dtype="float32")
    torch.testing.assert_close(single.weight, want.weight, rtol=1e-4, atol=1e-5)
    for rows, columns in ((0, 4), (3, 0)):
        result = prune.sparsegpt(torch.empty(rows, columns), torch.eye(columns), sparsity=0.5)
        assert result.weight.shape == result.mask.shape == (rows, columns)
        assert result.loss == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sparsity must be given"),
        ({"sparsity": 0.5, "block_size": 0}, "block_size must be from 1 to 256, got 0"),
        ({"sparsity": 0.5, "block_size": 257}, "block_size must be from 1 to 256"),
        ({"pattern": "2:4", "block_size": 6}, "block_size must be a multiple of 4"),
        ({"sparsity": 0.5, "damp": -0.1}, "damp must be finite and at least 0"),
        ({"sparsity": 0.5, "dtype": "float16"}, 'dtype must be "auto", "float64" or "float32"'),
        ({"sparsity": 0.5, "hessian": torch.eye(7)}, r"hessian must have shape \[8, 8\]"),
        ({"sparsity": 0.5, "hessian": -torch.eye(8)}, "hessian must be positive definite"),
        ({"sparsity": 0.5, "hessian": torch.full((8, 8), float("nan"))}, "positive definite"),
        ({"sparsity": 0.5, "weight": torch.full((2, 8), float("inf"))}, "weight must be finite"),
    ],
)
def test_errors(options, message):
    given = {"weight": torch.ones(2, 8), "hessian": torch.eye(8), **options}
    with pytest.raises(ValueError, match=f"sparsegpt: {message}|sparsegpt: .*{message}"):
        prune.sparsegpt(given.pop("weight"), given.pop("hessian"), **given)


def test_statistics_are_those_of_the_papers():
    squares, hessian = prune.InputSquares(4), prune.Hessian(4)
    assert not squares.values.any()
    squares.update(INPUTS)
    hessian.update(INPUTS)
    assert torch.equal(squares.values, INPUT_SQ)
    assert torch.equal(hessian.matrix, HESSIAN)


@given(
    columns=st.sampled_from([0, 1, 5, 300]),
    parts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_statistics_beside_float64(columns, parts, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, t, columns, generator=g).to(dtype) for n, t in parts]
    count = sum(n for n, _ in parts)
    rows = [batch.double().flatten(0, 1) for batch in batches]
    rows = torch.cat(rows) if rows else torch.zeros(0, columns, dtype=torch.float64)
    for kind, read, want in (
        (prune.InputSquares, "values", rows.square().sum(0)),
        (prune.Hessian, "matrix", 2 * rows.T @ rows),
    ):
        for precision, near in (("float32", 1e-5), ("float64", 1e-12)):
            whole, halves = kind(columns, dtype=precision), []
            for batch in batches:
                whole.update(batch)
                halves.append(kind(columns, dtype=precision))
                halves[-1].update(batch)
            assert whole.sequences == count
            expected = (want / max(count, 1)).to(getattr(torch, precision))
            got = getattr(whole, read)
            torch.testing.assert_close(got, expected, rtol=near, atol=near)
            merged = kind(columns, dtype=precision)
            for half in halves:
                merged.merge(half)
            torch.testing.assert_close(getattr(merged, read), got, rtol=near, atol=near)


def test_statistics_of_a_repeated_set_stay():
    batch = torch.randn(3, 7, 20, generator=torch.Generator().manual_seed(0))
    for kind, read in ((prune.InputSquares, "values"), (prune.Hessian, "matrix")):
        once, twice = kind(20), kind(20)
        once.update(batch)
        twice.update(batch)
        twice.update(batch)
        torch.testing.assert_close(getattr(twice, read), getattr(once, read))
        flat = kind(20)
        flat.update(batch.reshape(-1, 20).numpy(), sequences=3)
        assert torch.equal(getattr(flat, read), getattr(once, read))
        long = kind(20)
        long.update(batch.reshape(1, -1, 20).repeat(1, 300, 1))  # more rows than one part
        # float32, summed up part after part.
        want = getattr(once, read) * 900
        torch.testing.assert_close(getattr(long, read), want, rtol=1e-5, atol=1e-3)


def test_statistics_refuse_what_does_not_fit():
    hessian = prune.Hessian(4)
    with pytest.raises(ValueError, match=r"Hessian.update: inputs must have 4 columns"):
        hessian.update(torch.ones(2, 5))
    with pytest.raises(TypeError, match=r"Hessian.update: inputs must hold floating-point"):
        hessian.update(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"sequences must be at least 0"):
        hessian.update(torch.ones(2, 4), sequences=-1)
    with pytest.raises(ValueError, match=r"Hessian.merge: other must be of the same kind"):
        hessian.merge(prune.InputSquares(4))
    with pytest.raises(ValueError, match="columns must be at least 0"):
        prune.InputSquares(-1)
    with pytest.raises(ValueError, match='dtype must be "float32" or "float64"'):
        prune.Hessian(4, dtype="float16")


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_layers_with_one_hessian_share_its_factor(pattern: str) -> None:
    hessian = prune.Hessian(48)
    hessian.update(torch.randn(96, 48, generator=torch.Generator().manual_seed(1)))
    factor = prune.inverse_factor(hessian.matrix, 0.01, "auto")
    for rows in (1, 7, 32):
        weight = torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows))
        own = prune.sparsegpt(weight, hessian.matrix, sparsity=0.5, pattern=pattern)
        shared = prune.sparsegpt(
            weight, hessian.matrix, sparsity=0.5, pattern=pattern, factor=factor
        )
        assert torch.equal(own.weight, shared.weight)
    with pytest.raises(ValueError, match=r"sparsegpt: factor must have shape \[48, 48\]"):
        prune.sparsegpt(weight, hessian.matrix, sparsity=0.5, factor=factor[:, :40])
