"""Launches the kernels in the emulator as kernels/lowrank/README.md says."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tests.emulator.build import EmulatedModule

KERNELS = Path(__file__).parents[2] / "kernels"
ELEMENTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@functools.cache
def module(name: str, **defines: str | int) -> EmulatedModule:
    texts = {key: str(value) for key, value in defines.items()}
    return EmulatedModule(KERNELS / "lowrank" / f"{name}.cu", texts, [KERNELS / "include"])


def blocks(count: int, size: int) -> int:
    return -(-count // size)


@dataclass
class Basis:
    """A basis, in float32 or as codes."""

    values: torch.Tensor
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    bits: int = 32
    group_size: int = 1

    @property
    def arguments(self) -> list[torch.Tensor | None]:
        return [self.values, self.scale, self.zero_point]


@dataclass
class Schedule:
    """How the emulator runs the threads."""

    order: str = "forward"
    seed: int = 0
    launches: list[str] = field(default_factory=list)

    def run(self, kernels, name, grid, block, args):
        self.launches.append(name)
        # Blocks of a launch must not depend on one another either.
        shuffle = self.order == "random"
        kernels.launch(
            name, grid, block, args, order=self.order, seed=self.seed, shuffle_blocks=shuffle
        )


def product(
    run: Schedule,
    a: torch.Tensor,
    b: Basis,
    n: int,
    *,
    transposed: bool = False,
    by_columns: bool = False,
    runs_of_k: int = 1,
    tensor: int = 0,
    parts: int = 2,
    out: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    stages: int = 0,
) -> torch.Tensor:
    """``a @ b`` or ``a.T @ b``, ``[m, n]``; by columns it comes as ``[n, m]``."""
    kernels = module(
        "project", ELEM=ELEMENTS[a.dtype], BASIS_BITS=b.bits, TENSOR=tensor, BASIS_PARTS=parts
    )
    rows, columns = a.shape
    m, k = (columns, rows) if transposed else (rows, columns)
    a_row, a_k = (1, columns) if transposed else (columns, 1)
    # A run of k has whole slices of 32.
    k_per_run = blocks(blocks(k, runs_of_k), 32) * 32
    runs_of_k = blocks(k, k_per_run)
    if out is None:
        out = torch.full((n, m) if by_columns else (m, n), float("nan"))
    to = torch.full((runs_of_k, m * n), float("nan")) if runs_of_k > 1 else out
    run.run(
        kernels,
        "project",
        (blocks(m, 128) * blocks(n, 64), runs_of_k),
        128,
        [a, *b.arguments, to, m, n, k, a_row, a_k, n, b.group_size, int(by_columns), k_per_run,
         active, stages],
    )  # fmt: skip
    if runs_of_k > 1:
        run.run(
            kernels,
            "project_reduce",
            blocks(m * n, 1024),
            256,
            [to, out, m * n, runs_of_k, active, stages],
        )
    return out


def project(run: Schedule, grad: torch.Tensor, basis: Basis, rank: int, **options) -> torch.Tensor:
    """R = G P for ``rows >= columns``, else P^T G."""
    left = grad.shape[0] < grad.shape[1]
    return product(run, grad, basis, rank, transposed=left, by_columns=left, **options)


class Key(ctypes.Structure):
    """`rng::Key`."""

    _fields_ = [
        ("key", ctypes.c_uint32 * 2),
        ("tensor_id", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
    ]


QUANTIZE, BFLOAT16, SKETCH = 0, 1, 2


def key(seed: int, stream: int, tensor_id: int, step: int) -> Key:
    mixed = seed ^ (stream * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    return Key((ctypes.c_uint32 * 2)(mixed & 0xFFFFFFFF, mixed >> 32), tensor_id, step)


@dataclass
class Back:
    """Back-projection of one low-rank update into a ``[rows, columns]`` weight."""

    rows: int
    columns: int
    rank: int
    update: torch.Tensor
    basis: Basis
    tensor: int = 1

    def dense(self, run: Schedule, first_row: int = 0, row_count: int | None = None):
        """The update itself, or some of its rows."""
        row_count = self.rows if row_count is None else row_count
        out = torch.full((row_count, self.columns), float("nan"))
        grid = blocks(row_count, 32) * blocks(self.columns, 256)
        factors = [self.update, *self.basis.arguments, self.rows, self.columns, self.rank]
        run.run(
            module("project_back", BASIS_BITS=self.basis.bits, TENSOR=self.tensor),
            "project_back",
            grid,
            128,
            [out, *factors, self.basis.group_size, first_row, row_count],
        )
        return out
