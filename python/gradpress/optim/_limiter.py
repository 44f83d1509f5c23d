"""Norms of updates, and the limit to their growth."""

from __future__ import annotations

from typing import cast

import torch

#: Added to norms that others are divided by.
TINY = 1e-8
#: Numbers that are summed in one go.
RUN = 1024


def norms_along(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The norms of rows or columns, of what is finite in them; `dim` stays."""
    finite = x.nan_to_num(0.0, 0.0, 0.0)
    return cast(torch.Tensor, torch.linalg.vector_norm(finite, dim=dim, keepdim=True))


def total_norm(x: torch.Tensor) -> torch.Tensor:
    """The norm of a finite matrix, summed in an order that does not depend on threads."""
    values = x.reshape(-1)
    while values.numel() > 1:
        if values.numel() % RUN:
            values = torch.nn.functional.pad(values, (0, -values.numel() % RUN))
        values = torch.linalg.vector_norm(values.view(-1, RUN), dim=-1)
    return values.reshape(()).abs()


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
        norm: Of the update, without dimensions.
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
