"""Finding the leading subspace of a gradient: time, captured energy, orthogonality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benches.harness import Case, Options, Samples, interleave
from benches.report import Report
from benches.tables import Table, number, percent
from benches.workloads import spectrum_matrix
from gradpress.ops import lowrank

SHAPES = ((768, 2048, 128), (1024, 1024, 128), (2048, 2048, 256))
QUICK_SHAPES = ((192, 512, 32),)
PERTURBATION = 0.05
OVERSAMPLE = 8

COLD, WARM = "refresh_basis, cold", "refresh_basis, warm"
SVD, LOWRANK = "torch.linalg.svd", "torch.svd_lowrank(niter=2)"


@dataclass
class Problem:
    """One matrix, and the places where every contender leaves its basis.

    Attributes:
        matrix: The gradient.
        rank: Directions wanted.
        best: Squared norm that the best subspace of this rank captures.
        start: The basis and leading direction of a slightly different matrix.
        bases: The basis by contender, ``[min(m, n), rank]``.
    """

    matrix: torch.Tensor
    rank: int
    best: float
    start: tuple[torch.Tensor, torch.Tensor]
    bases: dict[str, torch.Tensor]

    @property
    def work(self) -> float:
        """Operations of one product of the gradient with `rank` vectors."""
        return 2.0 * self.matrix.numel() * self.rank

    @property
    def cold_work(self) -> float:
        """Operations of one such product in a cold start, which carries some directions more."""
        width = min(self.rank + OVERSAMPLE, *self.matrix.shape)
        return 2.0 * self.matrix.numel() * width


def run(options: Options) -> Report:
    """Times all shapes."""
    shapes = QUICK_SHAPES if options.quick else SHAPES
    rounds = options.rounds(7)
    tables = []
    for rows, columns, rank in shapes:
        problem = make_problem(rows, columns, rank)
        samples = interleave(make_cases(problem), rounds)
        title = f"{rows} x {columns}, rank {rank}"
        tables.append(_table(title, problem, samples, options.limits.flops))
    return Report("Leading subspace of a gradient", _ABOUT, rounds, tables)


_ABOUT = (
    "Matrices have random orthogonal factors and singular values i ** -0.7, a spectrum like that of"
    " a gradient. All contenders give a basis of the leading subspace on the side of the shorter"
    " dimension, but not by the same work: `linalg.svd` finds all singular vectors on both sides"
    " exactly; `svd_lowrank` (no oversampling, two power iterations) approximates the leading ones"
    " on both sides; `refresh_basis` approximates those of one side, with one power iteration from"
    f" nothing (cold, {OVERSAMPLE} directions more than asked for) or one step from an earlier"
    f" basis (warm: that of the matrix plus {PERTURBATION:.0%} noise).",
    "`energy` is the squared norm that the basis captures over what the best subspace of this rank"
    " captures. `orthogonality` is the largest entry of |B^T B - 1|. `GFLOP/s` counts the products"
    " with the gradient alone (2 m n (rank + 8) operations each: three cold, two warm, which"
    f" carries {OVERSAMPLE} random directions along); orthogonalization and the small eigenproblem"
    " come on top, so `of mm`, the share of the rate of `torch.mm`, stays below 100 %.",
)


def _perturbed(matrix: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(matrix)
    return matrix + noise * (PERTURBATION * matrix.norm() / noise.norm())


def _refresh(matrix: torch.Tensor, basis: torch.Tensor, vector: torch.Tensor, warm: bool) -> None:
    lowrank.refresh_basis(
        [matrix], [basis], [vector], warm=[warm], seed=1, tensor_ids=[0], steps=[0]
    )


def make_problem(rows: int, columns: int, rank: int, device: torch.device | str = "cpu") -> Problem:
    """A matrix of known singular values, and the basis of a slightly different one."""
    matrix, values = spectrum_matrix(rows, columns, device)
    short = min(rows, columns)
    start = torch.zeros(short, rank, device=device), torch.zeros(short, device=device)
    _refresh(_perturbed(matrix), *start, warm=False)
    best = float(values[:rank].square().sum())
    return Problem(matrix, rank, best, start, {})


def make_cases(problem: Problem) -> list[Case]:
    """The contenders, which leave their bases in the problem."""
    matrix, rank = problem.matrix, problem.rank
    right = matrix.shape[0] >= matrix.shape[1]
    cold, vector = (torch.zeros_like(t) for t in problem.start)
    warm, warm_vector = (torch.zeros_like(t) for t in problem.start)
    problem.bases.update({COLD: cold, WARM: warm})

    def restore() -> None:
        for target, source in zip((warm, warm_vector), problem.start, strict=True):
            target.copy_(source)

    def keeping(name: str, find: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Case:
        def call() -> None:
            left, other = find()
            problem.bases[name] = (other if right else left)[:, :rank]

        return Case(name, call)

    def full() -> tuple[torch.Tensor, torch.Tensor]:
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, vh.T

    def sketch() -> tuple[torch.Tensor, torch.Tensor]:
        u, _, v = torch.svd_lowrank(matrix, q=rank, niter=2)
        return u, v

    return [
        Case(COLD, partial(_refresh, matrix, cold, vector, False)),
        Case(WARM, partial(_refresh, matrix, warm, warm_vector, True), restore),
        keeping(LOWRANK, sketch),
        keeping(SVD, full),
    ]


def energy(problem: Problem, basis: torch.Tensor) -> float:
    """The squared norm that a basis captures, over the most that its rank can."""
    matrix = problem.matrix.double()
    right = matrix.shape[0] >= matrix.shape[1]
    image = matrix @ basis.double() if right else matrix.T @ basis.double()
    return float(image.square().sum()) / problem.best


def orthogonality(basis: torch.Tensor) -> float:
    """The largest entry of ``|B^T B - 1|``."""
    basis = basis.double()
    return float((basis.T @ basis - torch.eye(basis.shape[1], device=basis.device)).abs().max())


def _table(title: str, problem: Problem, samples: Samples, peak: float) -> Table:
    head = (
        "contender",
        "ms, median",
        "ms, min",
        "GFLOP/s",
        "of mm",
        "linalg.svd takes x",
        "svd_lowrank takes x",
        "energy",
        "orthogonality",
    )
    products = {COLD: 3 * problem.cold_work, WARM: 2 * problem.cold_work}
    rows = []
    for name in (COLD, WARM, LOWRANK, SVD):
        seconds, basis = samples.median(name), problem.bases[name]
        rate = products[name] / seconds if name in products else None
        rows.append(
            (
                name,
                number(1e3 * seconds),
                number(1e3 * samples.minimum(name)),
                number(rate / 1e9) if rate else "-",
                percent(rate / peak) if rate else "-",
                number(samples.ratio(SVD, name)),
                number(samples.ratio(LOWRANK, name)),
                f"{energy(problem, basis):.5f}",
                f"{orthogonality(basis):.1e}",
            )
        )
    return Table(title, head, rows)
