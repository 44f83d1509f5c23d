"""Fira: the residual of a subspace, scaled column by column and limited."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import gradpress

shapes = pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (1, 5)])


def fira(params, **options):
    return gradpress.optim.Fira(params, **{"weight_decay": 0.0, **options})


def transcription(w, grads, bases, *, lr, betas, eps, decay, alpha, gamma, reference):
    """Section 4 of the paper, or the released code, in float64; the bases are the library's."""
    wide = w.shape[0] < w.shape[1]
    m = v = 0.0
    previous = None
    for t, (grad, basis) in enumerate(zip(grads, bases, strict=True), 1):
        g = grad if wide else grad.T
        r = basis.T @ g
        m = betas[0] * m + (1 - betas[0]) * r
        v = betas[1] * v + (1 - betas[1]) * r**2
        if reference:
            n = m / (np.sqrt(v) + eps)
            size = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        else:
            n = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
            size = lr
        phi = np.linalg.norm(n, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8)
        s = (g - (alpha if reference else 1.0) * (basis @ r)) * phi
        if gamma is not None:
            norm = np.linalg.norm(s)
            limit = 1.0 if previous is None else max(norm / (previous + 1e-8), gamma) / gamma
            s, previous = s / limit, norm / limit
        u = alpha * (basis @ n) + (s if reference else alpha * s)
        u = u if wide else u.T
        before, after = (1.0, 1 - lr * decay) if reference else (1 - lr * decay, 1.0)
        w = (w * before - size * u) * after
    return w


@shapes
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("gamma", [1.01, None])
@pytest.mark.parametrize("maximize", [False, True])
def test_steps_are_the_papers(shape, reference, gamma, maximize):
    generator = np.random.default_rng(0)
    growth = np.linspace(0.5, 3, 9)  # so that the limiter has something to do
    grads = [f * generator.standard_normal(shape).astype(np.float32) for f in growth]
    w = generator.standard_normal(shape)
    numbers = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 0.01}
    p = nn.Parameter(torch.tensor(w).float())
    optimizer = fira(
        [p], **numbers, weight_decay=0.5, rank=2, update_proj_gap=4, scale=0.25,
        norm_growth=gamma, reference=reference, maximize=maximize,
    )  # fmt: skip
    bases = []
    for g in grads:
        p.grad = torch.tensor(-g if maximize else g).float()
        optimizer.step()
        bases.append(optimizer.state[p]["projector"].double().numpy().copy())
    want = transcription(
        w, grads, bases, **numbers, decay=0.5, alpha=0.25, gamma=gamma, reference=reference
    )
    moved = np.linalg.norm(want - w)
    assert np.linalg.norm(p.detach().numpy() - want) < 1e-5 * moved
    assert optimizer.refresh_counts() == {"0": 3}


def test_forms_and_limits_differ():
    """What the comparison above would not notice if they were all the same."""
    results = []
    for options in ({}, {"reference": True}, {"norm_growth": None}):
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(12, 7))
        optimizer = fira([p], rank=2, lr=1e-2, **options)
        for t in range(4):
            p.grad = (1 + t) * torch.randn(12, 7)
            optimizer.step()
        results.append(p.detach())
    a, b, c = results
    assert min(float((x - y).norm()) for x, y in ((a, b), (b, c), (a, c))) > 0.02 * float(a.norm())


@shapes
def test_full_rank_is_galore(shape):
    """Nothing is left out, so that nothing is added."""
    grads = [torch.randn(shape) for _ in range(5)]
    results = []
    for make in (gradpress.optim.Fira, gradpress.optim.GaLoreAdamW):
        p = nn.Parameter(torch.ones(shape))
        optimizer = make([p], rank=99, lr=1e-2, update_proj_gap=2)
        for grad in grads:
            p.grad = grad
            optimizer.step()
        results.append(p.detach())
    assert float((results[0] - 1).norm()) > 0
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@shapes
def test_what_galore_leaves_out_is_trained(shape):
    """The part outside of the subspace points down the gradient, column by column."""
    p = nn.Parameter(torch.zeros(shape))
    optimizer = fira([p], rank=1, lr=1.0, scale=1.0)
    grad = torch.randn(shape)
    p.grad = grad
    optimizer.step()
    basis = optimizer.state[p]["projector"]
    wide = shape[0] < shape[1]
    g, change = (grad, p.detach()) if wide else (grad.T, p.detach().T)
    outside = g - basis @ (basis.T @ g)
    rest = change - basis @ (basis.T @ change)
    if min(shape) == 1:
        assert float(rest.norm()) < 1e-5
        return
    cosines = -torch.nn.functional.cosine_similarity(outside, rest, dim=0)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-4)


def test_signs_of_the_directions_do_not_matter(monkeypatch):
    from gradpress.ops import lowrank as kernels

    refresh = kernels.refresh_basis

    def run(flip):
        def flipped(grads, bases, *args, **kwargs):
            outcomes = refresh(grads, bases, *args, **kwargs)
            for basis in bases:
                basis *= flip
            return outcomes

        monkeypatch.setattr(kernels, "refresh_basis", flipped)
        p = nn.Parameter(torch.ones(9, 12))
        optimizer = fira([p], lr=1e-2, rank=3)
        for t in range(5):
            p.grad = torch.randn(9, 12, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        return p.detach()

    one, other = run(torch.ones(3)), run(torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reference", [False, True])
def test_residuals_grow_by_the_limit_at_most(reference):
    p = nn.Parameter(torch.zeros(12, 8))
    optimizer = fira([p], rank=2, lr=1e-3, reference=reference)
    norms = []
    for t in range(10):
        p.grad = (1 + t) ** 2 * torch.randn(12, 8)
        optimizer.step()
        norms.append(float(optimizer.state[p]["update_norm"]))
    ratios = [b / a for a, b in itertools.pairwise(norms)]
    assert max(ratios) <= 1.01 * (1 + 1e-5)
    assert sum(r == pytest.approx(1.01, rel=1e-5) for r in ratios) >= 3


@pytest.mark.parametrize("make", [fira])
@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_same_bits_for_all_threads_where_sums_are_long(make, shape, restore_threads):
    results = []
    for threads in (1, 4):
        torch.set_num_threads(1)
        p = nn.Parameter(torch.zeros(shape))
        optimizer = make([p], rank=16, update_proj_gap=2)
        for t in range(3):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t))
            torch.set_num_threads(threads)
            optimizer.step()
            torch.set_num_threads(1)
        results.append(p.detach())
    assert torch.equal(*results)
    assert float(results[0].norm()) > 0


def test_poisoned_elements_are_left_alone():
    start = torch.randn(6, 10)
    p = nn.Parameter(start.clone())
    optimizer = fira([p], rank=3)
    p.grad = torch.randn(6, 10)
    optimizer.step()
    before = p.detach().clone()
    norm = optimizer.state[p]["update_norm"].clone()
    p.grad = torch.full((6, 10), float("inf"))
    optimizer.step()
    assert torch.equal(p, before)
    assert torch.equal(optimizer.state[p]["update_norm"], norm)
    assert optimizer.nonfinite_gradients == 30  # of the projected ones


@pytest.mark.parametrize(("state_bits", "near"), [(8, 0.05), (4, 0.4)])
def test_moments_of_few_bits_stay_near(state_bits, near):
    results = []
    for bits in (32, state_bits):
        p = nn.Parameter(torch.zeros(40, 64))
        optimizer = fira([p], lr=1e-2, rank=8, state_bits=bits, min_8bit_size=1)
        generator = torch.Generator().manual_seed(0)
        drift = torch.randn(40, 64, generator=generator)
        for _ in range(16):
            p.grad = drift + torch.randn(40, 64, generator=generator)
            optimizer.step()
        results.append(p.detach())
        assert ("exp_avg_codes" in optimizer.state[p]) == (bits != 32)
    distance = float((results[0] - results[1]).norm())
    assert 0 < distance < near * float(results[0].norm())


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_train(bits, reference):
    torch.manual_seed(0)
    model = gradpress.nn.quantize_(nn.Sequential(nn.Linear(32, 24, bias=False)), bits=bits)
    teacher = torch.randn(24, 32) / 6
    optimizer = fira(
        model.parameters(), rank=8, lr=5e-3, update_proj_gap=20, scale=1.0, reference=reference
    )
    losses = []
    for _ in range(150):
        x = torch.randn(64, 32)
        loss = (model(x) - x @ teacher.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:3])


def test_state_is_galores_and_one_number():
    p, q = nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(8, 6))
    ours, galore = fira([p], rank=3), gradpress.optim.GaLoreAdamW([q], rank=3)
    for parameter, optimizer in ((p, ours), (q, galore)):
        parameter.grad = torch.randn(8, 6)
        optimizer.step()
    sizes = [
        sum(t.nbytes for t in optimizer.state[x].values() if isinstance(t, torch.Tensor))
        for x, optimizer in ((p, ours), (q, galore))
    ]
    assert sizes[0] == sizes[1] + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_growth": 0.9}, "Invalid norm_growth value: 0.9"),
        ({"proj_type": "left"}, "Invalid proj_type value: 'left'"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        fira([nn.Parameter(torch.ones(2, 2))], **options)
