"""Scores of weights, which of them stay, and the second-order method's block of columns.

Matrices are ``[rows, columns]``: a row belongs to an output, a column to an input. A mask is True
where a weight is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from gradpress import _core
from gradpress.ops._arrays import (
    Array,
    check_array,
    contiguous,
    dtype_name,
    empty_like_kind,
    new_counter,
    numel,
    written,
    zeros_like_kind,
)

#: Where the digits of a score's key lie, from the highest on, and how many values each has.
SHIFTS, DIGIT_VALUES = (21, 10, 0), 2048


class Selected(NamedTuple):
    """What a selection makes of a matrix.

    Attributes:
        mask: bool in the matrix's shape, True where a weight is kept.
        nan: int64 of one element: how many scores were not a number, and so are kept.
    """

    mask: Array
    nan: Array


def _float32(x: Array | None) -> Array | None:
    if x is None:
        return None
    if dtype_name(x) != "float32":
        x = x.float() if isinstance(x, torch.Tensor) else x.astype(np.float32)
    return contiguous(x)


def _bytes(mask: Array) -> Array:
    """The same memory as uint8, which crosses the border."""
    if isinstance(mask, torch.Tensor):
        return mask.view(torch.uint8)
    return mask.view(np.uint8)


def _truths(mask: Array) -> Array:
    return mask.view(torch.bool) if isinstance(mask, torch.Tensor) else mask.view(np.bool_)


def score_weights(
    weight: Array,
    scale: Array | None = None,
    grad: Array | None = None,
    *,
    alpha: float = 1.0,
    half: bool = False,
) -> Array:
    """``|weight| * (scale + alpha * |grad|)`` in float32.

    Args:
        weight: float32, float16 or bfloat16 ``[rows, columns]``.
        scale: Factors of the columns ``[columns]``; without any ``|weight| * alpha * |grad|``.
        grad: Gradients or norms of them ``[rows, columns]``; without any ``|weight| * scale``.
        alpha: Weight of the gradients.
        half: Leave `alpha` out, and take the gradients' product as one of float16, rounded to
            float16.

    Raises:
        TypeError, ValueError: a dtype, a shape or `alpha` is not one of these.
    """
    weight = contiguous(check_array("score_weights", "weight", weight))
    out = empty_like_kind(weight, tuple(weight.shape), "float32")
    _core.score_weights(weight, _float32(scale), _float32(grad), out, alpha, half)
    return out


def _prepared(op: str, weight: Array) -> tuple[Array, Array, Array]:
    weight = contiguous(check_array(op, "weight", weight))
    return weight, empty_like_kind(weight, tuple(weight.shape), "uint8"), new_counter(weight)


def select_rows(
    weight: Array,
    scale: Array | None = None,
    grad: Array | None = None,
    *,
    drop: int,
    alpha: float = 1.0,
    given: bool = False,
    half: bool = False,
) -> Selected:
    """Keeps all but the `drop` least scores of every row; the scores never exist in memory.

    Of equal scores the lower columns are dropped first. A score that is not a number counts as
    infinite.

    Args:
        weight: As for :func:`score_weights`.
        scale: As there.
        grad: As there.
        drop: How many of each row go, from 0 to the number of columns.
        alpha: As there.
        given: `weight` holds the scores themselves, of either sign.
        half: As there.
    """
    weight, mask, nan = _prepared("select_rows", weight)
    scale, grad = _float32(scale), _float32(grad)
    _core.select_rows(weight, scale, grad, mask, nan, alpha, given, half, drop)
    return Selected(_truths(mask), nan)


def select_matrix(
    weight: Array,
    scale: Array | None = None,
    grad: Array | None = None,
    *,
    drop: int,
    alpha: float = 1.0,
    given: bool = False,
    half: bool = False,
    through: bool = False,
) -> Selected:
    """The same among all weights of a matrix, row by row.

    `through` drops one weight more, and all whose scores equal the last one's.
    """
    weight, mask, nan = _prepared("select_matrix", weight)
    scale, grad = _float32(scale), _float32(grad)
    room = zeros_like_kind(weight, (_core.select_matrix_workspace(numel(weight)),), "int64")
    _core.select_matrix(weight, scale, grad, mask, nan, room, alpha, given, half, drop, through)
    return Selected(_truths(mask), nan)


def select_groups(
    weight: Array,
    scale: Array | None = None,
    grad: Array | None = None,
    *,
    size: int,
    drop: int,
    alpha: float = 1.0,
    given: bool = False,
    half: bool = False,
) -> Selected:
    """The same among every `size` consecutive columns, which divide the columns."""
    weight, mask, nan = _prepared("select_groups", weight)
    scale, grad = _float32(scale), _float32(grad)
    _core.select_groups(weight, scale, grad, mask, nan, alpha, given, half, drop, size)
    return Selected(_truths(mask), nan)


def score_histogram(
    weight: Array,
    scale: Array | None = None,
    grad: Array | None = None,
    *,
    state: Array,
    counts: Array,
    shift: int,
    alpha: float = 1.0,
    given: bool = False,
    half: bool = False,
) -> None:
    """Counts a digit of the scores' keys, to find the threshold of many matrices at once.

    A key is the score as an unsigned integer of 32 bits in the same order; its digits are the bits
    from 21, from 10 and from 0 on.

    Args:
        weight: As for :func:`score_weights`.
        scale: As there.
        grad: As there.
        state: int64 ``[3]``; the first number holds the digits above this one, and only keys that
            have these are counted.
        counts: int64 ``[2048]``; increased by the keys that have each value of the digit.
        shift: Where the digit begins: 21, 10 or 0.
        alpha: As there.
        given: As for :func:`select_rows`.
        half: As there.
    """
    weight = contiguous(check_array("score_histogram", "weight", weight))
    scale, grad = _float32(scale), _float32(grad)
    _core.score_histogram(weight, scale, grad, state, counts, alpha, given, half, shift)
    written([counts])


def select_below(
    weight: Array,
    scale: Array | None = None,
    grad: Array | None = None,
    *,
    state: Array,
    alpha: float = 1.0,
    given: bool = False,
    half: bool = False,
) -> Selected:
    """Keeps the scores above a threshold, which may be that of many matrices.

    Args:
        weight: As for :func:`score_weights`.
        scale: As there.
        grad: As there.
        state: int64 ``[3]``: the threshold's key as for :func:`score_histogram`; how many scores
            that equal it are dropped, the first ones of this matrix before those of the next; how
            many there are. What this matrix has of them is taken off, unless none or all are
            dropped.
        alpha: As there.
        given: As for :func:`select_rows`.
        half: As there.
    """
    weight, mask, nan = _prepared("select_below", weight)
    scale, grad = _float32(scale), _float32(grad)
    room = empty_like_kind(weight, (_core.select_below_workspace(numel(weight)),), "int64")
    _core.select_below(weight, scale, grad, state, mask, nan, room, alpha, given, half)
    written([state])
    return Selected(_truths(mask), nan)


def accumulate_gradients(
    total: Array,
    part: Array,
    squared: bool = False,
    scale: float = 1.0,
    *,
    nonfinite: Array | None = None,
) -> Array:
    """Adds ``|scale * part|``, or its square, to `total` in place and in one pass.

    A term that is not finite is left out and counted.

    Args:
        total: float32, contiguous: a matrix, or a run of its rows.
        part: float32, float16 or bfloat16 in the same shape: the gradient of one sample.
        squared: Add squares.
        scale: Factor of every gradient, before it is squared.
        nonfinite: int64 of one element, increased by the terms left out; a new one when left out.

    Returns:
        `nonfinite`.
    """
    part = contiguous(check_array("accumulate_gradients", "part", part))
    counter = new_counter(part) if nonfinite is None else nonfinite
    _core.accumulate_gradients(total, part, counter, squared, scale)
    written([total, counter])
    return counter


def prune_columns(
    weight: torch.Tensor,
    factor: torch.Tensor,
    mask: torch.Tensor,
    *,
    group: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroes weights of a block, column by column, and lets its later columns make up for it.

    Args:
        weight: float32 ``[rows, width]``, contiguous, at most 256 wide; changed in place.
        factor: float32 ``[width, width]``: the block of the upper Cholesky factor of the inverse
            Hessian.
        mask: bool ``[rows, width]``, contiguous: what is kept; written where `group` is given.
        group: Size of groups of columns and how many of each go: the least of
            ``|weight| / factor[j, j]``, when the group's first column is reached.

    Returns:
        errors: float32 ``[rows, width]``: columns after the block change by ``-errors @ factor``.
        loss: float32 ``[rows]``: the sums of the squared errors.
    """
    errors = torch.empty_like(weight)
    loss = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    size, drop = group or (None, 0)
    changed: Any = [weight] if group is None else [weight, mask]
    _core.prune_columns(weight, contiguous(factor), _bytes(mask), errors, loss, size, drop)
    written(changed)
    return errors, loss
