"""How much each weight matters, and the choice of those that stay."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from gradpress.ops import prune as kernels
from gradpress.ops._arrays import Array
from gradpress.prune._arrays import as_matrix, check_like
from gradpress.prune._pattern import read_pattern

#: Tokens of a calibration sequence for which the weights of the gradients were found.
TOKENS = 2048
#: Calibration samples of the papers' code.
_SAMPLES = 128
_ALPHAS = {"l1": 100.0 * _SAMPLES, "l2": 100.0 * math.sqrt(_SAMPLES)}


@dataclass(frozen=True)
class Factors:
    """What weights are multiplied with.

    Attributes:
        scale: float32 ``[columns]``, or None.
        grad: ``[rows, columns]``, or None.
        alpha: Weight of `grad`.
        half: As the papers' code: the gradient's product in float16, `alpha` left out.
    """

    scale: Array | None = None
    grad: Array | None = None
    alpha: float = 1.0
    half: bool = False


def _root(x: Array, factor: float) -> Array:
    """``sqrt(factor * x)`` in float32."""
    if isinstance(x, torch.Tensor):
        return (x.float() * factor).sqrt()
    with np.errstate(invalid="ignore"):  # of a negative value NaN, as PyTorch
        root: Array = np.sqrt(x.astype(np.float32) * np.float32(factor))
    return root


def factors_of(
    op: str,
    weight: Array,
    input_sq: Array | None = None,
    grad_norm: Array | None = None,
    alpha: float | None = None,
    norm: str = "l1",
    tokens: int = TOKENS,
    reference: bool = False,
) -> tuple[Array, Factors]:
    """The weights as a matrix, and what they are multiplied with."""
    matrix = as_matrix(op, "weight", weight)
    if norm not in _ALPHAS:
        raise ValueError(f'{op}: norm must be "l1" or "l2", got {norm!r}')
    if tokens < 1:
        raise ValueError(f"{op}: tokens must be at least 1, got {tokens}")
    if reference and alpha is not None:
        raise ValueError(f"{op}: alpha is part of grad_norm where reference is set, got {alpha}")
    if alpha is not None and not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"{op}: alpha must be finite and at least 0, got {alpha}")
    scale = grad = None
    if input_sq is not None:
        input_sq = check_like(op, "input_sq", input_sq, (matrix.shape[1],))
        with_gradients = grad_norm is not None and not reference
        scale = _root(input_sq, TOKENS / tokens if with_gradients else 1.0)
    if grad_norm is not None:
        grad = check_like(op, "grad_norm", grad_norm, tuple(weight.shape)).reshape(matrix.shape)
    if scale is None and alpha is None:
        alpha = 1.0  # it scales all scores alike
    return matrix, Factors(scale, grad, _ALPHAS[norm] if alpha is None else alpha, reference)


def _score(weight: Array, matrix: Array, by: Factors) -> Array:
    score = kernels.score_weights(matrix, by.scale, by.grad, alpha=by.alpha, half=by.half)
    return score.reshape(tuple(weight.shape))


def score_magnitude(weight: Array) -> Array:
    """``|weight|`` in float32.

    Args:
        weight: float32, float16 or bfloat16, a row for each output; PyTorch or NumPy.

    Returns:
        float32 in the shape of `weight`, the same kind of array.
    """
    return _score(weight, *factors_of("score_magnitude", weight))


def score_wanda(weight: Array, input_sq: Array) -> Array:
    """``|weight| * sqrt(input_sq)``: Wanda (Sun et al. 2023, arXiv 2306.11695).

    Args:
        weight: float32, float16 or bfloat16 ``[outputs, ...]``; what follows the first dimension
            are a row's columns. PyTorch or NumPy.
        input_sq: The squares of each input, summed over the tokens of a calibration sequence, on
            average over the sequences: ``[columns]``, as :class:`InputSquares` collects them.

    Returns:
        float32 in the shape of `weight`; computed in float32 whatever the dtypes.

    Raises:
        TypeError: an argument is no tensor or array, or of no floating dtype.
        ValueError: a shape does not fit.

    Example:
        >>> import torch, gradpress
        >>> weight = torch.tensor([[0.5, -1.0, 0.25, 2.0]])
        >>> gradpress.prune.score_wanda(weight, torch.tensor([4.0, 9.0, 4.0, 1.0]))
        tensor([[1.0000, 3.0000, 0.5000, 2.0000]])
    """
    return _score(weight, *factors_of("score_wanda", weight, input_sq))


def score_gblm(
    weight: Array,
    input_sq: Array,
    grad_norm: Array,
    *,
    alpha: float | None = None,
    norm: str = "l1",
    tokens: int = TOKENS,
    reference: bool = False,
) -> Array:
    """Inputs and gradients together: GBLM-Pruner (Das et al. 2023, arXiv 2311.04902).

    ``|weight| * (sqrt(input_sq * 2048 / tokens) + alpha * |grad_norm|)``. Gradients are averaged
    over the samples, so that the balance depends neither on how many there are nor on how long:
    with 128 of 2048 tokens the ranking is that of the authors' code.

    Args:
        weight: float32, float16 or bfloat16 ``[outputs, ...]``; PyTorch or NumPy.
        input_sq: As for :func:`score_wanda`.
        grad_norm: In the shape of `weight`: the mean over the samples of ``|gradient|``, or the
            root of the mean of its square. Gradients of single samples, never of their sum.
        alpha: Weight of the gradients; 12800 for ``"l1"`` and 1131.37 for ``"l2"`` when left out,
            100 times what 128 samples add to a sum.
        norm: Which of the two `grad_norm` is: ``"l1"`` or ``"l2"``.
        tokens: Length of a calibration sequence.
        reference: As the authors' code: `grad_norm` is the norm over the samples, not averaged, of
            100 times the gradient; the gradient's product is one of float16, rounded to float16;
            the inputs do not depend on `tokens`.

    Returns:
        float32 in the shape of `weight`.

    Raises:
        TypeError, ValueError: as :func:`score_wanda`; or `alpha`, `norm` or `tokens` is out of
            range, or `alpha` is given beside `reference`.
    """
    factors = factors_of("score_gblm", weight, input_sq, grad_norm, alpha, norm, tokens, reference)
    return _score(weight, *factors)


def score_gradient(weight: Array, grad_norm: Array, *, reference: bool = False) -> Array:
    """``|weight| * |grad_norm|``: gradients without inputs, a variant of GBLM-Pruner.

    Args:
        weight: float32, float16 or bfloat16 ``[outputs, ...]``; PyTorch or NumPy.
        grad_norm: In the shape of `weight`, as for :func:`score_gblm`.
        reference: Multiply in float16, as the authors' code.
    """
    factors = factors_of("score_gradient", weight, grad_norm=grad_norm, reference=reference)
    return _score(weight, *factors)


def _choose(
    op: str,
    matrix: Array,
    factors: Factors,
    sparsity: float | None,
    pattern: str,
    group: str,
    *,
    given: bool,
    reference: bool,
) -> Array:
    if group not in ("row", "matrix"):
        raise ValueError(f'{op}: group must be "row" or "matrix", got {group!r}')
    rows, columns = matrix.shape
    wanted = read_pattern(op, pattern, sparsity, columns)
    scale, grad, alpha, half = factors.scale, factors.grad, factors.alpha, factors.half
    if wanted.size:
        size, drop = wanted.size, wanted.drop
        mask, nan = kernels.select_groups(
            matrix, scale, grad, alpha=alpha, given=given, half=half, size=size, drop=drop
        )
    elif group == "row":
        drop = wanted.count(columns)
        mask, nan = kernels.select_rows(
            matrix, scale, grad, alpha=alpha, given=given, half=half, drop=drop
        )
    else:
        drop = wanted.count(rows * columns)
        mask, nan = kernels.select_matrix(
            matrix, scale, grad, alpha=alpha, given=given, half=half, drop=drop, through=reference
        )
    if found := int(nan[0]):
        warnings.warn(
            f"{op}: {found} scores are not a number; these weights count as infinitely important",
            RuntimeWarning,
            stacklevel=3,
        )
    return mask


def mask(
    score: Array,
    *,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    group: str = "row",
    reference: bool = False,
) -> Array:
    """Which weights stay: True for the greater scores.

    Exactly ``int(columns * sparsity)`` of each row are dropped, or ``int(numel * sparsity)`` of the
    matrix, or M - N of every M consecutive columns of a row. Of equal scores those with the lower
    column (in a matrix: the lower row first) are dropped before the others, as a stable ascending
    sort does. A score that is not a number counts as infinite: its weight stays as long as any
    other can go.

    Args:
        score: float32, float16 or bfloat16, of either sign; PyTorch, on the CPU or a CUDA device,
            or NumPy. The first dimension are rows, all others columns; one dimension is one row.
        sparsity: The share that is dropped, from 0 to 1. May be left out for N:M.
        pattern: ``"unstructured"``, or ``"2:4"``, ``"4:8"``, any ``"N:M"``: N of M are kept; M must
            divide the columns.
        group: What an unstructured pattern compares: ``"row"``, the weights of each row, or
            ``"matrix"``, all of them.
        reference: As the code that magnitude pruning is measured by: of a matrix one score more is
            dropped, and all that equal it. Rows and N:M are the same.

    Returns:
        bool in the shape of `score`, the same kind of array.

    Raises:
        TypeError: `score` is no tensor or array of these dtypes.
        ValueError: an option is out of its range, or does not fit the columns.

    Example:
        >>> import torch, gradpress
        >>> score = torch.tensor([[1.0, 3.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
        >>> gradpress.prune.mask(score, sparsity=0.5)
        tensor([[False,  True, False,  True],
                [False, False,  True,  True]])
    """
    matrix = as_matrix("mask", "score", score)
    chosen = _choose(
        "mask", matrix, Factors(), sparsity, pattern, group, given=True, reference=reference
    )
    return chosen.reshape(tuple(score.shape))


def select(
    weight: Array,
    *,
    input_sq: Array | None = None,
    grad_norm: Array | None = None,
    alpha: float | None = None,
    norm: str = "l1",
    tokens: int = TOKENS,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    group: str = "row",
    reference: bool = False,
) -> Array:
    """Scores and chooses in one pass: the mask of the scores, which never exist in memory.

    Without `input_sq` and `grad_norm` by magnitude, with the first as Wanda, with both as
    GBLM-Pruner, with the second alone by gradients; see :func:`score_gblm` for the arguments of a
    score and :func:`mask` for those of the choice.

    Returns:
        bool in the shape of `weight`, True where a weight stays; the same as
        ``mask(score_...(weight, ...), ...)``.

    Example:
        >>> import torch, gradpress
        >>> weight = torch.tensor([[0.5, -1.0, 0.25, 2.0]])
        >>> gradpress.prune.select(weight, pattern="2:4")
        tensor([[False,  True, False,  True]])
    """
    op = "select"
    matrix, factors = factors_of(op, weight, input_sq, grad_norm, alpha, norm, tokens, reference)
    chosen = _choose(
        op, matrix, factors, sparsity, pattern, group, given=False, reference=reference
    )
    return chosen.reshape(tuple(weight.shape))
