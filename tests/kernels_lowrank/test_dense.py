"""Gram matrices, Cholesky, triangular inverses and eigenvectors against float64 NumPy."""

import numpy as np
import pytest
import torch
from tests.kernels_lowrank.dense import DEVIATION, MAIN, PIVOT, SWEEPS, Dense, Linear
from tests.kernels_lowrank.launcher import Basis, Schedule, key, product
from tests.kernels_lowrank.test_project import ORDERS

WIDTHS = [1, 5, 32, 33, 70]
ROUNDING = 2.0**-53


def tools(width, order="forward", sweeps=12):
    flags = torch.tensor([MAIN, 0, 0, 0, 0, 0, 0, 0], dtype=torch.int32)
    numbers = torch.zeros(32, dtype=torch.float64)
    return Linear(Schedule(order), flags, numbers, Dense(width), sweeps)


def graded(rows, width, steepness=3.0):
    """Columns whose norms fall by `steepness` decimal places, not orthogonal."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(rows, width, generator=generator) * torch.logspace(0, -steepness, width)


def orthogonality(q):
    q = q.double()
    return float((q.T @ q - torch.eye(q.shape[1])).abs().max())


@pytest.mark.parametrize("order", ORDERS)
def test_gram(order):
    for width in WIDTHS:
        for rows in (width, 200):
            z = graded(rows, width)
            linear = tools(width, order)
            linear.gram(z, MAIN)
            expected = (z.double().T @ z.double()).numpy()
            got, dense = linear.dense.gram.numpy(), linear.dense
            magnitudes = (z.double().abs().T @ z.double().abs()).numpy()
            # A sum of `rows` products in float64.
            assert (abs(got[:width, :width] - expected) <= rows * ROUNDING * magnitudes).all()
            padding = np.eye(dense.ld)
            padding[:width, :width] = got[:width, :width]
            assert (got == padding).all()
            assert (got == got.T).all()
            assert (dense.other.numpy() == np.eye(dense.ld)).all()
            deviation = abs(got[:width, :width] - np.eye(width)).max()
            assert float(linear.numbers[DEVIATION]) == deviation


@pytest.mark.parametrize("order", ORDERS)
def test_cholesky(order):
    for width in WIDTHS:
        z = graded(200, width)
        linear = tools(width, order)
        linear.gram(z, MAIN)
        gram = linear.dense.gram.clone().numpy()
        linear.cholesky(MAIN)
        lower = np.linalg.cholesky(gram)
        inverse = np.linalg.inv(lower)
        # Backward error of float64 times the condition of a well-scaled matrix, about 10.
        got = linear.dense.other.numpy()
        assert np.tril(got - inverse).max() <= 1e-12 * abs(inverse).max()
        assert (np.triu(got, 1) == 0).all()
        rounded = linear.dense.inverse.numpy()
        assert (rounded == got[:width, :width].T.astype("f4")).all()
        assert not linear.dense.dependent.any()
        smallest = (np.diag(lower) ** 2 / np.diag(gram))[:width].min()
        assert float(linear.numbers[PIVOT]) == pytest.approx(smallest, rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_dependent_columns_are_found_and_replaced(order):
    width = 40
    z = graded(100, width, 1.0)
    z[:, 7] = 0
    z[:, 20] = 2 * z[:, 3] - z[:, 19]
    z[:, 39] = z[:, 0]
    linear = tools(width, order)
    before = z.clone()
    linear.cholesky_pass(z, MAIN, key(1, 2, 0, 0), 0)
    assert linear.dense.dependent.nonzero().flatten().tolist() == [7, 20, 39]
    others = linear.dense.dependent == 0
    assert orthogonality(z[:, others]) <= 1e-5
    assert (z[:, ~others].norm(dim=0) - 1).abs().max() < 0.3
    for number in (1, 2):
        linear.cholesky_pass(z, MAIN, key(1, 2, 0, 0), number)
    assert orthogonality(z) <= 1e-6
    # Still the same span.
    rest = before.double() - z.double() @ (z.double().T @ before.double())
    assert rest.norm() <= 1e-6 * before.norm()


@pytest.mark.parametrize("order", ORDERS)
def test_eigenvectors(order):
    for width in WIDTHS:
        z = graded(200, width, 4.0)
        linear = tools(width, order)
        linear.gram(z, MAIN)
        gram = linear.dense.gram[:width, :width].clone().numpy()
        linear.eigen(MAIN, scaled=False)
        values, rotation = linear.dense.values.numpy(), linear.dense.inverse.double().numpy()
        # Jacobi's method is relatively accurate where columns are merely scaled: float64 and the
        # condition without the scaling, although the values span eight decimal places.
        expected = np.linalg.svd(z.double().numpy(), compute_uv=False) ** 2
        np.testing.assert_allclose(values, expected, rtol=1e-12)
        # Rotations are rounded to float32.
        assert abs(rotation.T @ rotation - np.eye(width)).max() <= 1e-6
        residual = gram @ rotation - rotation * values
        assert (np.linalg.norm(residual, axis=0) <= 1e-6 * values[0]).all()
        assert not linear.dense.dependent.any()


@pytest.mark.parametrize("order", ORDERS)
def test_scaled_eigenvectors_make_columns_orthonormal(order):
    z = graded(120, 45, 3.0)
    linear = tools(45, order)
    linear.gram(z, MAIN)
    linear.eigen(MAIN, scaled=True)
    q = product(linear.run, z, Basis(linear.dense.inverse), 45)
    assert orthogonality(q) <= 1e-4  # float32 products of numbers three decimal places larger
    left = np.linalg.svd(z.double().numpy(), full_matrices=False)[0]
    assert (abs((q.double().numpy() * left).sum(0)) >= 1 - 1e-4).all()


def test_equal_eigenvalues_keep_their_order():
    linear = tools(6)
    linear.gram(torch.eye(6) * torch.tensor([1.0, 2.0, 2.0, 3.0, 1.0, 2.0]), MAIN)
    linear.eigen(MAIN, scaled=False)
    assert linear.dense.values.tolist() == [9, 4, 4, 4, 1, 1]
    assert linear.dense.inverse.argmax(dim=0).tolist() == [3, 1, 2, 5, 0, 4]


def test_convergence_is_quadratic_and_ends_the_work():
    linear = tools(70)
    linear.gram(graded(200, 70), MAIN)
    linear.eigen(MAIN, scaled=False)
    found = linear.numbers[SWEEPS : SWEEPS + 12].tolist()
    assert found[-1] == 0  # had nothing to do
    used = [x for x in found if x > 0]
    assert len(used) <= 7
    assert used[-1] <= 1e-12


def test_nothing_depends_on_the_order():
    results = []
    for order in ORDERS:
        linear = tools(45, order)
        linear.gram(graded(120, 45), MAIN)
        linear.cholesky(MAIN)
        results.append([linear.dense.other.clone()])
        linear.gram(graded(120, 45), MAIN)
        linear.eigen(MAIN, scaled=True)
        results[-1] += [linear.dense.values, linear.dense.inverse]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
