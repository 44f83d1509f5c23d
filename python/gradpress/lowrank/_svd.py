"""Randomized singular value decomposition."""

from __future__ import annotations

from typing import TypeVar, cast

from gradpress.ops import lowrank as kernels
from gradpress.ops._arrays import Array

ArrayT = TypeVar("ArrayT", bound=Array)


def svd(
    x: ArrayT, rank: int, n_iter: int = 2, oversample: int = 8, seed: int = 0
) -> tuple[ArrayT, ArrayT, ArrayT]:
    """The leading singular values and vectors of a matrix, by random projection.

    A sketch of ``rank + oversample`` random directions is sharpened by power iterations, made
    orthonormal by Cholesky QR with float64 Gram matrices, and turned to the singular directions
    by a small eigenproblem: algorithm 4.4 and section 5.1 of Halko, Martinsson, Tropp: "Finding
    structure with randomness" (2011, arXiv 0909.4061). The signs are canonical: the entry of
    largest magnitude of each vector on the shorter side is positive. The result does not depend
    on the number of threads.

    Args:
        x: ``[m, n]``; float32, float16 or bfloat16, PyTorch (on the CPU or a CUDA device) or NumPy.
        rank: How many singular values, from 1 to ``min(m, n)``.
        n_iter: Power iterations; more sharpen slowly falling spectra.
        oversample: Directions beyond `rank` that are carried along.
        seed: Key of the random directions.

    Returns:
        ``(U, S, Vh)`` in float32: ``[m, rank]``, ``[rank]`` decreasing, ``[rank, n]``, with
        orthonormal columns of `U` and rows of `Vh`, and ``U @ diag(S) @ Vh`` close to the best
        approximation of that rank.

    Raises:
        TypeError: `x` is neither a tensor nor an array of these dtypes.
        ValueError: `x` is no matrix or not finite, or an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> x = torch.outer(torch.arange(1.0, 5.0), torch.ones(3))
        >>> U, S, Vh = gradpress.lowrank.svd(x, rank=1)
        >>> bool(torch.allclose(U * S @ Vh, x, atol=1e-5))
        True
    """
    result = kernels.svd(x, rank=rank, n_iter=n_iter, oversample=oversample, seed=seed)
    return cast("tuple[ArrayT, ArrayT, ArrayT]", result)
