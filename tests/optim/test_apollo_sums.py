"""APOLLO's updates, of which sums of squares tell the norms: beside updates that are formed."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradpress
from gradpress.optim._limiter import told_norms

KINDS = [{"rank": 8}, {"rank": 1, "scale_type": "tensor", "scale_front": True, "scale": 9.0}]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["channel", "tensor"])


def run(shape, kind, dtype=torch.float32, *, steps=4, quantized=None, spoil=None, **options):
    """The weight, and the limiter's norms, after some steps."""
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False).to(dtype)
    if quantized:
        gradpress.nn.quantize_(layer, bits=quantized, group_size=32)
    options = {"lr": 1e-2, "weight_decay": 0.1, **kind, **options}
    optimizer = gradpress.optim.Apollo([layer.weight], **options)
    norms = []
    for t in range(steps):
        grad = (1 + t) * torch.randn(shape)
        if spoil is not None:
            spoil(grad)
        layer.weight.grad = grad.to(dtype)
        optimizer.step()
        norms.append(float(optimizer.state[layer.weight]["update_norm"]))
    values = layer.weight.dequantize() if quantized else layer.weight.detach()
    return values.float(), norms


def formed(monkeypatch):
    """Lets every update be formed before its norm is known."""
    monkeypatch.setattr("gradpress.optim.apollo.told_norms", lambda grads, *_: [None] * len(grads))


@kinds
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"norm_growth": None}])
def test_updates_need_not_be_formed(shape, kind, options, monkeypatch):
    weight, norms = run(shape, kind, **options)
    formed(monkeypatch)
    want, expected = run(shape, kind, **options)
    torch.testing.assert_close(weight, want, rtol=1e-6, atol=1e-6)
    assert norms == pytest.approx(expected, rel=1e-5)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_few_bits_need_no_update_either(dtype, kind, monkeypatch):
    """Codes at the brink go the other way: few of them, by one unit in the last place."""
    weight, norms = run((96, 64), kind, dtype)
    formed(monkeypatch)
    want, expected = run((96, 64), kind, dtype)
    assert float((weight != want).float().mean()) < 0.01
    torch.testing.assert_close(weight, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    assert norms == pytest.approx(expected, rel=1e-5)


@kinds
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_need_no_update_either(bits, kind, monkeypatch):
    """Scales differ in their last bits, and few codes by one."""
    weight, norms = run((96, 64), kind, quantized=bits)
    formed(monkeypatch)
    want, expected = run((96, 64), kind, quantized=bits)
    size = float(want.abs().max())
    assert float(((weight - want).abs() > 1e-5 * size).float().mean()) < 0.01
    torch.testing.assert_close(weight, want, rtol=0, atol=3 * size / 2**bits)
    assert norms == pytest.approx(expected, rel=1e-5)


@kinds
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_elements_that_are_not_finite_are_only_decayed(shape, kind, bad, monkeypatch):
    def spoil(grad):
        grad[3, 5] = bad

    weight, norms = run(shape, kind, spoil=spoil)
    start, _ = run(shape, kind, steps=0)
    if not math.isfinite(bad):
        rate = float(weight[3, 5] / start[3, 5])
        assert rate == pytest.approx((1 - 1e-3) ** 4, rel=1e-4)
    assert all(math.isfinite(norm) for norm in norms)
    assert float((weight - start).norm()) > 0.01
    formed(monkeypatch)
    want, _ = run(shape, kind, spoil=spoil)
    assert torch.equal(weight, want)


@kinds
@pytest.mark.parametrize("size", [1e-18, 1e-15, 1e12, 1e17])
def test_gradients_of_any_size_are_stepped(size, kind, monkeypatch):
    def spoil(grad):
        grad *= size

    weight, norms = run((64, 96), kind, spoil=spoil)
    formed(monkeypatch)
    want, expected = run((64, 96), kind, spoil=spoil)
    torch.testing.assert_close(weight, want, rtol=1e-6, atol=1e-6)
    assert norms == pytest.approx(expected, rel=1e-5)


@kinds
def test_matrices_in_different_steps_are_stepped_as_if_alone(kind):
    grads = [[torch.randn(12, 7), torch.randn(7, 12), torch.randn(9, 9)] for _ in range(5)]
    missing = {(1, 0), (2, 1)}

    def train(chosen):
        params = [nn.Parameter(torch.ones(g.shape)) for g in grads[0]]
        optimizer = gradpress.optim.Apollo(params, lr=1e-2, **kind)
        for t, row in enumerate(grads):
            for i, p in enumerate(params):
                p.grad = row[i] if i in chosen and (t, i) not in missing else None
            optimizer.step()
        return params

    together = train([0, 1, 2])
    for i in range(3):
        assert torch.equal(together[i], train([i])[i])
        assert float((together[i].detach() - 1).norm()) > 0


@kinds
def test_float32_weights_are_stepped_without_a_copy_of_the_gradient(kind):
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                sizes.append(0 if storage.data_ptr() in known else storage.nbytes())
            return result

    p = nn.Parameter(torch.zeros(700, 900))
    optimizer = gradpress.optim.Apollo([p], **kind)
    p.grad = torch.randn(700, 900)
    known = {t.untyped_storage().data_ptr() for t in (p, p.grad)}
    with Sizes():
        optimizer.step()
    assert 0 < max(sizes) < 0.5 * p.nbytes


@pytest.mark.parametrize("shape", [(700, 900), (900, 700), (3, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_told(shape, dtype):
    torch.manual_seed(0)
    grad = torch.randn(shape).to(dtype)
    side = (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])
    for factor in (torch.rand(side), torch.tensor(0.3)):
        want = np.linalg.norm(grad.double().numpy() * factor.double().numpy())
        (norm,) = told_norms([grad], [factor], None, 1.0)
        assert float(norm) == pytest.approx(want, rel=1e-6)
        # The error of a difference is that of its terms: a share of them is asked for.
        for share, told in ((0.02, True), (0.005, False)):
            squares = grad.double().square().sum(int(shape[0] >= shape[1]), keepdim=True)
            (norm,) = told_norms([grad], [factor], [squares * (1 - share)], 1.0)
            assert (norm is not None) == told
            if told:
                assert float(norm) == pytest.approx(want * share**0.5, rel=5e-5)


@pytest.mark.parametrize(
    ("value", "factor", "rate"),
    [
        (float("nan"), 1.0, 1.0),
        (float("inf"), 1.0, 1.0),
        (1e25, 1.0, 1.0),
        (1e-25, 1.0, 1.0),
        (0.0, 1.0, 1.0),
        (1.0, float("inf"), 1.0),
        (1.0, 1e20, 1e20),
    ],
)
def test_norms_are_not_told_where_numbers_leave_their_range(value, factor, rate):
    grads, factors = [torch.ones(4, 6), torch.ones(4, 6)], [torch.ones(1, 6), torch.ones(1, 6)]
    grads[1] *= 0.0
    grads[1][2, 3] = value
    factors[1][0, 3] = factor
    first, second = told_norms(grads, factors, None, rate)
    assert float(first) == pytest.approx(24**0.5)
    assert second is None
