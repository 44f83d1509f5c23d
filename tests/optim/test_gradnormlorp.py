"""GradNormLoRP: two-sided projection, groups, and none of the released code's faults."""

import copy
import inspect
import warnings

import numpy as np
import pytest
import torch
from tests.optim.test_drop_in import Block, assert_same, snapshot, train
from torch import nn

import gradpress
from gradpress.nn.weight_norm import (
    WeightNormalizedLinear,
    add_weight_normalized_adapters_,
    merge_weight_normalized_,
    weight_normalize_,
)
from gradpress.optim.gradnormlorp import GradNormLoRP, gradnormlorp_groups

shapes = pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])


class Adam:
    """Kingma and Ba's, in float64: what is subtracted, for a learning rate of one."""

    def __init__(self, betas, eps):
        self.betas, self.eps = betas, eps
        self.m = self.v = 0.0
        self.t = 0

    def __call__(self, g):
        (b1, b2), self.t = self.betas, self.t + 1
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g * g
        return self.m / (1 - b1**self.t) / (np.sqrt(self.v / (1 - b2**self.t)) + self.eps)


class TwoSided:
    """``U adam(U' D V) V'`` in float64, with the signs of the library's directions."""

    def __init__(self, rank, gap, adam):
        self.rank, self.gap, self.adam = rank, gap, adam
        self.bases, self.refreshes = None, 0

    def __call__(self, d, signs_of):
        if np.any(d) and (self.bases is None or self.adam.t % self.gap == 0):
            u, _, vh = np.linalg.svd(d, full_matrices=False)
            found = u[:, : self.rank], vh[: self.rank].T
            # A singular vector is no less one with its sign changed; the moments that stay differ.
            self.bases = [
                b * np.sign(np.sum(b * s, 0)) for b, s in zip(found, signs_of, strict=True)
            ]
            self.refreshes += 1
        if self.bases is None:
            self.adam(0.0)
            return 0.0
        u, v = self.bases
        return u @ self.adam(u.T @ d @ v) @ v.T


def sides(optimizer, p):
    """The bases of the rows and of the columns."""
    short, long = (optimizer.state[p][name].double().numpy() for name in
                   ("projector", "projector_long"))  # fmt: skip
    return (long, short) if p.shape[0] >= p.shape[1] else (short, long)


def falling_spectrum(shape, generator, turn):
    """A gradient whose leading directions stand out, and turn a little from call to call."""
    short = min(shape)
    left, right = (
        np.linalg.qr(np.eye(n, short) + turn * generator.standard_normal((n, short)))[0]
        for n in shape
    )
    return ((left * 0.02 ** np.arange(short)) @ right.T).astype(np.float32)


@shapes
@pytest.mark.parametrize("maximize", [False, True])
def test_steps_are_the_papers(shape, maximize):
    """Over three refreshes, with decay, and an epsilon that shows where it stands."""
    generator = np.random.default_rng(0)
    numbers = {"betas": (0.8, 0.9), "eps": 0.01}
    want = w = generator.standard_normal(shape).astype(np.float32).astype(np.float64)
    p = nn.Parameter(torch.tensor(w).float())
    optimizer = GradNormLoRP(
        [p], lr=0.02, weight_decay=0.5, rank=2, update_proj_gap=3, scale=0.7, maximize=maximize,
        **numbers,
    )  # fmt: skip
    step = TwoSided(2, 3, Adam(**numbers))
    for _ in range(8):
        grad = falling_spectrum(shape, generator, 0.2)
        p.grad = torch.tensor(-grad if maximize else grad)
        optimizer.step()
        update = step(grad.astype(np.float64), sides(optimizer, p))
        want = want * (1 - 0.02 * 0.5) - 0.02 * 0.7 * update
    moved = np.linalg.norm(want - w * 0.99**8)
    # A refresh is one iteration from the last directions, which leaves of their errors the squared
    # ratio of singular values, 4e-4.
    assert np.linalg.norm(p.detach().numpy() - want) < 1e-3 * moved
    assert optimizer.refresh_counts() == {"0": step.refreshes} == {"0": 3}


def test_one_side_is_galore():
    """The form of the released code."""
    results = []
    for make in (GradNormLoRP, gradpress.optim.GaLoreAdamW):
        p = nn.Parameter(torch.ones(12, 7))
        optimizer = make([p], rank=2, proj_type="std", update_proj_gap=3)
        for t in range(7):
            p.grad = torch.randn(12, 7, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_fine_tuning_is_the_papers():
    """The whole of it in float64: layer, exact gradients, two-sided and plain Adam."""
    m, n, adapter, rank = 10, 8, 4, 2
    lr, scale, numbers = 0.02, 0.5, {"betas": (0.9, 0.999), "eps": 1e-3}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m, bias=False))
    layer = add_weight_normalized_adapters_(model, rank=adapter, alpha=2.0)[0]
    groups = gradnormlorp_groups(model, rank=rank, verbose=False)
    optimizer = GradNormLoRP(
        groups, lr=lr, scale=scale, weight_decay=0.0, update_proj_gap=100, **numbers
    )
    x, target = torch.randn(64, n), 3 * torch.randn(64, m)
    w0, j, i, magnitude = (
        p.detach().double().numpy().copy()
        for p in (layer.direction, layer.lora_A, layer.lora_B, layer.magnitude)
    )
    j_start, start, s = j.copy(), magnitude.copy(), 2.0 / adapter
    adams = [TwoSided(rank, 100, Adam(**numbers)) for _ in range(2)]
    plain = Adam(**numbers)
    x64, target64 = x.double().numpy(), target.double().numpy()
    for _ in range(6):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        v = w0 + s * i @ j
        c = np.linalg.norm(v, axis=1, keepdims=True)
        unit = v / c
        d = (2 / target64.size) * (x64 @ (magnitude[:, None] * unit).T - target64).T @ x64
        d_magnitude = np.sum(d * unit, axis=1)
        d_v = magnitude[:, None] / c * (d - d_magnitude[:, None] * unit)
        steps = [
            adam(grad, sides(optimizer, p))
            for adam, grad, p in (
                (adams[0], s * i.T @ d_v, layer.lora_A),
                (adams[1], s * d_v @ j.T, layer.lora_B),
            )
        ]
        j, i = j - lr * scale * steps[0], i - lr * scale * steps[1]
        magnitude = magnitude - lr * plain(d_magnitude)
    rows = ((layer.lora_A, j, j_start), (layer.lora_B, i, 0.0), (layer.magnitude, magnitude, start))
    for p, value, before in rows:
        assert np.abs(value - before).max() > 0.01
        np.testing.assert_allclose(p.detach().numpy(), value, rtol=0, atol=5e-6)
    assert np.array_equal(layer.direction.detach().numpy(), w0.astype(np.float32))
    assert optimizer.refresh_counts() == {"0.lora_A": 1, "0.lora_B": 1}


def test_defaults_are_those_of_the_paper_and_of_pytorch():
    options = {n: p.default for n, p in inspect.signature(GradNormLoRP).parameters.items()}
    theirs = inspect.signature(torch.optim.AdamW).parameters
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert options[name] == theirs[name].default
    own = {name: options[name] for name in ("rank", "update_proj_gap", "scale", "proj_type")}
    assert own == {"rank": None, "update_proj_gap": 250, "scale": 0.25, "proj_type": "full"}


def teacher(model, seed=3):
    """The same model with other weights in its layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3 * float(p.std()))
    return model


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24, bias=False))


def trained(model, wanted, optimizer, steps=120):
    """Losses on fresh batches, before and after."""

    def loss(seed):
        x = torch.randn(64, 24, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            y = wanted(x)
        return (model(x) - y).square().mean()

    before = loss(10_000).item()
    for seed in range(steps):
        optimizer.zero_grad()
        loss(seed).backward()
        optimizer.step()
    return before, loss(10_000).item()


@pytest.mark.parametrize(
    ("rank", "bits", "options"),
    [
        (4, None, {}),
        (4, None, {"state_bits": 8, "projector_bits": 8, "min_8bit_size": 1}),
        (4, 8, {"proj_type": "std"}),
        (4, 4, {"moments": "rotate"}),
        (8, None, {}),
    ],
)
def test_adapters_learn_what_a_frozen_base_cannot(rank, bits, options):
    """The loss before the first step is that of the frozen base."""
    model = network() if bits is None else gradpress.nn.quantize_(network(), bits=bits)
    add_weight_normalized_adapters_(model, rank=8)
    frozen = gradpress.nn.flatten_state_dict(model)
    frozen = {name: t.clone() for name, t in frozen.items() if "direction" in name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if rank == 8 else "error")
        groups = gradnormlorp_groups(model, rank=rank, update_proj_gap=20, scale=1.0, verbose=False)
    before, after = trained(model, teacher(network()), GradNormLoRP(groups, lr=1e-2, **options))
    assert after < 0.5 * before
    flat = gradpress.nn.flatten_state_dict(model)
    assert all(torch.equal(t, flat[name]) for name, t in frozen.items())
    x = torch.randn(4, 24)
    y = model(x)
    torch.testing.assert_close(merge_weight_normalized_(model)(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("options", [{}, {"state_bits": 8, "min_8bit_size": 1}])
def test_whole_weights_learn(bits, options):
    model = network() if bits is None else gradpress.nn.quantize_(network(), bits=bits)
    weight_normalize_(model)
    groups = gradnormlorp_groups(model, rank=8, update_proj_gap=20, scale=1.0, verbose=False)
    before, after = trained(model, teacher(network()), GradNormLoRP(groups, lr=1e-2, **options))
    assert after < 0.5 * before


def stepped(model, steps=3, lr=0.01, rank=4, **options):
    groups = gradnormlorp_groups(model, rank=rank, verbose=False)
    optimizer = GradNormLoRP(groups, lr=lr, **options)
    for seed in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer


prepare = pytest.mark.parametrize(
    "prepare", [weight_normalize_, add_weight_normalized_adapters_], ids=["whole", "adapters"]
)


# What the released code does, and this does not.


@prepare
def test_a_bias_of_zeros_is_a_bias(prepare):
    """There: 0/0 in the first step. Here: Adam's first step, of the learning rate's size."""
    model = network()
    with torch.no_grad():
        model[0].bias.zero_()
    prepare(model)
    stepped(model, steps=1, lr=0.01)
    torch.testing.assert_close(model[0].bias.detach().abs(), torch.full((32,), 0.01))
    assert all(p.isfinite().all() for p in model.parameters())


@prepare
def test_magnitudes_learn_and_keep_what_they_learned(prepare):
    """There: every step begins with the norms of the weights, and forgets the last."""
    model = prepare(network())
    layer = model[0]
    start = layer.magnitude.detach().double().numpy()
    optimizer = GradNormLoRP(
        gradnormlorp_groups(model, 4, verbose=False), weight_decay=0.0, lr=0.01
    )
    want, adam = start.copy(), Adam((0.9, 0.999), 1e-8)
    for seed in range(12):
        optimizer.zero_grad()
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(seed))
        (model(x) - x).square().mean().backward()
        want = want - 0.01 * adam(layer.magnitude.grad.double().numpy())
        optimizer.step()
    np.testing.assert_allclose(layer.magnitude.detach().numpy(), want, rtol=0, atol=1e-6)
    assert np.abs(want - start).max() > 0.05
    norms = torch.linalg.vector_norm(layer.weight, dim=1)
    torch.testing.assert_close(norms, layer.magnitude.detach().abs())


def test_no_copy_of_a_weight_is_kept():
    """There: a direction for each weight beside the weight, and moments of its size."""
    m, n, r = 96, 64, 4
    model = weight_normalize_(nn.Sequential(nn.Linear(24, n), nn.Linear(n, m)))
    optimizer = stepped(model, rank=r)
    state = optimizer.state[model[1].direction]
    tensors = [t for t in state.values() if isinstance(t, torch.Tensor)]
    # Beside bases and moments: the leading direction of the shorter side, and the counter.
    assert sum(t.numel() for t in tensors) == (m + n) * r + 2 * r * r + n + 1
    assert [tuple(p.shape) for p in model[1].parameters()] == [(m, n), (m,), (m,)]
    everything = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    assert max(t.numel() for t in everything) < m * n / 4


def test_updates_of_one_refresh_lie_in_the_tangent_of_it():
    """There: the gradient has a part along each row, which only changes its length."""
    model = weight_normalize_(network())
    groups = gradnormlorp_groups(model, rank=4, verbose=False)
    optimizer = GradNormLoRP(groups, lr=0.01)
    model(torch.randn(8, 24)).square().mean().backward()
    grad = model[0].direction.grad
    along = (grad * model[0].direction).sum(1) / model[0].direction.norm(dim=1)
    assert float(along.detach().abs().max()) < 1e-6 * float(grad.norm())
    optimizer.step()


def test_tensors_of_every_order_are_stepped():
    """There: an error for more than two dimensions, and vectors are normalized."""
    model = nn.Sequential(
        nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(28, 24), nn.LayerNorm(24), nn.Linear(24, 6)
    )
    weight_normalize_(model, target_modules=r"4")
    groups = gradnormlorp_groups(model, rank=4, verbose=False)
    optimizer = GradNormLoRP(groups, lr=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        model(torch.randn(5, 3, 8)).square().mean().backward()
        optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, old)


@prepare
def test_every_trainable_parameter_is_trained(prepare):
    """There: the weights of attention and MLP are in no group that has gradients."""
    model = prepare(network())
    weights = [m.weight for m in model if isinstance(m, WeightNormalizedLinear)]
    trainable = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = stepped(model)
    names = [n for group in optimizer.param_groups for n in group["param_names"]]
    assert sorted(names) == sorted(trainable)
    for name, p in model.named_parameters():
        assert name not in trainable or not torch.equal(p, trainable[name]), name
    for layer, old in zip((model[0], model[2]), weights, strict=True):
        assert float((layer.weight - old).norm()) > 1e-3 * float(old.norm())


def test_adapters_are_not_projected_to_their_own_rank(capsys):
    """There: they are, which makes the states larger."""
    model = add_weight_normalized_adapters_(network(), rank=8)
    with pytest.warns(UserWarning, match=r"rank 8 is not below .* 4 of 4 matrices \(0\.lora_A"):
        (only,) = gradnormlorp_groups(model, rank=8)
    assert capsys.readouterr().out == "projected to rank 8: 0 matrices; not projected: 7 tensors\n"
    assert only["rank"] is None
    projected, rest = gradnormlorp_groups(model, rank=7, verbose=False)
    names = ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]
    assert [name for name, _ in projected["params"]] == names
    assert [name for name, _ in rest["params"]] == ["0.magnitude", "0.bias", "2.magnitude"]
    elements = {}
    for groups in ([only], gradnormlorp_groups(model, rank=2, verbose=False)):
        optimizer = GradNormLoRP(groups)
        model(torch.ones(2, 24)).sum().backward()
        optimizer.step()
        tensors = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        elements[len(groups)] = sum(t.numel() for t in tensors)
    assert elements[2] < 0.5 * elements[1]


def test_groups_take_options_and_refuse_other_models():
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 3))
    with pytest.raises(ValueError, match="model has no trainable WeightNormalizedLinear"):
        gradnormlorp_groups(model, rank=4)
    weight_normalize_(model)
    with pytest.warns(UserWarning, match=r"rank 4 is not below .* 1 of 2 .*1\.direction"):
        groups = gradnormlorp_groups(
            model, 4, update_proj_gap=7, scale=2.0, verbose=False, weight_decay=0.0
        )
    first, second = GradNormLoRP(groups).param_groups
    chosen = {n: first[n] for n in ("rank", "update_proj_gap", "scale", "weight_decay")}
    assert chosen == {"rank": 4, "update_proj_gap": 7, "scale": 2.0, "weight_decay": 0.0}
    assert first["param_names"] == ["0.direction"]
    names = ["0.magnitude", "0.bias", "1.direction", "1.magnitude", "1.bias"]
    assert second["param_names"] == names
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model has no trainable"):
        gradnormlorp_groups(model, rank=4)


@prepare
@pytest.mark.parametrize("state_bits", [32, 8])
def test_memory_is_planned(prepare, state_bits):
    model = prepare(network())
    options = {"state_bits": state_bits, "min_8bit_size": 1}
    groups = gradnormlorp_groups(model, rank=4, verbose=False)
    planned = gradpress.memory.plan(model, GradNormLoRP(groups, **options))
    optimizer = stepped(model, **options)
    assert planned.by_category == gradpress.memory.count(model, optimizer).by_category


@prepare
def test_gradients_go_during_the_backward_pass(prepare):
    results = []
    for fused in (False, True):
        model = prepare(network())
        optimizer = GradNormLoRP(gradnormlorp_groups(model, rank=4, verbose=False), lr=0.01)
        if fused:
            gradpress.optim.fused_backward(model, optimizer)
        for seed in range(3):
            optimizer.zero_grad()
            x = torch.randn(8, 24, generator=torch.Generator().manual_seed(seed))
            model(x).square().mean().backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_adapters_resume_and_copy_bit_for_bit():
    """Of models with frozen parameters, which are in no group."""

    def made():
        torch.manual_seed(0)
        model = add_weight_normalized_adapters_(Block(), rank=8)
        bits = {"state_bits": 8, "projector_bits": 8, "min_8bit_size": 1}
        groups = gradnormlorp_groups(model, rank=4, update_proj_gap=3, scale=4.0, verbose=False)
        return model, GradNormLoRP(groups, lr=1e-2, **bits)

    model, optimizer = made()
    train(model, optimizer, 0, 4)
    twins = [copy.deepcopy((model, optimizer)), made()]
    gradpress.nn.load_flat_state_dict_(twins[1][0], gradpress.nn.flatten_state_dict(model))
    twins[1][1].load_state_dict(optimizer.state_dict())
    train(model, optimizer, 4, 9)
    for twin in twins:
        train(*twin, 4, 9)
        assert_same(snapshot(model, optimizer), snapshot(*twin))


def test_a_step_that_the_scaler_skips_changes_nothing():
    model = add_weight_normalized_adapters_(network(), rank=8)
    optimizer = stepped(model)
    before = snapshot(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.full((2, 24), float("inf"))).square().mean()).backward()
    scaler.step(optimizer)
    assert_same(before, snapshot(model, optimizer))
