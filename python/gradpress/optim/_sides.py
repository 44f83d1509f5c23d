"""Projections from the longer side of a matrix, or from both.

A wide matrix is taken as its transpose, so that there is one case: ``[long, short]``.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from gradpress.ops import lowrank as kernels
from gradpress.optim import _projector as projector
from gradpress.optim._base import Group, State
from gradpress.optim._moments import Turn
from gradpress.optim._products import product, transposed_product


class Sides(NamedTuple):
    """The bases of one matrix.

    Attributes:
        shape: The matrix's.
        short: ``[min(shape), rank]``, or None.
        long: ``[max(shape), rank]``, or None.
    """

    shape: tuple[int, int]
    short: torch.Tensor | None
    long: torch.Tensor | None

    @classmethod
    def of(cls, state: State, shape: tuple[int, int], group: Group) -> Sides:
        """Those of a state, in float32."""
        names = projector.kept_bases(shape, group["proj_type"])
        short, long = (
            projector.load_basis(state, shape, group, name) if name in names else None
            for name in (projector.SHORT, projector.LONG)
        )
        return cls(shape, short, long)

    def clone(self) -> Sides:
        """A copy that a refresh does not overwrite."""
        short, long = (None if t is None else t.clone() for t in (self.short, self.long))
        return Sides(self.shape, short, long)

    def project(self, grad: torch.Tensor) -> torch.Tensor:
        """A gradient's coordinates where there is a long basis: ``long.T @ grad [@ short]``."""
        assert self.long is not None
        if self.short is None:
            tall = grad if self.shape[0] >= self.shape[1] else grad.T
            return transposed_product(self.long, tall)
        shape = kernels.projected_shape(*self.shape, self.short.shape[1])
        low_rank = torch.empty(shape, dtype=torch.float32, device=grad.device)
        kernels.project([grad], [self.short], [low_rank])
        tall = low_rank if self.shape[0] >= self.shape[1] else low_rank.T
        return transposed_product(self.long, tall)

    def factors(self, update: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Coordinates as the kernels take them back: an update, and its basis."""
        assert self.long is not None
        basis = update.T if self.short is None else product(self.short, update.T)
        outer = self.long if self.shape[0] >= self.shape[1] else self.long.T
        return outer.contiguous(), basis.contiguous()

    def turn_from(self, old: Sides) -> Turn:
        """How coordinates change from old bases to these."""
        short, long = (
            None if new is None or before is None else transposed_product(new, before)
            for new, before in ((self.short, old.short), (self.long, old.long))
        )
        if long is None and self.shape[0] < self.shape[1]:
            return Turn(short, None)  # as the kernels lay it out: [rank, columns]
        return Turn(long, short)


def long_basis(grad: torch.Tensor, short: torch.Tensor) -> torch.Tensor:
    """The singular directions of the longer side that belong to those of the shorter one."""
    rank = short.shape[1]
    shape = kernels.projected_shape(grad.shape[0], grad.shape[1], rank)
    low_rank = torch.empty(shape, dtype=torch.float32, device=grad.device)
    kernels.project([grad], [short], [low_rank])
    tall = low_rank if grad.shape[0] >= grad.shape[1] else low_rank.T
    # Orthogonal columns already; those of singular values near zero need help.
    u, _, _ = kernels.svd(tall.contiguous(), rank=rank, n_iter=1, oversample=0, seed=0)
    return cast(torch.Tensor, u)


def moment_shape(shape: tuple[int, int], rank: int, proj_type: str) -> tuple[int, int]:
    """The shape of a projected gradient."""
    names = projector.kept_bases(shape, proj_type)
    if projector.LONG not in names:
        return kernels.projected_shape(*shape, rank)
    return (rank, rank if projector.SHORT in names else min(shape))
