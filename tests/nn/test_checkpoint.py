"""Blocks whose activations are computed again have the same gradients and keep less."""

import copy
import pickle

import pytest
import torch
from tests.nn.live import LiveBytes
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gradpress
from gradpress.nn import checkpoint_blocks_
from gradpress.ops import linear


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, *, gain=1.0):
        return x + gain * self.dropout(self.down(torch.tanh(self.up(x))))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.blocks = nn.ModuleList([Block() for _ in range(6)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x, gain=0.5)
        return sum(head(x).square().mean() for head in self.heads)


def llama():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=2, attention_dropout=0.1, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def loss_of(model):
    g = torch.Generator().manual_seed(0)
    if isinstance(model, LlamaForCausalLM):
        tokens = torch.randint(64, (4, 32), generator=g)
        return model(input_ids=tokens, labels=tokens).loss
    out = model(torch.randn(4, 32, 16, generator=g))
    return out if out.dim() == 0 else out.square().mean()


def outcome(model):
    """The loss and the gradients, and the bytes that are alive between forward and backward."""
    model.zero_grad()
    torch.manual_seed(1)
    with LiveBytes() as live:
        loss = loss_of(model)
        kept = live.now()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], kept


def sequence():
    return nn.Sequential(nn.Linear(16, 16), nn.Sequential(*(Block() for _ in range(6))))


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


@pytest.mark.parametrize("make", [Stack, sequence, encoder, llama])
@pytest.mark.parametrize("quantized", [False, True])
def test_same_gradients_and_fewer_activations(make, quantized):
    torch.manual_seed(0)
    model = make().train()
    if quantized:
        gradpress.nn.quantize_(model, target_modules=["up", "down", "linear", "proj"])
    want, kept = outcome(model)
    want = [t.clone() for t in want]
    handle = checkpoint_blocks_(model)
    got, kept_now = outcome(model)
    assert len(got) == len(want)
    # The same operations on the same numbers, with the same dropout.
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert kept_now < kept / 2
    assert len(handle.blocks) == (0 if make is llama else 6)
    handle.remove()
    handle.remove()
    again, kept_again = outcome(model)
    assert kept_again == kept
    assert all(torch.equal(*pair) for pair in zip(again, want, strict=True))


def test_together_with_the_chunked_loss():
    torch.manual_seed(0)
    model = llama().train()
    want = [t.clone() for t in outcome(model)[0]]
    with checkpoint_blocks_(model), gradpress.nn.chunk_loss_(model, chunk_tokens=10):
        got, _ = outcome(model)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_blocks_may_be_named_and_the_state_dict_stays():
    torch.manual_seed(0)
    model = Stack().train()
    names = list(model.state_dict())
    _, kept = outcome(model)
    with checkpoint_blocks_(model, blocks=[*model.blocks[:3], model.blocks[0]]) as handle:
        assert handle.blocks == tuple(model.blocks[:3])
        assert list(model.state_dict()) == names
        _, half = outcome(model)
    with checkpoint_blocks_(model):
        _, least = outcome(model)
    assert least < half < kept
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_copies_use_their_own_weights():
    torch.manual_seed(0)
    model = Stack().eval()
    checkpoint_blocks_(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(2)
        assert not torch.equal(loss_of(twin), loss_of(model))
        loss_of(twin).backward()
        assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_switch_that_was_on_stays_on():
    model = llama().train()
    kept = outcome(model)[1]
    first = checkpoint_blocks_(model)
    with checkpoint_blocks_(model):
        pass
    assert outcome(model)[1] < kept / 2
    first.remove()
    assert outcome(model)[1] == kept


def test_earlier_releases_of_transformers():
    """Before there were two names for it."""
    calls = []

    class Model(nn.Module):
        supports_gradient_checkpointing = True

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            calls.append(gradient_checkpointing_kwargs)

        def gradient_checkpointing_disable(self):
            calls.append("off")

    with checkpoint_blocks_(Model()):
        assert calls == [{"use_reentrant": False}]
    assert calls[1:] == ["off"]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"model must have a ModuleList.* got Linear"):
        checkpoint_blocks_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got Sequential"):
        checkpoint_blocks_(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    for blocks in ([], [nn.Linear(2, 2)]):
        with pytest.raises(ValueError, match="blocks must be modules of model, at least one"):
            checkpoint_blocks_(Stack(), blocks=blocks)


def test_a_blocks_last_product_is_not_computed_again(monkeypatch):
    model = Stack().eval()
    gradpress.nn.quantize_(model, target_modules=["up", "down"])
    products = []
    product = linear.linear_blockwise

    def counted(x, weight, bias, **options):
        products.append(weight.shape)
        return product(x, weight, bias, **options)

    monkeypatch.setattr(linear, "linear_blockwise", counted)
    x = torch.randn(5, 16)
    model(x).backward()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    kept = len(products)
    model.zero_grad()
    with checkpoint_blocks_(model, blocks=list(model.blocks)):
        model(x).backward()
    again = products[2 * kept :]
    assert kept == 12
    assert again == [model.blocks[0].up.weight.shape] * 6
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
