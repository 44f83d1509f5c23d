"""Whole models beside the papers' loop in float64."""

import copy

import pytest
import torch
from tests.engine.models import compress, llama, same, token_batches
from tests.reference import prune as reference
from tests.reference import pruning_loop as loop

from gradpress import prune

TOKENS = 10
BATCHES = token_batches(count=3, samples=2, tokens=TOKENS)
SEQUENCES = [ids for batch in BATCHES for ids in batch]
PATTERNS = {"unstructured": {}, "2:4": {"size": 4, "keep": 2}}
#: Statistics are float32, of a float32 model: scores within this of the last that goes are ties.
NEAR = 1e-4
#: One rounding of the float16 product that the code's form has, of a score's size at most.
NEAR_HALF = 2e-3


def settings(method, **options):
    return pytest.param(method, options, id=" ".join([method, *map(str, options.values())]))


def agree(score, expected, kept, size, near):
    """Equal masks, but for weights whose scores are those where a group's choice falls."""
    wrong = expected != kept
    if not wrong.any():
        return
    grouped = [m.reshape(-1, size) for m in (score, expected, wrong)]
    for values, chosen, missed in zip(*grouped, strict=True):
        if missed.any():
            edge = values[~chosen].max()
            assert ((values[missed] - edge).abs() <= near * edge).all()
    # Ties are rare: the rest of the test would say nothing if they were not.
    assert wrong.sum() <= 0.01 * wrong.numel()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        settings("Magnitude"),
        settings("Wanda"),
        settings("Wanda", sparsity=0.37),
        *(settings("Gradient", norm=norm) for norm in ("l1", "l2")),
        *(settings("GBLM", norm=norm) for norm in ("l1", "l2")),
        *(settings("GBLM", norm=norm, reference=True) for norm in ("l1", "l2")),
        settings("Gradient", norm="l1", reference=True),
    ],
)
def test_masks(method, options, pattern):
    groups = PATTERNS[pattern]
    options = dict(options)
    if groups:
        options.pop("sparsity", None)
    sparsity = options.get("sparsity", 0.5)
    norm, as_code = options.get("norm", "l1"), options.get("reference", False)
    dense = llama().double()
    model = llama()
    recipe = getattr(prune, method)(pattern=pattern, **options)
    compress(model, recipe, None if method == "Magnitude" else BATCHES)
    gradients = {}
    if method in ("Gradient", "GBLM"):
        gradients = loop.gradient_norms(dense, SEQUENCES, norm)
    seen = []

    def check(i, name, module, sums):
        before = module.weight.clone()
        score = loop.scores(
            before, sums, gradients.get((i, name)), method, norm, len(SEQUENCES), TOKENS, as_code
        )
        expected = loop.choose(score, method, sparsity, **{"size": 0, "keep": 0, **groups})
        after = model.model.layers[i].get_submodule(name).weight.detach()
        kept = after != 0
        size = 4 if groups else before.numel() if method == "Magnitude" else before.shape[1]
        agree(score, expected, kept, size, NEAR_HALF if as_code else NEAR)
        # What stays keeps its bits, and the next block sees what the engine's next block saw.
        assert torch.equal(after, torch.where(kept, before.float(), 0.0))
        module.weight.copy_(after.double())
        seen.append((i, name))

    loop.visit_blocks(dense, SEQUENCES, check)
    assert len(seen) == 14
    assert torch.equal(model.lm_head.weight, llama().lm_head.weight)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt(pattern):
    groups = PATTERNS[pattern]
    dense = llama().double()
    model = llama()
    compress(model, prune.SparseGPT(pattern=pattern), BATCHES)
    seen = []

    def check(i, name, module, sums):
        before = module.weight.clone()
        share = None if groups else 0.5
        expected, kept, _ = reference.sparsegpt(before, sums.products, share, **groups)
        after = model.model.layers[i].get_submodule(name).weight.detach()
        # float32 work on a Hessian of fewer tokens than columns, which damping alone makes regular.
        wrong = torch.from_numpy(kept) != (after != 0)
        assert wrong.sum() <= 0.005 * wrong.numel()
        expected = torch.from_numpy(expected)
        right = ~wrong.any(1)  # a weight that goes or not changes the rest of its row
        far = (after.double() - expected)[right].abs().max()
        assert far <= 1e-3 * before.abs().max()
        module.weight.copy_(after.double())
        seen.append(right.float().mean())

    loop.visit_blocks(dense, SEQUENCES, check)
    assert len(seen) == 14
    assert min(seen) > 0.8


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_groups_of_gradients_give_the_same_bits(norm):
    model = llama(layers=4)
    recipe = prune.GBLM(norm=norm)
    of_block = 4 * sum(m.weight.numel() for m in loop.linears(model.model.layers[0]).values())
    found = []
    for memory in (None, 4 * of_block, 3 * of_block, 2 * of_block + 3, of_block):
        found.append(copy.deepcopy(model))
        report = compress(found[-1], recipe, BATCHES, gradient_memory=memory)
        held = min(4, (memory or 4 * of_block) // of_block) * of_block
        assert held <= report.statistics_bytes < held + of_block
        assert report.sparsity == 0.5
        assert same(found[-1], found[0])
    assert not same(found[0], model)
