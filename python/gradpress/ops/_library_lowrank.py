"""Operators on subspaces of gradients, and the singular value decomposition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from gradpress import _core
from gradpress.ops import lowrank
from gradpress.ops._arrays import contiguous, written
from gradpress.ops._library import define, nothing, unsigned
from gradpress.ops._workspace import workspace

Tensor = torch.Tensor
Tensors = Sequence[torch.Tensor]


# Subspaces


def _bases(
    bases: Tensors,
    scales: Tensors | None,
    zero_points: Tensors | None,
    bits: int,
    group_size: int,
) -> Tensors | lowrank.PackedBases:
    if scales is None:
        return bases
    return lowrank.PackedBases(bases, scales, zero_points or (), bits, group_size)


def _new_projections(grads: Tensors, bases: Tensors, ranks: Sequence[int] | None) -> list[Tensor]:
    if ranks is None:
        if any(basis.ndim != 2 for basis in bases):
            raise ValueError("project: ranks must be given where bases hold packed codes")
        ranks = [basis.shape[1] for basis in bases]
    if len(ranks) != len(grads):
        raise ValueError(
            f"project: grads and bases must be as many, got {len(grads)}, {len(ranks)}"
        )
    outs = []
    for grad, rank in zip(grads, ranks, strict=True):
        rows, columns = grad.shape
        shape = lowrank.projected_shape(rows, columns, rank)
        outs.append(grad.new_empty(shape, dtype=torch.float32))
    return outs


def _project(
    grads: Tensors,
    bases: Tensors,
    basis_scales: Tensors | None = None,
    basis_zero_points: Tensors | None = None,
    *,
    ranks: Sequence[int] | None = None,
    basis_bits: int = 8,
    basis_group_size: int = 256,
) -> list[Tensor]:
    outs = _new_projections(grads, bases, ranks)
    packed = _bases(bases, basis_scales, basis_zero_points, basis_bits, basis_group_size)
    lowrank.project(grads, packed, outs)
    return outs


def _project_fake(
    grads: Tensors,
    bases: Tensors,
    basis_scales: Tensors | None = None,
    basis_zero_points: Tensors | None = None,
    *,
    ranks: Sequence[int] | None = None,
    **_: Any,
) -> list[Tensor]:
    return _new_projections(grads, bases, ranks)


define(
    "project(Tensor[] grads, Tensor[] bases, Tensor[]? basis_scales=None,"
    " Tensor[]? basis_zero_points=None, *, SymInt[]? ranks=None, int basis_bits=8,"
    " int basis_group_size=256) -> Tensor[]",
    _project,
    _project_fake,
)


def _project_back_add(
    params: Tensors,
    updates: Tensors,
    bases: Tensors,
    basis_scales: Tensors | None = None,
    basis_zero_points: Tensors | None = None,
    *,
    scale: float,
    decay: float = 0.0,
    stochastic_rounding: bool = False,
    seed: int = 0,
    tensor_ids: Sequence[int],
    steps: Sequence[int],
    found_inf: Tensor | None = None,
    basis_bits: int = 8,
    basis_group_size: int = 256,
) -> None:
    lowrank.project_back_add(
        params,
        updates,
        _bases(bases, basis_scales, basis_zero_points, basis_bits, basis_group_size),
        scale=scale,
        decay=decay,
        stochastic_rounding=stochastic_rounding,
        seed=unsigned(seed),
        tensor_ids=tensor_ids,
        steps=steps,
        found_inf=found_inf,
    )


define(
    "project_back_add_(Tensor(a!)[] params, Tensor[] updates, Tensor[] bases,"
    " Tensor[]? basis_scales=None, Tensor[]? basis_zero_points=None, *,"
    " float scale, float decay=0.0, bool stochastic_rounding=False, SymInt seed=0,"
    " SymInt[] tensor_ids, SymInt[] steps, Tensor? found_inf=None, int basis_bits=8,"
    " int basis_group_size=256) -> ()",
    _project_back_add,
    nothing,
)


def _project_back_requantize(
    codes: Tensors,
    scales: Tensors,
    zero_points: Tensors,
    updates: Tensors,
    bases: Tensors,
    basis_scales: Tensors | None = None,
    basis_zero_points: Tensors | None = None,
    *,
    rows: Sequence[int],
    columns: Sequence[int],
    bits: int = 8,
    group_size: int = 256,
    scale: float,
    decay: float = 0.0,
    stochastic: bool = True,
    seed: int = 0,
    tensor_ids: Sequence[int],
    steps: Sequence[int],
    found_inf: Tensor | None = None,
    basis_bits: int = 8,
    basis_group_size: int = 256,
) -> None:
    lowrank.project_back_requantize(
        codes,
        scales,
        zero_points,
        list(zip(rows, columns, strict=True)),
        updates,
        _bases(bases, basis_scales, basis_zero_points, basis_bits, basis_group_size),
        bits=bits,
        group_size=group_size,
        scale=scale,
        decay=decay,
        stochastic=stochastic,
        seed=unsigned(seed),
        tensor_ids=tensor_ids,
        steps=steps,
        found_inf=found_inf,
    )


define(
    "project_back_requantize_(Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor(c!)[] zero_points,"
    " Tensor[] updates, Tensor[] bases, Tensor[]? basis_scales=None,"
    " Tensor[]? basis_zero_points=None, *, SymInt[] rows,"
    " SymInt[] columns, int bits=8, int group_size=256, float scale, float decay=0.0,"
    " bool stochastic=True, SymInt seed=0, SymInt[] tensor_ids, SymInt[] steps,"
    " Tensor? found_inf=None, int basis_bits=8, int basis_group_size=256) -> ()",
    _project_back_requantize,
    nothing,
)


def _new_outcomes(grads: Tensors) -> Tensor:
    return grads[0].new_empty(len(grads), 3, dtype=torch.float64)


def _refresh_basis(
    grads: Tensors,
    bases: Tensors,
    vectors: Tensors,
    *,
    warm: Sequence[bool],
    seed: int,
    tensor_ids: Sequence[int],
    steps: Sequence[int],
) -> Tensor:
    outcomes = _new_outcomes(grads)
    space = None
    if all(t.ndim == 2 for t in (*grads, *bases)):
        shapes = [(*grad.shape, b.shape[1]) for grad, b in zip(grads, bases, strict=False)]
        space = workspace(grads[0], lambda: _core.refresh_basis_workspace(shapes))
    _core.refresh_basis(
        grads, bases, vectors, outcomes, warm, unsigned(seed), tensor_ids, steps, space
    )
    written(t for tensors in (bases, vectors) for t in tensors)
    return outcomes


def _refresh_basis_fake(grads: Tensors, bases: Tensors, vectors: Tensors, **_: Any) -> Tensor:
    return _new_outcomes(grads)


define(
    "refresh_basis_(Tensor[] grads, Tensor(a!)[] bases, Tensor(b!)[] vectors, *, bool[] warm,"
    " SymInt seed, SymInt[] tensor_ids, SymInt[] steps) -> Tensor",
    _refresh_basis,
    _refresh_basis_fake,
)


# Decompositions


def _new_factors(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    if x.ndim != 2:
        raise ValueError(f"svd: x must have two dimensions, got shape {list(x.shape)}")
    rows, columns = x.shape
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"svd: rank must be from 1 to {min(rows, columns)}, got {rank}")
    shapes = ((rows, rank), (rank,), (rank, columns))
    u, s, vh = (x.new_full(shape, math.nan, dtype=torch.float32) for shape in shapes)
    return u, s, vh


def _svd(
    x: Tensor, rank: int, *, n_iter: int = 2, oversample: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    factors = _new_factors(x, rank)
    status = x.new_empty(3, dtype=torch.float64)
    rows, columns = x.shape
    space = workspace(x, lambda: _core.svd_workspace(rows, columns, rank, oversample))
    _core.svd(contiguous(x), *factors, status, n_iter, oversample, unsigned(seed), space)
    return factors


def _svd_fake(x: Tensor, rank: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_factors(x, rank)


# The factors are NaN where the matrix is not finite, which nobody waits for.
define(
    "svd(Tensor x, SymInt rank, *, int n_iter=2, int oversample=8, SymInt seed=0)"
    " -> (Tensor u, Tensor s, Tensor vh)",
    _svd,
    _svd_fake,
)
