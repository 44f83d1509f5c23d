"""A subspace's refresh as a sequence of launches, as kernels/lowrank/README.md says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tests.kernels_lowrank.launcher import ELEMENTS, Basis, Key, Schedule, blocks, module, product

FRESH, MAIN, PASS = 1, 2, 4
ANOTHER_PASS, LOOK_AT_WARM, ROUGH_DONE, EXACT_DONE, LAST = range(5)
DEVIATION, LARGEST, PIVOT, SWEEPS = 3, 4, 5, 8
PARTS = 8  # of a sum or a maximum; on a device up to 1024
ROUGH_PASSES, EXACT_PASSES, SVD_PASSES = 2, 3, 4


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

    def decide(self, decision: int, columns: int | None = None) -> None:
        columns = self.dense.width if columns is None else columns
        self.run.run(
            module("refresh", ELEM="f32"), "refresh_decide", 1, 32,
            [decision, self.dense.dependent, columns, self.flags, self.numbers],
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


class Search:
    """A matrix, standing upright, and the workspaces of a search for its leading directions."""

    def __init__(self, run, x, width, key, *, tensor=0, sweeps=12, runs_of_k=1) -> None:
        rows, columns = x.shape
        self.run, self.x, self.width, self.key = run, x, width, key
        self.right = rows >= columns
        self.long, self.short = max(rows, columns), min(rows, columns)
        self.options = {"tensor": tensor, "runs_of_k": runs_of_k}
        self.flags = torch.full((8,), -1, dtype=torch.int32)
        self.numbers = nan(32, dtype=torch.float64)
        self.partial = nan(PARTS, dtype=torch.float64)
        self.magnitudes = torch.full((PARTS,), -1, dtype=torch.int32)
        self.linear = Linear(run, self.flags, self.numbers, Dense(width), sweeps)
        self.y = nan(self.long, width)
        self.start, self.z = nan(self.short, width), nan(self.short, width)

    def call(self, name: str, grid: int, args: list) -> None:
        kernels = module("refresh", ELEM=ELEMENTS[self.x.dtype])
        self.run.run(kernels, name, grid, 256, args)

    def begin(self, mode: int) -> None:
        self.call("square_norm", PARTS, [self.x, self.partial, self.x.numel()])
        self.call("refresh_begin", 1, [self.partial, PARTS, mode, self.flags, self.numbers])

    def times(self, b, out, stages, transposed=False) -> None:
        """a @ b or a.T @ b."""
        product(
            self.run, self.x, Basis(b), b.shape[1], transposed=transposed == self.right, out=out,
            active=self.flags, stages=stages, **self.options,
        )  # fmt: skip

    def to_unit(self, x, stages, twice) -> None:
        where = [self.magnitudes, x.numel(), self.flags, stages]
        self.call("largest_magnitude", PARTS, [x, *where])
        parts = [self.magnitudes, PARTS, x.numel(), int(twice), self.flags, stages]
        self.call("scale_to_unit", 3, [x, *parts])

    def sketch(self, out) -> None:
        args = [self.y, self.y.numel(), self.key, self.flags, FRESH]
        self.call("random_matrix", blocks(self.y.numel(), 2048), args)
        self.times(self.y, out, FRESH, transposed=True)
        self.to_unit(out, FRESH, False)

    def two_sided(self, b, stages) -> None:
        self.times(b, self.y, stages)
        self.to_unit(self.y, stages, True)
        self.times(self.y, self.z, stages, transposed=True)

    def passes(self, z, stages, count, first, decision) -> None:
        self.linear.decide(ANOTHER_PASS)
        for number in range(first, first + count):
            self.linear.cholesky_pass(z, stages | PASS, self.key, number)
            self.linear.decide(decision)


def refresh(
    run: Schedule,
    grad: torch.Tensor,
    basis: torch.Tensor,
    vector: torch.Tensor,
    warm: bool,
    key: Key,
    *,
    width: int | None = None,
    **options: int,
) -> tuple[int, float, float]:
    """Writes `basis` and `vector`; returns status, cosine, energy."""
    rank, short = basis.shape[1], min(grad.shape)
    width = min(rank + 8, short) if width is None else width
    s = Search(run, grad, width, key, **options)
    linear, state = s.linear, [s.flags, MAIN]
    s.begin(int(warm))
    if warm:
        args = [basis, s.start, short, rank, width, key, *state]
        s.call("start_basis", blocks(s.start.numel(), 256), args)
        linear.cholesky_pass(s.start, MAIN, key, 0)
        s.two_sided(s.start, MAIN)
        linear.gram(s.z, MAIN)
        linear.cholesky(MAIN)
        linear.decide(LOOK_AT_WARM, rank)
    # From here on the same for both; after a warm start the first part has nothing to do.
    s.sketch(s.start)
    s.passes(s.start, FRESH, ROUGH_PASSES, 0, ROUGH_DONE)
    s.two_sided(s.start, FRESH)
    # The directions, then rounding.
    linear.gram(s.z, MAIN)
    linear.eigen(MAIN, scaled=True)
    linear.apply(s.z, MAIN, key, ROUGH_PASSES)
    s.passes(s.z, MAIN, EXACT_PASSES, ROUGH_PASSES + 1, EXACT_DONE)
    linear.decide(LAST)
    args = [s.z, basis, vector, short, rank, width, int(warm), s.flags, s.numbers]
    s.call("refresh_commit", blocks(rank, 32), args)
    signs, sums, images = nan(rank, 4), nan(short, 4), nan(s.long, 4)
    s.call("probe_signs", blocks(rank * 4, 256), [signs, rank, key, *state])
    product(run, basis, Basis(signs), 4, out=sums, active=s.flags, stages=MAIN)
    s.times(sums, images, MAIN)
    s.call("captured_norm", PARTS, [images, s.partial, images.numel(), *state])
    s.call("refresh_end", 1, [s.partial, PARTS, s.flags, s.numbers])
    return int(s.flags[1]), float(s.numbers[2]), float(s.numbers[1])


def svd(
    run: Schedule,
    x: torch.Tensor,
    rank: int,
    n_iter: int,
    oversample: int,
    key: Key,
    **options: int,
) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Status, u, s, vh of a randomized SVD."""
    rows, columns = x.shape
    width = min(rank + oversample, rows, columns)
    s = Search(run, x, width, key, **options)
    linear = s.linear
    u, values, vh = nan(rows, rank), nan(rank), nan(rank, columns)
    s.begin(2)
    s.sketch(s.z)
    s.passes(s.z, MAIN, SVD_PASSES, 0, EXACT_DONE)
    for _ in range(n_iter):
        s.two_sided(s.z, MAIN)
        s.passes(s.z, MAIN, SVD_PASSES, 0, EXACT_DONE)
    s.times(s.z, s.y, MAIN)
    linear.gram(s.y, MAIN)
    linear.eigen(MAIN, scaled=False)
    rotation = Basis(linear.dense.inverse.clone())
    directions = product(run, s.z, rotation, width, active=s.flags, stages=MAIN)
    images = product(run, s.y, rotation, width, active=s.flags, stages=MAIN)
    s.passes(images, MAIN, SVD_PASSES, 0, EXACT_DONE)
    linear.decide(LAST)
    args = [directions, images, linear.dense.values, u, values, vh, rows, columns, rank, width]
    s.call("svd_commit", blocks(rank, 32), [*args, s.flags])
    return int(s.flags[1]), u, values, vh
