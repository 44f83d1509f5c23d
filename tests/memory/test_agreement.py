"""What is predicted for modules of any kind is what is measured."""

import pytest
import torch
import torch.nn.functional as F
from tests.memory.steps import check, measured
from torch import nn

import gradpress
from gradpress.memory import plan
from gradpress.memory._losses import token_loss


class Attention(nn.Module):
    """Attention with a mask, dropout, convolution and normalization: no language model's class."""

    def __init__(self, masked):
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.mixing = nn.Conv1d(64, 192, 3, padding=1)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("mask", torch.ones(48, 48).tril().bool() if masked else None)

    def forward(self, tokens):
        x = self.embedding(tokens)
        mixed = self.mixing(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = mixed.unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        positions = torch.arange(x.shape[1], device=x.device) / x.shape[1]
        y = y.transpose(1, 2).flatten(2) + positions[:, None]
        return self.head(self.dropout(self.norm(x + y)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", [gradpress.optim.AdamW8bit, torch.optim.SGD])
def test_modules_of_any_kind(make, masked):
    shape = {"batch": 3, "sequence": 48}
    model = Attention(masked)
    optimizer = make(model.parameters(), lr=0.1)
    planned = plan(model, optimizer, **shape)
    watched = measured(model, optimizer, token_loss(torch.float32), **shape, vocabulary=50)
    check(planned, watched)


def test_branches_by_values_take_the_way_of_zeros():
    """AdamP projects updates that are at right angles to a weight: here all are."""
    shape = {"batch": 3, "sequence": 48}
    model = Attention(masked=False)
    optimizer = gradpress.optim.AdamP(model.parameters())
    planned = plan(model, optimizer, **shape)
    watched = measured(model, optimizer, token_loss(torch.float32), **shape, vocabulary=50)
    assert watched.peak <= planned.peak <= 1.3 * watched.peak


def test_a_transformer_of_torch():
    shape = {"batch": 3, "sequence": 40}
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(nn.Embedding(50, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 50))
    optimizer = torch.optim.AdamW(model.parameters())
    planned = plan(model, optimizer, **shape)
    watched = measured(model, optimizer, token_loss(torch.float32), **shape, vocabulary=50)
    check(planned, watched)
