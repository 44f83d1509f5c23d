"""Finding the leading subspace of a large gradient, beside torch's decompositions."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from benches.gpu_sections.context import Context
from benches.gpu_sections.findings import Findings
from benches.gpu_sections.profiling import profile
from benches.gpu_sections.timing import alone
from benches.harness import Case
from benches.subspace import (
    COLD,
    LOWRANK,
    OVERSAMPLE,
    PERTURBATION,
    SVD,
    WARM,
    Problem,
    energy,
    make_cases,
    make_problem,
    orthogonality,
)
from benches.tables import Table, number
from gradpress.lowrank import svd

SHAPE, QUICK_SHAPE = (4096, 4096, 1024), (192, 160, 16)
ROUNDS = 7
OURS = "gradpress.lowrank.svd"
TARGETS = {COLD: 20.0, WARM: 50.0, OURS: None}
#: Shares of the most that a subspace of this rank captures.
LEAST_ENERGY = 0.95
#: Deviation of the bases from orthonormal ones.
MOST_DEVIATION = 1e-5


def run(context: Context, findings: Findings) -> None:
    """Times ours, then the peers, the slowest of them once or twice."""
    torch.manual_seed(0)
    rows, columns, rank = QUICK_SHAPE if context.quick else SHAPE
    problem = make_problem(rows, columns, rank, context.device)
    cases = {case.name: case for case in make_cases(problem)}
    cases[OURS] = Case(OURS, _svd(problem))
    # Loads what torch's decompositions need, on a matrix that takes no time.
    torch.linalg.svd(torch.randn(64, 64, device=context.device), full_matrices=False)
    times: dict[str, list[float]] = {}
    for name in (COLD, WARM, OURS, LOWRANK, SVD):
        rounds = 2 if context.quick else ROUNDS
        times[name] = _times(context, cases[name], rounds)
        if name != SVD:
            _check(findings, problem, name)
    name = f"{rows} x {columns}, rank {rank}"
    for ours, target in TARGETS.items():
        for who in (SVD, LOWRANK):
            mine, theirs = (statistics.median(times[case]) for case in (ours, who))
            findings.times(f"{ours}, {name}", mine, theirs, who, target if who == SVD else None)
    findings.row(
        f"energy captured, {name}",
        ", ".join(f"{energy(problem, problem.bases[n]):.4f}" for n in (COLD, WARM, OURS)),
        f"{energy(problem, problem.bases[LOWRANK]):.4f}, {LOWRANK}",
    )
    findings.table(_table(f"Leading subspace, {name}", problem, times))
    for case in (COLD, WARM):
        launches = profile(context, findings, _call(cases[case]), case)
        if launches is not None:
            findings.table(launches.table(f"Kernels of `{case}`, {name}"))


def _svd(problem: Problem) -> Callable[[], None]:
    right = problem.matrix.shape[0] >= problem.matrix.shape[1]

    def call() -> None:
        u, _, vh = svd(problem.matrix, problem.rank, n_iter=2)
        problem.bases[OURS] = vh.T if right else u

    return call


def _call(case: Case) -> Callable[[], None]:
    def call() -> None:
        if case.before is not None:
            case.before()
        case.run()

    return call


def _times(context: Context, case: Case, rounds: int) -> list[float]:
    """Seconds of some calls; a call that takes seconds is neither warmed up nor often repeated."""
    times: list[float] = []
    while len(times) < rounds + 1:
        if case.before is not None:
            case.before()
        times.append(alone(context, case.run))
        if times[-1] > 1 and (len(times) == 2 or 3 * times[-1] > context.left()):
            return times
    return times[1:]


def _check(findings: Findings, problem: Problem, name: str) -> None:
    basis = problem.bases[name]
    share, deviation = energy(problem, basis), orthogonality(basis)
    if name == LOWRANK:  # no promise of ours
        return
    right = LEAST_ENERGY <= share <= 1 + 1e-3 and deviation <= MOST_DEVIATION
    findings.check(
        f"{name}: energy {share:.4f} of the best, off orthonormal {deviation:.1e}", right
    )


def _table(title: str, problem: Problem, times: dict[str, list[float]]) -> Table:
    head = ("contender", "ms, median", "ms, min", "calls", "linalg.svd takes x", "energy", "off")
    rows = []
    for name, seconds in times.items():
        basis = problem.bases[name]
        median = statistics.median(seconds)
        rows.append(
            (
                name,
                number(1e3 * median),
                number(1e3 * min(seconds)),
                str(len(seconds)),
                number(statistics.median(times[SVD]) / median),
                f"{energy(problem, basis):.5f}",
                f"{orthogonality(basis):.1e}",
            )
        )
    notes = (
        "The singular values are i ** -0.7. `energy` is the squared norm that the basis captures"
        " over what the best subspace of this rank captures; `off` the largest entry of"
        f" |B^T B - 1|. Cold starts carry {OVERSAMPLE} directions more than asked for; a warm start"
        f" begins at the basis of the matrix plus {PERTURBATION:.0%} noise. `{OURS}` gives both"
        " sides, with two power iterations.",
    )
    return Table(title, head, rows, notes)
