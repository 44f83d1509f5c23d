"""Taking moments of a projected gradient to the coordinates of another subspace."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from gradpress.ops import dynamic
from gradpress.optim._adam import State, state_block_size
from gradpress.optim._base import Group
from gradpress.optim._products import product

#: The moments, and whether their codes are signed.
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class Turn(NamedTuple):
    """A change of coordinates: ``left @ moment @ right.T``; None is the identity."""

    left: torch.Tensor | None
    right: torch.Tensor | None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The first moment in the new coordinates."""
        if self.left is not None:
            x = product(self.left, x)
        return x if self.right is None else product(x, self.right.T)

    def squared(self) -> Turn:
        """With every entry squared: how variances of independent coordinates mix."""
        return Turn(*(None if t is None else t.square() for t in self))


def load_moment(state: State, name: str, shape: tuple[int, int], group: Group) -> torch.Tensor:
    """A moment in float32."""
    if name in state:
        return cast(torch.Tensor, state[name])
    values = dynamic.dequantize_dynamic(
        state[f"{name}_codes"],
        state[f"{name}_scale"],
        signed=SIGNED[name],
        bits=group["state_bits"],
        block_size=state_block_size(group),
        shape=shape,
    )
    return cast(torch.Tensor, values)


def store_moment(state: State, name: str, values: torch.Tensor, group: Group) -> None:
    """Writes a moment, quantized where the state's is; its tensors stay the same ones."""
    if name in state:
        state[name].copy_(values)
        return
    codes, scale, _ = dynamic.quantize_dynamic(
        values,
        signed=SIGNED[name],
        bits=group["state_bits"],
        block_size=state_block_size(group),
    )
    state[f"{name}_codes"].copy_(cast(torch.Tensor, codes))
    state[f"{name}_scale"].copy_(cast(torch.Tensor, scale))


def turn_moments(
    state: State, shape: tuple[int, int], turn: Turn, steps: int, group: Group
) -> None:
    """Estimates what the moments were, had the gradients been projected by another basis.

    The first moment is linear. The second is that of coordinates whose deviations from the mean
    are taken as uncorrelated: LDAdam, Robert, Safaryan, Modoranu, Alistarh (2024, arXiv
    2410.16103).

    Args:
        state: Holds the moments; written.
        shape: The moments' shape.
        turn: From the old coordinates to the new ones.
        steps: How many gradients the moments have seen.
        group: Decay rates, and how moments are stored.
    """
    if steps == 0:
        return
    corrections = [1.0 - float(beta) ** steps for beta in group["betas"]]
    mean, square = (
        load_moment(state, name, shape, group) / correction
        for name, correction in zip(SIGNED, corrections, strict=True)
    )
    turned = turn.apply(mean)
    variance = turn.squared().apply(square - mean.square())
    square = (variance + turned.square()).abs()
    for name, values, correction in zip(SIGNED, (turned, square), corrections, strict=True):
        store_moment(state, name, (values * correction).contiguous(), group)


def reset_moments(state: State, shape: tuple[int, int], group: Group) -> None:
    """Forgets all gradients."""
    for name in SIGNED:
        values = load_moment(state, name, shape, group)
        store_moment(state, name, torch.zeros_like(values), group)
