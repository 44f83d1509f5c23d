"""AdamW with moments of half a byte."""

import copy

import pytest
import torch
from torch import nn

import gradpress
from gradpress.optim import AdamW4bit, AdamW8bit


def train(optimizer_class, steps=60, **options):
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(64, 64)
    model.load_state_dict(
        {"weight": torch.zeros(64, 64), "bias": torch.randn(64, generator=generator)}
    )
    optimizer = optimizer_class(model.parameters(), lr=1e-2, **options)
    goal = torch.randn(64, 64, generator=generator)
    for _ in range(steps):
        x = torch.randn(128, 64, generator=generator)
        optimizer.zero_grad()
        (model(x) - x @ goal).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_is_adamw8bit_with_four_bits():
    ours, optimizer = train(AdamW4bit)
    theirs, other = train(AdamW8bit, state_bits=4)
    assert torch.equal(ours.weight, theirs.weight)
    state = optimizer.state[ours.weight]
    assert state["exp_avg_codes"].shape == (64 * 64 // 2,)
    assert state["exp_avg_sq_scale"].shape == (64 * 64 // 128,)
    assert optimizer.param_groups[0]["weight_decay"] == 1e-2
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.grad = q.grad = torch.ones_like(p)
    optimizer.step(), other.step()
    assert torch.equal(ours.weight, theirs.weight)


def distance_left(model, seed=0):
    """Share of the teacher's norm that the weight is off by; one before training."""
    generator = torch.Generator().manual_seed(seed)
    torch.randn(64, generator=generator)
    goal = torch.randn(64, 64, generator=generator)
    return float((model.weight.detach().T - goal).norm() / goal.norm())


def test_learns_nearly_as_float32_moments_do():
    ours, _ = train(AdamW4bit)
    exact, _ = train(AdamW8bit, state_bits=32)
    assert distance_left(exact) < 0.75
    # Within 5 percent of where float32 moments get in 60 steps, though not by the same way.
    assert distance_left(ours) == pytest.approx(distance_left(exact), rel=0.05)
    way = (ours.weight - exact.weight).detach().norm() / exact.weight.detach().norm()
    assert 0 < float(way) < 0.32


def test_groups_may_take_more_bits():
    p, q = (nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    optimizer = AdamW4bit([{"params": [p]}, {"params": [q], "state_bits": 32}])
    p.grad, q.grad = torch.ones(64, 64), torch.ones(64, 64)
    optimizer.step()
    assert "exp_avg_codes" in optimizer.state[p]
    assert optimizer.state[q]["exp_avg"].dtype == torch.float32
    with pytest.raises(ValueError, match="Invalid state_bits value: 2"):
        AdamW4bit([p], state_bits=2)


def test_bytes_are_half_of_eight_bits():
    model = nn.Linear(256, 256, bias=False)
    held = {}
    for optimizer_class in (AdamW4bit, AdamW8bit):
        optimizer = optimizer_class(model.parameters())
        model.weight.grad = torch.ones(256, 256)
        optimizer.step()
        counted = gradpress.memory.count(model, optimizer).by_category["optimizer_states"]
        held[optimizer_class] = counted / 256**2
    assert held[AdamW4bit] == pytest.approx(1 + 8 / 128, rel=1e-3)
    assert held[AdamW8bit] == pytest.approx(2 + 8 / 256, rel=1e-3)
