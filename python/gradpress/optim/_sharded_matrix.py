"""A weight of which every process has some rows, and a low-rank projection of its gradient.

Where the projector stands on the side of the columns (``R = G P``), rows stay rows: each process
projects its own, and keeps their moments. Where it stands on the side of the rows (``R = P^T G``)
the projected gradient is a sum over all processes, one of ``rank x columns`` numbers, and every
process has all moments.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch

from gradpress.ops import lowrank as kernels
from gradpress.optim import _projector as projector
from gradpress.optim._limiter import total_norm
from gradpress.optim._products import product, transposed_product
from gradpress.optim._sharded import Shard
from gradpress.optim._sharded_state import (
    Group,
    State,
    keeps_rows,
    local_state,
    note_borders,
    unit_of,
)


class ShardedMatrix(NamedTuple):
    """What this process has of a weight, its gradient and its state.

    Attributes:
        shard: Which rows.
        weight: Their values, as a matrix; to be written.
        grad: Their gradient, as a matrix.
        state: The weight's, with this process's part of moments, and with the key of this shard's
            random numbers as `tensor_id`.
        basis: ``[min(m, n), rank]`` of the whole weight, float32.
    """

    shard: Shard
    weight: torch.Tensor
    grad: torch.Tensor
    state: State
    basis: torch.Tensor

    @classmethod
    def of(cls, shard: Shard, state: State, basis: torch.Tensor, group: Group) -> ShardedMatrix:
        """The rows of this process.

        Args:
            shard: Which they are.
            state: The weight's.
            basis: Of the whole weight.
            group: The options.
        """
        shape = (shard.rows, shard.row_numel)
        own = {**local_state(shard, state, group), "tensor_id": shard.key(state["tensor_id"])}
        grad = shard.local_grad().detach().contiguous().view(shape)
        return cls(shard, shard.p._local_tensor.detach(), grad, own, basis)

    @property
    def keeps_rows(self) -> bool:
        """Whether the projector stands on the side of the columns."""
        return keeps_rows(self.shard.p)

    @property
    def along(self) -> int:
        """The dimension of a projected gradient that the rank is the size of."""
        return 1 if self.keeps_rows else 0

    def project(self) -> torch.Tensor:
        """The projected gradient: of this process's rows, or the sum over all of them."""
        rows, columns = self.grad.shape
        rank = self.basis.shape[1]
        if not self.keeps_rows:
            part = self.basis.new_zeros(rank, columns)
            if rows:
                part = transposed_product(self._own_basis(), self.grad)
            return self.shard.add_up(part)
        low_rank = self.basis.new_zeros(rows, rank)
        if rows >= columns:
            kernels.project([self.grad], [self.basis], [low_rank])
        elif rows:
            low_rank = transposed_product(self.basis, self.grad.T).T.contiguous()
        return low_rank

    def factors(self, low_rank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """An update and a basis that the kernels make this process's rows of a matrix of.

        The kernels take the basis on the side of the rows where these are fewer than the columns.
        """
        rows, columns = self.grad.shape
        if self.keeps_rows and rows >= columns:
            return low_rank, self.basis
        left, right = self._own_basis(), low_rank
        if self.keeps_rows:
            left, right = low_rank, self.basis.T.contiguous()
        if left.shape[1] > rows:  # more directions than rows
            return product(left, right), torch.eye(rows, device=left.device)
        return right, left

    def add_back(self, matrix: torch.Tensor, low_rank: torch.Tensor, factor: float) -> None:
        """``matrix += factor * back(low_rank)`` for a float32 matrix of this process's rows."""
        if matrix.numel():
            update, basis = self.factors(low_rank)
            kernels.project_back_add(
                [matrix], [update], [basis], scale=factor, tensor_ids=[0], steps=[0]
            )

    def total_norm(self, x: torch.Tensor, *, divided: bool = True) -> torch.Tensor:
        """The norm of a matrix of which every process has some rows, or all of it."""
        norm = total_norm(x) if x.numel() else x.new_zeros(())
        return total_norm(self.shard.gather(norm)) if divided else norm

    def _own_basis(self) -> torch.Tensor:
        """The rows of the basis that belong to this process's rows of the weight."""
        first = self.shard.first_row
        return self.basis[first : first + self.shard.rows].contiguous()


def divide_moments(shard: Shard, state: State, group: Group) -> None:
    """Takes new moments of a whole weight down to those of this process's rows."""
    if not keeps_rows(shard.p):
        return
    moments = replace(shard, tail=torch.Size([state["projector_rank"]]))
    for name in [name for name in state if name.startswith("exp_avg")]:
        unit = unit_of(name, group)
        # All entries of new moments are the same.
        count = moments.numel if unit is None else -(-moments.numel // unit)
        part = state[name].view(-1)[:1].repeat(count)
        shape = (moments.rows, moments.row_numel) if unit is None else (count,)
        state[name] = moments.store(part.view(shape), unit)
        note_borders(moments, state, unit)


def agree(shard: Shard, state: State) -> None:
    """Makes a projector that every process has found anew that of the first one, bit for bit.

    Processes on the same hardware find the same one. Others could differ in its last bits, and
    then in when they would refresh it.
    """
    names = sorted(name for name in state if name.startswith("projector_") or name == "projector")
    numbers = [name for name in names if not isinstance(state[name], torch.Tensor)]
    for name in names:
        if isinstance(state[name], torch.Tensor):
            shard.broadcast(state[name])
    values = torch.tensor([state[name] for name in numbers], dtype=torch.float64)
    values = values.to(shard.p.device)
    shard.broadcast(values)
    for name, value in zip(numbers, values.tolist(), strict=True):
        state[name] = type(state[name])(value)


def full_gradient(shard: Shard) -> torch.Tensor:
    """The gradient of the whole weight, as a matrix; every process takes part."""
    grad = cast(Any, shard.p.grad).detach().full_tensor()
    return cast(torch.Tensor, grad.contiguous().view(projector.matrix_shape(shard.p)))
