"""The Cholesky factor of a Hessian's inverse, without forming the inverse."""

from __future__ import annotations

import torch

from gradpress.prune._statistics import full_precision

#: A matrix of so many columns is factorized by LAPACK or cuSOLVER.
_SMALL = 128
#: Products with a triangle leave out what is zero in so many steps.
_STEPS = 4
#: Columns up to which float64 costs no time worth saving.
_ALWAYS_DOUBLE = 512
#: How far ``U^T U H v`` may be from ``v``, relative to it, before float32 is given up.
_RESIDUAL = 1e-2


def inverse_factor(hessian: torch.Tensor, damp: float, dtype: str = "float64") -> torch.Tensor:
    """The upper Cholesky factor U of the inverse: ``inverse(H) = U^T U``.

    Of the damped Hessian, in which a column that no input ever reached stands for itself. With
    ``H = P P^T``, P upper triangular, U is the inverse of P. Both are found together, half by half
    and in place, so that nearly all of the work is products: no inverse of H is formed, and there
    is no second factorization.

    Args:
        hessian: ``[columns, columns]``; only what lies on and right of the diagonal is read.
        damp: What is added to the diagonal, as a share of its mean.
        dtype: ``"float32"`` or ``"float64"``, of the factorization and the result; or ``"auto"``:
            float32 for more than 512 columns as long as ``U^T U H v`` gives back a random ``v``,
            float64 otherwise.

    Raises:
        ValueError: the damped Hessian is not positive definite.
    """
    if dtype == "auto":
        if len(hessian) > _ALWAYS_DOUBLE:
            factor = _checked_factor(hessian, damp)
            if factor is not None:
                return factor
        dtype = "float64"
    upper = _damped(hessian, damp, torch.float64 if dtype == "float64" else torch.float32)
    if not _factorize_(upper):
        raise ValueError(
            f"sparsegpt: hessian must be positive definite with damp {damp} of its mean diagonal"
            " added, got one that is not; a greater damp may help"
        )
    return upper


def _checked_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor | None:
    """The factor in float32, or None where that is not precise enough."""
    upper = _damped(hessian, damp, torch.float32)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(len(upper), generator=generator).to(upper.device)
    with full_precision():
        triangle = upper.triu()
        product = triangle @ probe + triangle.T @ probe - upper.diagonal() * probe
        del triangle
        if not _factorize_(upper):
            return None
        error = upper.T @ (upper @ product) - probe
    return upper if float(error.norm()) <= _RESIDUAL * float(probe.norm()) else None


def _damped(hessian: torch.Tensor, damp: float, dtype: torch.dtype) -> torch.Tensor:
    damped = hessian.to(dtype, memory_format=torch.contiguous_format, copy=True)
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    return damped


def _factorize_(matrix: torch.Tensor) -> bool:
    """Turns the upper triangle of a matrix into U and the rest into zeros; whether it could."""
    failures: list[torch.Tensor] = []
    with full_precision():
        _factorize_part_(matrix, failures)
    failed = bool(torch.stack(failures).any()) if failures else False
    return not failed and bool(torch.isfinite(matrix.diagonal()).all())


def _factorize_part_(matrix: torch.Tensor, failures: list[torch.Tensor]) -> None:
    size = len(matrix)
    if size <= _SMALL:
        # With both axes reversed the upper factor is the usual lower one.
        lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        failures.append(failed)
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True))
        return
    half = size // 2
    first, last, corner = matrix[:half, :half], matrix[half:, half:], matrix[:half, half:]
    matrix[half:, :half] = 0
    _factorize_part_(last, failures)
    # P12 = H12 U22^T: a column needs those from it on.
    for start, stop in _steps(size - half):
        corner[:, start:stop] = corner[:, start:] @ last[start:stop, start:].T
    # What P11 is the factor of; right of the diagonal, and a little left of it.
    for start, stop in _steps(half):
        first[start:stop, start:].addmm_(corner[start:stop], corner[start:].T, alpha=-1)
    _factorize_part_(first, failures)
    # U12 = -U11 P12 U22: a column needs those up to it, a row those from it on.
    for start, stop in reversed(_steps(size - half)):
        corner[:, start:stop] = corner[:, :stop] @ last[:stop, start:stop]
    for start, stop in _steps(half):
        corner[start:stop] = (first[start:stop, start:] @ corner[start:]).neg_()


def _steps(count: int) -> list[tuple[int, int]]:
    step = max(-(-count // _STEPS), 1)
    return [(start, min(start + step, count)) for start in range(0, count, step)]
