"""Projected gradients from activations, and from gradients: what never forming them saves."""

from __future__ import annotations

from functools import partial

import torch

from benches.harness import Case, Options, interleave
from benches.report import Report
from benches.tables import Table, number, percent
from gradpress.ops import lowrank

#: Outputs, inputs.
SHAPES = ((2048, 2048), (5504, 2048), (4096, 4096))
QUICK_SHAPES = ((192, 128),)
_TOKENS = 1024
#: Ranks as shares of ``m n / (m + n)``, where both ways take as many operations.
_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
_SECONDS = 0.05

_ABOUT = (
    f"A Linear of m outputs and n inputs after {_TOKENS} tokens: from the gradient D of its outputs"
    " and its inputs X to the projected gradient. `formed` makes D^T X by torch's product and"
    " projects it by ours; `from factors` makes X P (or D P) first and the projected gradient from"
    " that, so that nothing of the weight's size exists. Operations are 2 T m n + 2 m n r and"
    " 2 T r (m + n) for T tokens: the second way takes fewer below r = m n / (m + n) even if"
    " the projection of the first cost nothing.",
    "`x` is how many times as long the gradient takes that is formed; `operations` is the same"
    " ratio of operations; the last column is the share of the rate of torch's float32 product.",
)


def run(options: Options) -> Report:
    """Times all shapes and ranks."""
    shapes = QUICK_SHAPES if options.quick else SHAPES
    rounds = options.rounds(5)
    tables = [_shape(m, n, options, rounds) for m, n in shapes]
    return Report("Projected gradients from activations", _ABOUT, rounds, tables)


def _shape(m: int, n: int, options: Options, rounds: int) -> Table:
    tokens = 64 if options.quick else _TOKENS
    grad_output, inputs = torch.randn(tokens, m), torch.randn(tokens, n)
    break_even = m * n / (m + n)
    lines = []
    for share in _SHARES:
        rank = max(8, int(share * break_even) // 8 * 8)
        basis = torch.linalg.qr(torch.randn(min(m, n), rank))[0].contiguous()
        out = torch.empty((m, rank) if m >= n else (rank, n))
        formed = Case("formed", partial(_formed, grad_output, inputs, basis, out))
        factors = Case(
            "from factors",
            partial(lowrank.project_factors, [grad_output], [inputs], [basis], [out]),
        )
        samples = interleave([formed, factors], rounds, _SECONDS)
        work = 2 * tokens * rank * (m + n)
        rate = work / samples.median(factors.name)
        lines.append(
            (
                f"{rank} ({share:g})",
                number(1e3 * samples.median(factors.name)),
                number(1e3 * samples.median(formed.name)),
                number(samples.ratio(formed.name, factors.name)),
                number((2 * tokens * m * n + 2 * m * n * rank) / work),
                percent(rate / options.limits.flops),
            )
        )
    head = (
        "rank (of m n / (m + n))",
        "from factors, ms",
        "formed, ms",
        "x",
        "operations",
        "of mm",
    )
    return Table(f"{m} x {n}", head, lines)


def _formed(
    grad_output: torch.Tensor, inputs: torch.Tensor, basis: torch.Tensor, out: torch.Tensor
) -> None:
    lowrank.project([grad_output.T @ inputs], [basis], [out])
