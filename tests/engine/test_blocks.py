"""Which lists of modules are taken for blocks."""

import copy

import torch
from tests.engine.models import Residual, Stack, compress, same, square_loss, vector_batches
from tests.engine.zoo import bart
from torch import nn

from gradpress import prune
from gradpress.engine._blocks import find_blocks
from gradpress.engine._layers import select_layers


def names(model, modules="all-linear"):
    """Names of the blocks found, list by list."""
    known = {id(module): name for name, module in model.named_modules()}
    lists = find_blocks(model, select_layers("test", model, modules))
    return [[known[id(block)] for block in blocks] for blocks in lists]


def test_smaller_blocks_before_larger_ones():
    """Not the parts of the whole, of which one would hold nearly everything."""
    body = Stack(*[nn.Sequential(nn.Linear(16, 16), nn.ReLU(), Residual()) for _ in range(3)])
    model = nn.Sequential(nn.Linear(16, 16), body, nn.Linear(16, 4))
    assert names(model) == [[f"1.blocks.{i}" for i in range(3)]]


def test_list_after_list_in_the_order_of_the_model():
    model = nn.ModuleDict(
        {
            "small": nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)),
            "large": nn.Sequential(*[Residual() for _ in range(3)]),
            "one": nn.Sequential(nn.Linear(16, 16), nn.ReLU()),
        }
    )
    # A list of which one block alone has layers splits nothing.
    expected = [[f"small.{i}" for i in range(3)], [f"large.{i}" for i in range(3)]]
    assert names(model) == expected
    assert names(model, "large.1.up") == []
    encoder, decoder = names(bart().model)
    assert encoder == [f"model.encoder.layers.{i}" for i in range(2)]
    assert decoder == [f"model.decoder.layers.{i}" for i in range(3)]


def test_no_lists():
    block = Residual()
    assert names(nn.Sequential(block, block)) == []  # one module, twice
    assert names(Residual()) == []
    assert names(nn.Sequential(Residual())) == []


def test_what_comes_first_is_compressed_first():
    """A later list sees what an earlier one has become, as in one pass over the layers."""
    torch.manual_seed(0)
    model = nn.Sequential(Stack(*[Residual() for _ in range(2)]), nn.Tanh())
    model.append(Stack(*[Residual() for _ in range(3)]))
    alone = copy.deepcopy(model)
    report = compress(model, prune.GBLM(), vector_batches(), loss=square_loss)
    order = [row.name.rpartition(".")[0] for row in report.rows]
    assert order == sorted(order)
    assert len(order) == 10
    # By hand: the second part with gradients of the unchanged model, and inputs of the changed.
    second = copy.deepcopy(alone)
    compress(alone, prune.Wanda(), vector_batches())
    compress(second, prune.Wanda(modules=["0.blocks.0", "0.blocks.1"]), vector_batches())
    compress(second, prune.Wanda(modules="2.blocks"), vector_batches())
    assert same(alone, second)


def test_nothing_runs_behind_the_last_layer_meant():
    calls = []

    class Counted(Residual):
        def forward(self, x):
            calls.append(self)
            return super().forward(x)

    model = Stack(*[Counted() for _ in range(6)])
    compress(model, prune.Wanda(modules=["blocks.0.", "blocks.1."]), vector_batches())
    late = [block for block in calls if block in list(model.blocks)[2:]]
    # Watched once and tried once on the first batch, whose arguments are also taken; no more.
    assert len(late) <= 3 * 4
    early = [block for block in calls if block is model.blocks[0]]
    assert len(early) >= 2 * len(vector_batches())
