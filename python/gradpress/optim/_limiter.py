"""Norms of updates, and the limit to their growth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

#: Added to norms that others are divided by.
TINY = 1e-8
#: Numbers that are summed in one go.
RUN = 1024
#: Elements whose squares are in memory at a time.
SQUARES = 1 << 18
#: Sums of float32 squares between which nothing has overflowed, and what has underflowed is little.
#: Updates below the upper one change no weight to infinity.
LEAST, MOST = 1e-24, 1e30
#: The least share of a sum of squares that a difference of such sums may be. These err by 2e-7,
#: columns of a basis by up to 1e-6 from being orthonormal: by 6e-5 in the difference's root.
SHARE = 0.01


def norms_along(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The norms of rows or columns, of what is finite in them; `dim` stays."""
    return x.nan_to_num(0.0, 0.0, 0.0).square_().sum(dim, keepdim=True).sqrt_()


def long_side(shape: Sequence[int]) -> int:
    """The dimension to sum over for one number for each row or column of the longer side."""
    return 1 if shape[0] >= shape[1] else 0


def square_sums(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The float64 sums of the float32 squares of rows or columns; `dim` stays.

    What is not finite makes its sum so. PyTorch adds pairs of sums: an error of some 2e-7.
    """
    parts = torch.split(x, max(1, SQUARES // max(1, x.shape[1])))
    sums = [part.to(torch.float32).square().sum(dim, keepdim=True) for part in parts]
    joined = torch.cat(sums).to(torch.float64)
    return joined if dim == 1 else joined.sum(0, keepdim=True)


def total_norm(x: torch.Tensor) -> torch.Tensor:
    """The norm of a finite matrix, summed in an order that does not depend on threads."""
    values = x.reshape(-1)
    while values.numel() > 1:
        values = torch.linalg.vector_norm(_runs(values), dim=-1)
    return values.reshape(()).abs()


def _total(x: torch.Tensor) -> torch.Tensor:
    """The sum of all elements, in an order that does not depend on threads."""
    values = x.reshape(-1)
    while values.numel() > 1:
        values = _runs(values).sum(-1)
    return values.sum()


def _runs(values: torch.Tensor) -> torch.Tensor:
    """A vector as rows, the last one filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.numel() % RUN)).view(-1, RUN)


def told_norms(
    grads: list[torch.Tensor],
    factors: list[torch.Tensor],
    taken: list[torch.Tensor] | None,
    rate: float,
) -> list[torch.Tensor | None]:
    """The norms of gradients times factors, less parts of them, without making these products.

    Where there is None, sums of squares do not tell the norm well enough, or some number is not
    finite. To know it values are looked at, on the host.

    Args:
        grads: Matrices.
        factors: Of the rows or columns of each, or one for all.
        taken: By what the parts reduce the squares of the norms of rows or columns, float64.
        rate: Times the products must be finite, too.
    """
    norms, checks = [], []
    for i, (grad, factor) in enumerate(zip(grads, factors, strict=True)):
        sums = square_sums(grad, long_side(grad.shape))
        squares = factor.to(torch.float64).square()
        whole = rest = _total(squares * sums)
        if taken is not None:
            rest = whole - _total(squares * taken[i])
        norms.append(rest.clamp(min=0.0).sqrt().to(torch.float32))
        checks.append(torch.stack((sums.max(), whole.sqrt() * rate, rest - SHARE * whole)))
    values = torch.stack(checks).tolist()
    told = [LEAST < sums < MOST and size < MOST and rest >= 0 for sums, size, rest in values]
    return [norm if ok else None for norm, ok in zip(norms, told, strict=True)]


def scaled(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """A gradient times factors in float32, with zero for what is not finite."""
    return (grad.to(torch.float32) * factor).nan_to_num_(0.0, 0.0, 0.0)


def limit_growth(
    norm: torch.Tensor,
    previous: torch.Tensor,
    most: float | None,
    found_inf: torch.Tensor | None,
) -> torch.Tensor:
    """What to multiply an update by, so that its norm is at most `most` times the last one's.

    Fira's norm-growth limiter, without waiting for the device. A step whose update is zero leaves
    the norm as it was: the original would hold back the steps after it for a thousand steps.

    Args:
        norm: Of the update, without dimensions; or of several updates.
        previous: Of the last one, after its limiting; 0 before the first one. Written.
        most: The largest ratio of the two; None does not limit.
        found_inf: Where it is not zero nothing is written.
    """
    if most is None:
        return torch.ones_like(norm)
    excess = (norm / (previous + TINY)).clamp(min=most) / most
    excess = torch.where(previous > 0, excess, 1.0)
    counts = (norm > 0) & norm.isfinite()
    if found_inf is not None:
        counts &= found_inf.reshape(()) == 0
    previous.copy_(torch.where(counts, norm / excess, previous))
    return 1.0 / excess


def limit_together(
    norms: list[torch.Tensor],
    states: list[dict[str, Any]],
    most: float | None,
    found_inf: torch.Tensor | None,
) -> list[torch.Tensor]:
    """:func:`limit_growth` of several updates on one device.

    Args:
        norms: Of the updates.
        states: Each with the last one's as ``update_norm``. Written.
        most: The largest ratio of the two; None does not limit.
        found_inf: Where it is not zero nothing is written.
    """
    kept = [state["update_norm"] for state in states]
    previous = torch.stack(kept)
    limits = limit_growth(torch.stack(norms), previous, most, found_inf)
    torch._foreach_copy_(kept, list(previous.unbind()))
    return list(limits.unbind())
