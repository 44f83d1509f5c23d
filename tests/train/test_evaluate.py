import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gradpress.train.evaluate import Evaluation, evaluate


class Table(torch.nn.Module):
    """Logits that depend on the last token alone, so that NumPy can follow."""

    def __init__(self, vocabulary):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(
            3 * torch.randn(vocabulary, vocabulary, generator=generator)
        )
        self.calls = []

    def forward(self, input_ids, use_cache):
        assert not use_cache
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append(len(input_ids))
        return SimpleNamespace(logits=self.table[input_ids])


def reference(table, tokens, windows, length):
    """Mean loss per token in float64, window by window."""
    table = table.detach().numpy().astype(np.float64)
    available = (len(tokens) - 1) // length
    losses = []
    for index in range(windows):
        start = index * available // windows * length
        for position in range(start, start + length):
            row = table[tokens[position]]
            highest = row.max()
            normalizer = highest + math.log(np.exp(row - highest).sum())
            losses.append(normalizer - row[tokens[position + 1]])
    return float(np.mean(losses))


@pytest.mark.parametrize(("batches", "windows"), [(1, 4), (3, 12), (100, 33)])
def test_mean_per_token_in_float64(batches, windows):
    tokens = np.random.default_rng(1).integers(0, 20, size=300).astype(np.uint16)
    model = Table(20)
    found = evaluate(model, tokens, sequence_length=9, batch_size=4, batches=batches)
    assert found.windows == windows
    assert found.tokens == windows * 9
    # Logits and log-softmax are float32 (relative error about 1e-7 a token); the sum is float64.
    assert found.loss == pytest.approx(reference(model.table, tokens, windows, 9), rel=1e-6)
    assert found.perplexity == math.exp(found.loss)
    assert model.training
    assert sum(model.calls) == windows


def test_short_last_batch_weighs_what_it_holds():
    tokens = np.random.default_rng(2).integers(0, 20, size=46).astype(np.uint16)
    model = Table(20)
    found = evaluate(model, tokens, sequence_length=9, batch_size=4, batches=9)
    assert model.calls == [4, 1]
    assert found.loss == pytest.approx(reference(model.table, tokens, 5, 9), rel=1e-6)


def test_huge_loss_has_infinite_perplexity():
    assert Evaluation(loss=1e4, tokens=1, windows=1).perplexity == math.inf
