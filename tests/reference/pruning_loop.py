"""The block-sequential loop of Wanda's, GBLM-Pruner's and SparseGPT's code, for LLaMAs in float64.

Written after the papers and their protocol: the inputs of the first block are caught, then block
after block: statistics of the dense block, pruning, outputs of the pruned block.
"""

import contextlib
import math

import torch
from tests.reference import prune
from torch import nn
from torch.nn import functional


def linears(module):
    """The Linear modules inside of a block, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def gradient_norms(model, sequences, norm):
    """Sums over single sequences of ``|g|``, or of ``g^2``, by (block, name); mean loss a token."""
    sums = {}
    for ids in sequences:
        model.zero_grad()
        logits = model(ids[None]).logits[0]
        functional.cross_entropy(logits[:-1], ids[1:]).backward()
        for i, block in enumerate(model.model.layers):
            for name, module in linears(block).items():
                g = module.weight.grad
                g = g.abs() if norm == "l1" else g.square()
                sums[i, name] = sums.get((i, name), 0) + g
    model.zero_grad()
    return sums


class _Caught(Exception):
    pass


def _first_inputs(model, sequences):
    """What the first block is given, and the arguments beside it."""
    caught = []

    def catch(module, args, kwargs):
        caught.append((args[0], kwargs))
        raise _Caught

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids in sequences:
        with contextlib.suppress(_Caught):
            model(ids[None], use_cache=False)
    handle.remove()
    return caught


class _Sums:
    """Of one Linear: squares of inputs and their products, on average over the sequences."""

    def __init__(self, count):
        self.count = count
        self.squares, self.products = 0, 0

    def __call__(self, module, args, output):
        x = args[0][0]
        self.squares = self.squares + x.square().sum(0) / self.count
        self.products = self.products + 2 * x.T @ x / self.count


def visit_blocks(model, sequences, prune_linear):
    """The loop: `prune_linear` gets block, name, module and sums, and writes into the weight."""
    with torch.no_grad():
        hidden = _first_inputs(model, sequences)
        for i, block in enumerate(model.model.layers):
            sums = {name: _Sums(len(sequences)) for name in linears(block)}
            hooks = [m.register_forward_hook(sums[name]) for name, m in linears(block).items()]
            for x, kwargs in hidden:
                block(x, **kwargs)
            for hook in hooks:
                hook.remove()
            for name, module in linears(block).items():
                prune_linear(i, name, module, sums[name])
            hidden = [(block(x, **kwargs), kwargs) for x, kwargs in hidden]


def scores(weight, sums, gradients, method, norm, count, tokens, as_code):
    """Scores of one matrix in float64; of the code's form the gradients' product in float16."""
    size = weight.abs()
    if method == "Magnitude":
        return size
    if method == "Wanda":
        return size * sums.squares.sqrt()
    if as_code:
        total = 100 * (gradients if norm == "l1" else gradients.sqrt())
        product = (weight.half().abs() * total.half()).double()
        return product if method == "Gradient" else size * sums.squares.sqrt() + product
    mean = gradients / count if norm == "l1" else (gradients / count).sqrt()
    if method == "Gradient":
        return size * mean
    alpha = 100 * 128 if norm == "l1" else 100 * math.sqrt(128)
    return size * ((sums.squares * 2048 / tokens).sqrt() + alpha * mean)


def choose(score, method, sparsity, size, keep):
    """The mask that scores give."""
    group = "matrix" if method == "Magnitude" else "row"
    return torch.from_numpy(prune.mask(prune.array(score), sparsity, size, keep, group))
