"""Gradients that are products of two factors, against the gradients themselves in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradpress.ops import lowrank

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@given(
    tokens=st.integers(1, 300),
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_projections_are_those_of_the_gradient(tokens, m, n, dtype, data):
    rank = data.draw(st.integers(1, min(m, n)))
    generator = torch.Generator().manual_seed(tokens)
    dy = torch.randn(tokens, m, generator=generator).to(dtype)
    x = torch.randn(tokens, n, generator=generator).to(dtype)
    basis = torch.randn(min(m, n), rank, generator=generator)
    out = torch.empty(lowrank.projected_shape(m, n, rank))
    lowrank.project_factors([dy], [x], [basis], [out])
    grad = dy.double().T @ x.double()
    expected = grad @ basis.double() if m >= n else basis.double().T @ grad
    # Float32 sums over tokens and columns, of numbers about one.
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5 * (tokens * 90) ** 0.5)


@pytest.mark.parametrize(("m", "n"), [(80, 50), (50, 80), (60, 60)])
def test_the_basis_is_that_of_the_gradient(m, n):
    generator = torch.Generator().manual_seed(m)
    fade = torch.logspace(0, -2, 64)
    dy, x = (
        (torch.randn(64, 64, generator=generator) * fade) @ torch.randn(64, k, generator=generator)
        for k in (m, n)
    )
    results = []
    for warm in (False, True):
        options = {"warm": [warm], "seed": 5, "tensor_ids": [2], "steps": [9]}
        for function, given_ in (
            (lowrank.refresh_basis, [[dy.T @ x]]),
            (lowrank.refresh_basis_factors, [[dy], [x]]),
        ):
            basis, vector = (torch.empty(min(m, n), 7), torch.empty(min(m, n)))
            if warm:
                basis, vector = (t.clone() for t in results[0])
            (outcome,) = function(*given_, [basis], [vector], **options)
            assert outcome.status == lowrank.REFRESHED
            results.append((basis, vector))
        one, other = results[-2:]
        # The same random numbers; gaps between singular values are some per cent.
        torch.testing.assert_close(one[0], other[0], rtol=0, atol=2e-3)


def test_the_same_bits_for_any_number_of_threads(restore_threads):
    generator = torch.Generator().manual_seed(0)
    dy, x = torch.randn(700, 300, generator=generator), torch.randn(700, 200, generator=generator)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        basis, vector, out = torch.empty(200, 20), torch.empty(200), torch.empty(300, 20)
        lowrank.refresh_basis_factors(
            [dy], [x], [basis], [vector], warm=[False], seed=0, tensor_ids=[0], steps=[0]
        )
        lowrank.project_factors([dy], [x], [basis], [out])
        results.append((basis, out))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_does_not_fit_is_refused():
    dy, x, basis, out = torch.ones(4, 6), torch.ones(4, 5), torch.ones(5, 2), torch.zeros(6, 2)
    options = {"warm": [False], "seed": 0, "tensor_ids": [0], "steps": [0]}
    for message, (a, b) in {
        r"inputs\[0\].*shape": (dy, torch.ones(3, 5)),
        r"inputs\[0\].*float32": (dy, x.half()),
        r"grad_outputs\[0\].*contiguous": (torch.ones(6, 4).T, x),
        r"grad_outputs\[0\].*two dimensions": (torch.ones(4), x),
        "tokens must be at least 1, got 0": (torch.ones(0, 6), torch.ones(0, 5)),
        "grad_outputs.*float64": (dy.double(), x.double()),
    }.items():
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
            lowrank.project_factors([a], [b], [basis], [out])
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
            lowrank.refresh_basis_factors([a], [b], [basis], [torch.ones(5)], **options)
    with pytest.raises(ValueError, match="inputs"):
        lowrank.project_factors([dy], [x, x], [basis], [out])
    with pytest.raises(ValueError, match=r"outs\[0\]"):
        lowrank.project_factors([dy], [x], [basis], [torch.zeros(2, 5)])
    assert not out.any()
    assert lowrank.refresh_basis_factors([], [], [], [], **{**options, "warm": []}) == []
    lowrank.project_factors([], [], [], [])
