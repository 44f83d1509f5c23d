"""Sorting a model's parameters into those that are projected and the rest."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gradpress.nn._select import Targets, select_linear

_logger = logging.getLogger("gradpress")


def param_groups(
    model: nn.Module,
    rank: int,
    update_proj_gap: int | None = None,
    scale: float | None = None,
    target_modules: Targets = None,
    verbose: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """Two parameter groups: weights that are projected, and everything else.

    Frozen parameters are left out. Both groups take further options afterwards, a learning rate
    of their own among them. What was chosen is logged (logger ``"gradpress"``, level INFO), and
    printed when `verbose`. A rank at or above half of a weight's shorter side draws a warning.

    Args:
        model: Any module.
        rank: Directions kept for each projected weight.
        update_proj_gap: Steps between refreshes, to begin with; the optimizer's default when None.
        scale: Factor on the back-projected update; the optimizer's default when None.
        target_modules: Which Linear weights are projected: None or ``"all-linear"`` for all but
            the output head and shared weights; otherwise names, parts of names or regular
            expressions.
        verbose: Print one line about the choice.
        **options: Further options of the projected group.

    Returns:
        ``[projected, rest]``; a group without parameters is left out. Parameters are named.

    Raises:
        ValueError: `target_modules` matches nothing, or nothing can be projected.
    """
    chosen = {
        id(module.weight)
        for module in select_linear(model, target_modules).values()
        if module.weight.requires_grad
    }
    if not chosen:
        raise ValueError("param_groups: model has no trainable Linear weight to project")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    projected = [(name, p) for name, p in named if id(p) in chosen]
    rest = [(name, p) for name, p in named if id(p) not in chosen]
    text = (
        f"projected to rank {rank}: {len(projected)} weights, {_count(projected):,} elements;"
        f" not projected: {len(rest)} tensors, {_count(rest):,} elements"
    )
    _logger.info(text)
    if verbose:
        print(text)
    _warn_of_little_use(rank, projected)
    low_rank = {"update_proj_gap": update_proj_gap, "scale": scale}
    given = {name: value for name, value in low_rank.items() if value is not None}
    groups: list[dict[str, Any]] = [{"params": projected, "rank": rank, **given, **options}]
    if rest:
        groups.append({"params": rest, "rank": None})
    return groups


def _warn_of_little_use(rank: int, projected: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Ranks that save little are likelier a mistake than a wish."""
    wide = [name for name, p in projected if 2 * rank >= min(p.shape)]
    if wide:
        warnings.warn(
            f"param_groups: rank {rank} is at or above half of the shorter side of"
            f" {len(wide)} of {len(projected)} projected weights ({wide[0]} first), where"
            " projecting saves little memory",
            stacklevel=3,
        )


def _count(named: Sequence[tuple[str, torch.Tensor]]) -> int:
    return sum(p.numel() for _, p in named)
