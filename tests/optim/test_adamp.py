"""AdamP and SGDP: the projection's properties, a float64 transcription, and the original."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.reference import elementwise as reference
from torch import nn

from gradpress.optim import SGDP, AdamP

EXACT = {"state_bits": 32}


def gradient_of(kind, weight, generator):
    """A gradient that passes the test of the rows, of the whole only, of neither, or any."""
    g = torch.randn(weight.shape, generator=generator)
    if weight.dim() < 2 or not weight.numel() or kind == "random":
        return g
    rows, w = g.view(g.shape[0], -1), weight.reshape(weight.shape[0], -1)
    if kind == "rows":
        rows -= w * ((rows * w).sum(1) / w.square().sum(1)).unsqueeze(1)
    elif kind == "whole":
        rows += 3 * w
        rows -= w * ((rows * w).sum() / w.square().sum())
    else:
        rows += 5 * w
    return g


def run(optimizer_class, shape, kind, seed, steps, **options):
    """The parameter, its transcription, and the closest that a decision came."""
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(shape, generator=generator))
    expected = getattr(reference, optimizer_class.__name__)(p.detach().numpy(), **options)
    optimizer = optimizer_class([p], **EXACT, **options)
    nearest, projected = math.inf, 0
    for _ in range(steps):
        p.grad = gradient_of(kind, p.detach(), generator)
        expected.step(p.grad.numpy())
        optimizer.step()
        nearest = min(nearest, expected.nearest)
        projected += expected.projected
    return p, expected, nearest, projected


CASES = {
    "shape": st.lists(st.integers(0, 6), max_size=4),
    "kind": st.sampled_from(["random", "rows", "whole", "parallel"]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "delta": st.sampled_from([0.0, 0.1, 3.0]),
    "nesterov": st.booleans(),
    "seed": st.integers(0, 1000),
}


@given(**CASES)
def test_adamp_agrees_with_the_transcription(shape, kind, seed, **options):
    p, expected, nearest, _ = run(AdamP, shape, kind, seed, 5, lr=1e-2, eps=1e-4, **options)
    assume(nearest > 1e-3)  # rounding may decide otherwise
    # Five steps of up to 1e-2; the native step rounds 1 - beta2 to float32.
    np.testing.assert_allclose(p.detach().numpy(), expected.w, atol=2e-6, rtol=1e-6)


@given(momentum=st.sampled_from([0.0, 0.5, 0.9]), dampening=st.sampled_from([0.0, 0.3]), **CASES)
def test_sgdp_agrees_with_the_transcription(shape, kind, seed, **options):
    p, expected, nearest, _ = run(SGDP, shape, kind, seed, 5, lr=1e-2, **options)
    assume(nearest > 1e-3)
    np.testing.assert_allclose(p.detach().numpy(), expected.w, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(("kind", "times"), [("rows", 5), ("whole", 5), ("parallel", 0)])
@pytest.mark.parametrize("optimizer_class", [AdamP, SGDP])
def test_every_branch_is_taken(optimizer_class, kind, times):
    options = {"lr": 1e-2, "weight_decay": 0.1}
    p, expected, _, projected = run(optimizer_class, (6, 4, 3), kind, 0, 5, **options)
    assert projected == times
    np.testing.assert_allclose(p.detach().numpy(), expected.w, atol=2e-6)


def originals():
    adamp = pytest.importorskip("adamp")
    return {AdamP: adamp.AdamP, SGDP: adamp.SGDP}


@pytest.mark.parametrize("kind", ["random", "rows", "whole", "parallel"])
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (AdamP, {"lr": 1e-2, "weight_decay": 0.05}),
        (AdamP, {"lr": 1e-2, "nesterov": True, "betas": (0.8, 0.99), "eps": 1e-4}),
        (SGDP, {"lr": 1e-2, "weight_decay": 0.05}),
        (SGDP, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True}),
        (SGDP, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "delta": 0.0}),
    ],
)
def test_agrees_with_the_original(optimizer_class, options, kind):
    original_class = originals()[optimizer_class]
    generator = torch.Generator().manual_seed(5)
    shapes = [(9,), (8, 12), (6, 3, 5, 5), ()]
    ours = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = optimizer_class(ours, **EXACT, **options)
    original = original_class(theirs, **options)
    for _ in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = gradient_of(kind, q.detach(), generator)
            q.grad = p.grad.clone()
        optimizer.step()
        original.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)


def test_the_momentum_is_not_projected():
    """The original writes the projected update into its momentum; the paper does not."""
    w = torch.eye(2, 3)
    p = nn.Parameter(w.clone())
    optimizer = SGDP([p], lr=1e-3, momentum=0.9, **EXACT)
    p.grad = w.clone()  # parallel: no projection
    optimizer.step()
    p.grad = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])  # orthogonal
    optimizer.step()
    expected = 0.9 * w + p.grad
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected)
    torch.testing.assert_close(p.detach()[:, 2], torch.full((2,), -1e-3))
    torch.testing.assert_close(p.detach()[:, :2], 0.999 * w[:, :2])


def test_signatures_are_those_of_the_original():
    for ours, theirs in originals().items():
        mine = list(inspect.signature(ours).parameters.values())[:-1]
        other = list(inspect.signature(theirs).parameters.values())
        assert [p.name for p in mine] == [p.name for p in other]
        for p, q in zip(mine, other, strict=True):
            assert p.kind == q.kind
            assert p.name in ("params", "lr") or p.default == q.default


def row_norms(x):
    return x.detach().double().flatten(1).norm(dim=1)


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("optimizer_class", [AdamP, SGDP])
def test_pythagoras(optimizer_class, bits):
    generator = torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.randn(64, 8, 3, 3, generator=generator))
    options = {} if optimizer_class is AdamP else {"momentum": 0.9}
    optimizer = optimizer_class([p], lr=0.1, state_bits=bits, **options)
    for _ in range(5):
        before = p.detach().clone()
        p.grad = gradient_of("rows", before, generator)
        optimizer.step()
        step = row_norms(p.detach() - before)
        hypotenuse = (row_norms(before).square() + step.square()).sqrt()
        torch.testing.assert_close(row_norms(p), hypotenuse, rtol=2e-6, atol=0)
        assert float(step.min()) > 0.05


def turn(optimizer_class, lr, momentum):
    """How much a scale-invariant weight has grown, and how well it points in the end."""
    goal = torch.tensor([1.0, 0.0])
    angle = math.radians(150)
    w = nn.Parameter(torch.tensor([[math.cos(angle), math.sin(angle)]]))
    optimizer = optimizer_class([w], lr=lr, momentum=momentum)
    largest = 1.0
    for _ in range(1000):
        optimizer.zero_grad()
        (-torch.cosine_similarity(w, goal[None]).sum()).backward()
        optimizer.step()
        largest = max(largest, float(w.detach().norm()))
    return largest, float(torch.cosine_similarity(w.detach(), goal[None]))


@pytest.mark.parametrize(
    ("lr", "momentum", "most", "growth_of_sgd"),
    [
        (0.01, 0.9, 1.1, 2.13),
        (0.01, 0.99, 1.1, 19.3),
        (0.02, 0.9, 1.15, 2.85),
        (0.02, 0.99, 1.15, 27.3),
    ],
)
def test_scale_invariant_weights_keep_their_norm(lr, momentum, most, growth_of_sgd):
    largest, cosine = turn(SGDP, lr, momentum)
    assert largest <= most
    assert cosine > 0.999
    assert turn(torch.optim.SGD, lr, momentum)[0] == pytest.approx(growth_of_sgd, rel=0.01)


@pytest.mark.parametrize("optimizer_class", [AdamP, SGDP])
def test_threshold_and_wd_ratio(optimizer_class):
    """Gradients just below and just above the threshold; the decay tells which it was."""
    columns = 16
    threshold = 0.1 / math.sqrt(columns)
    for part, ratio in ((0.98, 0.25), (1.02, 1.0)):
        w = torch.zeros(4, columns)
        w[:, 0] = 1.0
        p = nn.Parameter(w.clone())
        p.grad = torch.zeros(4, columns)
        p.grad[:, 0], p.grad[:, 1] = part * threshold, math.sqrt(1 - (part * threshold) ** 2)
        options = {} if optimizer_class is AdamP else {"momentum": 0.75}
        optimizer = optimizer_class([p], lr=0.01, weight_decay=0.5, wd_ratio=0.25, delta=0.1,
                                    **options)  # fmt: skip
        optimizer.step()
        decay = 0.01 * 0.5 * ratio / (1 if optimizer_class is AdamP else 0.25)
        step = 0.0 if ratio != 1.0 else 0.01 * (1 if optimizer_class is AdamP else p.grad[0, 0])
        expected = torch.full((4,), 1 - decay - step)
        torch.testing.assert_close(p.detach()[:, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("optimizer_class", [AdamP, SGDP])
def test_zero_rows_give_no_nan(optimizer_class, eps):
    """They count as scale-invariant, so that the other rows decide, and are projected by row."""
    generator = torch.Generator().manual_seed(3)
    start = torch.zeros(4, 8)
    start[:2] = torch.randn(2, 8, generator=generator)
    grad = torch.ones(4, 8)
    grad[:2] = gradient_of("rows", start[:2], generator)
    p = nn.Parameter(start.clone())
    optimizer = optimizer_class([p], lr=0.1, eps=eps, weight_decay=0.1)
    p.grad = grad
    optimizer.step()
    torch.testing.assert_close(p.detach()[2:], torch.full((2, 8), -0.1), rtol=1e-5, atol=0)
    change = p.detach() - start * (1 - 0.1 * 0.1 * 0.1)  # decayed as projected
    assert float((change * start).sum(1).abs().max()) < 1e-6
    assert float(change.norm(dim=1).min()) > 0.1
    p.data.zero_()
    optimizer.step()
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("optimizer_class", [AdamP, SGDP])
@pytest.mark.parametrize("shape", [(), (64,)])
def test_vectors_are_never_projected(optimizer_class, shape):
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.ones(shape)
    if shape:
        p.grad[::2] = -1.0  # orthogonal
    before = (p.detach() * p.grad).clone()
    optimizer_class([p], lr=0.1, delta=1e9, weight_decay=1.0, wd_ratio=0.0).step()
    expected = p.grad * (before - 0.1) - 0.1
    torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_one_poisoned_element_does_not_stop_the_others():
    for optimizer_class in (AdamP, SGDP):
        generator = torch.Generator().manual_seed(2)
        start = torch.randn(64, 64, generator=generator)
        p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        ours, clean = (optimizer_class([x], lr=0.1, weight_decay=0.1, **EXACT) for x in (p, q))
        p.grad = gradient_of("rows", start, generator)
        p.grad[3, 5], p.grad[4, 6] = float("nan"), float("-inf")
        q.grad = p.grad.nan_to_num(0.0, neginf=0.0)
        ours.step(), clean.step()
        assert ours.nonfinite_gradients == 2
        assert clean.nonfinite_gradients == 0
        same = torch.ones(64, 64, dtype=torch.bool)
        same[3, 5] = same[4, 6] = False
        assert torch.equal(p[~same], start[~same])
        assert torch.equal(p[same], q[same])
        assert not torch.equal(p[same], start[same])


def test_sgdp_without_momentum_holds_no_moment():
    p = nn.Parameter(torch.ones(64, 64))
    optimizer = SGDP([p], lr=0.1)
    p.grad = torch.ones(64, 64)
    optimizer.step()
    assert set(optimizer.state[p]) == {"step", "tensor_id"}
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.step()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((64, 64), 1 - 0.1 * (1 + 1 + 1.5)))
    assert optimizer.state[p]["momentum_buffer_codes"].dtype == torch.uint8


def test_no_projection_and_no_decay_is_sgd():
    p, q = (nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    ours = SGDP([p], lr=0.1, momentum=0.9, delta=0.0, **EXACT)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for i in range(5):
        p.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(i))
        q.grad = p.grad.clone()
        ours.step(), theirs.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("optimizer_class", [AdamP, SGDP])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "Invalid learning rate: -0.1"),
        ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
        ({"delta": -0.1}, "Invalid delta value: -0.1"),
        ({"wd_ratio": float("nan")}, "Invalid wd_ratio value: nan"),
        ({"state_bits": 2}, "Invalid state_bits value: 2"),
    ],
)
def test_invalid_options(optimizer_class, options, message):
    with pytest.raises(ValueError, match=message):
        optimizer_class([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **options})


def test_invalid_momenta():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="lr"):
        SGDP([p])
    with pytest.raises(ValueError, match=r"Invalid momentum value: -0\.1"):
        SGDP([p], lr=0.1, momentum=-0.1)
    with pytest.raises(ValueError, match="divided by 1 - momentum"):
        SGDP([p], lr=0.1, momentum=1.0, weight_decay=0.1)
    SGDP([p], lr=0.1, momentum=1.0)
