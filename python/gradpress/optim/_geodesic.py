"""Turning a subspace towards a gradient along a geodesic of the Grassmannian.

The loss of a subspace with the orthonormal basis S (d x r) is what it leaves of a gradient,
``F(S) = min_A |G - S A|^2``, with the gradient ``-2 (G - S A) A^T`` for ``A = S^T G``, which is
tangent to the Grassmannian. Geodesics after Edelman, Arias, Smith: "The Geometry of Algorithms
with Orthogonality Constraints" (1998, arXiv physics/9806030), theorem 2.3.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch

from gradpress.ops import lowrank as kernels
from gradpress.optim._limiter import total_norm
from gradpress.optim._products import transposed_product

#: The largest element of ``|S^T S - I|`` up to which a basis counts as orthonormal.
DRIFT = 5e-6
#: Iterations towards an orthonormal basis; each enlarges small singular values by half.
MOST_ITERATIONS = 40
#: A tangent smaller than this share of its factors' norms is rounding errors.
NOISE = 1e-6
#: The search for the leading direction of a tangent: columns beside it, and iterations.
OVERSAMPLE, ITERATIONS = 16, 8
#: Rows of an upright gradient that are in float32 at a time, or the rank where that is more.
RUN = 512


class Move(NamedTuple):
    """A step along a geodesic.

    Attributes:
        basis: The new one, ``[d, rank]``.
        angle: Between the old subspace and the new one, as long as it is at most a right one.
        energy: Share of the gradient's squared norm that the new subspace captures.
    """

    basis: torch.Tensor
    angle: float
    energy: float


def orthonormalized(basis: torch.Tensor) -> torch.Tensor | None:
    """The nearest matrix of orthonormal columns; the same tensor where it is one up to `DRIFT`.

    By the iteration ``S <- S (3 I - S^T S) / 2`` towards the polar factor (Björck, Bowie: "An
    Iterative Algorithm for Computing the Best Estimate of an Orthogonal Matrix", 1971): products
    alone, whose bits do not depend on threads, and directions that stay where they are.

    Args:
        basis: ``[d, rank]``, float32.

    Returns:
        None where the columns are not independent.
    """
    one = torch.eye(basis.shape[1], device=basis.device)
    for iteration in range(MOST_ITERATIONS):
        gram = transposed_product(basis, basis)
        drift, off, size = _numbers((gram - one).abs().amax(), total_norm(gram - one), gram)
        if drift <= DRIFT:
            return basis
        if iteration == 0 and not off < 1.0:
            # Singular values up to one always converge; larger than the root of three never.
            basis, gram = basis / math.sqrt(size), gram / size
        basis = _times(basis, 1.5 * one - 0.5 * gram)
    return None


def descend(grad: torch.Tensor, basis: torch.Tensor, rate: float | None) -> Move | None:
    """One step of steepest descent of what a subspace leaves of a gradient, by rank one.

    With the leading singular triple ``(u, s, v)`` of the loss's gradient, the subspace turns in
    the plane of S v and u: ``S <- S + (S v (cos(a) - 1) - u sin(a)) v^T``. Takes no copy of the
    gradient, and waits for the device.

    Args:
        grad: ``[m, n]``; float32, float16 or bfloat16, contiguous.
        basis: ``[min(m, n), rank]``, float32, orthonormal columns; of the side of the shorter
            dimension, of a square matrix that of the columns.
        rate: The angle is this times s; None takes the angle at which the loss is least on the
            geodesic, in closed form.

    Returns:
        None where nothing can be said or done: a gradient that is zero or not finite, and a
        subspace that is stationary up to rounding.
    """
    (largest,) = _numbers(torch.linalg.vector_norm(grad, math.inf))
    if basis.shape[1] == basis.shape[0] or not 0.0 < largest < math.inf:
        return None
    # A power of two: neither squares of tiny gradients nor this division lose anything.
    unit = math.ldexp(1.0, min(max(math.frexp(largest)[1], -125), 125))
    inside = _along(grad, basis) / unit
    tangent, norm = _outside(grad, basis, inside, unit)
    kept, size, length = _numbers(inside, norm, tangent)
    if not NOISE * kept * size < length < math.inf:
        return None
    # Down the slope: this u is minus the one of the loss's gradient.
    u, v, slope = _leading_triple(tangent, basis)
    if slope <= NOISE * kept * size:
        return None
    # What S v and u capture, each by itself.
    here, there = (n**2 for n in _numbers(_times(inside, v), _along(grad, u) / unit))
    angle = 0.5 * math.atan2(slope, here - there)
    if rate is not None:
        angle = rate * slope * unit**2
    cosine, sine = math.cos(angle), math.sin(angle)
    turned = basis + (_times(basis, v) * (cosine - 1.0) + u * sine) * v.T
    gain = slope * sine * cosine + (there - here) * sine**2
    return Move(turned, angle, min((kept**2 + gain) / size**2, 1.0))


def _outside(
    grad: torch.Tensor, basis: torch.Tensor, inside: torch.Tensor, unit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the steepest descent, ``A (G - S A)^T`` ``[rank, d]``, and the gradient's norm.

    Both of the gradient divided by `unit`, a few rows or columns of which are in float32 at a time.

    Args:
        grad: G.
        basis: S.
        inside: ``A^T``, divided by `unit`.
        unit: A power of two.
    """
    short, rank = basis.shape
    upright = grad if grad.shape[0] >= grad.shape[1] else grad.T
    run = min(short - 1, max(rank, RUN))
    product = torch.empty(rank, short, dtype=torch.float32, device=grad.device)
    total, norms = torch.zeros_like(product), []
    parts = (torch.split(t, run) for t in (upright, inside))
    for rows, weights in zip(*parts, strict=True):
        part = rows.to(torch.float32).mul(1.0 / unit).contiguous()
        if len(part) < rank:
            part, weights = (torch.nn.functional.pad(t, (0, 0, 0, rank - len(t)))
                             for t in (part, weights))  # fmt: skip
        kernels.project([part], [weights.contiguous()], [product])
        total += product
        norms.append(total_norm(part))
    total -= _times(basis, transposed_product(inside, inside)).T
    return total, torch.stack(norms)


def _leading_triple(
    tangent: torch.Tensor, basis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Leading singular vectors ``[d, 1]`` and ``[rank, 1]``, and twice the singular value.

    Args:
        tangent: ``[rank, d]``, of rank below d: half of the steepest descent, transposed.
        basis: What the vector of length d has to be orthogonal to.
    """
    options = {"rank": 1, "n_iter": ITERATIONS, "oversample": OVERSAMPLE, "seed": 0}
    v = cast(torch.Tensor, kernels.svd(tangent, **options)[0])
    v = v / total_norm(v)
    u = torch.empty(1, tangent.shape[1], dtype=torch.float32, device=v.device)
    kernels.project([tangent], [v], [u])
    u = u.T.contiguous()
    for _ in range(2):  # the second time for what rounding has left of the first
        u = u - _times(basis, transposed_product(u, basis).T.contiguous())
    (length,) = _numbers(u)
    return u / length if length else u, v, 2.0 * length


def _along(grad: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """A gradient's coordinates ``[max(m, n), k]`` on k directions of its shorter side."""
    rows, columns = grad.shape
    shape = kernels.projected_shape(rows, columns, directions.shape[1])
    out = torch.empty(shape, dtype=torch.float32, device=grad.device)
    kernels.project([grad], [directions.contiguous()], [out])
    return out if rows >= columns else out.T.contiguous()


def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` for an upright matrix, and a right factor of no more columns than it has."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    kernels.project([a], [b.contiguous()], [out])
    return out


def _numbers(*tensors: torch.Tensor) -> list[float]:
    """Scalars, and norms of all others; the host waits for them once."""
    scalars = [t.float() if t.dim() == 0 else total_norm(t) for t in tensors]
    return cast("list[float]", torch.stack(scalars).tolist())
