"""One step of a block power iteration from basis to basis, and orthonormal rows.

Bases are handled transposed here, a direction in each row, so that the kernels multiply small
matrices from the left. All products are those of `_products`, and the triangular factors are found
by elimination row by row: LAPACK's differ in their last bits from one number of threads to another.
"""

from __future__ import annotations

import torch

from gradpress.ops import lowrank as kernels
from gradpress.optim._products import MIN_WIDTH, product, transposed_product

#: Part of the identity that is added to the iterated matrix, relative to the norm of the result:
#: above what rounding leaves of a direction in which there is nothing. Such directions stay.
IDENTITY = 1e-6
#: Added to the diagonal of a Gram matrix of unit rows, for each root of its size: what its
#: products in float32 may be wrong by.
DIAGONAL = 1e-6
#: Passes of elimination; each divides a condition beyond that of the diagonal by about a thousand.
PASSES = 3
#: How far from the identity a Gram matrix may be for the last correction to leave rounding alone.
NEARLY = 1e-3


def rows_of(low_rank: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A projected gradient as ``[rank, max(shape)]``, or such rows as a projected gradient."""
    return low_rank.T.contiguous() if shape[0] >= shape[1] else low_rank


def project_rows(matrix: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The coordinates of a float32 matrix in a basis ``[short, rank]``: ``[rank, long]``."""
    shape = (matrix.shape[0], matrix.shape[1])
    projected = torch.empty(
        kernels.projected_shape(*shape, basis.shape[1]), dtype=torch.float32, device=matrix.device
    )
    kernels.project([matrix], [basis], [projected])
    return rows_of(projected, shape)


def next_directions(
    matrix: torch.Tensor, basis: torch.Tensor, mean: torch.Tensor, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of ``qr(B (B.T P))`` with ``B = weight * P mean + (1 - weight) * matrix``.

    B itself, of the matrix's size, is never made. For a matrix that is not wide B is transposed.

    Args:
        matrix: ``[m, n]``, float32.
        basis: P, ``[min(m, n), rank]``, float32; orthonormal columns.
        mean: ``[rank, max(m, n)]``, float32.
        weight: Of the part that is known already.

    Returns:
        ``[rank, min(m, n)]``, and whether they are orthonormal, on the device: not where the
        matrix holds NaN or infinity, or all is zero.
    """
    image = mean * weight + project_rows(matrix, basis) * (1.0 - weight)
    image = image / image.abs().amax()
    known = transposed_product(mean.T, image.T)
    directions = transposed_product(known, basis.T) * weight
    directions += _multiply_long(image, matrix) * (1.0 - weight)
    # First into the range of float32: the entries are products of two gradients.
    directions = directions / directions.abs().amax()
    directions /= _norm(directions)
    return orthonormal_rows(directions.add_(basis.T, alpha=IDENTITY))


def _multiply_long(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``rows @ matrix``, or ``rows @ matrix.T`` for a wide one, a part of the sum at a time."""
    rank, short = rows.shape[0], min(matrix.shape)
    if matrix.shape[0] < matrix.shape[1]:
        return _multiply_wide(rows, matrix)
    run = max(short, rank + 1, MIN_WIDTH) - 1
    total = torch.zeros(rank, short, dtype=torch.float32, device=matrix.device)
    for i in range(0, matrix.shape[0], run):
        total += transposed_product(rows[:, i : i + run].T, matrix[i : i + run])
    return total


def _multiply_wide(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """By square parts of the matrix: transposing them would take longer than the product."""
    short = matrix.shape[0]
    total = torch.zeros(short, rows.shape[0], dtype=torch.float32, device=matrix.device)
    for part, theirs in zip(
        torch.split(matrix, short, dim=1), torch.split(rows, short, dim=1), strict=True
    ):
        missing = (0, short - part.shape[1])
        part = torch.nn.functional.pad(part, missing).contiguous()
        basis = torch.nn.functional.pad(theirs, missing).T.contiguous()
        out = torch.empty_like(total)
        kernels.project([part], [basis], [out])
        total += out
    return total.T.contiguous()


def _norm(rows: torch.Tensor) -> torch.Tensor:
    """The norm of the longest of rows whose entries are at most 1."""
    return _gram(rows).diagonal().amax().sqrt()


def _gram(rows: torch.Tensor) -> torch.Tensor:
    columns = rows.T.contiguous()
    return transposed_product(columns, columns)


def orthonormal_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The transposed factor Q of the QR decomposition of ``rows.T``, with R's diagonal positive.

    Cholesky's factor of the Gram matrix, with a shifted diagonal, pass by pass (Fukaya, Kannan,
    Nakatsukasa, Yamamoto, Yanagisawa: "Shifted Cholesky QR for Computing the QR Factorization of
    Ill-Conditioned Matrices", 2018, arXiv 1809.11085).

    Args:
        rows: ``[rank, n]`` with rank <= n, float32.

    Returns:
        Rows, and whether they are orthonormal, on the device.
    """
    identity = torch.eye(rows.shape[0], dtype=torch.float32, device=rows.device)
    rows = rows / rows.abs().amax(dim=1, keepdim=True)
    for passes_left in range(PASSES, -1, -1):
        gram = _gram(rows)
        deviation = gram - identity
        good = deviation.abs().amax() < NEARLY
        # On the CPU nobody waits for an answer; on devices all passes cost less than one.
        if passes_left == 0 or (rows.device.type == "cpu" and bool(good)):
            break
        rows = product(inverse_factor(gram).to(torch.float32), rows)
    # The first order of what one more factor would be: the deviation's square is below rounding.
    correction = deviation.tril()
    correction.diagonal().mul_(0.5)
    return rows - product(correction, rows), good


def inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """A float64 lower triangle T for which ``T gram T.T`` is nearly the identity.

    Args:
        gram: ``[n, n]``, positive up to the rounding of float32.
    """
    size = gram.shape[0]
    gram = gram.to(torch.float64)
    scale = gram.diagonal().rsqrt()
    shift = DIAGONAL * size**0.5
    identity = torch.eye(size, dtype=torch.float64, device=gram.device)
    scaled = gram * scale * scale.unsqueeze(1) + shift * identity
    inverse = _eliminate(scaled, shift) if gram.device.type == "cpu" else _solve(scaled)
    return inverse * scale


def _eliminate(matrix: torch.Tensor, smallest: float) -> torch.Tensor:
    """The inverse of Cholesky's factor, a row at a time."""
    size = matrix.shape[0]
    table = torch.cat((matrix, torch.eye(size, dtype=matrix.dtype)), dim=1)
    for i in range(size):
        row = table[i]
        row *= row[i].clamp(min=smallest).rsqrt()
        # What is to the right of row i's own column in the second half is zero still.
        table[i + 1 :, i : size + i + 1].addr_(row[i + 1 : size], row[i : size + i + 1], alpha=-1.0)
    return table[:, size:]


def _solve(matrix: torch.Tensor) -> torch.Tensor:
    """The same by the library, for devices; means nothing where the matrix is not positive."""
    factor, _ = torch.linalg.cholesky_ex(matrix)
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    inverse: torch.Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse
