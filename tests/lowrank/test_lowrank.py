"""Randomized subspaces and projections against float64 NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradpress
from gradpress.ops import lowrank as kernels
from gradpress.ops import quant


def decaying(m, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=g, dtype=torch.float64))
    s = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -0.7
    return ((u * s) @ v.T).float()


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (1, 1), (1, 5), (7, 3), (64, 64)])
def test_svd_against_numpy(shape):
    x = decaying(*shape)
    rank = min(20, *shape)
    u, s, vh = (t.double().numpy() for t in gradpress.lowrank.svd(x, rank, n_iter=4))
    best = np.linalg.svd(x.double().numpy(), compute_uv=False)[:rank]
    # Four power iterations leave the last of the singular values within two per cent.
    np.testing.assert_allclose(s, best, rtol=2e-2)
    assert abs(u.T @ u - np.eye(rank)).max() <= 1e-5
    assert abs(vh @ vh.T - np.eye(rank)).max() <= 1e-5
    assert (s**2).sum() >= 0.999 * (best**2).sum()
    residual = np.linalg.norm(x.double().numpy() - (u * s) @ vh) ** 2
    assert residual <= 1.01 * (np.linalg.norm(x.double().numpy()) ** 2 - (best**2).sum()) + 1e-9


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_svd_of_low_rank_and_any_scale(scale):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(60, 3, generator=g) @ torch.randn(3, 40, generator=g) * scale
    u, s, vh = (t.double() for t in gradpress.lowrank.svd(x, 6))
    x = x.double()
    assert torch.linalg.norm((u * s) @ vh - x) <= 1e-5 * torch.linalg.norm(x)
    assert (s[3:] <= 1e-5 * s[0]).all()
    assert (u.T @ u - torch.eye(6)).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
@pytest.mark.parametrize("true_rank", [0, 1, 3, 29])
@pytest.mark.parametrize("rank", [1, 10, 30])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_svd_of_any_rank_asked_of_any_rank(shape, true_rank, rank, scale):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(shape[0], true_rank, generator=g) @ torch.randn(
        true_rank, shape[1], generator=g
    )
    x = x * scale
    u, s, vh = (t.double() for t in gradpress.lowrank.svd(x, rank, n_iter=4))
    identity = torch.eye(rank, dtype=torch.float64)
    assert (u.T @ u - identity).abs().max() <= 1e-5
    assert (vh @ vh.T - identity).abs().max() <= 1e-5
    assert (s.diff() <= 0).all()
    best = torch.linalg.svdvals(x.double())
    top = best[0]
    # Values below the rounding of float32, relative to the largest, are noise.
    assert (s[true_rank:] <= 2e-6 * top).all()
    if rank >= true_rank:
        torch.testing.assert_close(s[:true_rank], best[: min(rank, true_rank)], rtol=1e-4, atol=0)
        assert torch.linalg.norm((u * s) @ vh - x.double()) <= 1e-5 * torch.linalg.norm(x.double())


def test_svd_of_zero_and_errors():
    assert (gradpress.lowrank.svd(np.zeros((5, 4), "f4"), 2)[1] == 0).all()
    with pytest.raises(ValueError, match="svd: x must be finite"):
        gradpress.lowrank.svd(torch.tensor([[1.0, float("nan")]]), 1)
    with pytest.raises(ValueError, match="svd: rank must be from 1 to 3, got 4"):
        gradpress.lowrank.svd(torch.ones(3, 5), 4)
    with pytest.raises(ValueError, match="two dimensions"):
        gradpress.lowrank.svd(torch.ones(3), 1)


def test_svd_does_not_depend_on_threads(restore_threads):
    x = decaying(400, 300)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(gradpress.lowrank.svd(x, 32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(512, 384), (384, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refresh_captures_nearly_the_best(shape, dtype):
    x = decaying(*shape).to(dtype)
    best = (np.linalg.svd(x.double().numpy(), compute_uv=False)[:64] ** 2).sum()
    basis, vector = torch.empty(384, 64), torch.zeros(384)
    for warm in (False, True):
        (result,) = kernels.refresh_basis(
            [x], [basis], [vector], warm=[warm], seed=0, tensor_ids=[0], steps=[0]
        )
        out = torch.empty(kernels.projected_shape(*shape, 64))
        kernels.project([x], [basis], [out])
        captured = float(out.double().square().sum())
        assert result.status == kernels.REFRESHED
        assert captured >= 0.99 * best
        assert result.energy == pytest.approx(captured / float(x.double().square().sum()), rel=0.02)
        gram = basis.double().T @ basis.double()
        assert (gram - torch.eye(64)).abs().max() <= 1e-5
    assert result.cosine > 0.99


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e25])
@pytest.mark.parametrize("warm", [False, True])
def test_refresh_at_any_scale(scale, warm):
    x = decaying(120, 80)
    bases, vectors = [torch.empty(80, 8) for _ in range(2)], [torch.zeros(80) for _ in range(2)]
    for start in (False, True)[: 1 + warm]:
        results = kernels.refresh_basis(
            [x, x * scale], bases, vectors, warm=[start] * 2, seed=0, tensor_ids=[0, 0],
            steps=[0, 0],
        )  # fmt: skip
    assert [r.status for r in results] == [kernels.REFRESHED] * 2
    # The leading directions are well apart; rounding of x * scale moves them a little.
    torch.testing.assert_close(vectors[1], vectors[0], atol=1e-4, rtol=0)
    assert results[1].energy == pytest.approx(results[0].energy, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("kept", [8, 29, 30])
def test_refresh_of_a_matrix_of_lower_rank(rank, kept):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, rank, generator=g) @ torch.randn(rank, 30, generator=g)
    basis, vector = torch.empty(30, kept), torch.zeros(30)
    for warm in (False, True):
        (result,) = kernels.refresh_basis(
            [x], [basis], [vector], warm=[warm], seed=0, tensor_ids=[0], steps=[0]
        )
        wide = basis.double()
        assert result.status == kernels.REFRESHED
        assert (wide.T @ wide - torch.eye(kept)).abs().max() <= 1e-5
        left_over = x.double() - x.double() @ wide @ wide.T
        assert float(left_over.norm() / x.double().norm()) <= 1e-4
        assert result.energy == pytest.approx(1.0, abs=1e-4)


@given(
    m=st.integers(1, 90),
    n=st.sampled_from([1, 2, 7, 33, 64, 101, 257]),
    rank=st.integers(1, 8),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([7, 64, 256]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_projection_and_back(m, n, rank, bits, group_size, dtype):
    g = torch.Generator().manual_seed(m * n)
    rank = min(rank, m, n)
    x = torch.randn(m, n, generator=g).to(dtype)
    basis = torch.randn(min(m, n), rank, generator=g)
    low = torch.empty(kernels.projected_shape(m, n, rank))
    kernels.project([x], [basis], [low])
    wide, narrow = x.double(), basis.double()
    right = m >= n
    expected = wide @ narrow if right else narrow.T @ wide
    # Sums of up to 257 products in float32.
    torch.testing.assert_close(low.double(), expected, rtol=1e-5, atol=1e-4)
    back = low.double() @ narrow.T if right else narrow @ low.double()

    w = torch.randn(m, n, generator=g)
    target = w.double() * 0.99 + 0.25 * back
    dense = w.clone()
    kernels.project_back_add(
        [dense], [low], [basis], scale=0.25, decay=0.01, tensor_ids=[0], steps=[1]
    )
    torch.testing.assert_close(dense.double(), target, rtol=1e-5, atol=1e-4)

    q = quant.quantize_blockwise(w, bits=bits, group_size=group_size, rounding="nearest")
    layout = {"shape": (m, n), "bits": bits, "group_size": group_size}
    start = quant.dequantize_blockwise(q.codes, q.scale, q.zero_point, **layout).double()
    target = start * 0.99 + 0.25 * back
    kernels.project_back_requantize(
        [q.codes], [q.scale], [q.zero_point], [(m, n)], [low], [basis],
        bits=bits, group_size=group_size, scale=0.25, decay=0.01, stochastic=False,
        tensor_ids=[0], steps=[1],
    )  # fmt: skip
    after = quant.dequantize_blockwise(q.codes, q.scale, q.zero_point, **layout).double()
    step = q.scale.repeat_interleave(group_size)[: m * n].view(m, n).double()
    assert ((after - target).abs() <= step * 1.001 + 1e-4).all()


def test_int4_projector_statistics():
    frame, _ = torch.linalg.qr(torch.randn(512, 128, generator=torch.Generator().manual_seed(0)))
    q = gradpress.quant.quantize(frame, bits=4, rounding="nearest")
    rounded = q.dequantize().double()
    gram = rounded.T @ rounded
    diagonal = gram.diagonal()
    off = gram - torch.diag(diagonal)
    assert float(diagonal.mean()) == pytest.approx(1.012, abs=0.005)
    assert diagonal.min() >= 0.97
    assert diagonal.max() <= 1.04
    assert float(off.square().mean().sqrt()) == pytest.approx(0.0066, abs=0.0007)
    assert off.abs().max() < 0.035
