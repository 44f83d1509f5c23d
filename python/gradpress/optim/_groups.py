"""Sorting a model's parameters into those that are projected and the rest."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gradpress.nn._select import Targets, select_linear
from gradpress.optim._projected import ProjectedOptimizer
from gradpress.optim._rank_choice import choose_ranks
from gradpress.optim._ranks import AUTO

_logger = logging.getLogger("gradpress")


def param_groups(
    model: nn.Module,
    rank: int | str | Mapping[str, int],
    update_proj_gap: int | None = None,
    scale: float | None = None,
    target_modules: Targets = None,
    verbose: bool = True,
    *,
    energy: float | None = None,
    budget: int | str | None = None,
    min_rank: int | None = None,
    max_rank: int | None = None,
    rank_multiple: int | None = None,
    optimizer: type[ProjectedOptimizer] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups: weights that are projected, one group for each rank, and all others.

    Frozen parameters are left out. The groups take further options afterwards, a learning rate of
    their own among them. What was chosen is logged (logger ``"gradpress"``, level INFO), and
    printed when `verbose`. A rank at or above half of a weight's shorter side draws a warning.

    Args:
        model: Any module; for ``rank="auto"`` one that has gradients, of one backward pass or added
            up over several.
        rank: Directions kept for each projected weight. ``"auto"`` chooses for each weight by what
            its gradient's leading directions hold, as :func:`choose_ranks` does; the groups then
            have plain numbers. A dict gives ranks by the parameters' names, as
            :attr:`RankChoice.ranks` keeps them for a resumed run, in which there is no gradient
            yet.
        update_proj_gap: Steps between refreshes, to begin with; the optimizer's default when None.
        scale: Factor on the back-projected update; the optimizer's default when None.
        target_modules: Which Linear weights are projected: None or ``"all-linear"`` for all but
            the output head and shared weights; otherwise names, parts of names or regular
            expressions.
        verbose: Print one line about the choice.
        energy: For ``rank="auto"``, as all that follow: the share of each gradient's squared norm
            that its rank is to capture; 0.9 where `budget` is not given either.
        budget: Bytes for the states of all projected weights, projectors among them, as a number
            or as ``"64MB"``.
        min_rank: The lowest rank; 1 when None.
        max_rank: The highest rank; the largest below half of a weight's shorter side when None.
        rank_multiple: Ranks are multiples of it; 1 when None.
        optimizer: Whose states `budget` is about; :class:`QGaLoreAdamW` when None. Options of it
            that states depend on, as `state_bits`, have to stand among `options`.
        **options: Further options of the projected groups.

    Returns:
        Projected groups by increasing rank, then the rest; a group without parameters is left out.
        Parameters are named.

    Raises:
        ValueError: `target_modules` matches nothing, or nothing can be projected; for
            ``rank="auto"`` a weight has no gradient, or an option is out of its range; a dict of
            ranks lacks a weight.
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
    limits = {
        "energy": energy,
        "budget": budget,
        "min_rank": min_rank,
        "max_rank": max_rank,
        "rank_multiple": rank_multiple,
        "optimizer": optimizer,
    }
    limits = {name: value for name, value in limits.items() if value is not None}
    ranks, kept = _ranks_of(rank, projected, limits, options)
    text = (
        f"projected to {kept}: {len(projected)} weights, {_count(projected):,} elements;"
        f" not projected: {len(rest)} tensors, {_count(rest):,} elements"
    )
    _logger.info(text)
    if verbose:
        print(text)
    low_rank = {"update_proj_gap": update_proj_gap, "scale": scale}
    given = {name: value for name, value in low_rank.items() if value is not None}
    groups: list[dict[str, Any]] = []
    for each in sorted(set(ranks.values())):
        members = [(name, p) for name, p in projected if ranks[name] == each]
        _warn_of_little_use(each, members)
        groups.append({"params": members, "rank": each, **given, **options})
    if rest:
        groups.append({"params": rest, "rank": None})
    return groups


def _ranks_of(
    rank: int | str | Mapping[str, int],
    projected: Sequence[tuple[str, torch.Tensor]],
    limits: dict[str, Any],
    options: dict[str, Any],
) -> tuple[dict[str, int], str]:
    """The ranks by name, and words for them."""
    if rank == AUTO:
        choice = choose_ranks(projected, **limits, **options)
        rows = choice.rows
        shares = f"{min(r.energy for r in rows):.2f} to {max(r.energy for r in rows):.2f}"
        words = f"{_span(choice.ranks)} ({shares} of the gradients, {choice.total_bytes:,} bytes)"
        return choice.ranks, words
    if limits:
        raise ValueError(f"param_groups: {next(iter(limits))} is for rank='auto', got {rank!r}")
    if isinstance(rank, Mapping):
        missing = [name for name, _ in projected if name not in rank]
        unknown = sorted(rank.keys() - {name for name, _ in projected})
        if missing or unknown:
            raise ValueError(
                f"param_groups: rank must name the projected weights, it lacks {missing} and has"
                f" {unknown} beside them"
            )
        return dict(rank), _span(rank)
    if isinstance(rank, str):
        raise ValueError(f"param_groups: rank must be a number, 'auto' or a dict, got {rank!r}")
    return {name: rank for name, _ in projected}, f"rank {rank}"


def _span(ranks: Mapping[str, int]) -> str:
    return f"ranks {min(ranks.values())} to {max(ranks.values())}"


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
