"""Subspaces of gradients: finding them, projecting into them, and back into weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch

from gradpress import _core
from gradpress.ops._arrays import Array, check_array, contiguous, empty_like_kind, written
from gradpress.ops._workspace import workspace
from gradpress.ops.quant import check_seed

Tensors = Sequence[torch.Tensor]

REFRESHED, ZERO_GRADIENT, KEPT = 0, 1, 2


class PackedBases(NamedTuple):
    """Bases as the codes of :func:`gradpress.ops.quant.quantize_blockwise`.

    Attributes:
        codes: ``[min(m, n), rank]`` for 8 bits, packed for 4.
        scales: float32, one tensor for each basis.
        zero_points: uint8, one tensor for each basis; empty for symmetric codes.
        bits: 4 or 8.
        group_size: Elements that share a scale.
    """

    codes: Tensors
    scales: Tensors
    zero_points: Tensors
    bits: int
    group_size: int


_Grids = tuple[Tensors, Tensors, int, int]


def _split(bases: Tensors | PackedBases) -> tuple[Tensors, _Grids | None]:
    """Values, and what codes come with, as the core takes them."""
    if isinstance(bases, PackedBases):
        codes, *grids = bases
        return codes, cast("_Grids", tuple(grids))
    return bases, None


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


def _projection_shape(grad: torch.Tensor, out: torch.Tensor) -> tuple[int, int, int]:
    rows, columns = grad.shape
    return rows, columns, out.shape[1] if rows >= columns else out.shape[0]


def project(grads: Tensors, bases: Tensors | PackedBases, outs: Tensors) -> None:
    """Projects gradients into subspaces: ``grad @ basis`` or ``basis.T @ grad``.

    Args:
        grads: ``[m, n]`` each; float32, float16 or bfloat16, contiguous.
        bases: ``[min(m, n), rank]`` each, float32 or packed.
        outs: Written: float32, ``[m, rank]`` for m >= n, ``[rank, n]`` otherwise.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing is written.
    """
    space = None
    # What does not fit together is for the core to refuse.
    if grads and all(t.ndim == 2 for t in (*grads, *outs)):
        shapes = [_projection_shape(*pair) for pair in zip(grads, outs, strict=False)]
        plain = not isinstance(bases, PackedBases) and any(g.dtype == torch.float32 for g in grads)
        space = workspace(grads[0], lambda: _core.project_workspace(shapes, plain))
    values, grids = _split(bases)
    _core.project(grads, values, outs, grids, space)
    written(outs)


def project_back_add(
    params: Tensors,
    updates: Tensors,
    bases: Tensors | PackedBases,
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
        bases: ``[min(m, n), rank]`` each, float32 or packed.
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
    values, grids = _split(bases)
    _core.project_back_add(
        params,
        updates,
        values,
        scale,
        decay,
        stochastic_rounding,
        seed,
        tensor_ids,
        steps,
        found_inf,
        grids,
    )
    written(params)


def project_back_requantize(
    codes: Tensors,
    scales: Tensors,
    zero_points: Tensors,
    shapes: Sequence[tuple[int, int]],
    updates: Tensors,
    bases: Tensors | PackedBases,
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

    No tensor of a weight's size is made, unless it is a small one: on devices, group sizes other
    than 32, 64, 128 and 256 that divide a row need the update of about 4 million elements at a
    time. Groups in which nothing changes keep their codes and
    grids bit for bit.

    Args:
        codes: As :func:`gradpress.ops.quant.quantize_blockwise` makes them; written.
        scales: float32; written.
        zero_points: uint8; written. Empty for symmetric codes.
        shapes: The weights' ``(m, n)``.
        updates: float32, of the shapes of :func:`projected_shape`, or of the weights' shapes where
            `bases` is empty.
        bases: ``[min(m, n), rank]`` each, float32 or packed, or none at all.
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
    values, grids = _split(bases)
    space = None
    if codes and values:
        space = workspace(
            codes[0], lambda: _core.project_back_requantize_workspace(shapes, bits, group_size)
        )
    _core.project_back_requantize(
        codes,
        scales,
        zero_points,
        shapes,
        updates,
        values,
        bits,
        group_size,
        scale,
        decay,
        stochastic,
        seed,
        tensor_ids,
        steps,
        found_inf,
        grids,
        space,
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
    0909.4061). From an earlier basis with eight random columns beside it: one step of subspace
    iteration. The directions come in the order of their singular values, the largest entry of each
    is positive. Waits for the device once, for what it returns.

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
    if not grads:
        return []
    outcomes = torch.empty(len(grads), 3, dtype=torch.float64, device=grads[0].device)
    space = None
    if all(t.ndim == 2 for t in (*grads, *bases)):
        shapes = [(*grad.shape, b.shape[1]) for grad, b in zip(grads, bases, strict=False)]
        space = workspace(grads[0], lambda: _core.refresh_basis_workspace(shapes))
    _core.refresh_basis(grads, bases, vectors, outcomes, warm, seed, tensor_ids, steps, space)
    written(t for tensors in (bases, vectors) for t in tensors)
    return [Refresh(int(status), *rest) for status, *rest in outcomes.tolist()]


def project_factors(
    grad_outputs: Tensors, inputs: Tensors, bases: Tensors | PackedBases, outs: Tensors
) -> None:
    """:func:`project` of gradients ``grad_output.T @ input`` that are never formed.

    ``grad_output.T @ (input @ basis)`` or ``(grad_output @ basis).T @ input``: two thin products in
    place of a full one and a thin one.

    Args:
        grad_outputs: ``[tokens, m]`` each; float32, float16 or bfloat16, contiguous.
        inputs: ``[tokens, n]`` each, of the same dtype, contiguous.
        bases: ``[min(m, n), rank]`` each, float32 or packed.
        outs: Written: float32, ``[m, rank]`` for m >= n, ``[rank, n]`` otherwise.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing is written.
    """
    space = None
    if inputs and all(t.ndim == 2 for t in (*grad_outputs, *inputs, *outs)):
        shapes = [
            (x.shape[0], dy.shape[1], x.shape[1], out.shape[dy.shape[1] >= x.shape[1]])
            for dy, x, out in zip(grad_outputs, inputs, outs, strict=False)
        ]
        plain = any(x.dtype == torch.float32 for x in inputs)
        space = workspace(inputs[0], lambda: _core.project_factors_workspace(shapes, plain))
    values, grids = _split(bases)
    _core.project_factors(grad_outputs, inputs, values, outs, grids, space)
    written(outs)


def refresh_basis_factors(
    grad_outputs: Tensors,
    inputs: Tensors,
    bases: Tensors,
    vectors: Tensors,
    *,
    warm: Sequence[bool],
    seed: int,
    tensor_ids: Sequence[int],
    steps: Sequence[int],
) -> list[Refresh]:
    """:func:`refresh_basis` of gradients ``grad_output.T @ input`` that are never formed.

    The same search, to rounding, with each product made in two steps. The energy is measured with
    four random vectors on both sides of the ratio.

    Args:
        grad_outputs: ``[tokens, m]`` each; float32, float16 or bfloat16, contiguous.
        inputs: ``[tokens, n]`` each, of the same dtype, contiguous.
        bases: ``[min(m, n), rank]`` each, float32; read where `warm`, written.
        vectors: ``[min(m, n)]`` each, float32: the leading direction; read where `warm`, written.
        warm: Whether `bases` and `vectors` hold an earlier result.
        seed: Key of the sketch, with `tensor_ids` and `steps`.
        tensor_ids: One for each gradient.
        steps: One for each gradient.
    """
    if not inputs:
        return []
    outcomes = torch.empty(len(inputs), 3, dtype=torch.float64, device=inputs[0].device)
    space = None
    if all(t.ndim == 2 for t in (*grad_outputs, *inputs, *bases)):
        triples = zip(grad_outputs, inputs, bases, strict=False)
        shapes = [(x.shape[0], dy.shape[1], x.shape[1], b.shape[1]) for dy, x, b in triples]
        space = workspace(inputs[0], lambda: _core.refresh_basis_factors_workspace(shapes))
    _core.refresh_basis_factors(
        grad_outputs, inputs, bases, vectors, outcomes, warm, seed, tensor_ids, steps, space
    )
    written(t for tensors in (bases, vectors) for t in tensors)
    return [Refresh(int(status), *rest) for status, *rest in outcomes.tolist()]


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
    outcome = empty_like_kind(x, (3,), "float64")
    space = workspace(x, lambda: _core.svd_workspace(rows, columns, rank, oversample))
    _core.svd(x, u, s, vh, outcome, n_iter, oversample, seed, space)
    # Waits for the device: the functional form raises where the numbers ask for it.
    if int(outcome[0]) != REFRESHED:
        raise ValueError(f"{op}: x must be finite, got NaN or infinite values")
    return u, s, vh
