"""Whole training steps through the CUDA kernels, beside those of the CPU."""

import copy

import pytest
import torch
from tests.cuda.devices import emulator

import gradpress


def model(dtype):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(96, 160), torch.nn.Linear(160, 64), torch.nn.Linear(64, 64)]
    return torch.nn.Sequential(*layers, torch.nn.LayerNorm(64)).to(dtype)


def train(net, optimizer, steps=4):
    """Gradients that do not depend on the parameters' last bits."""
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        for p in optimizer.param_groups[0]["params"]:
            grad = torch.randn(p.shape, generator=g) * (1 + torch.arange(p.shape[-1])) ** -0.5
            p.grad = grad.to(p.dtype)
        optimizer.step()
    return [p.dequantize() if hasattr(p, "codes") else p.detach() for p in net.parameters()]


def both(make, dtype, quantized=None):
    results = []
    for emulated in (False, True):
        net = model(dtype)
        if quantized:
            gradpress.nn.quantize_(net, bits=quantized, group_size=32)
        optimizer = make(net.parameters())
        if emulated:
            with emulator(2 + 4, seed=1) as used:
                values = train(net, optimizer)
            assert used
        else:
            values = train(net, optimizer)
        results.append((values, optimizer))
    return results


@pytest.mark.parametrize("bits", [8, 4, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_the_cpus_bit_for_bit(dtype, bits):
    (cpu, one), (device, other) = both(
        lambda params: gradpress.optim.AdamW8bit(
            params, lr=1e-2, state_bits=bits, min_8bit_size=100
        ),
        dtype,
    )
    assert all(torch.equal(*pair) for pair in zip(device, cpu, strict=True))
    states = [copy.deepcopy(o.state_dict()["state"]) for o in (one, other)]
    for i, state in states[0].items():
        for name, value in state.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(states[1][i][name], value), (i, name)


@pytest.mark.parametrize("quantized", [None, 8, 4])
@pytest.mark.parametrize("projector_bits", [4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qgalore_goes_the_cpus_way(dtype, projector_bits, quantized):
    """Products differ in their last bits: codes and bfloat16 by a step where they are at the brink.

    Adam's first steps are the learning rate whatever the gradient, so that a sign is what could
    differ: as far as one step, in a few places.
    """
    options = {"lr": 1e-2, "rank": 8, "update_proj_gap": 2, "projector_bits": projector_bits}
    (cpu, one), (device, other) = both(
        lambda params: gradpress.optim.QGaLoreAdamW(params, **options), dtype, quantized
    )
    start = [p.detach().float() for p in model(dtype).parameters()]
    for got, want, before in zip(device, cpu, start, strict=True):
        moved = (want.float() - before).norm()
        assert moved > 0
        assert (got.float() - want.float()).norm() <= 0.05 * moved
    assert one.refresh_counts() == other.refresh_counts()
    assert max(one.refresh_counts().values()) >= 2
    for a, b in zip(one.report().projected, other.report().projected, strict=True):
        assert a.energy == pytest.approx(b.energy, rel=1e-2)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights(bits):
    net = model(torch.float32)
    dense = net[0].weight.detach().clone()
    gradpress.nn.quantize_(net, bits=bits, group_size=32)
    with emulator() as used:
        values = net[0].weight.dequantize()
        again = gradpress.quant.quantize(dense, bits=bits, group_size=32)
    assert len(used) > 0
    assert torch.equal(values, net[0].weight.dequantize())
    expected = gradpress.quant.quantize(dense, bits=bits, group_size=32)
    assert torch.equal(again.dequantize(), expected.dequantize())


@pytest.mark.parametrize("name", ["AdamW8bit", "QGaLoreAdamW"])
@pytest.mark.parametrize("quantized", [None, 8])
def test_a_scalers_flag_is_read_on_the_device(name, quantized):
    """Skipped steps change nothing and do not count, whoever finds out, and whenever."""
    options = {"rank": 4, "update_proj_gap": 1} if name == "QGaLoreAdamW" else {}
    flags = [0.0, 1.0, 0.0, 0.0, 1.0]

    def run(optimizer):
        for step, flag in enumerate(flags):
            for i, p in enumerate(optimizer.param_groups[0]["params"]):
                g = torch.Generator().manual_seed(10 * step + i)
                p.grad = (1024 * torch.randn(p.shape, generator=g)).to(p.dtype)
                if flag and i == 1:
                    p.grad.view(-1)[0] = float("inf")
            optimizer.grad_scale = torch.tensor(1024.0)
            optimizer.found_inf = torch.tensor(flag)
            optimizer.step()
        return optimizer

    results = []
    for emulated in (False, True):
        net = model(torch.float32)
        if quantized:
            gradpress.nn.quantize_(net, bits=quantized, group_size=32)
        optimizer = getattr(gradpress.optim, name)(net.parameters(), lr=1e-2, **options)
        if emulated:
            with emulator(1):
                run(optimizer)
                state = copy.deepcopy(optimizer.state_dict()["state"])
        else:
            state = copy.deepcopy(run(optimizer).state_dict()["state"])
        values = [p.dequantize() if hasattr(p, "codes") else p.detach() for p in net.parameters()]
        results.append((values, state, optimizer))
    (cpu, one, _), (device, other, optimizer) = results
    assert all(s["step"] == 3 for s in one.values())
    assert all(s["step"] == 3 for s in other.values())
    start = [p.detach() for p in model(torch.float32).parameters()]
    for got, want, before in zip(device, cpu, start, strict=True):
        assert (got - want).norm() <= 0.05 * (want - before).norm()
        assert name == "QGaLoreAdamW" or torch.equal(got, want)
    if name == "QGaLoreAdamW":
        assert {s["projector_refreshes"] for s in other.values() if "projector_rank" in s} == {3}
    assert optimizer.nonfinite_gradients == 0


FAMILY = {
    "AdamW4bit": {},
    "AdamP": {},
    "SGDP": {"momentum": 0.9},
    "DiffGrad": {},
    "GaLoreAdamW": {"rank": 4, "update_proj_gap": 2, "moments": "rotate", "proj_type": "full"},
    "Apollo": {"rank": 4, "update_proj_gap": 2},
    "ApolloMini": {},
    "Fira": {"rank": 4, "update_proj_gap": 2},
}


@pytest.mark.parametrize("quantized", [None, 8])
@pytest.mark.parametrize("name", FAMILY)
def test_the_whole_family_goes_the_cpus_way(name, quantized):
    """Where products are summed in another order, codes move where they are at the brink."""
    make = getattr(gradpress.optim, name)
    options = {"lr": 1e-2, "min_8bit_size": 100, **FAMILY[name]}
    (cpu, _), (device, _) = both(lambda params: make(params, **options), torch.float32, quantized)
    start = [p.detach() for p in model(torch.float32).parameters()]
    for got, want, before in zip(device, cpu, start, strict=True):
        moved = (want - before).norm()
        assert moved > 0
        assert (got - want).norm() <= 0.05 * moved
