"""Optimizers in the hands of accelerate: prepared, stepped, saved and loaded by it."""

import copy

import accelerate
import pytest
import torch
from tests.optim.test_drop_in import MAKERS, assert_same, setup, snapshot, train

every = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def forget_settings():
    """Accelerators keep theirs in the process, and so do those of a Trainer before."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture
def accelerator():
    forget_settings()
    yield accelerate.Accelerator(cpu=True)
    forget_settings()


def train_with(accelerator, model, optimizer, first, last):
    for i in range(first, last):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        accelerator.backward((model(x) - x.roll(1, 1)).square().mean())
        optimizer.step()


@every
def test_the_same_bits_as_without(make, accelerator):
    reference, expected = setup(make)
    train(reference, expected, 0, 4)
    model, optimizer = accelerator.prepare(*setup(make))
    train_with(accelerator, model, optimizer, 0, 4)
    assert_same(snapshot(reference, expected), snapshot(model, optimizer.optimizer))


@pytest.mark.parametrize("make", [m for m in MAKERS if "int8" not in m.__name__][::3])
def test_saved_and_loaded_in_the_middle_of_an_interval(make, accelerator, tmp_path):
    model, optimizer = accelerator.prepare(*setup(make))
    train_with(accelerator, model, optimizer, 0, 4)
    accelerator.save_state(tmp_path / "state")
    kept = copy.deepcopy(snapshot(model, optimizer.optimizer))
    train_with(accelerator, model, optimizer, 4, 7)
    ended = snapshot(model, optimizer.optimizer)
    accelerator.load_state(tmp_path / "state")
    assert_same(kept, snapshot(model, optimizer.optimizer))
    train_with(accelerator, model, optimizer, 4, 7)
    assert_same(ended, snapshot(model, optimizer.optimizer))


def test_clipping_and_accumulation(accelerator):
    """Through `accumulate`, which steps only at its boundary."""
    make = MAKERS[0]
    reference, expected = setup(make)
    model, optimizer = accelerator.prepare(*setup(make))
    accelerator.gradient_accumulation_steps = 2
    for i in range(6):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(i))
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - x.roll(1, 1)).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        ((reference(x) - x.roll(1, 1)).square().mean() / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
            expected.step()
            expected.zero_grad()
    assert_same(snapshot(reference, expected), snapshot(model, optimizer.optimizer))
