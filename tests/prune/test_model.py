"""One choice among many matrices beside a sort of all their scores."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.cuda.devices import emulator
from tests.reference import prune as reference

from gradpress import prune


def sorted_choice(scores, sparsity):
    """The first ``int(total * sparsity)`` of a stable ascending sort go."""
    flat = torch.cat([x.float().flatten() for x in scores]) if scores else torch.zeros(0)
    kept = reference.drop_first(flat.numpy(), int(flat.numel() * sparsity))
    parts = np.split(kept, np.cumsum([x.numel() for x in scores])[:-1]) if scores else []
    return [part.reshape(x.shape) for part, x in zip(parts, scores, strict=True)]


def equal(masks, want):
    return len(masks) == len(want) and all(
        (np.asarray(mask) == other).all() for mask, other in zip(masks, want, strict=True)
    )


@given(
    shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), max_size=6),
    sparsity=st.sampled_from([0.0, 1.0, 0.5, 0.29]) | st.floats(0, 1),
    levels=st.sampled_from([0, 1, 3]),
    dtypes=st.permutations([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_matches_a_sort_of_everything(shapes, sparsity, levels, dtypes, seed):
    g = torch.Generator().manual_seed(seed)
    scores = []
    for i, shape in enumerate(shapes):
        score = torch.randn(shape, generator=g) * 2.0 ** (i - 2)
        scores.append((score * levels).round() if levels else score)
        scores[-1] = scores[-1].to(dtypes[i % 3])
    masks = prune.mask_model(scores, sparsity=sparsity)
    want = sorted_choice(scores, sparsity)
    assert equal(masks, want)
    total = sum(x.numel() for x in scores)
    assert sum(int((~mask).sum()) for mask in masks) == int(total * sparsity)
    if len(scores) == 1:
        assert torch.equal(masks[0], prune.mask(scores[0], sparsity=sparsity, group="matrix"))


def statistics(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(20, 30), (30, 20), (7, 111), (64, 64)]
    weights = [torch.randn(shape, generator=g) for shape in shapes]
    input_sqs = [torch.rand(columns, generator=g) for _, columns in shapes]
    grad_norms = [torch.rand(shape, generator=g) * 1e-4 for shape in shapes]
    return weights, {"input_sqs": input_sqs, "grad_norms": grad_norms}


def test_scores_are_those_of_single_matrices():
    weights, given = statistics()
    squares, norms = given["input_sqs"], given["grad_norms"]
    for options, scorer in (
        ({}, lambda w, a, n: prune.score_magnitude(w)),
        ({"input_sqs": squares}, lambda w, a, n: prune.score_wanda(w, a)),
        ({"grad_norms": norms}, lambda w, a, n: prune.score_gradient(w, n)),
        (given, lambda w, a, n: prune.score_gblm(w, a, n)),
        (given | {"alpha": 3.0, "norm": "l2", "tokens": 512}, None),
        (given | {"reference": True}, lambda w, a, n: prune.score_gblm(w, a, n, reference=True)),
    ):
        if scorer is None:
            scorer = lambda w, a, n: prune.score_gblm(w, a, n, alpha=3.0, norm="l2", tokens=512)  # noqa: E731
        scores = [scorer(*each) for each in zip(weights, squares, norms, strict=True)]
        masks = prune.select_model(weights, **options, sparsity=0.4)
        assert equal(masks, sorted_choice(scores, 0.4))
        assert equal(prune.mask_model(scores, sparsity=0.4), masks)


def test_matrices_are_compared_with_each_other():
    weights, given = statistics()
    scaled = [weight * factor for weight, factor in zip(weights, (8, 1, 1, 1), strict=True)]
    masks = prune.select_model(scaled, sparsity=0.5)
    shares = [float(mask.float().mean()) for mask in masks]
    assert shares[0] > 0.9
    assert all(share < 0.5 for share in shares[1:])
    previous = [torch.ones_like(mask) for mask in masks]
    for sparsity in (0.0, 0.1, 0.5, 0.9, 1.0):
        masks = prune.select_model(weights, **given, sparsity=sparsity)
        assert all((~mask | old).all() for mask, old in zip(masks, previous, strict=True))
        previous = masks
    assert not any(mask.any() for mask in previous)


def test_ties_go_from_the_first_matrix_on():
    scores = [torch.ones(2, 3), torch.full((1, 4), 2.0), torch.ones(70, 1000), torch.ones(3, 3)]
    masks = prune.mask_model(scores, sparsity=35_000 / 70_019)
    dropped = [int((~mask).sum()) for mask in masks]
    assert dropped == [6, 0, 34_994, 0]
    assert not masks[2].flatten()[:34_994].any()


def test_devices_agree():
    weights, given = statistics()
    coarse = [weight.round() for weight in weights]
    for options in (given | {"sparsity": 0.5}, {"sparsity": 0.3}):
        want = [prune.select_model(x, **options) for x in (weights, coarse)]
        with emulator(order=6, seed=1) as used:
            got = [prune.select_model(x, **options) for x in (weights, coarse)]
        assert used
        assert all(equal(a, b) for a, b in zip(got, want, strict=True))


def test_kinds_of_arrays():
    weights, given = statistics()
    want = prune.select_model(weights, **given, sparsity=0.5)
    arrays = {name: [x.double().numpy() for x in items] for name, items in given.items()}
    masks = prune.select_model([x.numpy() for x in weights], **arrays, sparsity=0.5)
    assert all(isinstance(mask, np.ndarray) and mask.dtype == np.bool_ for mask in masks)
    assert equal(masks, want)
    mixed = [weights[0], weights[1].numpy(), weights[2].T.contiguous().T, weights[3].view(64, 8, 8)]
    masks = prune.select_model(mixed, sparsity=0.5)
    assert [tuple(mask.shape) for mask in masks] == [tuple(x.shape) for x in mixed]
    assert prune.mask_model([], sparsity=0.5) == []


def test_refuses_what_does_not_fit():
    weights, given = statistics()
    with pytest.raises(
        ValueError, match="select_model: input_sqs must have one entry for each of 4"
    ):
        prune.select_model(weights, input_sqs=given["input_sqs"][:3], sparsity=0.5)
    with pytest.raises(ValueError, match="select_model: grad_norm must have shape"):
        prune.select_model(weights, grad_norms=given["grad_norms"][::-1], sparsity=0.5)
    with pytest.raises(ValueError, match="mask_model: sparsity must be from 0 to 1, got 2"):
        prune.mask_model(weights, sparsity=2)
    with pytest.raises(TypeError, match="mask_model: score must have dtype"):
        prune.mask_model([weights[0].double()], sparsity=0.5)
    with pytest.warns(RuntimeWarning, match="mask_model: 2 scores are not a number"):
        masks = prune.mask_model(
            [torch.tensor([float("nan"), 1.0]), torch.tensor([2.0, -float("nan")])], sparsity=0.5
        )
    assert [mask.tolist() for mask in masks] == [[True, False], [False, True]]
