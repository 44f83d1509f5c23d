"""Small models of many kinds, and what tests ask of them."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gradpress

VOCABULARY = 48


def llama(layers=2, hidden=32, **options):
    torch.manual_seed(0)
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, **options}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        **options,
    )
    return LlamaForCausalLM(config)


def token_batches(count=3, samples=2, tokens=10, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (samples, tokens), generator=g) for _ in range(count)]


def vector_batches(count=3, samples=4, columns=16, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, columns, generator=g) for _ in range(count)]


def square_loss(model, batch):
    """The mean square of what a model returns: a loss for any of them."""
    if isinstance(batch, dict):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple) else model(batch)
    if not isinstance(output, torch.Tensor):
        output = output[0]
    return output.float().square().mean()


def compress(model, recipe, calibration=None, **options):
    return gradpress.compress(
        model, recipe, calibration=calibration, **{"progress": False, **options}
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    """Whether two models hold the same bits."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        # Zeros of either sign are equal, but not the same.
        torch.equal(x, second[name]) and torch.equal(x.signbit(), second[name].signbit())
        for name, x in first.items()
    )


class Residual(nn.Module):
    """A block of two Linear modules."""

    def __init__(self, width=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def change(self, x):
        return self.down(nn.functional.gelu(self.up(self.norm(x))))

    def forward(self, x):
        return x + self.change(x)


class Stack(nn.Module):
    """Blocks of any kind, one after the other."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def stack(kind=Residual, count=3, model=Stack, **options):
    torch.manual_seed(0)
    return model(*[kind(**options) for _ in range(count)])
