"""Masks on models: applied once, held in training, and counted."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import gradpress
from gradpress import prune

NAN = float("nan")


def bits(x):
    view = {4: torch.int32, 2: torch.int16, 8: torch.int64}[x.dtype.itemsize]
    return x.detach().contiguous().view(view)


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def make_masks(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"{i}.weight": torch.rand(model[i].weight.shape, generator=g) < 0.4 for i in (0, 2)}


def zero_where_dropped(model, masks):
    """Dropped weights have no bits set: they are positive zeros."""
    return all(
        not bits(model.get_submodule(name.removesuffix(".weight")).weight)[~mask].any()
        for name, mask in masks.items()
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    shape=st.sampled_from([(3, 5), (1, 1), (0, 4), (4, 2, 3, 3), (8, 16)]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_apply_keeps_bits_and_writes_positive_zeros(dtype, shape, share, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g).to(dtype)
    odd = torch.rand(shape, generator=g)
    weight[odd < 0.2], weight[odd > 0.8], weight[odd > 0.9] = NAN, -0.0, -torch.inf
    kept = torch.rand(shape, generator=g) < share
    model = nn.Module()
    model.weight = nn.Parameter(weight.clone())
    prune.apply_masks_(model, {"weight": kept})
    assert torch.equal(bits(model.weight), bits(weight) * kept)


def test_apply_by_names_and_versions():
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = make_masks(model)
    bias = torch.tensor([True, False] * 6)
    versions = [p._version for p in model.parameters()]
    loss = model(torch.ones(1, 16)).sum()
    prune.apply_masks_(model, {"0": masks["0.weight"], "0.bias": bias, "2": masks["2.weight"]})
    for name, kept in {**masks, "0.bias": bias}.items():
        p = model.get_parameter(name)
        assert torch.equal(bits(p), bits(before[name]) * kept)
    assert torch.equal(model[2].bias, before["2.bias"])
    after = [p._version for p in model.parameters()]
    assert [b > a for a, b in zip(versions, after, strict=True)] == [True, True, True, False]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    linear = nn.Linear(4, 2)
    for name in ("", "weight"):
        prune.apply_masks_(linear, {name: torch.zeros(2, 4, dtype=torch.bool)})
    assert not linear.weight.any()
    transposed = nn.Module()
    transposed.weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    prune.apply_masks_(transposed, {"weight": torch.tensor([[True, False]] * 3)})
    assert transposed.weight.tolist() == [[0, 0], [1, 0], [2, 0]]


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "Adam8bit": lambda p: gradpress.optim.AdamW8bit(p, lr=0.01, weight_decay=0.1),
    "GaLore": lambda p: gradpress.optim.GaLoreAdamW(
        [{"params": [x for x in p if x.ndim == 2], "rank": 2}], lr=0.01
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_through_training(name):
    model = make_model()
    masks = make_masks(model)
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS[name](parameters)
    x, y = torch.randn(8, 16), torch.randn(8, 4)
    # Moments that would move the dropped weights exist already.
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    before = model[0].weight.detach().clone()
    memory = [p.data_ptr() for p in parameters]
    with prune.hold_masks_(model, masks) as held:
        assert torch.equal(model[0].weight, torch.where(masks["0.weight"], before, 0))
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            for weight, mask in zip(parameters[::2], masks.values(), strict=True):
                assert not bits(weight.grad)[~mask].any()
                assert weight.grad[mask].any()
            optimizer.step()
            assert zero_where_dropped(model, masks)
        for key, mask in masks.items():
            assert torch.equal(held.masks[key], mask)
    assert zero_where_dropped(model, masks)
    assert not parametrize.is_parametrized(model[0])
    assert type(model[0]) is nn.Linear
    assert not torch.equal(model[0].weight, torch.where(masks["0.weight"], before, 0))
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert [p.data_ptr() for p in parameters] == memory
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    held.remove()
    assert held.masks == {}


def test_same_training_as_with_zeros_set_after_every_step():
    x, y = torch.randn(8, 16), torch.randn(8, 4)
    model, other = make_model(), make_model()
    masks = make_masks(model)
    prune.apply_masks_(other, masks)
    prune.hold_masks_(model, masks)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, other)]
    for _ in range(4):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(m(x), y).backward()
            if m is other:
                for name, mask in masks.items():
                    m.get_parameter(name).grad.masked_fill_(~mask, 0)
            optimizer.step()
        prune.apply_masks_(other, masks)
    assert torch.equal(model[0].weight, other[0].weight)
    assert torch.equal(model[2].weight, other[2].weight)


def test_nan_does_not_pass():
    model = nn.Linear(4, 2, bias=False)
    mask = torch.tensor([[True, False, True, False]] * 2)
    prune.hold_masks_(model, {"weight": mask})
    original = model.parametrizations.weight.original
    with torch.no_grad():
        original[:, 1] = NAN
    x = torch.tensor([[1.0, 2, 3, NAN]])
    out = F.linear(torch.tensor([[1.0, 2, 3, 4]]), model.weight)
    assert out.isfinite().all()
    F.linear(x, model.weight).sum().backward()
    assert torch.equal(original.grad, torch.tensor([[1.0, 0, 3, 0]] * 2))


def test_masks_of_the_zeros_that_are_there():
    model = nn.Sequential(
        nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(8, 2, 1), nn.LayerNorm(8)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.flatten()[:3] = 0
        model[1].weight[0, 3], model[1].weight[0, 4] = -0.0, NAN
        model[2].weight.fill_(1)
    wanted = model[1].weight != 0
    held = prune.hold_masks_(model)
    assert set(held.masks) == {"1.weight", "3.weight"}
    assert torch.equal(held.masks["1.weight"], wanted)
    assert not bits(model[1].weight)[~wanted].any()
    assert model[1].weight[0, 4].isnan()
    held.remove()
    with pytest.raises(ValueError, match="hold_masks_: no weight of model has zeros to hold"):
        prune.hold_masks_(nn.Linear(3, 3))


def test_state_dict_copies_and_moves():
    model = make_model()
    masks = make_masks(model)
    prune.hold_masks_(model, masks)
    other = make_model(1)
    prune.hold_masks_(other, {name: torch.ones_like(mask) for name, mask in masks.items()})
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(other(x), model(x))
    assert zero_where_dropped(other, masks)
    assert all(torch.equal(prune.HeldMasks(other).masks[name], m) for name, m in masks.items())
    clone = copy.deepcopy(model)
    F.mse_loss(clone(x), torch.ones(3, 4)).backward()
    torch.optim.SGD(clone.parameters(), lr=1.0).step()
    assert zero_where_dropped(clone, masks)
    assert not torch.equal(clone(x), model(x))
    prune.HeldMasks(clone).remove()
    assert type(clone[0]) is nn.Linear
    assert zero_where_dropped(clone, masks)
    assert parametrize.is_parametrized(model[0])
    for dtype in (torch.bfloat16, torch.float64):
        moved = copy.deepcopy(model).to(dtype)
        assert moved[0].weight.dtype == dtype
        assert moved[0].parametrizations.weight[0].kept.dtype == torch.bool
        assert zero_where_dropped(moved, masks)
    assert copy.deepcopy(model).to("meta")[0].weight.is_meta


def test_files_of_held_masks(tmp_path):
    model = make_model()
    masks = make_masks(model)
    prune.hold_masks_(model, masks)
    gradpress.io.save(model, tmp_path / "f")
    other = make_model(1)
    prune.hold_masks_(other, {name: torch.ones_like(mask) for name, mask in masks.items()})
    gradpress.io.load(tmp_path / "f", other)
    assert torch.equal(other[0].weight, model[0].weight)
    assert zero_where_dropped(other, masks)


def test_autocast():
    model = make_model()
    masks = make_masks(model)
    prune.hold_masks_(model, masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(torch.ones(2, 16))
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        assert not bits(model[0].parametrizations.weight.original.grad)[~masks["0.weight"]].any()
        optimizer.step()
    assert zero_where_dropped(model, masks)


def test_tied_weights_are_masked_for_all_users():
    torch.manual_seed(0)
    model = Tied()
    kept = torch.rand(6, 8) < 0.5
    plain = copy.deepcopy(model)
    prune.apply_masks_(plain, {"embed": kept})
    assert not plain.head.weight[~kept].any()
    tokens = torch.arange(6)
    held = prune.hold_masks_(model, {"head": kept})
    assert torch.equal(model(tokens), plain(tokens))
    assert torch.equal(model.embed.weight, model.head.weight)
    assert len(list(model.parameters())) == 3
    model(tokens).square().sum().backward()
    plain(tokens).square().sum().backward()
    original = model.embed.parametrizations.weight.original
    assert torch.equal(original.grad, torch.where(kept, plain.embed.weight.grad, 0))
    clone = copy.deepcopy(model).bfloat16()
    prune.HeldMasks(clone).remove()
    assert clone.head.weight is clone.embed.weight
    held.remove()
    assert model.head.weight is model.embed.weight is original
    assert not parametrize.is_parametrized(model.embed)
    with pytest.raises(ValueError, match=r"name a parameter once, got 'embed' and 'head.weight'"):
        prune.apply_masks_(model, {"embed": kept, "head.weight": kept})


def test_recurrent_modules():
    torch.manual_seed(0)
    model = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    kept = torch.rand(16, 3) < 0.5
    plain = copy.deepcopy(model)
    prune.apply_masks_(plain, {"weight_ih_l0": kept})
    held = prune.hold_masks_(model, {"weight_ih_l0": kept})
    assert torch.equal(model(x)[0], plain(x)[0])
    held.remove()
    assert torch.equal(model(x)[0], plain(x)[0])
    with torch.no_grad():
        model.weight_ih_l0.mul_(2)
        plain.weight_ih_l0.mul_(2)
    assert torch.equal(model(x)[0], plain(x)[0])


def test_handles_end_what_they_began():
    model = make_model()
    masks = make_masks(model)
    first = prune.hold_masks_(model, {"0": masks["0.weight"]})
    second = prune.hold_masks_(model, {"2": masks["2.weight"]})
    first.remove()
    assert not parametrize.is_parametrized(model[0])
    assert parametrize.is_parametrized(model[2])

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    before = model[2].weight.detach().clone()
    parametrize.register_parametrization(model[2], "weight", Doubled())
    second.remove()
    assert torch.equal(model[2].weight, 2 * before)
    assert list(second.masks) == []
    again = nn.Linear(2, 2)
    prune.hold_masks_(again, {"weight": torch.eye(2).bool()})
    again.weight = torch.ones(2, 2)
    assert torch.equal(again.weight, torch.eye(2))


@pytest.mark.parametrize("attributes", [("weight", "bias"), ("bias", "weight")])
@pytest.mark.parametrize("reverse", [False, True])
def test_order_of_parameters_comes_back(attributes, reverse):
    model = nn.Linear(2, 2)
    masks = {name: torch.ones_like(getattr(model, name)).bool() for name in attributes}
    held = [prune.hold_masks_(model, {name: mask}) for name, mask in masks.items()]
    copied = copy.deepcopy(model)
    for handle in reversed(held) if reverse else held:
        handle.remove()
        assert torch.equal(copied(torch.ones(2)), model(torch.ones(2)))
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]
    prune.HeldMasks(copied, [attributes[0]]).remove()
    assert parametrize.is_parametrized(copied, attributes[1])
    assert not parametrize.is_parametrized(copied, attributes[0])
    assert torch.equal(copied(torch.ones(2)), model(torch.ones(2)))


def test_mask_is_a_copy():
    model, kept = nn.Linear(2, 2), torch.eye(2).bool()
    prune.hold_masks_(model, {"weight": kept})
    kept.fill_(True)
    with torch.no_grad():
        model.parametrizations.weight.original.fill_(1)
    assert torch.equal(model.weight, torch.eye(2))


def test_errors_leave_the_model():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    good = torch.zeros(3, 4, dtype=torch.bool)
    cases = [
        ({"1": good}, ValueError, "masks must name parameters or modules with a weight, got '1'"),
        ({"2": good}, ValueError, r"masks\['2'\] must have shape \[2, 3\], got \[3, 4\]"),
        ({"2": torch.zeros(2, 3)}, TypeError, "must be a bool tensor, got torch.float32"),
        ({"2": [[True]]}, TypeError, "must be a bool tensor, got list"),
        ({"0.weight": good}, ValueError, "name a parameter once, got '0' and '0.weight'"),
        ({"2": torch.zeros(2, 3).bool().to("meta")}, ValueError, r"masks\['2'\] is on the meta"),
    ]
    for call in (prune.apply_masks_, prune.hold_masks_):
        for masks, kind, message in cases:
            with pytest.raises(kind, match=f"{call.__name__}: {message}|{message}"):
                call(model, {"0": good, **masks})
        with pytest.raises(TypeError, match=f"{call.__name__}: masks must map names to tensors"):
            call(model, [good])
        with pytest.raises(TypeError, match=f"{call.__name__}: model must be a torch.nn.Module"):
            call(good, {"0": good})
        meta = nn.Linear(4, 3, device="meta")
        with pytest.raises(ValueError, match=f"{call.__name__}: weight is on the meta device"):
            call(meta, {"weight": good})
        integers = gradpress.nn.quantize_(nn.Sequential(nn.Linear(4, 3)))
        with pytest.raises(TypeError, match="must be a plain dense parameter, got QuantizedWeight"):
            call(integers, {"0": good})
        held = prune.hold_masks_(copy.deepcopy(model), {"0": good})
        with pytest.raises(ValueError, match=r"0.weight has a mask already; remove"):
            call(held._model, {"0": good})
        normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
        with pytest.raises(ValueError, match=r"0.weight is parametrized; remove"):
            call(normed, {"0": good})
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert not any(parametrize.is_parametrized(m) for m in model)
    with pytest.raises(
        TypeError, match=r"hold_masks_: model must be a torch.nn.Module, got Tensor"
    ):
        prune.hold_masks_(good)


def test_sparsity_counts_effective_weights():
    torch.manual_seed(0)
    model = Tied()
    model.conv = nn.Conv2d(4, 8, 3)
    model.free = nn.Parameter(torch.zeros(2, 3))
    model.norm = nn.LayerNorm(6)
    model.steps = nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False)
    model.quantized = gradpress.nn.quantize_(nn.Sequential(nn.Linear(5, 5)))[0]
    model.shared = nn.Linear(8, 8)
    model.shared.weight = model.body.weight
    with torch.no_grad():
        model.conv.weight[0] = -0.0
    kept = torch.rand(8, 8) < 0.5
    prune.hold_masks_(model, {"body": kept})
    with torch.no_grad():
        model.body.parametrizations.weight.original.fill_(1)
    report = prune.sparsity(model)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["free", "body.weight", "conv.weight", "quantized.weight"]
    dropped = int((~kept).sum())
    assert (rows["body.weight"].zeros, rows["body.weight"].numel) == (dropped, 64)
    assert rows["body.weight"].sparsity == dropped / 64
    assert rows["conv.weight"].zeros == 36
    assert rows["conv.weight"].shape == (8, 4, 3, 3)
    zeros = int((model.quantized.weight.dequantize() == 0).sum())
    assert rows["quantized.weight"].zeros == zeros
    assert rows["free"].sparsity == 1
    assert report.zeros == dropped + 36 + 6 + zeros
    assert report.numel == 64 + 288 + 6 + 25
    assert report.sparsity == report.zeros / report.numel
    assert report.to_dict()[1]["zeros"] == dropped
    assert report.to_pandas().loc["conv.weight", "zeros"] == 36
    assert "body.weight" in str(report)
    assert "<td" in report._repr_html_()


@pytest.mark.parametrize("shape", [(16, 24), (4, 8, 2, 2)])
def test_sparsity_names_patterns(shape):
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    dense = model.weight.detach().clone()
    assert prune.sparsity(model).rows[0].pattern == ""
    for pattern in ("2:4", "1:4", "4:8", "3:8"):
        n, m = map(int, pattern.split(":"))
        places = torch.rand(dense.numel() // m, m).argsort(1) < n
        model.weight.data = dense * places.view(shape)
        found = prune.sparsity(model).rows[0]
        assert found.pattern == pattern
        assert found.sparsity == 1 - n / m
    model.weight.data = torch.zeros(shape)
    assert prune.sparsity(model).rows[0].pattern == ""


def test_sparsity_of_nothing():
    report = prune.sparsity(nn.ReLU())
    assert (report.sparsity, report.numel, report.rows) == (0, 0, ())
    assert "total" in str(report)
    assert len(report.to_pandas()) == 0
    empty = prune.sparsity(nn.Conv1d(4, 4, 1)).rows[0]
    assert empty.zeros == 0
    with pytest.raises(TypeError, match=r"sparsity: model must be a torch.nn.Module, got dict"):
        prune.sparsity({})
    with pytest.raises(ValueError, match="sparsity: weight is on the meta device"):
        prune.sparsity(nn.Linear(2, 2, device="meta"))
