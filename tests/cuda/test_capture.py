"""Whole steps that a CUDA graph could record: nothing is read by the host."""

import pytest
import torch
from tests.cuda.devices import emulator
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradpress import _core
from gradpress.optim import AdamW4bit, AdamW8bit

#: Operators by which PyTorch tells the host a value.
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


class NothingRead(TorchDispatchMode):
    """Refuses to tell the host a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise AssertionError(f"{func} reads a tensor")
        return func(*args, **(kwargs or {}))


def parameters():
    g = torch.Generator().manual_seed(0)
    shapes = [((60, 80), torch.float32), ((9,), torch.float32), ((70, 50), torch.bfloat16)]
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s, dtype in shapes]


def train(optimizer, steps, mode=None):
    rate = optimizer.param_groups[0]["lr"]
    for step in steps:
        g = torch.Generator().manual_seed(step)
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            if step or i:
                p.grad = (64.0 * torch.randn(p.shape, generator=g)).to(p.dtype)
        optimizer.grad_scale = torch.tensor(64.0)
        optimizer.found_inf = torch.tensor([float(step in (1, 4))])
        rate.mul_(0.9)
        if mode is None:
            optimizer.step()
        else:
            with mode:
                optimizer.step()


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_the_kernels_count_as_the_cpu_does_and_the_host_reads_nothing(bits):
    results = []
    for capturable, emulated in ((False, False), (True, False), (True, True)):
        options = {"state_bits": bits, "min_8bit_size": 100, "capturable": capturable}
        optimizer = AdamW8bit(parameters(), lr=torch.tensor(1e-2), **options)
        if emulated:
            with emulator(1) as used:
                train(optimizer, range(7), NothingRead())
            assert "optim.cu" in used
        else:
            train(optimizer, range(7))
        params = optimizer.param_groups[0]["params"]
        states = [t for s in optimizer.state_dict()["state"].values() for t in s.values()]
        results.append([*params, *map(torch.as_tensor, states)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_other_steps_do_read():
    """What the test above would notice."""
    optimizer = AdamW8bit(parameters(), lr=torch.tensor(1e-2))
    with emulator(1), pytest.raises(AssertionError, match="_local_scalar_dense"):
        train(optimizer, range(2), NothingRead())


@pytest.fixture
def calls(monkeypatch):
    """What the core would have been given."""
    given = []
    for name in ("adamw_step", "adamw_blockwise_step"):
        monkeypatch.setattr(_core, name, lambda *arguments: given.append(arguments))
    return given


@pytest.mark.parametrize("make", [AdamW8bit, AdamW4bit])
def test_tensors_on_a_device_are_never_read(make, calls):
    """Tensors without values, of which reading one is an error, on a device that need not be."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(n, device="cuda")) for n in (8192, 8)]
        optimizer = make(params, capturable=True)
        optimizer.param_groups[0]["lr"] = rate = torch.tensor(1e-3, device="cuda")
        for step in range(3):
            for p in params[step == 0 :]:
                p.grad = torch.ones_like(p)
            if step == 2:
                optimizer.grad_scale = torch.ones(1, device="cuda")
                optimizer.found_inf = torch.zeros(1, device="cuda")
            optimizer.step()
        counters = [optimizer.state[p]["step"] for p in params]
        assert {(c.device.type, c.dtype, c.shape) for c in counters} == {
            ("cuda", torch.float32, ())
        }
        assert len(calls) == 5
        *_, scale, found_inf, lr, steps = calls[-1]
        assert (scale, found_inf) == (optimizer.grad_scale, optimizer.found_inf)
        assert lr.device == rate.device
        assert steps[0] is counters[1]
        # A rate that is on the host is a number there.
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.found_inf = None
        optimizer.step()
        assert calls[-1][-2] is None
        optimizer.param_groups[0]["capturable"] = False
        with pytest.raises(DataDependentOutputException):
            optimizer.step()


def test_counters_follow_the_flag_of_a_checkpoint(calls):
    with FakeTensorMode():
        p = nn.Parameter(torch.ones(8, device="cuda"))
        p.grad = torch.ones_like(p)
        for first, second in ((True, False), (False, True), (True, True)):
            optimizer = AdamW8bit([p], capturable=first)
            optimizer.state[p] = {
                "step": torch.zeros((), device="cuda" if first else "cpu"),
                "tensor_id": 0,
                "exp_avg": torch.zeros(8, device="cuda"),
                "exp_avg_sq": torch.zeros(8, device="cuda"),
            }
            state = optimizer.state_dict()
            state["param_groups"][0]["capturable"] = second
            other = AdamW8bit([p], capturable=first)
            other.load_state_dict(state)
            assert other.state[p]["step"].device.type == ("cuda" if second else "cpu")
            if second:
                other.step()
                assert calls[-1][-1][0] is other.state[p]["step"]
