"""Steps that CUDA graphs record and replay, beside those that are launched one by one."""

import copy

import pytest
import torch
from torch import nn

from gradpress.optim import AdamW8bit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def parameters():
    g = torch.Generator().manual_seed(0)
    shapes = [((300, 200), torch.float32), ((9,), torch.float32), ((70, 500), torch.bfloat16)]
    return [nn.Parameter(torch.randn(s, generator=g).to("cuda", dtype)) for s, dtype in shapes]


class Inputs:
    """What changes from step to step, in tensors that stay where they are."""

    def __init__(self, optimizer, scaled):
        self.params = optimizer.param_groups[0]["params"]
        self.rate = optimizer.param_groups[0]["lr"]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        if scaled:
            optimizer.grad_scale = torch.full((1,), 64.0, device="cuda")
            optimizer.found_inf = torch.zeros(1, device="cuda")
        self.found_inf = getattr(optimizer, "found_inf", None)

    def fill(self, step):
        g = torch.Generator().manual_seed(step)
        for p in self.params:
            p.grad.copy_(torch.randn(p.shape, generator=g))
        self.rate.fill_(1e-2 * 0.9**step)
        if self.found_inf is not None:
            self.found_inf.fill_(float(step in (3, 5)))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_replays_are_steps(bits, scaled):
    options = {"state_bits": bits, "min_8bit_size": 100}
    eager = AdamW8bit(parameters(), lr=torch.tensor(1e-2, device="cuda"), **options)
    inputs = Inputs(eager, scaled)
    for step in range(8):
        inputs.fill(step)
        eager.step()

    captured = AdamW8bit(
        parameters(), lr=torch.tensor(1e-2, device="cuda"), capturable=True, **options
    )
    inputs = Inputs(captured, scaled)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(2):
            inputs.fill(step)
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(2, 8):
        inputs.fill(step)
        graph.replay()

    pairs = zip(*(o.param_groups[0]["params"] for o in (eager, captured)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    states = [copy.deepcopy(o.state_dict()["state"]) for o in (eager, captured)]
    for i, state in states[0].items():
        for name, value in state.items():
            ours, theirs = (torch.as_tensor(v).cpu() for v in (states[1][i][name], value))
            assert torch.equal(ours, theirs), name
        assert states[1][i]["step"] == (6 if scaled else 8)
        assert states[1][i]["step"].is_cuda


def test_steps_wait_for_nothing():
    optimizer = AdamW8bit(parameters(), lr=torch.tensor(1e-2, device="cuda"), capturable=True)
    inputs = Inputs(optimizer, scaled=True)
    inputs.fill(0)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(state["step"] == 2 for state in optimizer.state.values())


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("capturable", [False, True])
def test_what_cannot_be_recorded_says_so(capturable):
    """Without the flag, and before the first step, which makes the states."""
    optimizer = AdamW8bit(parameters(), capturable=capturable)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    message = "must exist before" if capturable else "capturable is False"
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(graph):
        optimizer.step()
