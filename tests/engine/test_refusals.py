"""What compressing refuses, with the model left as it was."""

import math

import pytest
import torch
from tests.engine.models import (
    Residual,
    Stack,
    compress,
    llama,
    same,
    square_loss,
    stack,
    token_batches,
    vector_batches,
    weights,
)
from tests.engine.zoo import Scaled
from torch import nn
from torch.nn.utils import parametrize

import gradpress
from gradpress import prune

BATCHES = token_batches()
BLOCK_BYTES = 4 * 9216
WANDA = prune.Wanda()
GBLM = prune.GBLM()


def parametrized():
    model = llama()
    parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", nn.Identity())
    return model


def tied():
    model = Stack(Residual(), Residual())
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return model


@pytest.mark.parametrize(
    ("error", "message", "model", "recipe", "calibration", "options"),
    [
        (TypeError, "model must be a module, got int", lambda: 5, WANDA, BATCHES, {}),
        (TypeError, "recipe must be a recipe or several, got Wanda", llama, prune.Wanda, [], {}),
        (TypeError, "recipe must be a recipe or several, got int", llama, 5, BATCHES, {}),
        (TypeError, r"recipe\[1\] must be a recipe, got str", llama, [WANDA, "x"], [], {}),
        (ValueError, "recipe must be a recipe or several, got none", llama, [], BATCHES, {}),
        (ValueError, "calibration must be batches .* got None", llama, WANDA, None, {}),
        (
            ValueError,
            "calibration must be batches .* got None",
            llama,
            prune.Magnitude(allocation="gradient"),
            None,
            {},
        ),
        (TypeError, "iterable of batches, got Tensor", llama, WANDA, BATCHES[0], {}),
        (TypeError, "iterable of batches, got dict", llama, WANDA, {"x": BATCHES[0]}, {}),
        (TypeError, "iterable of batches, got int", llama, WANDA, 3, {}),
        (
            TypeError,
            r"calibration\[1\] must be .* got str",
            llama,
            WANDA,
            [*BATCHES[:1], "x"],
            {},
        ),
        (TypeError, r"calibration\[0\] must be .* got float", llama, WANDA, [1.5], {}),
        (ValueError, "at least one sample, got none", llama, WANDA, [], {}),
        (ValueError, "at least one sample, got none", llama, WANDA, [BATCHES[0][:0]], {}),
        (
            TypeError,
            "loss must be a function .* got int",
            llama,
            GBLM,
            BATCHES,
            {"loss": 3},
        ),
        (
            ValueError,
            "Stack gives no loss for batches of Tensor; got None",
            lambda: Stack(Residual(), Residual()),
            GBLM,
            vector_batches(),
            {},
        ),
        (
            ValueError,
            r"loss must return a scalar tensor, got \[1, 10\]",
            llama,
            GBLM,
            BATCHES,
            {"loss": lambda model, batch: model(batch).logits[..., 0]},
        ),
        (
            ValueError,
            "loss must return a scalar tensor, got float",
            llama,
            GBLM,
            BATCHES,
            {"loss": lambda model, batch: model(batch).logits.sum().item()},
        ),
        (
            ValueError,
            "loss must be finite on every sample, got inf",
            llama,
            GBLM,
            BATCHES,
            {"loss": lambda model, batch: model(batch).logits.square().sum() * math.inf},
        ),
        (
            ValueError,
            "loss must depend on the layers",
            llama,
            GBLM,
            BATCHES,
            {"loss": lambda model, batch: model(batch).logits.sum().detach()},
        ),
        (
            ValueError,
            "gradient_memory must be at least 1, got 0",
            llama,
            GBLM,
            BATCHES,
            {"gradient_memory": 0},
        ),
        (
            ValueError,
            r"gradient_memory must be at least \d+ bytes, what the block of "
            r"model\.layers\.0\.self_attn\.q_proj needs, got 1000",
            llama,
            GBLM,
            BATCHES,
            {"gradient_memory": 1000},
        ),
        (
            ValueError,
            "gradient_memory must be left out or greater, since the blocks of Scaled",
            lambda: stack(model=Scaled),
            GBLM,
            vector_batches(),
            {"gradient_memory": 4 * 2 * 16 * 32, "loss": square_loss},
        ),
        (
            ValueError,
            "modules must match a layer of the model, got 'nothing'",
            llama,
            prune.Wanda(modules="nothing"),
            BATCHES,
            {},
        ),
        (
            ValueError,
            "modules must match a layer of the model, got 'all-linear'",
            lambda: nn.Sequential(nn.ReLU()),
            WANDA,
            BATCHES,
            {},
        ),
        (
            ValueError,
            "must be a parameter of dtype",
            lambda: llama().double(),
            WANDA,
            BATCHES,
            {},
        ),
        (
            ValueError,
            r"up_proj must be a parameter of its module",
            parametrized,
            WANDA,
            BATCHES,
            {},
        ),
        (
            ValueError,
            r"two layers of one weight, got blocks\.0\.up and blocks\.1\.up",
            tied,
            prune.Wanda(modules="up"),
            vector_batches(),
            {},
        ),
        (
            ValueError,
            "must hold values, got a meta tensor",
            lambda: llama().to("meta"),
            prune.Magnitude(),
            None,
            {},
        ),
        (
            ValueError,
            r"Wanda of 0: pattern 2:4 needs a multiple of 4 columns, got 6",
            lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)),
            prune.Wanda(pattern="2:4"),
            vector_batches(columns=6),
            {},
        ),
    ],
)
def test_refused(error, message, model, recipe, calibration, options):
    made = model()
    before = weights(made) if isinstance(made, nn.Module) else {}
    with pytest.raises(error, match=message) as found:
        compress(made, recipe, calibration, **options)
    assert str(found.value).startswith(("compress: ", "Wanda"))
    for name, old in before.items():
        if not old.is_meta:
            assert torch.equal(made.get_parameter(name), old)


def test_a_recipe_that_changes_weights_cannot_wait():
    class Halved(prune.GBLM):
        def compress(self, observed):
            for one in observed:
                yield gradpress.engine.Outcome(one.layer.name, one.layer.matrix / 2)

    model = llama()
    with pytest.raises(ValueError, match="without a mask"):
        compress(model, Halved(), BATCHES, gradient_memory=BLOCK_BYTES)
    assert same(model, llama())
    compress(model, Halved(), BATCHES)
    layer = model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(layer, llama().model.layers[1].mlp.up_proj.weight / 2)
