"""Scores and selections beside float64 transcriptions, and the laws they keep."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.prune.golden import GRADIENTS, INPUT_SQ, WEIGHT
from tests.reference import prune as reference

from gradpress import prune
from gradpress.ops import prune as kernels
from gradpress.ops import runtime

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Three roundings of float32 stand between a score and its float64 value.
ROUNDING = 4 * 2.0**-24


def random(rows, columns, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g).to(dtype)
    return weight, torch.rand(columns, generator=g), torch.rand(rows, columns, generator=g) * 1e-4


def same_but_for_rounding(got, want, score, **group):
    """The masks are the same, but where the float64 score is within rounding of a dropped one."""
    got = np.asarray(got)
    assert got.shape == want.shape
    columns = score.shape[1]
    width = group.get("size") or (columns if group.get("group") != "matrix" else score.size)
    flat = [x.reshape(-1, width) if x.size else x for x in (got, want, score)]
    for mine, theirs, scores in zip(*flat, strict=True):
        assert mine.sum() == theirs.sum()
        if (mine != theirs).any():
            odd = scores[mine != theirs]
            assert np.ptp(odd) <= ROUNDING * np.abs(odd).max()


def test_golden_scores():
    wanda = [[0.559017, 1.5, 0.559017, 4.472136], [0.33541, 1.2, 3.577709, 0.223607]]
    gblm = [[0.709017, 1.8, 0.734017, 4.772136], [0.45541, 1.44, 4.697709, 0.443607]]
    assert INPUT_SQ.tolist() == [1.25, 2.25, 5, 5]
    score = prune.score_wanda(WEIGHT, INPUT_SQ)
    torch.testing.assert_close(score, torch.tensor(wanda), rtol=1e-6, atol=1e-6)
    for kept in (
        prune.mask(score, sparsity=0.5),
        prune.select(WEIGHT, input_sq=INPUT_SQ, sparsity=0.5),
    ):
        assert kept.tolist() == [[False, True, False, True], [False, True, True, False]]
    l1, l2 = (100 * GRADIENTS).abs().sum(0), (100 * GRADIENTS).square().sum(0).sqrt()
    expected = [[0.223607, 0.223607, 0.5, 0.111803], [0.316228, 0.223607, 0.608276, 2.009975]]
    torch.testing.assert_close(l2, torch.tensor(expected), rtol=1e-5, atol=0)
    score = prune.score_gblm(WEIGHT, INPUT_SQ, l1, alpha=1.0)
    torch.testing.assert_close(score, torch.tensor(gblm), rtol=1e-6, atol=0)
    # Two roundings to float16 of factors and one of the product.
    score = prune.score_gblm(WEIGHT, INPUT_SQ, l1, reference=True)
    torch.testing.assert_close(score, torch.tensor(gblm), rtol=2e-3, atol=0)
    half = (WEIGHT.half().abs() * l1.half()).float()
    assert torch.equal(score, WEIGHT.abs() * INPUT_SQ.sqrt() + half)


def test_golden_magnitude():
    score = prune.score_magnitude(WEIGHT)
    assert torch.equal(score, WEIGHT.abs())
    exact = prune.mask(score, sparsity=0.5, group="matrix")
    assert (~exact).sum() == 4
    assert not exact[score < 0.8].any()
    compatible = prune.mask(score, sparsity=0.5, group="matrix", reference=True)
    assert torch.equal(compatible, score > 0.8)
    assert (~compatible).sum() == 5


@given(
    rows=st.integers(0, 9),
    columns=st.sampled_from([0, 1, 2, 31, 64, 192, 200, 257, 2049, 5000]) | st.integers(1, 700),
    sparsity=st.sampled_from([0.0, 1.0, 0.5, 0.29, 1 / 3]) | st.floats(0, 1),
    group=st.sampled_from(["row", "matrix"]),
    kind=st.sampled_from(["magnitude", "wanda", "gblm", "gradient"]),
    dtype=st.sampled_from(DTYPES),
    levels=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 1000),
)
def test_matches_float64(rows, columns, sparsity, group, kind, dtype, levels, seed):
    weight, input_sq, grad = random(rows, columns, dtype, seed)
    if levels:  # many ties, among scores that float32 holds exactly
        weight = (weight.float() * levels).round().to(dtype)
        input_sq, grad = (input_sq * 3).round().square(), (grad * 2e4).round()
    options = {}
    if kind in ("wanda", "gblm"):
        options["input_sq"] = input_sq
    if kind in ("gradient", "gblm"):
        options["grad_norm"] = grad
    alpha = 2.0 if kind == "gblm" else 1.0
    wanted = reference.score(
        weight.double(), **{k: v.double() for k, v in options.items()}, alpha=alpha
    )
    if kind == "gblm":
        options["alpha"] = alpha
    scorer = {
        "magnitude": prune.score_magnitude,
        "wanda": prune.score_wanda,
        "gblm": prune.score_gblm,
        "gradient": prune.score_gradient,
    }[kind]
    score = scorer(weight, **options)
    np.testing.assert_allclose(score.numpy(), wanted, rtol=ROUNDING)
    kept = prune.mask(score, sparsity=sparsity, group=group)
    assert kept.dtype == torch.bool
    assert (kept.numpy() == reference.mask(score.numpy(), sparsity, group=group)).all()
    fused = prune.select(weight, **options, sparsity=sparsity, group=group)
    assert torch.equal(fused, kept)
    expected = reference.mask(wanted, sparsity, group=group)
    if levels:
        assert (kept.numpy() == expected).all()
    else:
        same_but_for_rounding(kept, expected, wanted, group=group)
    if group == "row":
        assert (~kept).sum(1).tolist() == [int(columns * sparsity)] * rows
    else:
        assert (~kept).sum() == int(rows * columns * sparsity)


@given(
    rows=st.integers(0, 6),
    groups=st.integers(0, 70),
    shape=st.sampled_from(
        [(2, 4), (4, 8), (1, 4), (1, 2), (3, 3), (1, 1), (5, 7), (9, 16), (20, 50)]
    ),
    dtype=st.sampled_from(DTYPES),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_groups_of_columns(rows, groups, shape, dtype, ties, seed):
    keep, size = shape
    weight, input_sq, _ = random(rows, groups * size, dtype, seed)
    if ties:
        weight, input_sq = weight.float().round().to(dtype), (input_sq * 2).round().square()
    score = prune.score_wanda(weight, input_sq)
    kept = prune.mask(score, pattern=f"{keep}:{size}")
    want = reference.mask(score.numpy(), size=size, keep=keep)
    assert (kept.numpy() == want).all()
    assert (kept.reshape(-1, size).sum(1) == keep).all()
    assert torch.equal(prune.select(weight, input_sq=input_sq, pattern=f"{keep}:{size}"), kept)


@given(
    count=st.integers(1, 1200),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 1000),
    special=st.sampled_from([(), (np.nan,), (np.inf, -np.inf), (np.nan, np.inf, -0.0, 0.0)]),
)
@settings(max_examples=60)
@pytest.mark.filterwarnings("ignore:mask. .* not a number:RuntimeWarning")
def test_scores_of_either_sign(count, sparsity, seed, special):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((2, count)).astype(np.float32)
    for value in special:
        scores[rng.random(scores.shape) < 0.2] = value
    for group in ("row", "matrix"):
        kept = prune.mask(scores, sparsity=sparsity, group=group)
        assert isinstance(kept, np.ndarray)
        assert kept.dtype == np.bool_
        assert (kept == reference.mask(scores, sparsity, group=group)).all()


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_ties_go_from_the_lower_column_on(group):
    for count in (1, 10, 300, 70000):
        kept = prune.mask(torch.ones(1, count), sparsity=0.3, group=group)
        assert kept.tolist() == [[False] * int(count * 0.3) + [True] * (count - int(count * 0.3))]
    kept = prune.mask(torch.ones(3, 50_000), sparsity=0.5, group="matrix").flatten()
    assert not kept[:75_000].any()
    assert kept[75_000:].all()
    assert prune.mask(torch.ones(2, 4), pattern="1:4").tolist() == [[False] * 3 + [True]] * 2


def test_what_is_not_a_number_is_kept_and_reported():
    score = torch.tensor([[float("nan"), 3.0, float("inf"), 1.0, -float("nan"), 2.0]])
    with pytest.warns(RuntimeWarning, match="mask: 2 scores are not a number"):
        kept = prune.mask(score, sparsity=0.5)
    assert kept.tolist() == [[True, False, True, False, True, False]]
    with pytest.warns(RuntimeWarning, match="mask: 2 scores"):
        assert prune.mask(score, pattern="1:3").tolist() == [
            [False, False, True, False, True, False]
        ]
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    infinite = torch.tensor([float("inf"), 1.0, 1.0, 1.0])
    with pytest.warns(RuntimeWarning, match="select: 1 scores"):
        kept = prune.select(weight, input_sq=infinite, sparsity=0.25)
    assert kept.tolist() == [[True, False, True, True]]
    for sparsity in (0.0, 1.0):
        with pytest.warns(RuntimeWarning, match="mask: 2 scores"):
            kept = prune.mask(score, sparsity=sparsity, group="matrix")
        assert kept.tolist() == [[sparsity == 0] * 6]


def test_laws_of_masks():
    weight, input_sq, grad = random(20, 96)
    options = {"input_sq": input_sq, "grad_norm": grad}
    previous = torch.ones(20, 96, dtype=torch.bool)
    for sparsity in (0.0, 0.1, 0.37, 0.5, 0.99, 1.0):
        for group in ("row", "matrix"):
            kept = prune.select(weight, **options, sparsity=sparsity, group=group)
            more = prune.select(weight, **options, sparsity=min(1, sparsity + 0.2), group=group)
            assert (kept | ~more).all()  # what stays at a greater sparsity stays at a lower one
        previous = kept
    assert not previous.any()
    kept = prune.select(weight, **options, sparsity=0.5)
    rows, columns = torch.randperm(20), torch.randperm(96)
    assert torch.equal(
        prune.select(weight[rows], input_sq=input_sq, grad_norm=grad[rows], sparsity=0.5),
        kept[rows],
    )
    shuffled = prune.select(
        weight[:, columns], input_sq=input_sq[columns], grad_norm=grad[:, columns], sparsity=0.5
    )
    assert torch.equal(shuffled, kept[:, columns])
    for dtype in (torch.bfloat16, torch.float16):
        stored = weight.to(dtype)
        assert torch.equal(
            prune.select(stored, **options, sparsity=0.5),
            prune.select(stored.float(), **options, sparsity=0.5),
        )


def test_laws_of_wanda():
    weight, input_sq, _ = random(12, 64)
    kept = prune.select(weight, input_sq=input_sq, sparsity=0.5)
    # Powers of two scale float32 exactly.
    scale = torch.tensor([2.0, -0.5, 8.0]).repeat(4)[:, None]
    assert torch.equal(prune.select(weight * scale, input_sq=input_sq, sparsity=0.5), kept)
    assert torch.equal(prune.select(weight, input_sq=input_sq * 16, sparsity=0.5), kept)
    ones = prune.select(weight, input_sq=torch.ones(64), sparsity=0.5)
    assert torch.equal(ones, prune.select(weight, sparsity=0.5))


def test_laws_of_gblm():
    weight, input_sq, grad = random(12, 64)

    def both(**options):
        given = {"input_sq": input_sq, "grad_norm": grad, "sparsity": 0.5}
        return prune.select(weight, **{**given, **options})

    wanda = prune.select(weight, input_sq=input_sq, sparsity=0.5)
    gradient = prune.select(weight, grad_norm=grad, sparsity=0.5)
    assert torch.equal(both(grad_norm=torch.zeros_like(grad)), wanda)
    assert torch.equal(both(alpha=0.0), wanda)
    assert torch.equal(both(input_sq=torch.zeros(64), alpha=1.0), gradient)
    assert torch.equal(
        both(input_sq=torch.zeros(64), reference=True),
        prune.select(weight, grad_norm=grad, sparsity=0.5, reference=True),
    )
    assert torch.equal(both(alpha=1e12), gradient)
    assert not torch.equal(both(), wanda)
    assert not torch.equal(both(), gradient)
    # Sums over 128 samples of 100 times the gradient, inputs of 2048 tokens: the authors' balance.
    summed = weight.abs() * (input_sq.sqrt() + 100 * 128 * grad)
    torch.testing.assert_close(prune.score_gblm(weight, input_sq, grad), summed)
    squares = weight.abs() * (input_sq.sqrt() + 100 * 128**0.5 * grad)
    torch.testing.assert_close(prune.score_gblm(weight, input_sq, grad, norm="l2"), squares)
    # Half as many tokens in a sequence sum up to half the squares.
    shorter = prune.score_gblm(weight, input_sq / 4, grad, tokens=512)
    torch.testing.assert_close(shorter, summed)


def test_kinds_of_arrays():
    weight, input_sq, grad = random(6, 40)
    kept = prune.select(weight, input_sq=input_sq, grad_norm=grad, sparsity=0.5)
    arrays = [x.numpy() for x in (weight, input_sq, grad)]
    same = prune.select(arrays[0], input_sq=arrays[1], grad_norm=arrays[2], sparsity=0.5)
    assert isinstance(same, np.ndarray)
    assert (same == kept.numpy()).all()
    score = prune.score_gblm(arrays[0], arrays[1].astype(np.float64), arrays[2])
    assert isinstance(score, np.ndarray)
    strided = weight.T.contiguous().T
    assert torch.equal(prune.select(strided, input_sq=input_sq, grad_norm=grad, sparsity=0.5), kept)
    parameter = torch.nn.Parameter(weight.clone())
    assert torch.equal(prune.score_wanda(parameter, input_sq), prune.score_wanda(weight, input_sq))
    convolution = prune.select(weight.view(6, 10, 2, 2), input_sq=input_sq, sparsity=0.5)
    assert convolution.shape == (6, 10, 2, 2)
    assert torch.equal(
        convolution.view(6, 40), prune.select(weight, input_sq=input_sq, sparsity=0.5)
    )
    row = prune.mask(weight[0], sparsity=0.5)
    assert row.shape == (40,)
    assert torch.equal(row, prune.mask(weight, sparsity=0.5)[0])
    assert prune.mask(torch.empty(0), sparsity=0.5).shape == (0,)
    assert prune.mask(torch.tensor([2.0]), sparsity=0.5).tolist() == [True]


def test_bits_do_not_depend_on_threads_or_instructions(restore_level, restore_threads):
    weight, input_sq, grad = random(70, 3001, torch.bfloat16)
    weight[:, ::3] = 0.5  # ties across tasks
    calls = [
        {"sparsity": 0.4, "input_sq": torch.ones(3001)},
        {"sparsity": 0.4, "group": "matrix"},
        {"sparsity": 0.6, "input_sq": input_sq, "grad_norm": grad},
        {"pattern": "3001:3001"},
    ]
    want = None
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for level in runtime.simd_levels():
            runtime.set_simd_level(level)
            got = [prune.select(weight, **options).tolist() for options in calls]
            want = want or got
            assert got == want


def test_inputs_stay_and_huge_scores_are_ordered():
    weight, input_sq, grad = random(5, 24)
    before = [x.clone() for x in (weight, input_sq, grad)]
    prune.select(weight, input_sq=input_sq, grad_norm=grad, pattern="2:4")
    assert all(map(torch.equal, before, (weight, input_sq, grad)))
    score = torch.tensor([[3e38, 1e-45, 0.0, 1e-30, float("inf"), 1.0]])
    assert prune.mask(score, sparsity=0.5).tolist() == [[True, False, False, False, True, True]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sparsity must be given"),
        ({"sparsity": 1.5}, "sparsity must be from 0 to 1, got 1.5"),
        ({"sparsity": float("nan")}, "sparsity must be from 0 to 1"),
        ({"sparsity": 0.5, "pattern": "dense"}, 'must be "unstructured" or "N:M"'),
        ({"pattern": "0:4"}, "from 1 to M"),
        ({"pattern": "5:4"}, "from 1 to M"),
        ({"pattern": "2:4:8"}, "from 1 to M"),
        ({"pattern": "2:4"}, "needs a multiple of 4 columns, got 6"),
        ({"pattern": "2:3", "sparsity": 0.5}, "sparsity of pattern 2:3 is 0.333"),
        ({"sparsity": 0.5, "group": "column"}, 'group must be "row" or "matrix"'),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"mask: .*{message}"):
        prune.mask(torch.ones(2, 6), **options)


def test_arguments_that_do_not_fit():
    weight, input_sq, grad = random(4, 8)
    with pytest.raises(ValueError, match=r"score_wanda: input_sq must have shape \[8\], got \[7\]"):
        prune.score_wanda(weight, input_sq[:7])
    with pytest.raises(ValueError, match=r"score_gblm: grad_norm must have shape \[4, 8\]"):
        prune.score_gblm(weight, input_sq, grad[:3])
    with pytest.raises(TypeError, match="mask: score must have dtype float32, float16 or bfloat16"):
        prune.mask(weight.double(), sparsity=0.5)
    with pytest.raises(
        TypeError, match=r"select: weight must be a torch.Tensor or a numpy.ndarray"
    ):
        prune.select([1.0], sparsity=0.5)
    with pytest.raises(TypeError, match="input_sq must hold floating-point numbers, got int64"):
        prune.score_wanda(weight, torch.ones(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="score must have at least one dimension"):
        prune.mask(torch.tensor(1.0), sparsity=0.5)
    for options, message in (
        ({"alpha": -1.0}, "alpha must be finite and at least 0"),
        ({"alpha": float("inf")}, "alpha must be finite and at least 0"),
        ({"norm": "l3"}, 'norm must be "l1" or "l2"'),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"alpha": 1.0, "reference": True}, "alpha is part of grad_norm"),
    ):
        with pytest.raises(ValueError, match=f"score_gblm: {message}"):
            prune.score_gblm(weight, input_sq, grad, **options)


def test_kernels_refuse_what_does_not_fit():
    weight = torch.ones(2, 6)
    with pytest.raises(
        ValueError, match="select_rows: drop must be from 0 to the number of columns"
    ):
        kernels.select_rows(weight, drop=7)
    with pytest.raises(ValueError, match="select_matrix: drop must be"):
        kernels.select_matrix(weight, drop=13)
    with pytest.raises(
        ValueError, match="select_groups: size must be a divisor of 6 columns, got 4"
    ):
        kernels.select_groups(weight, size=4, drop=2)
    with pytest.raises(ValueError, match="select_groups: drop must be from 0 to size"):
        kernels.select_groups(weight, size=3, drop=4)
    with pytest.raises(ValueError, match="select_rows: given must be false"):
        kernels.select_rows(weight, torch.ones(6), drop=1, given=True)
    with pytest.raises(ValueError, match="score_weights: scale must have shape"):
        kernels.score_weights(weight, torch.ones(5))
