"""SparseGPT: weights go one column after the other, and those that stay make up for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradpress.ops import prune as kernels
from gradpress.ops._arrays import Array
from gradpress.prune._arrays import as_matrix, check_like
from gradpress.prune._factor import inverse_factor
from gradpress.prune._pattern import Pattern, read_pattern
from gradpress.prune._statistics import as_tensor, full_precision

#: The kernel's widest block.
MOST_COLUMNS = 256


@dataclass(frozen=True)
class SparseGPTResult:
    """What :func:`sparsegpt` makes of a weight.

    Attributes:
        weight: In the shape, dtype and kind of the weight given; zeros where `mask` is False.
        mask: bool in the same shape, True where a weight stays.
        loss: ``tr(D H D^T) / 2`` of the change ``D``, with the damped Hessian.
    """

    weight: Array
    mask: Array
    loss: float


def sparsegpt(
    weight: Array,
    hessian: Array,
    *,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    block_size: int = 128,
    damp: float = 0.01,
    reference: bool = False,
    dtype: str = "auto",
    factor: torch.Tensor | None = None,
) -> SparseGPTResult:
    """Prunes a weight and adjusts the rest of it: SparseGPT (Frantar and Alistarh 2023).

    arXiv 2301.00774. Columns are visited from left to right in blocks. An unstructured mask is
    chosen for all rows of a block at once, when the block is reached: exactly ``int(numel *
    sparsity)`` of its weights go, those with the least ``(w / U_jj)^2``, of equal ones the lower
    row and column first. Of N:M the groups are chosen one by one, from weights that the columns
    before have already changed. What a dropped weight costs is made up for by later columns.

    The work is float32 throughout, without TF32.

    Args:
        weight: float32, float16 or bfloat16 ``[outputs, ...]``; PyTorch or NumPy.
            It stays as it is.
        hessian: ``[columns, columns]`` of the inputs, as :class:`Hessian` collects it; only what
            lies on and right of the diagonal is read. Its scale does not matter.
        sparsity: The share that is dropped, from 0 to 1. May be left out for N:M.
        pattern: ``"unstructured"`` or ``"N:M"``, N of M kept; M divides the columns and the block.
        block_size: Columns of a block, 1 to 256.
        damp: What is added to the Hessian's diagonal, as a share of its mean.
        reference: As the authors' code: in each block one weight more goes, and all that score the
            same.
        dtype: Of the Hessian's factorization, which takes a matrix of it and half as much again
            for a moment: ``"float32"``, ``"float64"``, or ``"auto"``: float32 for more than 512
            columns as long as the factor proves precise on a random vector, float64 otherwise.
        factor: What :func:`inverse_factor` makes of this Hessian, for layers that share one; `damp`
            and `dtype` do not matter then. Left out, it is found here.

    Raises:
        TypeError: an argument is no tensor or array, or of no floating dtype.
        ValueError: a shape or an option does not fit, the weight is not finite, or the Hessian is
            not positive definite.

    Example:
        >>> import torch, gradpress
        >>> inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> hessian = gradpress.prune.Hessian(8)
        >>> hessian.update(inputs)
        >>> result = gradpress.prune.sparsegpt(torch.ones(4, 8), hessian.matrix, pattern="2:4")
        >>> int(result.mask.sum()), int((result.weight == 0).sum())
        (16, 16)
    """
    op = "sparsegpt"
    matrix = as_tensor(as_matrix(op, "weight", weight))
    columns = matrix.shape[1]
    curvature = as_tensor(check_like(op, "hessian", hessian, (columns, columns)))
    wanted = read_pattern(op, pattern, sparsity, columns)
    if not 1 <= block_size <= MOST_COLUMNS:
        raise ValueError(f"{op}: block_size must be from 1 to {MOST_COLUMNS}, got {block_size}")
    if wanted.size and block_size % wanted.size:
        raise ValueError(
            f"{op}: block_size must be a multiple of {wanted.size} for pattern {pattern},"
            f" got {block_size}"
        )
    if not (damp >= 0 and math.isfinite(damp)):
        raise ValueError(f"{op}: damp must be finite and at least 0, got {damp}")
    if dtype not in ("auto", "float64", "float32"):
        raise ValueError(f'{op}: dtype must be "auto", "float64" or "float32", got {dtype!r}')
    if factor is not None:
        check_like(op, "factor", factor, (columns, columns))
    # A copy, since a float32 weight must not be changed.
    pruned = matrix.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if not bool(torch.isfinite(pruned).all()):
        raise ValueError(f"{op}: weight must be finite, got NaN or infinite values")
    kept = torch.ones(pruned.shape, dtype=torch.bool, device=pruned.device)
    loss = 0.0
    if pruned.numel():
        pruned[:, curvature.diagonal().to(pruned.device) == 0] = 0
        if factor is None:
            factor = inverse_factor(curvature, damp, dtype)
        factor = factor.to(pruned)
        with full_precision():
            loss = _prune(pruned, kept, factor, wanted, block_size, reference)
    shape = tuple(weight.shape)
    result = pruned.to(matrix.dtype).reshape(shape), kept.reshape(shape)
    if isinstance(weight, torch.Tensor):
        return SparseGPTResult(*result, loss)
    return SparseGPTResult(result[0].numpy(), result[1].numpy(), loss)


def _prune(
    weight: torch.Tensor,
    kept: torch.Tensor,
    factor: torch.Tensor,
    wanted: Pattern,
    block_size: int,
    reference: bool,
) -> float:
    """All blocks, in place; returns the loss."""
    columns = weight.shape[1]
    losses = torch.zeros((), dtype=torch.float64, device=weight.device)
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        block = weight[:, first:last].contiguous()
        corner = factor[first:last, first:last].contiguous()
        if wanted.size:
            mask = torch.empty(block.shape, dtype=torch.bool, device=block.device)
            group = wanted.size, wanted.drop
        else:
            mask = _mask_of_block(block, corner.diagonal(), wanted, reference)
            group = None
        errors, loss = kernels.prune_columns(block, corner, mask, group=group)
        weight[:, first:last] = block
        kept[:, first:last] = mask
        losses += loss.sum(dtype=torch.float64)
        weight[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1)
    return float(losses) / 2


def _mask_of_block(
    block: torch.Tensor, diagonal: torch.Tensor, wanted: Pattern, reference: bool
) -> torch.Tensor:
    drop = wanted.count(block.numel())
    if reference:
        scores = block.square() / diagonal.square()
        chosen = kernels.select_matrix(scores, drop=drop, given=True, through=True)
    else:
        chosen = kernels.select_matrix(block, diagonal.reciprocal(), drop=drop)
    mask = chosen.mask
    assert isinstance(mask, torch.Tensor)
    return mask
