"""Scoring and selecting weights, and SparseGPT's solve, beside the same in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benches.harness import Case, Options, interleave
from benches.report import Report
from benches.tables import Table, number
from gradpress import prune

#: Outputs and inputs of the linear layers of a LLaMA with 576 and with 2048 features.
SHAPES = ((576, 576), (1536, 576), (2048, 2048), (5504, 2048), (2048, 5504))
QUICK_SHAPES = ((64, 128),)
SOLVED = ((576, 576), (576, 1536), (2048, 2048))
SPARSITY = 0.5
BLOCK = 128
_SECONDS = 0.02


def run(options: Options) -> Report:
    """Times every selection on all shapes, and the solves on some."""
    shapes = QUICK_SHAPES if options.quick else SHAPES
    rounds = options.rounds(7)
    tables = []
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in shapes:
            tables.append(_selections(rows, columns, dtype, rounds))
    solved = QUICK_SHAPES if options.quick else SOLVED
    tables += [_solves(rows, columns, options.rounds(3)) for rows, columns in solved]
    tables += [_gradients(*(QUICK_SHAPES[0] if options.quick else (2048, 2048)), rounds)]
    tables += [_models(shapes, rounds)]
    return Report("Pruning", _ABOUT, rounds, tables)


_ABOUT = (
    "Both sides start from a weight and the statistics of its layer and end with a mask. `torch`"
    " does it as the published code: the scores as a matrix, a stable sort of every row, a scatter"
    " of the first half of the indices; for N:M `topk` and a scatter for every M columns; for a"
    " matrix a sort of all magnitudes and a comparison. `select` neither sorts nor keeps scores.",
    "`sparsegpt` beside a transcription of the published solver: Cholesky factor, inverse, Cholesky"
    f" factor of that, then column by column in blocks of {BLOCK}, in float32. Ours factorizes"
    " once: in float32 as long as the factor proves precise, and by the last row of each table in"
    " float64.",
    "Gradients: `GradientNorms` adds up `|g|` of one sample of 512 tokens from its activations, a"
    " few rows at a time; torch makes the whole gradient, and its sizes, beside the sum. The whole"
    " model: one threshold for all the matrices of the first tables; torch puts all scores into one"
    " vector and sorts it.",
    "`x` is how many times as long torch takes.",
)


def _table(title: str, cases: list[tuple[Case, Case]], rounds: int, count: int) -> Table:
    samples = interleave([case for pair in cases for case in pair], rounds, _SECONDS)
    head = ("choice", "ours, ms", "torch, ms", "ours, ns/weight", "x")
    lines = []
    for ours, theirs in cases:
        mine, other = samples.median(ours.name), samples.median(theirs.name)
        per_weight = number(1e9 * mine / count)
        ratio = number(samples.ratio(theirs.name, ours.name))
        lines.append((ours.name, number(1e3 * mine), number(1e3 * other), per_weight, ratio))
    return Table(title, head, lines)


def _pair(name: str, ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[Case, Case]:
    return Case(name, ours), Case(f"torch, {name}", theirs)


def _selections(rows: int, columns: int, dtype: torch.dtype, rounds: int) -> Table:
    weight = torch.randn(rows, columns).to(dtype)
    input_sq, grad = torch.rand(columns), torch.rand(rows, columns) * 1e-4
    wanda = partial(_wanda, weight, input_sq)
    gblm = partial(_gblm, weight, input_sq, grad)
    mine = partial(prune.select, weight, input_sq=input_sq)
    cases = [
        _pair("Wanda, rows", partial(mine, sparsity=SPARSITY), lambda: _sorted_rows(wanda())),
        _pair(
            "GBLM, rows",
            partial(mine, grad_norm=grad, sparsity=SPARSITY),
            lambda: _sorted_rows(gblm()),
        ),
        _pair("Wanda, 2:4", partial(mine, pattern="2:4"), lambda: _top_groups(wanda(), 2, 4)),
        _pair("Wanda, 4:8", partial(mine, pattern="4:8"), lambda: _top_groups(wanda(), 4, 8)),
        _pair(
            "magnitude, matrix",
            partial(prune.select, weight, sparsity=SPARSITY, group="matrix"),
            lambda: _sorted_matrix(weight),
        ),
    ]
    name = str(dtype).removeprefix("torch.")
    return _table(f"{rows} x {columns}, {name}", cases, rounds, rows * columns)


def _wanda(weight: torch.Tensor, input_sq: torch.Tensor) -> torch.Tensor:
    return weight.abs() * input_sq.sqrt()[None]


def _gblm(weight: torch.Tensor, input_sq: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return weight.abs() * input_sq.sqrt()[None] + weight.abs() * grad


def _sorted_rows(score: torch.Tensor) -> torch.Tensor:
    order = torch.sort(score, dim=-1, stable=True)[1]
    dropped = torch.zeros_like(score, dtype=torch.bool)
    return dropped.scatter_(1, order[:, : int(score.shape[1] * SPARSITY)], True)


def _top_groups(score: torch.Tensor, keep: int, size: int) -> torch.Tensor:
    dropped = torch.zeros_like(score, dtype=torch.bool)
    for first in range(0, score.shape[1], size):
        group = score[:, first : first + size].float()
        least = torch.topk(group, size - keep, dim=1, largest=False)[1]
        dropped.scatter_(1, first + least, True)
    return dropped


def _sorted_matrix(weight: torch.Tensor) -> torch.Tensor:
    size = weight.abs()
    threshold = torch.sort(size.flatten())[0][int(size.numel() * SPARSITY)]
    return size <= threshold


def _solves(rows: int, columns: int, rounds: int) -> Table:
    weight = torch.randn(rows, columns)
    hessian = prune.Hessian(columns)
    hessian.update(torch.randn(2 * columns, columns) @ (torch.eye(columns) + 0.01))
    matrix = hessian.matrix
    cases = [
        _pair(
            f"sparsegpt, {pattern}",
            partial(prune.sparsegpt, weight, matrix, sparsity=SPARSITY, pattern=pattern),
            partial(_solve, weight, matrix, size),
        )
        for pattern, size in (("unstructured", 0), ("2:4", 4))
    ]
    double = partial(prune.sparsegpt, weight, matrix, pattern="2:4", dtype="float64")
    cases.append(_pair("sparsegpt, 2:4, float64", double, partial(_solve, weight, matrix, 4)))
    return _table(f"solve of {rows} x {columns}, float32", cases, rounds, rows * columns)


def _gradients(rows: int, columns: int, rounds: int) -> Table:
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = torch.randn(1, 512, columns).to(dtype)
        outputs = (torch.randn(1, 512, rows) * 1e-3).to(dtype)
        norms, total = prune.GradientNorms(rows, columns), torch.zeros(rows, columns)
        cases.append(
            _pair(
                f"one sample, {str(dtype).removeprefix('torch.')}",
                partial(norms.update_from_activations, inputs, outputs),
                partial(_add_sizes, total, inputs[0], outputs[0]),
            )
        )
    return _table(f"gradients of {rows} x {columns}", cases, rounds, rows * columns)


def _add_sizes(total: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
    total += (outputs.T @ inputs).abs()


def _models(shapes: tuple[tuple[int, int], ...], rounds: int) -> Table:
    weights = [torch.randn(shape) for shape in shapes]
    squares = [torch.rand(columns) for _, columns in shapes]
    mine = partial(prune.select_model, weights, input_sqs=squares, sparsity=SPARSITY)
    cases = [_pair("Wanda, model", mine, partial(_sorted_model, weights, squares))]
    count = sum(weight.numel() for weight in weights)
    return _table("a model of these shapes, float32", cases, rounds, count)


def _sorted_model(weights: list[torch.Tensor], squares: list[torch.Tensor]) -> list[torch.Tensor]:
    scores = [_wanda(*each) for each in zip(weights, squares, strict=True)]
    everything = torch.cat([score.flatten() for score in scores])
    threshold = torch.sort(everything)[0][int(len(everything) * SPARSITY)]
    return [score < threshold for score in scores]


def _solve(weight: torch.Tensor, hessian: torch.Tensor, size: int) -> torch.Tensor:
    """Half the weights, unstructured or of every `size` columns."""
    weight, hessian = weight.clone(), hessian.clone()
    columns = weight.shape[1]
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        block, corner = weight[:, first:last].clone(), upper[first:last, first:last]
        result, errors = torch.zeros_like(block), torch.zeros_like(block)
        dropped = torch.zeros_like(block, dtype=torch.bool)
        if not size:
            score = block**2 / corner.diagonal().reshape(1, -1) ** 2
            dropped = score <= torch.sort(score.flatten())[0][int(score.numel() * SPARSITY)]
        for i in range(last - first):
            column, scale = block[:, i], corner[i, i]
            if size and i % size == 0:
                diagonal = corner.diagonal()[i : i + size].reshape(1, -1)
                score = block[:, i : i + size] ** 2 / diagonal**2
                least = torch.topk(score, size // 2, dim=1, largest=False)[1]
                dropped.scatter_(1, i + least, True)
            kept = column.clone()
            kept[dropped[:, i]] = 0
            result[:, i] = kept
            error = (column - kept) / scale
            block[:, i:] -= error.unsqueeze(1) @ corner[i, i:].unsqueeze(0)
            errors[:, i] = error
        weight[:, first:last] = result
        weight[:, last:] -= errors @ upper[first:last, last:]
    return weight
