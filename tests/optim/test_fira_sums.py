"""Fira's residuals, of which sums of squares tell the norms: beside residuals that are formed."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradpress


def fira(params, **options):
    return gradpress.optim.Fira(params, **{"weight_decay": 0.0, **options})


def run(shape, dtype=torch.float32, *, grads=4, quantized=None, spoil=None, **options):
    """The weight, and the limiter's norms, after some steps."""
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False).to(dtype)
    if quantized:
        gradpress.nn.quantize_(layer, bits=quantized, group_size=32)
    optimizer = fira([layer.weight], **{"rank": 8, "lr": 1e-2, "weight_decay": 0.1, **options})
    norms = []
    for t in range(grads):
        grad = (1 + t) * torch.randn(shape)
        if spoil is not None:
            spoil(grad)
        layer.weight.grad = grad.to(dtype)
        optimizer.step()
        norms.append(float(optimizer.state[layer.weight]["update_norm"]))
    values = layer.weight.dequantize() if quantized else layer.weight.detach()
    return values.float(), norms


def formed(monkeypatch):
    """Lets every residual be formed."""
    monkeypatch.setattr("gradpress.optim.fira.told_norms", lambda grads, *_: [None] * len(grads))


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
@pytest.mark.parametrize("options", [{}, {"reference": True, "scale": 0.5}, {"norm_growth": None}])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_residuals_need_not_be_formed(shape, options, bits, monkeypatch):
    """Two sums of float32 squares, or one of products: they err by some 1e-6."""
    weight, norms = run(shape, projector_bits=bits, **options)
    formed(monkeypatch)
    want, expected = run(shape, projector_bits=bits, **options)
    torch.testing.assert_close(weight, want, rtol=0, atol=1e-6)
    assert norms == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", [True, False])
def test_weights_of_few_bits_need_no_residual_either(dtype, rounding, monkeypatch):
    """Codes at the brink go the other way: few of them, by one unit in the last place."""
    weight, norms = run((96, 64), dtype, stochastic_rounding=rounding)
    formed(monkeypatch)
    want, expected = run((96, 64), dtype, stochastic_rounding=rounding)
    assert float((weight != want).float().mean()) < 0.01
    torch.testing.assert_close(weight, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    assert norms == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_need_no_residual_either(bits, monkeypatch):
    """Scales differ in their last bits, and few codes by one."""
    weight, norms = run((96, 64), quantized=bits)
    formed(monkeypatch)
    want, expected = run((96, 64), quantized=bits)
    assert float(((weight - want).abs() > 1e-6).float().mean()) < 0.01
    torch.testing.assert_close(weight, want, rtol=0, atol=0.3 / 2**bits)
    assert norms == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [0.5, 1e-2, 1e-4, 1e-7])
def test_residuals_of_any_share_have_their_norm(share):
    """Where differences of sums of squares would be lost, the residual is formed."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 24, dtype=torch.float64))[0] for n in (64, 96))
    values = torch.ones(24, dtype=torch.float64)
    values[4:] = share
    p = nn.Parameter(torch.zeros(64, 96))
    optimizer = fira([p], rank=4, lr=1e-2, scale=1.0)
    p.grad = ((left * values) @ right.T).float()
    optimizer.step()
    basis = optimizer.state[p]["projector"].double()
    grad, low_rank = p.grad.double(), basis.T @ p.grad.double()
    n = low_rank / (low_rank.abs() + 1e-8)
    phi = n.norm(dim=0) / (low_rank.norm(dim=0) + 1e-8)
    residual = (grad - basis @ low_rank) * phi
    # Float32 gradients are rounded by 6e-8 of the parts that are taken off.
    near = 1e-4 + 1e-7 / share
    norm = float(residual.norm())
    assert float(optimizer.state[p]["update_norm"]) == pytest.approx(norm, rel=near)
    want = -1e-2 * (basis @ n + residual)
    assert float((p.detach() - want).norm()) < 1e-5 * float(want.norm())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_columns_that_are_not_finite_are_only_decayed(shape, bad):
    def spoil(grad):
        (grad if shape[0] < shape[1] else grad.T)[3, 5] = bad

    weight, norms = run(shape, spoil=spoil)
    start, _ = run(shape, grads=0)
    moved = weight - start if shape[0] < shape[1] else (weight - start).T
    decayed = start * ((1 - 1e-3) ** 4 - 1)
    decayed = decayed if shape[0] < shape[1] else decayed.T
    keep = torch.arange(96) != 5
    torch.testing.assert_close(moved[:, 5], decayed[:, 5], rtol=1e-3, atol=1e-8)
    assert float((moved - decayed)[:, keep].abs().min(dim=0).values.max()) > 0
    assert float((moved - decayed)[:, keep].norm(dim=0).min()) > 1e-3
    assert all(math.isfinite(norm) for norm in norms)


@pytest.mark.parametrize("size", [1e-18, 1e-15, 1e12, 1e17])
def test_gradients_of_any_size_are_stepped(size, monkeypatch):
    def spoil(grad):
        grad *= size

    weight, norms = run((64, 96), spoil=spoil)
    formed(monkeypatch)
    want, expected = run((64, 96), spoil=spoil)
    torch.testing.assert_close(weight, want, rtol=0, atol=1e-6)
    assert norms == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reference", [False, True])
def test_matrices_in_different_steps_are_stepped_as_if_alone(reference):
    grads = [[torch.randn(12, 7), torch.randn(7, 12), torch.randn(9, 9)] for _ in range(5)]
    missing = {(1, 0), (2, 1)}

    def train(chosen):
        params = [nn.Parameter(torch.ones(grads[0][i].shape)) for i in chosen]
        optimizer = fira(params, rank=2, lr=1e-2, reference=reference)
        for t, row in enumerate(grads):
            for p, i in zip(params, chosen, strict=True):
                p.grad = None if (t, i) in missing else row[i]
            optimizer.step()
        return params

    for i, p in enumerate(train([0, 1, 2])):
        (alone,) = train([i])
        # The sketches of their subspaces are not the same.
        torch.testing.assert_close(p, alone, rtol=0, atol=1e-4)
        assert float((p.detach() - 1).norm()) > 0


def test_float32_weights_are_stepped_without_a_copy_of_the_gradient():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if (
                isinstance(result, torch.Tensor)
                and result.untyped_storage().data_ptr() not in known
            ):
                sizes.append(result.untyped_storage().nbytes())
            return result

    p = nn.Parameter(torch.zeros(700, 900))
    optimizer = fira([p], rank=4)
    p.grad = torch.randn(700, 900)
    known = {t.untyped_storage().data_ptr() for t in (p, p.grad)}
    optimizer.step()
    sizes.clear()
    with Sizes():
        optimizer.step()
    assert 0 < max(sizes) < 0.5 * p.nbytes
