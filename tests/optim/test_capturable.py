"""`capturable`: steps counted where the parameters are, with the bits of steps that are not."""

import copy
import io

import pytest
import torch
from torch import nn

import gradpress
from gradpress.nn import QuantizedWeight
from gradpress.optim import AdamW4bit, AdamW8bit, _base, _capture

BITS = pytest.mark.parametrize("bits", [4, 8, 32])
SHAPES = [(64, 96), (7,), (), (3, 0), (40, 30)]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters():
    dense = [nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    half = [nn.Parameter(randn(50, 60, seed=i).bfloat16()) for i in (8, 9)]
    return [*dense, *half, nn.Parameter(randn(30, 50).t())]


def make(params, bits, **options):
    return AdamW8bit(params, lr=1e-2, state_bits=bits, min_8bit_size=100, **options)


def give_gradients(params, step, scale=1.0):
    for i, p in enumerate(params):
        # Some begin later, so that counters differ.
        if step >= i % 3:
            p.grad = (scale * randn(*p.shape, seed=100 * step + i)).to(p.dtype)


def train(optimizer, first, last):
    params = optimizer.param_groups[0]["params"]
    for step in range(first, last):
        give_gradients(params, step)
        optimizer.step()
    return params


def assert_same(one, other):
    ours, theirs = (o.param_groups[0]["params"] for o in (one, other))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    states = [o.state_dict()["state"] for o in (one, other)]
    assert states[0].keys() == states[1].keys()
    for i, state in states[0].items():
        assert state.keys() == states[1][i].keys()
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][i][name])), name


@BITS
def test_bits_are_those_of_other_steps(bits):
    plain, counted = (make(parameters(), bits, capturable=flag) for flag in (False, True))
    counted.param_groups[0]["lr"] = rate = torch.tensor(1e-2)
    for step in range(10):
        for optimizer in (plain, counted):
            train(optimizer, step, step + 1)
        rate.mul_(0.9)
        plain.param_groups[0]["lr"] = rate.item()
    assert_same(plain, counted)
    assert counted.state[counted.param_groups[0]["params"][1]]["step"] == 9


@BITS
def test_steps_that_the_device_skips_do_not_count(bits, monkeypatch):
    """GradScaler's flag is a tensor that the host does not read."""
    monkeypatch.setattr(_base, "stays_on_device", lambda tensor: tensor is not None)
    plain, counted = (make(parameters(), bits, capturable=flag) for flag in (False, True))
    for step in range(10):
        skip, shape = step in (0, 4, 5, 9), () if step % 2 else (1,)
        give_gradients(plain.param_groups[0]["params"], step)
        params = counted.param_groups[0]["params"]
        give_gradients(params, step, scale=1024.0)
        before = [p.detach().clone() for p in params]
        if skip:
            params[0].grad[0, 0] = float("inf")
        counted.grad_scale = torch.full(shape, 1024.0)
        counted.found_inf = torch.full(shape, float(skip))
        counted.step()
        assert "_open_step" not in counted.__dict__
        if skip:
            assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
            # Which makes the states, and steps nothing.
            plain.found_inf = counted.found_inf
            plain.step()
            plain.found_inf = None
        else:
            plain.step()
    assert_same(plain, counted)
    assert counted.nonfinite_gradients == plain.nonfinite_gradients == 0


def test_grad_scaler_steps():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    twin = copy.deepcopy(model)
    for net, flag in ((model, True), (twin, False)):
        optimizer = make(net.parameters(), 8, capturable=flag)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(net(randn(8, 40, seed=step)).square().mean()).backward()
            if step in (0, 3):
                net[0].weight.grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[net[0].weight]["step"] == 4
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("kind", [AdamW8bit, AdamW4bit])
@pytest.mark.parametrize("flags", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("how", ["load", "switch"])
def test_runs_go_on_with_the_other_kind_of_counter(kind, flags, how):
    options = {"lr": 1e-2, "min_8bit_size": 100}
    straight = kind(parameters(), **options)
    train(straight, 0, 10)
    optimizer = kind(parameters(), capturable=flags[0], **options)
    params = train(optimizer, 0, 4)
    if how == "load":
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer)
        # As in PyTorch the options of a checkpoint replace those of the optimizer.
        state["param_groups"][0]["capturable"] = flags[1]
        optimizer = kind(params, capturable=not flags[1], **options)
        optimizer.load_state_dict(state)
    else:
        optimizer.param_groups[0]["capturable"] = flags[1]
    train(optimizer, 4, 10)
    assert_same(straight, optimizer)


def test_copies_count_for_themselves():
    optimizer = make(parameters(), 8, capturable=True)
    train(optimizer, 0, 3)
    twin = copy.deepcopy(optimizer)
    other = make(parameters(), 8)
    other.load_state_dict(optimizer.state_dict())
    train(optimizer, 3, 5)
    train(twin, 3, 5)
    assert_same(optimizer, twin)
    assert other.param_groups[0]["capturable"]
    assert next(iter(other.state.values()))["step"] == 3


@BITS
def test_steps_while_gradients_are_computed(bits):
    results = []
    for flag in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
        optimizer = make(model.parameters(), bits, capturable=flag)
        with gradpress.optim.fused_backward(model, optimizer, max_grad_norm=1.0):
            for step in range(4):
                model(randn(8, 40, seed=step)).square().mean().backward()
                optimizer.step()
        results.append(optimizer)
    assert_same(*results)


def test_groups_of_both_kinds(monkeypatch):
    monkeypatch.setattr(_base, "stays_on_device", lambda tensor: tensor is not None)
    mixed = parameters()
    groups = [{"params": mixed[:3], "capturable": True}, {"params": mixed[3:]}]
    one, other = make(groups, 8), make(parameters(), 8)
    for step in range(6):
        for optimizer in (one, other):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            give_gradients(params, step)
            optimizer.found_inf = torch.tensor(float(step % 2))
            optimizer.step()
    assert all(
        torch.equal(a, b) for a, b in zip(mixed, other.param_groups[0]["params"], strict=True)
    )
    counts = [[int(s["step"]) for s in o.state_dict()["state"].values()] for o in (one, other)]
    assert counts[0] == counts[1]


@pytest.fixture
def capturing(monkeypatch):
    """What the optimizers ask whether a graph is recorded; it is not."""
    recorded = [False]
    for module in (_capture, _base):
        monkeypatch.setattr(module, "is_capturing", lambda: recorded[0])
    return recorded


def test_what_must_exist_before_a_capture(capturing):
    params = parameters()
    optimizer = make(params, 8, capturable=True)
    give_gradients(params, 2)
    before = [p.detach().clone() for p in params]
    capturing[0] = True
    with pytest.raises(RuntimeError, match="AdamW8bit: the states of parameters must exist before"):
        optimizer.step()
    capturing[0] = False
    optimizer.step()
    loaded = make(params, 8, capturable=True)
    loaded.load_state_dict(optimizer.state_dict())
    capturing[0] = True
    optimizer.step()
    with pytest.raises(RuntimeError, match="count of nonfinite_gradients on cpu must exist before"):
        loaded.step()
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True) if p.numel())


def test_a_capture_of_what_is_not_capturable_is_refused(capturing):
    params = parameters()
    give_gradients(params, 2)
    groups = [{"params": params[:3], "capturable": True}, {"params": params[3:]}]
    optimizer, galore = make(groups, 8), gradpress.optim.GaLoreAdamW(params, rank=4)
    optimizer.step()
    galore.param_groups[0]["capturable"] = True
    before = [p.detach().clone() for p in params]
    capturing[0] = True
    with pytest.raises(RuntimeError, match=r"AdamW8bit: .*capturable is False.*capturable=True"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"GaLoreAdamW: .*capturable is False.*projection"):
        galore.step()
    model = nn.Linear(4, 4)
    handle = gradpress.optim.fused_backward(model, make(model.parameters(), 8))
    with pytest.raises(RuntimeError, match="capturable is False"):
        model(torch.ones(1, 4)).sum().backward()
    handle.remove()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        *("AdamP", "SGDP", "DiffGrad", "GaLoreAdamW", "GaLoreAdafactor", "QGaLoreAdamW", "LDAdamW"),
        *("Apollo", "ApolloMini", "Fira", "SubTrack", "GradNormLoRP"),
    ],
)
def test_other_optimizers_refuse(name):
    reason = (
        "steps are counted on the host|the host decides by its count of steps when a projection"
    )
    make = getattr(gradpress.optim, name)
    options = {"relative_step": False} if name == "GaLoreAdafactor" else {}
    params = [nn.Parameter(torch.ones(4, 4))]
    with pytest.raises(NotImplementedError, match=f"{name}: capturable must be False; ({reason})"):
        make(params, lr=1e-3, capturable=True, **options)


def test_quantized_weights_are_refused():
    weight = nn.Parameter(QuantizedWeight.from_float(randn(64, 64)))
    message = "AdamW8bit: capturable must be False for quantized weights; the host counts"
    with pytest.raises(NotImplementedError, match=message):
        AdamW8bit([weight], capturable=True)
    optimizer = AdamW8bit([weight])
    optimizer.param_groups[0]["capturable"] = True
    weight.grad = torch.ones(64, 64)
    before = weight.dequantize().detach()
    with pytest.raises(NotImplementedError, match=message):
        optimizer.step()
    assert torch.equal(weight.dequantize(), before)
    assert not optimizer.state[weight]
