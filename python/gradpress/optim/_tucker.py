"""Gradients of order above 2 in Tucker form: a small core, and a factor for each of its modes.

The subspace of a tensor G (n_1 x ... x n_N) is spanned by factors F_k (n_k x r_k) with orthonormal
columns. Its core ``G x_1 F_1^T ... x_N F_N^T`` (r_1 x ... x r_N) takes the place of the projected
gradient, and ``X x_1 F_1 ... x_N F_N`` brings an update back. Notation: Kolda and Bader: "Tensor
Decompositions and Applications", SIAM Review 51 (2009).

Every product is along the first mode, which then becomes the last one: after all of them the modes
are in their order again, and nothing larger than a product's own result is ever copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch

from gradpress.optim._products import product, transposed_product

State = dict[str, Any]
Group = dict[str, Any]
Rank = int | float | Sequence[int]

#: Modes that PyTorch's tensors have at most.
MAX_ORDER = 64
FACTORS = tuple(f"projector_factor_{k}" for k in range(MAX_ORDER))

#: Halvings of an interval: more than a float64 has bits.
HALVINGS = 64


def is_tensor(group: Group, p: torch.Tensor) -> bool:
    """Whether a parameter of a projected group is kept in Tucker form."""
    return group["tensor_projection"] == "tucker" and p.dim() > 2


def check_rank(group: Group) -> None:
    """Refuses ranks that a group of tensors does not take.

    Raises:
        ValueError: the rank is neither None nor an int of at least 1, nor a fraction between 0 and
            1, nor one int for each mode; or a matrix of the group needs an int.
    """
    rank = group["rank"]
    if rank is None:
        return
    several = isinstance(rank, (tuple, list))
    if not all(map(_is_count, rank) if several else (_is_count(rank) or _is_fraction(rank),)):
        raise ValueError(
            f"Invalid rank value: {rank!r}; with tensor_projection='tucker' it is an int of at"
            " least 1, a fraction of the parameters between 0 and 1, or a tuple of ints"
        )
    if _is_count(rank):
        return
    for p in group["params"]:
        if p.dim() == 2:
            raise ValueError(
                f"Invalid rank value: {rank!r}; it must be an int for a matrix, got a parameter of"
                f" shape {list(p.shape)} in the group"
            )
        if several and p.dim() > 2 and p.dim() != len(rank):
            raise ValueError(
                f"Invalid rank value: {rank!r}; it must have one rank for each mode, got a"
                f" parameter of shape {list(p.shape)} in the group"
            )


def _is_count(rank: object) -> bool:
    return isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1


def _is_fraction(rank: object) -> bool:
    return isinstance(rank, float) and 0.0 < rank < 1.0


def ranks_of(shape: Sequence[int], rank: Rank) -> tuple[int, ...]:
    """How many directions each mode keeps.

    Args:
        shape: The tensor's.
        rank: The same number for all modes, or one for each, clamped to the modes' sizes; or the
            share of the tensor's elements that core and factors together have, with ranks in
            proportion to the sizes: of r_k = c n_k, c is the solution of
            ``c**N prod(n) + c sum(n_k**2) = rank prod(n)``. Each rank is rounded to nearest (halves
            to even), and is at least 1. The meaning is TensorLy's.
    """
    if isinstance(rank, float):
        share = _proportion(shape, rank)
        return tuple(max(1, round(share * n)) for n in shape)
    several = [rank] * len(shape) if isinstance(rank, int) else rank
    return tuple(min(r, n) for r, n in zip(several, shape, strict=True))


def _proportion(shape: Sequence[int], fraction: float) -> float:
    """Ranks over sizes; the number of parameters grows with it, and is too large at 1."""
    numel, squares = math.prod(shape), sum(n * n for n in shape)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle ** len(shape) * numel + middle * squares < fraction * numel:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def new_factors(state: State, p: torch.Tensor, group: Group, offset: int) -> None:
    """Adds factors that hold unit vectors until their first refresh."""
    ranks = ranks_of(p.shape, group["rank"])
    state["projector_rank"] = max(ranks)
    state["projector_ready"] = 0
    state["projector_interval"] = group["update_proj_gap"]
    state["projector_offset"] = offset
    state["projector_refreshes"] = 0
    state["projector_energy"] = 0.0
    for k, (name, n, rank) in enumerate(zip(FACTORS, p.shape, ranks, strict=False)):
        state[f"projector_rank_{k}"] = rank
        state[name] = torch.eye(n, rank, dtype=torch.float32, device=p.device)


def core_shape(p: torch.Tensor, state: State) -> tuple[int, ...]:
    """The shape of a projected gradient, and of its moments."""
    return tuple(state[f"projector_rank_{k}"] for k in range(p.dim()))


def multiply_first(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The product along the first mode, ``x x_1 matrix.T``, which becomes the last one.

    Args:
        x: ``[n, ...]``; float32, float16 or bfloat16.
        matrix: ``[n, m]``, float32.

    Returns:
        ``[..., m]``, float32, contiguous.
    """
    result = transposed_product(matrix, x.reshape(x.shape[0], -1))
    return result.T.contiguous().view(*x.shape[1:], matrix.shape[1])


def multiply_all(x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """``x x_1 matrices[0].T x_2 matrices[1].T ...``; of a gradient and its factors the core."""
    for matrix in matrices:
        x = multiply_first(x, matrix)
    return x


class Factors(NamedTuple):
    """The factors of one tensor.

    Attributes:
        shape: The tensor's.
        matrices: ``[n_k, r_k]`` each, float32.
    """

    shape: tuple[int, ...]
    matrices: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, state: State, p: torch.Tensor) -> Factors:
        """Those of a state."""
        matrices = (cast(torch.Tensor, state[name]) for name in FACTORS[: p.dim()])
        return cls(tuple(p.shape), tuple(matrices))

    def clone(self) -> Factors:
        """These: a refresh puts others in their place."""
        return self

    def store(self, state: State) -> None:
        """Puts them into a state, in place of others."""
        state.update(zip(FACTORS, self.matrices, strict=False))

    def project(self, grad: torch.Tensor) -> torch.Tensor:
        """A gradient's core."""
        return multiply_all(grad.view(self.shape), self.matrices)

    def factors(self, core: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A core as the kernels take it back into a matrix: an update, and its basis.

        All modes but the first are brought back here, in float32: r_1 / n_1 of the tensor's
        elements, twice while the last product is turned. The product with the first factor is the
        kernel's, tile by tile. Only where the first mode keeps more directions than the other
        modes have elements is it made here, as large as the tensor.
        """
        first, *others = self.matrices
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        x = multiply_all(core.movedim(0, -1), [f.T.contiguous() for f in others])
        x = x.view(-1, columns)
        if rows < columns:
            return x, first
        if first.shape[1] <= columns:
            return first, x.T.contiguous()
        return product(first, x), torch.eye(columns, device=x.device)

    def turn_from(self, old: Factors) -> ModeTurns:
        """How coordinates change from old factors to these."""
        pairs = zip(old.matrices, self.matrices, strict=True)
        return ModeTurns(tuple(transposed_product(*pair) for pair in pairs))


class ModeTurns(NamedTuple):
    """A change of a core's coordinates: one matrix for each mode, ``[old, new]``."""

    matrices: tuple[torch.Tensor, ...]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """A core in the new coordinates."""
        return multiply_all(x, self.matrices)

    def squared(self) -> ModeTurns:
        """With every entry squared: how variances of independent coordinates mix.

        An entry of the change of all modes at once is a product of one of each, and so is its
        square.
        """
        return ModeTurns(tuple(matrix.square() for matrix in self.matrices))
