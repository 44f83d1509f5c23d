"""Memory predicted before anything exists is what is counted afterwards."""

import pytest
import torch
from tests.optim.test_drop_in import every, setup, train
from torch import nn

import gradpress


@every
def test_a_plan_is_what_is_counted(make):
    model, optimizer = setup(make)
    planned = gradpress.memory.plan(model, optimizer)
    assert not optimizer.state
    train(model, optimizer, 0, 3)
    counted = gradpress.memory.count(model, optimizer).by_category
    if any(group.get("rank") == "auto" for group in optimizer.param_groups):
        # Ranks that gradients will choose are planned as large as they may become.
        assert planned.by_category.keys() == counted.keys()
        assert all(planned.by_category[name] >= size for name, size in counted.items())
    else:
        assert planned.by_category == counted


def test_models_that_do_not_fit_can_be_planned():
    """LLaMA-7B's matrices (Q-GaLore's table: section 3.2 of the GaLore paper, rank 1024)."""
    with torch.device("meta"):
        layers = [nn.Linear(4096, 4096, bias=False) for _ in range(4 * 32)]
        layers += [nn.Linear(4096, 11008, bias=False) for _ in range(3 * 32)]
        model = nn.ModuleList(layers)
    groups = [{"params": model.parameters(), "rank": 1024}]
    optimizer = gradpress.optim.QGaLoreAdamW(groups)
    planned = gradpress.memory.plan(model, optimizer).by_category
    elements = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert planned["weights"] == planned["gradients"] == 4 * elements
    low_rank = 32 * 1024 * (4 * 4096 + 3 * 11008)
    # Two moments of a byte each, a scale for every 256 elements, a counter for each weight.
    assert planned["optimizer_states"] == 2 * low_rank * (256 + 4) // 256 + 4 * len(layers)
    bases = len(layers) * 4096 * 1024
    codes = bases // 2 + bases // 256 * 5
    beside = len(layers) * 4 * (4096 + 5)  # leading directions, cosines
    assert planned["projectors"] == codes + beside


def test_other_optimizers_are_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"optimizer must be one of gradpress\.optim, got SGD"):
        gradpress.memory.plan(model, torch.optim.SGD(model.parameters()))


def test_gradients_that_are_never_formed_are_not_planned():
    model = gradpress.nn.quantize_(nn.Sequential(nn.Linear(64, 96)), target_modules="all-linear")
    groups = gradpress.optim.param_groups(model, rank=8, verbose=False)
    optimizer = gradpress.optim.QGaLoreAdamW(groups, materialize_gradients=False)
    planned = gradpress.memory.plan(model, optimizer).by_category
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    assert planned == gradpress.memory.count(model, optimizer).by_category
    assert planned["gradients"] == 4 * 96  # the bias
