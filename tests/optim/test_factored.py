"""Gradients that are never formed: the same steps, from the factors of a backward pass."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradpress
from gradpress.nn import QuantizedWeight
from gradpress.optim import QGaLoreAdamW, fused_backward


@pytest.fixture(autouse=True)
def _one_thread(restore_threads):
    """Networks so small that threads only wait for each other."""
    torch.set_num_threads(1)


EXACT = {"state_bits": 32, "projector_bits": None}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.tall = nn.Linear(48, 80, bias=False)
        self.wide = nn.Linear(80, 48)
        self.square = nn.Linear(48, 48)

    def forward(self, x):
        return self.square(torch.tanh(self.wide(torch.tanh(self.tall(x)))))


def network(bits=8, dtype=torch.float32):
    torch.manual_seed(0)
    model = Network().to(dtype)
    return gradpress.nn.quantize_(model, bits=bits, target_modules="all-linear")


def optimizer_of(model, **options):
    groups = gradpress.optim.param_groups(model, rank=6, verbose=False)
    return QGaLoreAdamW(groups, **{"lr": 1e-2, "update_proj_gap": 7, **options})


def train(model, optimizer, steps, passes=1, first=0):
    target = torch.randn(48, 48, generator=torch.Generator().manual_seed(1)) / 7
    losses = []
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        x = torch.randn(24 * passes, 48, generator=torch.Generator().manual_seed(100 + step))
        for part in x.chunk(passes):
            y = model(part.to(dtype))
            loss = (y - (part @ target).to(dtype)).square().mean() / passes
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def weights(model):
    return [p for p in model.parameters() if isinstance(p, QuantizedWeight)]


def values(model):
    dense = gradpress.nn.dequantize_(copy.deepcopy(model))
    return torch.cat([p.detach().float().flatten() for p in dense.parameters()])


def same_bits(a, b):
    return all(
        torch.equal(s, t)
        for s, t in zip(
            (t for p in weights(a) for t in p.parts.values()),
            (t for p in weights(b) for t in p.parts.values()),
            strict=True,
        )
    )


def both_ways(steps, bits, **options):
    """Losses, values and the optimizer: with whole gradients, and without."""
    for materialized in (True, False):
        model = network(bits)
        optimizer = optimizer_of(model, materialize_gradients=materialized, **options)
        yield train(model, optimizer, steps), values(model), optimizer


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("options", [EXACT, {"min_8bit_size": 0}])
def test_a_hundred_steps_are_those_of_whole_gradients(bits, options):
    (losses, whole, _), (others, factored, optimizer) = both_ways(100, bits, **options)
    assert sum(optimizer.refresh_counts().values()) > 12
    # Both round R otherwise, by 1e-7 of it: now and then a weight falls on the other side of a
    # rounding, and then the two runs drift apart by some steps of the grid.
    moved = (whole - values(network(bits))).norm()
    assert moved > 1.0
    assert (whole - factored).norm() < 0.3 * moved
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(others), rtol=2e-2, atol=1e-4)


def test_steps_are_those_of_whole_gradients_to_rounding():
    (losses, whole, _), (others, factored, _) = both_ways(10, 8, **EXACT)
    # Until a weight falls on the other side of a rounding.
    torch.testing.assert_close(factored, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(others), rtol=1e-5, atol=0)


@given(
    tokens=st.integers(1, 40),
    passes=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_with_one_basis_the_projected_gradient_is_that_of_the_sum(tokens, passes, dtype, seed):
    model = network(dtype=dtype)
    twin = copy.deepcopy(model)
    optimizer = optimizer_of(model, materialize_gradients=False, **EXACT)
    generator = torch.Generator().manual_seed(seed)
    exact = {}
    for _ in range(passes):
        x = torch.randn(tokens, 48, generator=generator).to(dtype)
        model(x).square().sum().backward()
        # In float64 from what the layers of a twin get and hand on.
        for name, grad, given_ in factors(twin, x):
            exact[name] = exact.get(name, 0) + grad.double().T @ given_.double()
    for name, p in model.named_parameters():
        if not isinstance(p, QuantizedWeight):
            continue
        assert p.grad is None
        basis = optimizer.state[p]["projector"].double()
        gradient = exact[name]
        right = gradient.shape[0] >= gradient.shape[1]
        expected = gradient @ basis if right else basis.T @ gradient
        got = optimizer._collected[p].projected.double()
        # float32 sums over up to 640 tokens, relative to the largest.
        assert (got - expected).abs().max() <= 3e-6 * expected.abs().max().clamp(min=1e-30)


def factors(model, x):
    """Names of the weights, gradients of their layers' outputs, and inputs."""
    seen, handles = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def keep(module, inputs, output, name=name):
                output.register_hook(
                    lambda grad: seen.append((f"{name}.weight", grad, inputs[0].detach()))
                )

            handles.append(module.register_forward_hook(keep))
    model(x).square().sum().backward()
    for handle in handles:
        handle.remove()
    return seen


class Largest(TorchDispatchMode):
    """The most elements that a floating-point tensor had which an operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if type(t) is torch.Tensor and t.is_floating_point():
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("fused", [False, True])
def test_no_tensor_of_a_weights_size_ever_exists(fused):
    torch.manual_seed(0)
    model = gradpress.nn.quantize_(
        nn.Sequential(nn.Linear(512, 1024), nn.Tanh(), nn.Linear(1024, 512)),
        target_modules="all-linear",
    )
    optimizer = optimizer_of(model, materialize_gradients=False, update_proj_gap=2)
    handle = fused_backward(model, optimizer) if fused else None
    x = torch.randn(8, 512)
    with Largest() as largest:
        for _ in range(5):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert largest.elements < 512 * 1024
    if handle is not None:
        handle.remove()
    del optimizer, handle
    ordinary = optimizer_of(model)
    with Largest() as largest:
        model(x).square().mean().backward()
        ordinary.step()
    assert largest.elements >= 512 * 1024


@pytest.mark.parametrize("passes", [1, 4])
def test_stepping_in_the_backward_pass_changes_no_bit(passes):
    models = []
    for fused in (False, True):
        model = network()
        optimizer = optimizer_of(
            model, materialize_gradients=False, accumulation_steps=passes, min_8bit_size=0
        )
        if fused:
            fused_backward(model, optimizer, accumulation_steps=passes)
        train(model, optimizer, 20, passes)
        models.append(model)
    assert same_bits(*models)


def test_clips_by_the_norm_of_what_the_last_step_used():
    model, twin = network(), network()
    optimizer, other = (
        optimizer_of(m, materialize_gradients=False, **EXACT) for m in (model, twin)
    )
    handle = fused_backward(model, optimizer, max_grad_norm=0.01)
    last = None
    for step in range(6):
        x = torch.randn(24, 48, generator=torch.Generator().manual_seed(step))
        for m in (model, twin):
            (m(x) - x).square().mean().backward()
        parts = [p.grad for p in twin.parameters() if p.grad is not None]
        parts += [c.projected for c in other._collected.values()]
        norm = float(torch.cat([t.double().flatten() for t in parts]).norm())
        for part in parts:
            part.div_(1.0 if last is None else max(1.0, (last + 1e-6) / 0.01))
        last = norm
        other.step()
        other.zero_grad()
        # Float32 sums of squares; the models are apart by rounding.
        assert float(handle.grad_norm) == pytest.approx(norm, rel=1e-4)
    assert norm > 0.01
    torch.testing.assert_close(values(model), values(twin), rtol=0, atol=1e-5)


def low_rank_factors(tokens, m, n, rank, generator):
    """Factors whose product has `rank` strong directions, others for every call but not them."""
    fixed = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(k, rank, generator=fixed))[0] for k in (m, n))
    inner = torch.randn(tokens, rank, generator=generator)
    dy = inner @ left.T + 0.1 * torch.randn(tokens, m, generator=generator)
    x = inner @ right.T + 0.1 * torch.randn(tokens, n, generator=generator)
    return dy, x


@pytest.mark.parametrize(("m", "n"), [(60, 40), (40, 60)])
def test_a_basis_found_over_several_passes_captures_what_the_best_one_does(m, n):
    weight = QuantizedWeight.from_float(torch.zeros(m, n))
    p = nn.Parameter(weight)
    optimizer = QGaLoreAdamW(
        [{"params": [p], "rank": 6}],
        update_proj_gap=2,
        materialize_gradients=False,
        accumulation_steps=8,
        **EXACT,
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.zeros(m, n, dtype=torch.float64)
        for _ in range(8):
            dy, x = low_rank_factors(8, m, n, 6, generator)
            optimizer._receive(p, dy, x)
            gradient += dy.double().T @ x.double()
        optimizer.step()
    basis = optimizer.state[p]["projector"].double()
    kept = basis.T @ basis
    torch.testing.assert_close(kept, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)
    captured = (gradient @ basis if m >= n else basis.T @ gradient).square().sum()
    best = torch.linalg.svdvals(gradient)[:6].square().sum()
    assert captured > 0.97 * best
    row = optimizer.report().rows[0]
    assert row.refreshes >= 3
    # Four random vectors measure it.
    assert abs(row.energy - float(best / gradient.square().sum())) < 0.3


def test_clips_by_the_norm_of_what_is_stepped():
    model = network()
    optimizer = optimizer_of(model, materialize_gradients=False, **EXACT)
    model(torch.randn(9, 48)).square().sum().backward()
    parts = [p.grad for p in model.parameters() if p.grad is not None]
    parts += [c.projected for c in optimizer._collected.values()]
    before = torch.cat([t.double().flatten() for t in parts]).norm()
    got = optimizer.clip_grad_norm_(0.5)
    torch.testing.assert_close(got.double(), before, rtol=1e-6, atol=0)
    after = torch.cat([t.double().flatten() for t in parts]).norm()
    torch.testing.assert_close(after, torch.tensor(0.5, dtype=torch.float64), rtol=1e-5, atol=0)
    optimizer.clip_grad_norm_(100.0)
    assert torch.cat([t.double().flatten() for t in parts]).norm() == after


def test_forgets_what_was_not_stepped():
    model = network()
    optimizer = optimizer_of(model, materialize_gradients=False, **EXACT)
    before = values(model)
    model(torch.randn(9, 48)).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(values(model), before)
    assert all(int(s["step"]) == 0 for s in optimizer.state.values() if "projector" in s)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_scaler_divides_and_skips(overflow):
    ends = []
    for scaled in (True, False):
        model = network()
        optimizer = optimizer_of(model, materialize_gradients=False, **EXACT)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(3):
            x = torch.randn(24, 48, generator=torch.Generator().manual_seed(step))
            if overflow and step == 1:
                if not scaled:
                    continue
                x = x * float("inf")
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update(1024.0)
            optimizer.zero_grad()
        ends.append(model)
        steps = {int(optimizer.state[p]["step"]) for p in model.parameters()}
        assert steps == {2 if overflow else 3}
    # Scales are powers of two.
    assert same_bits(*ends)


def test_a_scaler_that_has_unscaled_is_refused():
    model = network()
    optimizer = optimizer_of(model, materialize_gradients=False)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(9, 48)).sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscale_ does not reach"):
        scaler.step(optimizer)


@pytest.mark.parametrize("passes", [1, 4])
def test_resumes_bit_for_bit(passes):
    options = {
        "materialize_gradients": False,
        "accumulation_steps": passes,
        "update_proj_gap": 3,
        "min_8bit_size": 0,
    }
    model = network()
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, 7, passes)
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    twin = network()
    other = optimizer_of(twin, **options)
    states = torch.load(saved, weights_only=True)
    twin.load_state_dict(states[0])
    other.load_state_dict(states[1])
    copied_model, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, other), (copied_model, copied)):
        train(m, o, 6, passes, first=7)
    assert same_bits(model, twin)
    assert same_bits(model, copied_model)


def test_other_uses_of_a_weight_count_too():
    """A weight that two layers share, and that is looked up in: three parts of one gradient."""

    weight = nn.Parameter(QuantizedWeight.from_float(torch.randn(60, 40)))
    optimizer = QGaLoreAdamW(
        [{"params": [weight], "rank": 5}], lr=1.0, materialize_gradients=False, **EXACT
    )
    dense = weight.detach().dequantize().requires_grad_()

    def loss(weight):
        x = nn.functional.embedding(torch.arange(7), weight)
        x = torch.tanh(nn.functional.linear(x, weight))
        return nn.functional.linear(x @ torch.ones(60, 40), weight).square().mean()

    loss(weight).backward()
    loss(dense).backward()
    assert optimizer._collected[weight].passes == 2
    basis = optimizer.state[weight]["projector"]
    expected = dense.grad @ basis
    got = optimizer._collected[weight].projected + weight.grad @ basis
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    update = dense.grad @ basis
    optimizer.step()
    # The first step of Adam is the sign of the gradient.
    moved = (weight.detach().dequantize() - dense.detach()).flatten()
    towards = (-update.sign() @ basis.T).flatten()
    assert torch.nn.functional.cosine_similarity(moved, towards, dim=0) > 0.5


def test_what_cannot_be_is_refused():
    dense = nn.Linear(8, 8)
    with pytest.raises(TypeError, match=r"materialize_gradients must be True .* Parameter"):
        QGaLoreAdamW([{"params": [dense.weight], "rank": 2}], materialize_gradients=False)
    model = gradpress.nn.quantize_(nn.Sequential(nn.Linear(8, 8)), target_modules="all-linear")
    for options, message in (
        ({"rank": "auto"}, "rank must be a number"),
        ({"rank": 2, "accumulation_steps": 0}, "accumulation_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            QGaLoreAdamW([{"params": [model[0].weight], **options}], materialize_gradients=False)
    # Nothing to project: as ever.
    QGaLoreAdamW(dense.parameters(), materialize_gradients=False)


def test_gradients_are_whole_again_without_the_optimizer():
    model = network()
    optimizer = optimizer_of(model, materialize_gradients=False)
    model(torch.randn(3, 48)).sum().backward()
    assert model.tall.weight.grad is None
    del optimizer
    model(torch.randn(3, 48)).sum().backward()
    assert model.tall.weight.grad.shape == (80, 48)


def test_gradients_of_no_tokens_and_checkpointed_layers():
    model = network()
    optimizer = optimizer_of(model, materialize_gradients=False, **EXACT)
    model(torch.randn(0, 48)).sum().backward()
    assert not optimizer._collected
    twin = copy.deepcopy(model)
    other = optimizer_of(twin, materialize_gradients=False, **EXACT)
    x = torch.randn(5, 48)
    model(x).square().sum().backward()
    torch.utils.checkpoint.checkpoint(twin, x, use_reentrant=False).square().sum().backward()
    optimizer.step()
    other.step()
    assert same_bits(model, twin)
