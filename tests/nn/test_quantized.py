"""Weights stored as integers behave as the parameters they stand for."""

import copy
import io

import pytest
import torch
from torch import nn

import gradpress
from gradpress.nn import QuantizedWeight


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8))


@pytest.mark.parametrize("bits", [4, 8])
def test_forward_and_backward_equal_the_dense_model(model, bits):
    quantized = gradpress.nn.quantize_(copy.deepcopy(model), bits=bits)
    dense = gradpress.nn.dequantize_(copy.deepcopy(quantized))
    assert type(dense[0].weight) is nn.Parameter
    x = torch.randn(5, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    quantized(x).square().sum().backward()
    dense(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for a, b in zip(quantized.parameters(), dense.parameters(), strict=True):
        assert type(a.grad) is torch.Tensor
        torch.testing.assert_close(a.grad, b.grad)


def test_copies_saves_and_loads(model):
    gradpress.nn.quantize_(model)
    twin = copy.deepcopy(model)
    assert isinstance(twin[0].weight, nn.Parameter)
    assert twin[0].weight.codes.data_ptr() != model[0].weight.codes.data_ptr()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    twin[0].weight.codes.zero_()
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(twin[0].weight.codes, model[0].weight.codes)
    flat = gradpress.nn.flatten_state_dict(model)
    assert all(type(t) is torch.Tensor for t in flat.values())
    twin[0].weight.codes.zero_()
    gradpress.nn.load_flat_state_dict_(twin, flat)
    assert torch.equal(twin[0].weight.codes, model[0].weight.codes)
    with pytest.raises(ValueError, match="missing"):
        gradpress.nn.load_flat_state_dict_(twin, {})


def test_moves_clips_and_refuses(model):
    gradpress.nn.quantize_(model)
    model(torch.randn(3, 64)).sum().backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0
    assert model.bfloat16()(torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16
    assert model[0].weight.scale.dtype == torch.float32
    with torch.no_grad(), pytest.raises(NotImplementedError, match="in-place arithmetic"):
        model[0].weight.mul_(2)


def test_selection():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(16, 8)
            self.attn = nn.Linear(8, 8)
            self.tied = nn.Linear(8, 16, bias=False)
            self.tied.weight = self.embed.weight
            self.lm_head = nn.Linear(8, 16)

    net = gradpress.nn.quantize_(Net())
    assert isinstance(net.attn.weight, QuantizedWeight)
    assert not isinstance(net.lm_head.weight, QuantizedWeight)
    assert not isinstance(net.tied.weight, QuantizedWeight)
    net = Net()
    with pytest.raises(ValueError, match="target_modules must match"):
        gradpress.nn.quantize_(net, target_modules="mlp")
    assert not isinstance(net.attn.weight, QuantizedWeight)


def test_memory_count(model):
    dense = gradpress.memory.count(model)
    assert dense.by_category == {"weights": 4 * (64 * 48 + 48 + 48 * 8 + 8)}
    gradpress.nn.quantize_(model)
    count = gradpress.memory.count(model)
    assert count.by_category == {
        "weights": 64 * 48 + 48 * 8 + 4 * 56,
        "weight_scales": 5 * (12 + 2),
    }
    assert str(count.total) in str(count).replace(",", "")


def test_averages_of_weights_are_kept_dense(model):
    """Rounding to the grid would swallow an average's steps."""
    gradpress.nn.quantize_(model)
    dense = gradpress.nn.dequantize_(copy.deepcopy(model))
    average = torch.optim.swa_utils.AveragedModel(
        dense, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(model)
    before = model[0].weight.dequantize()
    optimizer = gradpress.optim.AdamW8bit(model.parameters(), lr=0.1)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    average.update_parameters(model)
    expected = 0.5 * before.double() + 0.5 * model[0].weight.dequantize().double()
    torch.testing.assert_close(average.module[0].weight.double(), expected, rtol=1e-6, atol=1e-6)
