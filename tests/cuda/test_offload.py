"""States of parameters on a CUDA device, on the host between steps."""

import copy

import pytest
import torch
from torch import nn

import gradpress

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MAKERS = {
    "AdamW8bit": {},
    "AdamP": {"state_bits": 32},
    "QGaLoreAdamW": {"rank": 64, "update_proj_gap": 2},
}


def make(name, offloaded, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))).cuda()
    optimizer = getattr(gradpress.optim, name)(model.parameters(), lr=1e-2, **MAKERS[name])
    if offloaded:
        gradpress.optim.offload_states(optimizer, **options)
    return model, optimizer


def train(model, optimizer, first, last):
    for step in range(first, last):
        x = torch.randn(16, 1024, generator=torch.Generator().manual_seed(step)).cuda()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(one, other):
    for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(p, q)
        state, reference = one[1].state[p], other[1].state[q]
        assert state.keys() == reference.keys()
        for name, value in state.items():
            got, want = torch.as_tensor(value).cpu(), torch.as_tensor(reference[name]).cpu()
            assert torch.equal(got, want), name


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("pin_memory", [True, False])
def test_same_bits_on_the_host(name, pin_memory):
    one = make(name, True, pin_memory=pin_memory, portion_bytes=3 << 20)
    other = make(name, False)
    for step in range(5):
        train(*one, step, step + 1)
        train(*other, step, step + 1)
        for state in one[1].state.values():
            moving = [t for n, t in state.items() if n in one[1]._KEEP_DTYPE and t.dim()]
            assert {t.device.type for t in moving} == {"cpu"}
            on_host = {n for n in state if n in one[1]._ON_HOST}
            pinned = [state[n].is_pinned() for n in state.keys() & one[1]._KEEP_DTYPE - on_host]
            assert all(pinned) == pin_memory
        assert_same(one, other)
    saved = copy.deepcopy(other[1].state_dict())
    one[1].load_state_dict(saved)
    other[1].load_state_dict(one[1].state_dict())
    train(*one, 5, 7)
    train(*other, 5, 7)
    assert_same(one, other)


def test_copies_and_fused_backward():
    one, other = make("AdamW8bit", True), make("AdamW8bit", False)
    for model, optimizer in (one, other):
        gradpress.optim.fused_backward(model, optimizer)
        train(model, optimizer, 0, 4)
    assert_same(one, other)
    twin = copy.deepcopy(one)
    train(*twin, 4, 6)
    train(*other, 4, 6)
    assert_same(twin, other)


def test_memory_of_the_device_is_bounded():
    used = []
    for offloaded in (False, True):
        model, optimizer = make("AdamP", offloaded, portion_bytes=9 << 20)
        train(model, optimizer, 0, 2)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
        del model, optimizer
    # Two float32 moments of four matrices.
    assert used[0] - used[1] >= 2 * 4 * 4 * 1024**2


def test_removed_the_states_are_on_the_device_again():
    model, optimizer = make("AdamW8bit", False)
    reference = make("AdamW8bit", False)
    with gradpress.optim.offload_states(optimizer):
        train(model, optimizer, 0, 2)
    train(*reference, 0, 2)
    assert all(s["exp_avg_codes"].is_cuda for s in optimizer.state.values() if "exp_avg_codes" in s)
    train(model, optimizer, 2, 3)
    train(*reference, 2, 3)
    assert_same((model, optimizer), reference)
