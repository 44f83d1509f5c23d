"""Subspaces of gradients: finding them, projecting into them, and back into weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from gradpress import _core
from gradpress.ops._arrays import Array, check_array, contiguous, empty_like_kind, written
from gradpress.ops.quant import check_seed

Tensors = Sequence[torch.Tensor]

REFRESHED, ZERO_GRADIENT, KEPT = 0, 1, 2


class Refresh(NamedTuple):
    """What became of one refresh.

    Attributes:
        status: `REFRESHED`; `ZERO_GRADIENT` or `KEPT` (NaN or infinite values) when the earlier
            basis stays.
        cosine: Of the leading directions before and after; NaN without an earlier one.
        energy: Share of the gradient's squared norm that the basis captures.
    """

    status: int
    cosine: float
    energy: float


def projected_shape(rows: int, columns: int, rank: int) -> tuple[int, int]:
    """The shape of a projected ``[rows, columns]`` gradient."""
    return (rows, rank) if rows >= columns else (rank, columns)


def project(grads: Tensors, bases: Tensors, outs: Tensors) -> None:
    """Projects gradients into subspaces: ``grad @ basis`` or ``basis.T @ grad``.

    Args:
        grads: ``[m, n]`` each; float32, float16 or bfloat16, contiguous.
        bases: ``[min(m, n), rank]`` each, float32.
        outs: Written: float32, ``[m, rank]`` for m >= n, ``[rank, n]`` otherwise.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing is written.
    """
    _core.project(grads, bases, outs)
    written(outs)


def project_back_add(
    params: Tensors,
    updates: Tensors,
    bases: Tensors,
    *,
    scale: float,
    decay: float = 0.0,
    stochastic_rounding: bool = False,
    seed: int = 0,
    tensor_ids: Sequence[int],
    steps: Sequence[int],
    found_inf: torch.Tensor | None = None,
) -> None:
    """``params = params * (1 - decay) + scale * back(updates)``, in place, rounded once.

    Args:
        params: ``[m, n]`` each; float32, float16 or bfloat16, contiguous.
        updates: float32, of the shapes of :func:`projected_shape`.
        bases: ``[min(m, n), rank]`` each, float32.
        scale: Multiplies the updates.
        decay: Learning rate times weight decay.
        stochastic_rounding: How bfloat16 parameters are rounded.
        seed: Key of the random numbers, with `tensor_ids` and `steps`.
        tensor_ids: One for each parameter.
        steps: One for each parameter.
        found_inf: float32 of one element: where it is not zero nothing is written.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing is written.
    """
    _core.project_back_add(
        params,
        updates,
        bases,
        scale,
        decay,
        stochastic_rounding,
        seed,
        tensor_ids,
        steps,
        found_inf,
    )
    written(params)


def project_back_requantize(
    codes: Tensors,
    scales: Tensors,
    zero_points: Tensors,
    shapes: Sequence[tuple[int, int]],
    updates: Tensors,
    bases: Tensors,
    *,
    bits: int,
    group_size: int,
    scale: float,
    decay: float = 0.0,
    stochastic: bool = True,
    seed: int = 0,
    tensor_ids: Sequence[int],
    steps: Sequence[int],
    found_inf: torch.Tensor | None = None,
) -> None:
    """Updates quantized weights in one pass: dequantize, decay, add, find the grid, round.

    No tensor of a weight's size is made. Groups in which nothing changes keep their codes and
    grids bit for bit.

    Args:
        codes: As :func:`gradpress.ops.quant.quantize_blockwise` makes them; written.
        scales: float32; written.
        zero_points: uint8; written. Empty for symmetric codes.
        shapes: The weights' ``(m, n)``.
        updates: float32, of the shapes of :func:`projected_shape`, or of the weights' shapes where
            `bases` is empty.
        bases: ``[min(m, n), rank]`` each, float32, or none at all.
        bits: 4 or 8.
        group_size: Elements that share a scale.
        scale: Multiplies the updates.
        decay: Learning rate times weight decay.
        stochastic: Round stochastically, or to nearest.
        seed: Key of the random numbers, with `tensor_ids` and `steps`.
        tensor_ids: One for each weight.
        steps: One for each weight.
        found_inf: float32 of one element: where it is not zero nothing is written.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing is written.
    """
    _core.project_back_requantize(
        codes,
        scales,
        zero_points,
        shapes,
        updates,
        bases,
        bits,
        group_size,
        scale,
        decay,
        stochastic,
        seed,
        tensor_ids,
        steps,
        found_inf,
    )
    written(t for tensors in (codes, scales, zero_points) for t in tensors)


def refresh_basis(
    grads: Tensors,
    bases: Tensors,
    vectors: Tensors,
    *,
    warm: Sequence[bool],
    seed: int,
    tensor_ids: Sequence[int],
    steps: Sequence[int],
) -> list[Refresh]:
    """Finds the leading singular subspaces of gradients anew, in place.

    From nothing: a random sketch with one power iteration (Halko, Martinsson, Tropp 2011, arXiv
    0909.4061). From an earlier basis: one step of subspace iteration. The directions come in the
    order of their singular values, the largest entry of each is positive.

    Args:
        grads: ``[m, n]`` each; float32, float16 or bfloat16, contiguous.
        bases: ``[min(m, n), rank]`` each, float32; read where `warm`, written.
        vectors: ``[min(m, n)]`` each, float32: the leading direction; read where `warm`, written.
        warm: Whether `bases` and `vectors` hold an earlier result.
        seed: Key of the sketch, with `tensor_ids` and `steps`.
        tensor_ids: One for each gradient.
        steps: One for each gradient.

    Returns:
        One :class:`Refresh` for each gradient. Numbers never raise: a zero gradient or one with
        NaN or infinite values leaves the earlier basis, or unit vectors where there is none.
    """
    outcomes = _core.refresh_basis(grads, bases, vectors, warm, seed, tensor_ids, steps)
    written(t for tensors in (bases, vectors) for t in tensors)
    return [Refresh(*outcome) for outcome in outcomes]


def svd(x: Array, *, rank: int, n_iter: int, oversample: int, seed: int) -> tuple[Array, ...]:
    """Randomized SVD; see :func:`gradpress.lowrank.svd`."""
    op = "svd"
    x = contiguous(check_array(op, "x", x))
    check_seed(op, seed)
    if x.ndim != 2:
        raise ValueError(f"{op}: x must have two dimensions, got shape {list(x.shape)}")
    rows, columns = x.shape
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"{op}: rank must be from 1 to {min(rows, columns)}, got {rank}")
    for name, value in (("n_iter", n_iter), ("oversample", oversample)):
        if value < 0:
            raise ValueError(f"{op}: {name} must be at least 0, got {value}")
    u = empty_like_kind(x, (rows, rank), "float32")
    s = empty_like_kind(x, (rank,), "float32")
    vh = empty_like_kind(x, (rank, columns), "float32")
    if not _core.svd(x, u, s, vh, n_iter, oversample, seed):
        raise ValueError(f"{op}: x must be finite, got NaN or infinite values")
    return u, s, vh
