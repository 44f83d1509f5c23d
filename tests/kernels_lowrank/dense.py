"""Dense linear algebra as launches, as kernels/lowrank/README.md says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tests.kernels_lowrank.launcher import Basis, Key, Schedule, blocks, module, product

MAIN = 2
DEVIATION, LARGEST, PIVOT, SWEEPS = 3, 4, 5, 8


def nan(*shape, dtype=torch.float32):
    """Memory as the allocator may give it."""
    return torch.full(shape, float("nan"), dtype=dtype)


class Dense:
    """Workspaces of small matrices: everything whose size is the width's."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.ld = ld = blocks(width, 32) * 32
        self.gram, self.other = nan(ld, ld, dtype=torch.float64), nan(ld, ld, dtype=torch.float64)
        self.diagonal = nan(ld, dtype=torch.float64)
        self.values = nan(width, dtype=torch.float64)
        self.inverse = nan(width, width)
        self.rotations = nan(ld // 32, 32, 32, dtype=torch.float64)
        self.rotated = torch.full((ld // 32,), -1, dtype=torch.int32)
        self.dependent = torch.full((width,), -1, dtype=torch.int32)


@dataclass
class Linear:
    """Launches of dense linear algebra on one state."""

    run: Schedule
    flags: torch.Tensor
    numbers: torch.Tensor
    dense: Dense
    sweeps: int = 10

    def gram(self, z: torch.Tensor, stages: int, runs_of_rows: int = 2) -> None:
        rows, (width, ld) = z.shape[0], (self.dense.width, self.dense.ld)
        per_run = blocks(blocks(rows, runs_of_rows), 32) * 32
        runs_of_rows = blocks(rows, per_run)
        parts = nan(runs_of_rows, ld, ld, dtype=torch.float64)
        state, squares = [self.flags, self.numbers, stages], ld // 32
        m, d = module("orthonormal"), self.dense
        self.run.run(
            m, "gram", (squares * (squares + 1) // 2, runs_of_rows), 256,
            [z, parts, rows, width, ld, per_run, *state],
        )  # fmt: skip
        self.run.run(
            m, "gram_reduce", ld * ld // 256, 256,
            [parts, d.gram, d.other, d.inverse, d.diagonal, width, ld, runs_of_rows, *state],
        )  # fmt: skip

    def cholesky(self, stages: int) -> None:
        d, m = self.dense, module("orthonormal")
        squares = d.ld // 32
        for k in range(squares):
            self.run.run(
                m, "cholesky_panel", squares, 256,
                [d.gram, d.other, d.diagonal, d.inverse, d.dependent, d.width, d.ld, k,
                 self.flags, self.numbers, stages],
            )  # fmt: skip
            below = squares - 1 - k
            if below:
                grid = below * (below + 1) // 2 + below * (k + 1)
                args = [d.gram, d.other, d.ld, k, self.flags, stages]
                self.run.run(m, "cholesky_update", grid, 256, args)

    def eigen(self, stages: int, scaled: bool) -> None:
        d, m = self.dense, module("eigen")
        pairs = d.ld // 32
        for sweep in range(self.sweeps):
            for turn in range(2 * pairs - 1):
                self.run.run(
                    m, "jacobi_solve", pairs, 256,
                    [d.gram, d.rotations, d.rotated, d.ld, turn, sweep, self.flags, self.numbers,
                     stages],
                )  # fmt: skip
                self.run.run(
                    m, "jacobi_update", pairs * (pairs + 1) // 2 + pairs * pairs, 256,
                    [d.gram, d.other, d.rotations, d.rotated, d.ld, pairs, turn, sweep, self.flags,
                     self.numbers, stages],
                )  # fmt: skip
        self.run.run(
            m, "eigen_order", d.width, 256,
            [d.gram, d.other, d.diagonal, d.values, d.inverse, d.dependent, d.width, d.ld,
             int(scaled), self.flags, stages],
        )  # fmt: skip

    def apply(self, z: torch.Tensor, stages: int, key: Key, number: int) -> None:
        """Multiplies z by what `cholesky` or `eigen` found, with new columns for dependent ones."""
        rows, width = z.shape
        z2 = product(
            self.run, z, Basis(self.dense.inverse), width, active=self.flags, stages=stages
        )
        self.run.run(
            module("orthonormal"), "replace_dependent", blocks(z.numel(), 256), 256,
            [z2, z, self.dense.dependent, rows, width, key, number * z.numel(), self.flags, stages],
        )  # fmt: skip

    def cholesky_pass(self, z: torch.Tensor, stages: int, key: Key, number: int) -> None:
        self.gram(z, stages)
        self.cholesky(stages)
        self.apply(z, stages, key, number)
