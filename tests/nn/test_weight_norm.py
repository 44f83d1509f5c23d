"""Weight-normalized layers: their gradients, norms and memory, and what they replace."""

import copy
import io
import pickle
import warnings
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import is_tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradpress
from gradpress.nn import QuantizedWeight, _weight_norm_function
from gradpress.nn.weight_norm import (
    WeightNormalizedLinear,
    add_weight_normalized_adapters_,
    merge_weight_normalized_,
    weight_normalize_,
)

kinds = pytest.mark.parametrize("rank", [None, 3])


@pytest.fixture
def three_rows_at_a_time(monkeypatch):
    """Of matrices with five columns."""
    monkeypatch.setattr(_weight_norm_function, "BLOCK_ELEMENTS", 15)


def moved_layer(m, n, rank, dtype=torch.float32, **options):
    """A layer that has left its starting point, some magnitudes below zero."""
    torch.manual_seed(0)
    layer = WeightNormalizedLinear(nn.Linear(n, m, dtype=dtype), rank, **options)
    with torch.no_grad():
        layer.magnitude.mul_(torch.randn(m))
        if rank is not None:
            layer.lora_B.normal_()
    return layer


def reference_weight(direction, magnitude, a=None, b=None, scaling=0.0, detach=False):
    """Equation (3.2), as it stands there."""
    v = direction if a is None else direction + scaling * (b @ a)
    norms = v.square().sum(1, keepdim=True).sqrt()
    return magnitude[:, None] * v / (norms.detach() if detach else norms)


@kinds
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_finite_differences(rank, bias, three_rows_at_a_time):
    layer = moved_layer(7, 5, rank, torch.float64)
    if not bias:
        layer.bias = None
    names, params = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def output(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *params))
    if rank is not None:  # of a base that somebody thaws, too
        layer.direction.requires_grad_()
        assert torch.autograd.gradcheck(output, (x, *params))


@pytest.mark.parametrize("detach", [False, True])
def test_adapters_have_the_gradients_of_the_formula(detach, three_rows_at_a_time):
    layer = moved_layer(7, 5, 2, torch.float64, detach_norm=detach)
    x, upstream = (torch.randn(4, n, dtype=torch.float64) for n in (5, 7))
    layer(x).backward(upstream)
    names = ("direction", "magnitude", "lora_A", "lora_B")
    twins = [getattr(layer, name).detach().clone().requires_grad_() for name in names]
    scaling = 16.0 / 2
    weight = reference_weight(*twins, scaling, detach)
    (x @ weight.T).backward(upstream)
    for name, twin in zip(names[1:], twins[1:], strict=True):
        torch.testing.assert_close(getattr(layer, name).grad, twin.grad)
    # The equations written out, with dW for W.
    d = upstream.T @ x
    with torch.no_grad():
        v = twins[0] + scaling * twins[3] @ twins[2]
        c = v.norm(dim=1, keepdim=True)
        d_magnitude = (d * v / c).sum(1)
        tangent = 0.0 if detach else d_magnitude[:, None] * v / c
        d_v = twins[1][:, None] / c * (d - tangent)
    torch.testing.assert_close(layer.magnitude.grad, d_magnitude)
    torch.testing.assert_close(layer.lora_B.grad, scaling * d_v @ twins[2].detach().T)
    torch.testing.assert_close(layer.lora_A.grad, scaling * twins[3].detach().T @ d_v)


def test_detached_gradients_differ():
    grads = []
    for detach in (False, True):
        layer = moved_layer(7, 5, 2, detach_norm=detach)
        layer(torch.ones(1, 5)).sum().backward()
        grads.append(layer.lora_B.grad)
    assert float((grads[0] - grads[1]).norm()) > 0.1 * float(grads[0].norm())


def test_without_an_adapter_it_is_pytorchs_weight_norm(three_rows_at_a_time):
    linear = nn.Linear(5, 7, dtype=torch.float64)
    theirs = nn.utils.parametrizations.weight_norm(copy.deepcopy(linear), dim=0)
    ours = WeightNormalizedLinear(linear)
    originals = theirs.parametrizations.weight
    with torch.no_grad():
        ours.magnitude.mul_(torch.randn(7))
        originals.original0.copy_(ours.magnitude[:, None])
    x, upstream = (torch.randn(4, n, dtype=torch.float64) for n in (5, 7))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(i) for layer, i in zip((ours, theirs), inputs, strict=True)]
    for y in outputs:
        y.backward(upstream)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.direction.grad, originals.original1.grad)
    torch.testing.assert_close(ours.magnitude.grad, originals.original0.grad[:, 0])
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


@given(m=st.integers(1, 20), n=st.integers(1, 20), rank=st.sampled_from([None, 1, 4]))
def test_rows_have_the_norms_of_the_magnitudes(m, n, rank):
    layer = moved_layer(m, n, rank)
    norms = torch.linalg.vector_norm(layer.weight.double(), dim=1)
    # A quotient and a product in float32, each off by 2^-24 at most, and a norm of n of them.
    torch.testing.assert_close(norms, layer.magnitude.abs().double(), rtol=4e-7, atol=0)


@pytest.mark.parametrize("factor", [2.0**-20, 3.0, 2.0**20])
def test_lengths_of_directions_do_not_matter(factor):
    layer = moved_layer(7, 5, None)
    x = torch.randn(4, 5)
    before, weight = layer(x), layer.weight
    with torch.no_grad():
        layer.direction.mul_(factor)
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(layer.weight, weight)


def test_directions_turn_and_grow_under_sgd():
    """Their gradients stand at right angles on them."""
    layer = moved_layer(7, 5, None, torch.float64)
    optimizer = torch.optim.SGD([layer.direction], lr=0.3)
    for seed in range(3):
        x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        before, grad = layer.direction.detach().clone(), layer.direction.grad.clone()
        optimizer.step()
        cosines = torch.cosine_similarity(before, grad, dim=1)
        assert float(cosines.abs().max()) < 1e-12
        assert float(grad.norm()) > 0.1
        grown = (before.square().sum(1) + 0.09 * grad.square().sum(1)).sqrt()
        torch.testing.assert_close(layer.direction.detach().norm(dim=1), grown)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_stay_zeros(rank, dtype):
    linear = nn.Linear(5, 7, dtype=dtype)
    with torch.no_grad():
        linear.weight[2] = 0
    layer = WeightNormalizedLinear(linear, rank)
    x = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert torch.equal(y[:, 2], layer.bias[2].expand(4))
    for p in (x, *layer.parameters()):
        assert p.grad is None or p.grad.isfinite().all()
    if rank is None:
        assert not layer.direction.grad[2].any()
    assert not layer.weight[2].any()
    model = nn.Sequential(linear)
    with pytest.warns(UserWarning, match=r"1 weights \(0 first\) have rows of zeros"):
        weight_normalize_(model)


def test_cancelled_rows_are_zeros_too():
    """The adapter takes away all of the frozen weight."""
    layer = WeightNormalizedLinear(nn.Linear(3, 2, bias=False), 2, alpha=2.0)
    with torch.no_grad():
        layer.lora_B.copy_(torch.eye(2))
        layer.lora_A.copy_(-layer.direction)
    y = layer(torch.randn(4, 3))
    y.sum().backward()
    assert not layer.weight.any()
    assert all(p.grad.isfinite().all() for p in (layer.lora_A, layer.lora_B, layer.magnitude))


def small_model(bits=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8, bias=False))
    return model if bits is None else gradpress.nn.quantize_(model, bits=bits)


def move(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("magnitude", "lora_B")):
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model


prepare = pytest.mark.parametrize(
    "prepare", [weight_normalize_, add_weight_normalized_adapters_], ids=["whole", "adapters"]
)


@prepare
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_begins_as_the_model_and_ends_as_a_plain_one(prepare, bits):
    model, x = small_model(bits), torch.randn(5, 24)
    base = model(x).detach()
    prepared = prepare(model)
    assert prepared is model
    torch.testing.assert_close(model(x), base)
    move(model)
    moved = model(x).detach()
    assert float((moved - base).norm()) > 0.1 * float(base.norm())
    merge_weight_normalized_(model)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert type(model[0].weight) is nn.Parameter
    assert (model[0].bias is None, model[2].bias is None) == (False, True)
    torch.testing.assert_close(model(x), moved)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_adapters_freeze_the_base_and_nothing_else(bits):
    model = small_model(bits)
    model.add_module("norm", nn.LayerNorm(8))
    kept = [model[0].weight, model[0].bias]
    layer = add_weight_normalized_adapters_(model, rank=2, target_modules="0")[0]
    assert (layer.direction, layer.bias) == (kept[0], kept[1])
    assert isinstance(layer.direction, QuantizedWeight) == (bits is not None)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["0.direction"]
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((2, 24), (40, 2))
    assert not layer.lora_B.any()
    # Kaiming's uniform distribution, as for a Linear module of 24 inputs.
    assert 0.5 < float(layer.lora_A.detach().abs().max()) * 24**0.5 <= 1
    model(torch.randn(5, 24)).square().sum().backward()
    assert layer.direction.grad is None
    assert layer.magnitude.grad.norm() > 0
    assert layer.lora_B.grad.norm() > 0


def test_integer_directions_have_dense_gradients():
    grads = []
    for model in (small_model(8), gradpress.nn.dequantize_(small_model(8))):
        move(weight_normalize_(model))
        model(torch.ones(2, 24)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        assert type(model[0].direction.grad) is torch.Tensor
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_is_in_the_adapters_branch_only():
    layer = moved_layer(7, 5, 2, dropout=0.4)
    x = torch.randn(300, 5)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.4)
    assert 0.3 < float((dropped == 0).double().mean()) < 0.5
    v = layer.direction + 8.0 * layer.lora_B @ layer.lora_A
    z = x @ layer.direction.T + 8.0 * dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(y, z * layer.magnitude / v.norm(dim=1) + layer.bias)
    merged = layer.merge()
    assert merged.training
    torch.testing.assert_close(layer.eval()(x), merged(x))
    with torch.no_grad():
        layer.train().lora_B.zero_()
    torch.testing.assert_close(layer(x), layer.eval()(x))


@prepare
@pytest.mark.parametrize("bits", [None, 8])
def test_copies_saves_and_loads(prepare, bits):
    model, x = move(prepare(small_model(bits))), torch.randn(5, 24)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        assert twin[0].magnitude is not model[0].magnitude
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(7)
    fresh = small_model(bits)
    other = prepare(fresh)
    assert not torch.equal(other(x), y)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), y)
    other = prepare(small_model(bits))
    gradpress.nn.load_flat_state_dict_(other, gradpress.nn.flatten_state_dict(model))
    assert torch.equal(other(x), y)


@prepare
def test_magnitudes_stay_exact_in_half_precision(prepare):
    model = prepare(small_model().bfloat16())
    layer = model[0]
    assert layer.direction.dtype == torch.bfloat16
    assert layer.magnitude.dtype == torch.float32
    with torch.no_grad():  # far below a step of bfloat16
        layer.magnitude.mul_(1 + 2.0**-12)
    x = torch.randn(64, 24).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in layer.parameters() if p.requires_grad)
    weight = layer.direction.double() * (1 + 2.0**-12)
    want = x.double() @ weight.T + layer.bias.double()
    # The product is rounded, and then the output: twice half a step of 2^-8.
    torch.testing.assert_close(y.double(), want, rtol=2.0**-7, atol=2.0**-7)
    assert merge_weight_normalized_(model)[0].weight.dtype == torch.bfloat16


@prepare
@pytest.mark.parametrize("bits", [None, 8])
def test_autocast(prepare, bits):
    model, x = move(prepare(small_model(bits))), torch.randn(5, 24)
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain, rtol=0.05, atol=0.05)
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g.dtype == torch.float32 for g in grads.values())
    model.zero_grad()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            error = float((grads[name] - p.grad).norm())
            assert error < 0.03 * float(p.grad.norm()), name


def test_norms_are_float32_under_autocast():
    layer = moved_layer(7, 5, 2)
    norms = [layer._norms()]
    with torch.autocast("cpu", torch.bfloat16):
        norms.append(layer._norms())
    assert torch.equal(*norms)


def test_compiled_models_train():
    model = add_weight_normalized_adapters_(small_model(), target_modules="0")
    move(weight_normalize_(model))
    twin, x = copy.deepcopy(model), torch.randn(5, 24)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    twin(x).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad)


class Sizes(TorchDispatchMode):
    """Elements of the memory that every operation takes for its results."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        for t in tree_leaves(result):
            if is_tensor(t) and t.untyped_storage()._cdata not in given:
                self.sizes.append(t.untyped_storage().nbytes() // t.element_size())
        return result


@contextmanager
def held(*known):
    """Elements that autograd holds at the end, storages counted once, beside those known."""
    seen = {t.untyped_storage().data_ptr() for t in known}
    sizes = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in seen:
            seen.add(t.untyped_storage().data_ptr())
            sizes.append(t.untyped_storage().nbytes() // t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield sizes


@kinds
def test_no_second_matrix_is_made_or_held(rank, monkeypatch):
    """The released code keeps one for each weight; here some rows exist at a time."""
    m, n, tokens = 96, 64, 3
    monkeypatch.setattr(_weight_norm_function, "BLOCK_ELEMENTS", 8 * n)
    layer = moved_layer(m, n, rank)
    x = torch.randn(tokens, n, requires_grad=True)
    with held(x, *layer.parameters()) as sizes:
        y = layer(x)
    # Norms and the factor that divides by them; with a rank what the docstring says.
    most = 4 * m if rank is None else tokens * (m + rank) + 4 * m
    assert sum(sizes) <= most
    assert max(sizes) < m * n / 8
    with Sizes() as made:
        y = layer(x)
        y.sum().backward()
    full = [size for size in made.sizes if size > 8 * n]
    assert full == ([m * n] if rank is None else [])  # dW, which becomes the gradient
    if rank is None:
        theirs = nn.utils.parametrizations.weight_norm(nn.Linear(n, m), dim=0)
        with held(x, *theirs.parameters()) as sizes:
            theirs(x)
        assert max(sizes) == m * n


def test_only_plain_linear_modules_are_taken():
    class Own(nn.Linear):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(16, 8)
            self.first = nn.Linear(8, 8)
            self.again = self.first
            self.own = Own(8, 8)
            self.tied = nn.Linear(8, 16, bias=False)
            self.tied.weight = self.embed.weight
            self.lm_head = nn.Linear(8, 16)

    net = add_weight_normalized_adapters_(Net(), rank=2)
    replaced = [n for n, m in net.named_modules() if isinstance(m, WeightNormalizedLinear)]
    assert replaced == ["first"]
    assert net.again is net.first
    assert net.tied.weight.requires_grad
    with pytest.raises(ValueError, match="no plain Linear module that is meant"):
        weight_normalize_(Net(), target_modules="own")
    with pytest.raises(ValueError, match="no plain Linear module that is meant"):
        add_weight_normalized_adapters_(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="target_modules must match"):
        weight_normalize_(Net(), target_modules="mlp")
    with pytest.raises(ValueError, match="pass it to WeightNormalizedLinear"):
        weight_normalize_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"merge\(\) returns the Linear module"):
        merge_weight_normalized_(WeightNormalizedLinear(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"alpha": float("inf")}, "alpha must be finite, got inf"),
    ],
)
def test_invalid_options_leave_the_model_alone(options, message):
    model = small_model()
    with pytest.raises(ValueError, match=message):
        add_weight_normalized_adapters_(model, **options)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


@prepare
def test_models_without_values_can_be_prepared(prepare):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prepare(nn.Sequential(nn.Linear(24, 40)))
    assert all(p.is_meta for p in model.parameters())


def test_frozen_layers_stay_frozen_and_modes_stay():
    model = small_model().eval().requires_grad_(False)
    weight_normalize_(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert str(model[0]).startswith("WeightNormalizedLinear(\n  24, 40, bias=True\n")


def test_fused_layers_of_pytorch_see_the_weight():
    """The fast path of its transformer reads weights past the modules."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    add_weight_normalized_adapters_(block, rank=2, target_modules="linear")
    move(block)
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        fast = block(x)
    torch.testing.assert_close(fast, block(x), rtol=1e-4, atol=1e-5)
