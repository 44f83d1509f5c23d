"""Refreshes and SVDs that stay on the device: against NumPy, and against the CPU."""

import math

import numpy as np
import pytest
import torch
from tests.kernels_lowrank.launcher import SKETCH, Schedule, blocks, key
from tests.kernels_lowrank.subspace import Search, nan, refresh, svd
from tests.kernels_lowrank.test_dense import orthogonality
from tests.kernels_lowrank.test_project import ORDERS

from gradpress.ops import lowrank

KEY = key(7, SKETCH, 3, 5)
WHERE = {"seed": 7, "tensor_ids": [3], "steps": [5]}


def decaying(m, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=g, dtype=torch.float64))
    s = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -0.7
    return ((u * s) @ v.T).float()


def low_rank(m, n, rank):
    g = torch.Generator().manual_seed(rank)
    return torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)


def captured(x, basis):
    x = x.double() if x.shape[0] >= x.shape[1] else x.double().T
    return float((x @ basis.double()).square().sum() / x.square().sum())


def on_cpu(x, basis, vector, warm):
    (result,) = lowrank.refresh_basis([x], [basis], [vector], warm=[warm], **WHERE)
    return result


CASES = {
    "tall": (decaying(150, 90), 12),
    "wide": (decaying(90, 150), 12),
    "bf16": (decaying(90, 70).bfloat16(), 20),
    "f16": (decaying(70, 90).half(), 20),
    "tiny": (decaying(120, 80) * 1e-30, 8),
    "huge": (decaying(120, 80) * 1e25, 8),
    "full rank": (decaying(40, 30), 30),
    "one": (torch.tensor([[-3.0]]), 1),
    "a row": (decaying(1, 7), 1),
    "odd": (decaying(7, 3), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_refresh_is_the_cpus(name):
    """Where singular values are apart, both find the same directions, by other arithmetic.

    A cold start has the same random numbers. A warm one of the basis's own width multiplies the
    same columns. Float32 leaves 1e-6 of a column, over gaps of a fortieth.
    """
    x, rank = CASES[name]
    short = min(x.shape)
    device = torch.randn(short, rank), torch.randn(short)  # memory of any content
    cpu = torch.empty(short, rank), torch.empty(short)
    for warm, order in ((False, "forward"), (True, "reverse")):
        if warm:
            device = cpu[0].clone(), cpu[1].clone()
        expected = on_cpu(x, *cpu, warm)
        width = rank if warm else None
        status, cosine, energy = refresh(Schedule(order), x, *device, warm, KEY, width=width)
        assert status == expected.status == lowrank.REFRESHED
        torch.testing.assert_close(device[0], cpu[0], rtol=0, atol=1e-4)
        assert torch.equal(device[1], device[0][:, 0])
        assert cosine == pytest.approx(expected.cosine, abs=1e-5, nan_ok=True)
        assert energy == pytest.approx(expected.energy, rel=1e-4)
        assert orthogonality(device[0]) <= 1e-6
        largest = device[0].gather(0, device[0].abs().argmax(dim=0, keepdim=True))
        assert (largest > 0).all()


def test_every_order_finds_the_same_bits():
    x = decaying(90, 70)
    results = []
    for order in ORDERS:
        basis, vector = nan(70, 10), nan(70)
        outcomes = [
            refresh(Schedule(order, 3), x, basis, vector, warm, KEY, runs_of_k=2)
            for warm in (False, True)
        ]
        results.append((basis, vector, torch.tensor(outcomes)))
    for other in results[1:]:
        assert all(
            torch.equal(a.nan_to_num(9), b.nan_to_num(9))
            for a, b in zip(results[0], other, strict=True)
        )


def test_random_columns_help_a_warm_start():
    """Eight of them keep up with a gradient that drifts, where its own subspace does not."""
    rank, x = 12, decaying(90, 70)
    shares = []
    for step in range(3):
        if step == 0:
            wide, narrow = (nan(70, rank), nan(70)), (nan(70, rank), nan(70))
        for (basis, vector), width in ((wide, None), (narrow, rank if step else None)):
            where = key(7, SKETCH, 3, step)
            status, _, _ = refresh(Schedule(), x, basis, vector, step > 0, where, width=width)
            assert status == lowrank.REFRESHED
        shares.append((captured(x, wide[0]), captured(x, narrow[0])))
        x = 0.7 * x + 0.3 * decaying(90, 70, seed=9 + step)
    assert shares[0][0] == shares[0][1]
    assert all(a > b for a, b in shares[1:])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
@pytest.mark.parametrize("rank_of_gradient", [1, 3, 8])
def test_gradients_of_lower_rank(rank_of_gradient, scale, order):
    x = low_rank(40, 30, rank_of_gradient) * scale
    basis, vector = nan(30, 8), nan(30)
    for warm in (False, True):
        status, _, energy = refresh(Schedule(order), x, basis, vector, warm, KEY)
        assert status == lowrank.REFRESHED
        assert orthogonality(basis) <= 1e-6
        wide = basis.double()
        outside = x.double() - x.double() @ wide @ wide.T
        assert outside.norm() <= 2e-6 * x.double().norm()
        assert energy == pytest.approx(1, abs=1e-5)


def test_a_basis_that_misses_the_gradient_is_found_anew():
    x = torch.zeros(60, 50)
    x[:, 20:] = decaying(60, 30)
    basis, vector = torch.eye(50, 10), torch.eye(50)[0]
    status, cosine, _ = refresh(Schedule("random"), x, basis, vector, True, KEY, width=10)
    assert status == lowrank.REFRESHED
    assert abs(cosine) < 1e-6
    best = np.linalg.svd(x.double().numpy(), compute_uv=False)
    assert captured(x, basis) >= 0.95 * (best[:10] ** 2).sum() / (best**2).sum()


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("warm", [False, True])
def test_gradients_without_a_subspace(value, warm):
    x = torch.zeros(40, 50)
    x[3, 4] = value
    expected = torch.randn(40, 8) if warm else torch.eye(40, 8)
    basis, vector = expected.clone() if warm else nan(40, 8), torch.ones(40)
    status, cosine, energy = refresh(Schedule("random"), x, basis, vector, warm, KEY)
    assert status == (lowrank.ZERO_GRADIENT if value == 0 else lowrank.KEPT)
    assert math.isnan(cosine)
    assert math.isnan(energy)
    assert torch.equal(basis, expected)
    assert torch.equal(vector, torch.ones(40))


def test_overflow_keeps_the_basis():
    """Finite, but its products are not: found by the Gram matrix, on the device."""
    x = torch.full((40, 30), 3e38)
    earlier, vector = torch.linalg.qr(torch.randn(30, 4))[0], torch.ones(30)
    basis = earlier.clone()
    status, _, _ = refresh(Schedule(), x, basis, vector, True, KEY)
    assert status == lowrank.KEPT
    assert torch.equal(basis, earlier)
    assert torch.equal(vector, torch.ones(30))


def test_launches_are_always_the_same():
    """Whatever the gradient holds, so that they can be captured once."""
    names = []
    for x in (decaying(40, 30), low_rank(40, 30, 1), torch.zeros(40, 30)):
        run = Schedule()
        refresh(run, x, torch.eye(30, 4), torch.eye(30)[0], True, KEY)
        names.append(run.launches)
    assert names[0] == names[1] == names[2]


def test_tensor_cores_find_the_same_subspace():
    x = decaying(90, 120).bfloat16()
    bases = [nan(90, 12), nan(90, 12)]
    for tensor, basis in enumerate(bases):
        refresh(Schedule("random"), x, basis, nan(90), False, KEY, tensor=tensor)
        assert orthogonality(basis) <= 1e-6
    # Two halves for a float32 lose 2^-17 of an element.
    torch.testing.assert_close(bases[1], bases[0], rtol=0, atol=1e-3)


def test_random_numbers_are_the_cpus():
    for count in (1, 255, 3000):
        s = Search(Schedule("random"), torch.ones(3, 2), 2, KEY)
        s.begin(0)
        out = nan(count)
        s.call("random_matrix", blocks(count, 2048), [out, count, KEY, s.flags, 1])
        dithers = reference_dithers(count)
        unit = np.sqrt(np.float32(12)) / np.float32(65536)
        assert (out.numpy() == (dithers - np.float32(32767.5)) * unit).all()


def reference_dithers(count):
    """src/rng/mod.rs, word by word."""
    words = np.zeros(count, "u4")
    for e in range(count):
        counter = [e // 256 * 32 + e % 32, 0, 3, 5]
        k = list(KEY.key)
        for _ in range(10):
            p0, p1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
            counter = [
                p1 >> 32 ^ counter[1] ^ k[0], p1 & 0xFFFFFFFF,
                p0 >> 32 ^ counter[3] ^ k[1], p0 & 0xFFFFFFFF,
            ]  # fmt: skip
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        half = e % 256 // 32
        words[e] = counter[half // 2] >> 16 * (half % 2) & 0xFFFF
    return words.astype("f4")


SVD_CASES = {
    "tall": (decaying(90, 60), 10, 2),
    "wide": (decaying(60, 90), 10, 1),
    "sketch only": (decaying(60, 50), 10, 0),
    "all": (decaying(30, 40), 30, 3),
    "one": (torch.tensor([[-2.0]]), 1, 2),
    "bf16": (decaying(40, 30).bfloat16(), 5, 2),
}


@pytest.mark.parametrize("name", SVD_CASES)
def test_svd_is_the_cpus(name):
    x, rank, n_iter = SVD_CASES[name]
    expected = lowrank.svd(x, rank=rank, n_iter=n_iter, oversample=8, seed=7)
    status, *got = svd(Schedule("random"), x, rank, n_iter, 8, key(7, SKETCH, 0, 0))
    assert status == lowrank.REFRESHED
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert orthogonality(got[0]) <= 1e-6
    assert orthogonality(got[2].T) <= 1e-6


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e25])
@pytest.mark.parametrize("rank", [6, 40])
def test_svd_of_low_rank_and_any_scale(scale, rank):
    """Rank 40 asks for all directions of a matrix that has three."""
    x = low_rank(60, 40, 3) * scale
    status, u, s, vh = svd(Schedule("reverse"), x, rank, 2, 8, KEY)
    x, u, s, vh = x.double(), u.double(), s.double(), vh.double()
    assert status == lowrank.REFRESHED
    assert torch.linalg.norm((u * s) @ vh - x) <= 1e-5 * torch.linalg.norm(x)
    assert (s[3:] <= 1e-5 * s[0]).all()
    assert max(orthogonality(u), orthogonality(vh.T)) <= 1e-6


def test_svd_writes_nothing_for_what_is_not_finite():
    x = decaying(20, 10)
    x[1, 2] = math.nan
    status, *got = svd(Schedule(), x, 3, 1, 4, KEY)
    assert status == lowrank.KEPT
    assert all(t.isnan().all() for t in got)
