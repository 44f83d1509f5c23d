"""Stepping during the backward pass gives what stepping afterwards gives."""

import copy

import pytest
import torch
from tests.optim.test_drop_in import adamw8bit, adamw8bit_int8, assert_same, qgalore, qgalore_int8
from torch import nn

import gradpress
from gradpress.optim import fused_backward

MAKERS = [adamw8bit, adamw8bit_int8, qgalore, qgalore_int8]
every = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


class Model(nn.Module):
    """Embedding, shared weight, norm, and a branch that some batches leave out."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 24)
        self.hidden = nn.Linear(24, 24)
        self.branch = nn.Linear(24, 24, bias=False)
        self.norm = nn.LayerNorm(24)

    def forward(self, tokens, branch=True):
        x = self.hidden(torch.relu(self.hidden(self.embedding(tokens))))
        if branch:
            x = x + self.branch(x)
        return self.norm(x) @ self.embedding.weight.T


def setup(make, **options):
    torch.manual_seed(0)
    model = Model()
    return model, make(model, **options)


def loss_of(model, number, branch=True):
    tokens = torch.randint(20, (6,), generator=torch.Generator().manual_seed(number))
    return nn.functional.cross_entropy(model(tokens, branch), tokens.roll(1))


def values(model):
    return {k: v.clone() for k, v in gradpress.nn.flatten_state_dict(model).items()}


def train(model, optimizer, steps, accumulation, scheduler=None, first=0):
    for step in range(first, first + steps):
        for micro in range(accumulation):
            # The last pass of a step does not reach every parameter.
            branch = not (accumulation > 1 and micro == accumulation - 1)
            loss_of(model, 10 * step + micro, branch).div(accumulation).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


@every
@pytest.mark.parametrize("accumulation", [1, 4])
def test_same_bits_as_stepping_afterwards(make, accumulation):
    """With schedulers, shared weights, and parameters that a pass leaves out."""
    results = []
    for fused in (False, True):
        model, optimizer = setup(make)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        if fused:
            fused_backward(model, optimizer, accumulation_steps=accumulation)
        before = values(model)
        train(model, optimizer, 5, accumulation, scheduler)
        after = values(model)
        # A zero point need not move.
        moved = {name for name in before if not torch.equal(after[name], before[name])}
        assert moved >= {name for name in before if "zero_point" not in name}
        results.append((after, copy.deepcopy(optimizer.state_dict())))
    assert_same(results[0][0], results[1][0])
    for i, state in results[0][1]["state"].items():
        for name, value in state.items():
            other = results[1][1]["state"][i][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), (i, name)


def test_gradients_never_exist_all_at_once():
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    optimizer = gradpress.optim.AdamW8bit(model.parameters())
    alive = []

    def count(p):
        alive.append(sum(q.grad is not None for q in model.parameters()))

    # Seen by a hook that runs before the one that steps.
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    fused_backward(model, optimizer)
    model(torch.randn(4, 32)).square().mean().backward()
    assert len(alive) == 12
    assert max(alive) <= 2
    assert all(p.grad is None for p in model.parameters())


def test_clips_by_the_norm_of_the_step_before():
    most = 0.05
    model, optimizer = setup(adamw8bit)
    reference, other = setup(adamw8bit)
    handle = fused_backward(model, optimizer, max_grad_norm=most)
    assert handle.grad_norm is None
    previous = None
    for step in range(4):
        (loss_of(model, step) * 10**step).backward()
        optimizer.step()
        (loss_of(reference, step) * 10**step).backward()
        grads = [p.grad for p in reference.parameters()]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
        if previous is not None:
            divisor = ((previous + 1e-6) / most).clamp(min=1.0)
            for g in grads:
                g.div_(divisor)
        other.step()
        other.zero_grad()
        torch.testing.assert_close(handle.grad_norm, norm, rtol=1e-5, atol=0)
        previous = norm
    # A moment's code may differ by one where a division was rounded otherwise.
    for got, want in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


@every
def test_resumes_bit_for_bit(make):
    model, optimizer = setup(make)
    fused_backward(model, optimizer)
    train(model, optimizer, 2, 1)
    saved = values(model), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3, 1, first=2)
    again, resumed = setup(make)
    gradpress.nn.load_flat_state_dict_(again, saved[0])
    resumed.load_state_dict(saved[1])
    fused_backward(again, resumed)
    train(again, resumed, 3, 1, first=2)
    assert_same(values(model), values(again))


def test_removed_it_leaves_gradients_alone():
    model, optimizer = setup(adamw8bit)
    with fused_backward(model, optimizer):
        loss_of(model, 0).backward()
        assert model.hidden.weight.grad is None
    before = values(model)
    loss_of(model, 1).backward()
    assert model.hidden.weight.grad is not None
    assert_same(values(model), before)
    optimizer.step()
    assert not torch.equal(model.hidden.weight, before["hidden.weight"])


def test_later_groups_are_stepped_too():
    model, optimizer = setup(lambda m: gradpress.optim.AdamW8bit(m.hidden.parameters()))
    for p in (*model.embedding.parameters(), *model.branch.parameters(), *model.norm.parameters()):
        p.requires_grad_(False)
    fused_backward(model, optimizer)
    loss_of(model, 0).backward()
    model.norm.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.norm.parameters())})
    before = model.norm.weight.detach().clone()
    loss_of(model, 1).backward()
    optimizer.step()  # takes the gradients that nobody watched yet, and watches from now on
    assert not torch.equal(model.norm.weight, before)
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    assert model.norm.weight.grad is None


def test_bad_arguments_are_named():
    model, optimizer = setup(adamw8bit)
    with pytest.raises(TypeError, match=r"optimizer must be one of gradpress\.optim, got AdamW"):
        fused_backward(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="accumulation_steps must be at least 1, got 0"):
        fused_backward(model, optimizer, accumulation_steps=0)
    with pytest.raises(ValueError, match=r"max_grad_norm must be positive, got -1"):
        fused_backward(model, optimizer, max_grad_norm=-1)
    some = gradpress.optim.AdamW8bit(model.hidden.parameters())
    with pytest.raises(ValueError, match=r"lacks \['embedding.weight'"):
        fused_backward(model, some)
    with fused_backward(model, optimizer, accumulation_steps=3):
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="after 1 of 3 backward passes"):
            optimizer.step()


@every
def test_a_state_loaded_later_brings_its_options(make):
    """Loading makes new groups, which schedulers and the loop write to from then on."""
    results = []
    for fused in (False, True):
        model, optimizer = setup(make)
        if fused:
            fused_backward(model, optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        train(model, optimizer, 2, 1)
        results.append(values(model))
    assert_same(*results)
