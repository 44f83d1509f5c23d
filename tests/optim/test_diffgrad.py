"""diffGrad: published trajectories, a float64 transcription, and the friction's limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import elementwise as reference
from torch import nn

import gradpress
from gradpress.optim import DiffGrad

AT = (1, 2, 10, 50, 100, 299)


def f1(x):
    return 2 * x + 0.6 if x <= 0 else 2 * x - 0.4


def f2(x):
    # The first step ends on the edge at -0.9, where rounding would decide; the table's went left.
    edge = -0.9 + 1e-5
    return -40.0 if x <= edge else x * math.cos(8 * x) + math.sin(8 * x) + 3 * x * x


def f3(x):
    for end, slope in ((-0.5, 2 * x), (-0.4, 1.0), (0, -7 / 8), (0.4, 7 / 8), (0.5, -1.0)):
        if x <= end:
            return slope
    return 2 * x


# The analytical notebooks of the original implementation: x0 = -1, lr 0.1, betas (0.95, 0.999).
TABLE = [
    (f1, "adam", (-0.900000, -0.800487, -0.121852, 0.118662, 0.221195, 0.200115)),
    (f1, "abs", (-0.919782, -0.865961, -0.464024, -0.377654, -0.295383, -0.300071)),
    (f1, "bug", (-0.919782, -0.869950, -0.486055, -0.362859, -0.287793, -0.300168)),
    (f2, "adam", (-0.900000, -0.800000, -0.418513, 0.083704, -0.031819, 0.000177)),
    (f2, "abs", (-0.900000, -0.850000, -0.604532, -0.687887, -0.892179, -0.812145)),
    (f3, "adam", (-0.900000, -0.800270, -0.114691, 0.100576, -0.003421, 0.000510)),
    (f3, "abs", (-0.911920, -0.857648, -0.426936, -0.086673, 0.055829, 0.013565)),
]
OPTIONS = {"lr": 0.1, "betas": (0.95, 0.999)}


def trajectory(slope, make):
    p = nn.Parameter(torch.tensor([-1.0]))
    optimizer = make([p])
    values = []
    for _ in range(AT[-1]):
        p.grad = torch.tensor([slope(p.item())])
        optimizer.step()
        values.append(p.item())
    return [values[t - 1] for t in AT]


@pytest.mark.parametrize(("slope", "variant", "expected"), TABLE)
def test_the_transcription_follows_the_table(slope, variant, expected):
    model = reference.DiffGrad([-1.0], variant=variant, **OPTIONS)
    values = []
    for _ in range(AT[-1]):
        model.step([slope(model.w.item())])
        values.append(model.w.item())
    np.testing.assert_allclose([values[t - 1] for t in AT], expected, atol=6e-7)


@pytest.mark.parametrize(("slope", "variant", "expected"), TABLE)
def test_golden_trajectories(slope, variant, expected):
    def adam(params):
        return gradpress.optim.AdamW8bit(params, state_bits=32, weight_decay=0.0, **OPTIONS)

    def diffgrad(params):
        return DiffGrad(params, state_bits=32, **OPTIONS)

    values = trajectory(slope, adam if variant == "adam" else diffgrad)
    # Three hundred float32 steps of up to 0.1.
    if variant == "bug":
        assert abs(values[1] - expected[1]) > 1e-3
    else:
        np.testing.assert_allclose(values, expected, atol=4e-5)


def test_finds_the_global_minimum_that_adam_misses():
    assert trajectory(f1, lambda p: DiffGrad(p, **OPTIONS))[-1] == pytest.approx(-0.3, abs=1e-3)
    plain = trajectory(f1, lambda p: gradpress.optim.AdamW8bit(p, weight_decay=0.0, **OPTIONS))
    assert plain[-1] == pytest.approx(0.2, abs=1e-3)


@given(
    shape=st.lists(st.integers(0, 7), max_size=3),
    variant=st.sampled_from(["abs", "signed", "wide"]),
    eps_of_reference=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1e-5, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_transcription(shape, variant, eps_of_reference, weight_decay, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    options = {
        "lr": 1e-2,
        "eps": 1e-4,
        "weight_decay": weight_decay,
        "variant": variant,
        "reference": eps_of_reference,
    }
    p = nn.Parameter(torch.randn(shape, generator=generator))
    expected = reference.DiffGrad(p.detach().numpy(), **options)
    optimizer = DiffGrad([p], state_bits=32, **options)
    for _ in range(6):
        p.grad = scale * torch.randn(shape, generator=generator)
        expected.step(p.grad.numpy())
        optimizer.step()
    # Six steps of up to 5e-2; the native step rounds 1 - beta2 to float32.
    np.testing.assert_allclose(p.detach().numpy(), expected.w, atol=5e-6, rtol=1e-6)


def difference_of_steps(gradients, bits):
    """The last change of parameters under diffGrad, and under Adam."""
    changes = []
    for optimizer_class in (DiffGrad, gradpress.optim.AdamW8bit):
        p = nn.Parameter(torch.zeros(64, 64))
        optimizer = optimizer_class([p], lr=1e-2, weight_decay=0.0, state_bits=bits)
        for gradient in gradients:
            before = p.detach().clone()
            p.grad = gradient.clone()
            optimizer.step()
        changes.append(p.detach() - before)
    return changes


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_constant_gradients_halve_the_step_and_wild_ones_leave_adam(bits):
    constant = torch.randn(64, 64).bfloat16().float()  # exact as an earlier gradient of 16 bits
    ours, adam = difference_of_steps([constant] * 3, bits)
    torch.testing.assert_close(ours, 0.5 * adam, rtol=2e-5, atol=1e-9)
    wild = 1000 * torch.randn(64, 64).sign()
    ours, adam = difference_of_steps([wild, -wild, wild], bits)
    torch.testing.assert_close(ours, adam, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize(("variant", "low", "high"), [("abs", 0.5, 1), ("signed", 0, 1),
                                                      ("wide", 0.5, 5)])  # fmt: skip
def test_friction_stays_in_its_range(bits, variant, low, high):
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(64, 64))
    q = nn.Parameter(torch.zeros(64, 64))
    ours = DiffGrad([p], lr=1.0, state_bits=bits, variant=variant)
    adam = gradpress.optim.AdamW8bit([q], lr=1.0, weight_decay=0.0, state_bits=bits)
    factors = []
    for _ in range(10):
        p.grad = 10 * torch.randn(64, 64, generator=generator)
        q.grad = p.grad.clone()
        with torch.no_grad():
            p.zero_(), q.zero_()
        ours.step(), adam.step()
        factors.append((p / q).detach())
    factors = torch.stack(factors)
    assert low - 1e-5 <= float(factors.min()) < low + 0.05 * (high - low)
    assert high - 0.05 * (high - low) < float(factors.max()) <= high + 1e-5


@pytest.mark.parametrize(("bits", "dtype"), [(32, torch.float32), (8, torch.bfloat16),
                                             (4, torch.bfloat16)])  # fmt: skip
def test_the_earlier_gradient_is_a_copy(bits, dtype):
    p = nn.Parameter(torch.zeros(64, 64))
    small = nn.Parameter(torch.zeros(3))
    optimizer = DiffGrad([p, small], state_bits=bits)
    for q in (p, small):
        q.grad = torch.ones_like(q)
    optimizer.step()
    for q in (p, small):
        q.grad.fill_(7.0)
    assert optimizer.state[p]["previous_grad"].dtype == dtype
    assert optimizer.state[small]["previous_grad"].dtype == torch.float32
    assert (optimizer.state[p]["previous_grad"] == 1).all()
    assert (optimizer.state[small]["previous_grad"] == 1).all()
    own = DiffGrad([p], state_bits=8, previous_grad_bits=32)
    own.step()
    assert own.state[p]["previous_grad"].dtype == torch.float32


def test_maximize_and_scale_reach_the_earlier_gradient():
    p = nn.Parameter(torch.zeros(4))
    optimizer = DiffGrad([p], maximize=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    p.grad = torch.full((4,), 16.0)
    optimizer.step()
    assert optimizer.state[p]["previous_grad"].tolist() == [-2.0] * 4
    assert (p > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "DFC3"}, "Invalid variant value: 'DFC3'"),
        ({"previous_grad_bits": 8}, "Invalid previous_grad_bits value: 8"),
        ({"state_bits": 16}, "Invalid state_bits value: 16"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        DiffGrad([nn.Parameter(torch.ones(2))], **options)
