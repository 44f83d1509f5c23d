"""Which parameters are projected, and what is said about it."""

import warnings

import pytest
from torch import nn

import gradpress


def test_a_rank_that_saves_little_draws_a_warning():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 12))
    with pytest.warns(UserWarning, match=r"rank 6 is at or above half .* 1 of 2 .*1\.weight"):
        gradpress.optim.param_groups(model, rank=6, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        projected, rest = gradpress.optim.param_groups(model, rank=5, verbose=False)
    assert [name for name, _ in projected["params"]] == ["0.weight", "1.weight"]
    assert [name for name, _ in rest["params"]] == ["0.bias", "1.bias"]


def test_nothing_to_project_is_an_error():
    with pytest.raises(ValueError, match="no trainable Linear weight"):
        gradpress.optim.param_groups(nn.LayerNorm(4), rank=1)
    with pytest.raises(ValueError, match="target_modules must match"):
        gradpress.optim.param_groups(nn.Sequential(nn.Linear(8, 8)), 1, target_modules=["mlp"])
