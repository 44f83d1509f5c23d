"""Selection among the weights of many matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradpress.prune._score import score_gblm, score_gradient, score_magnitude, score_wanda


def select_many(
    weights: Sequence[torch.Tensor], factors: Sequence[Mapping[str, Any]], sparsity: float
) -> list[torch.Tensor]:
    """The least scores of all matrices together go; of equal ones the earlier."""
    scores = [_score(w, f) for w, f in zip(weights, factors, strict=True)]
    flat = torch.cat([score.flatten() for score in scores]).nan_to_num(nan=torch.inf)
    order = torch.argsort(flat, stable=True)
    kept = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    kept[order[: int(sparsity * len(flat))]] = False
    parts = torch.split(kept, [score.numel() for score in scores])
    return [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]


def _score(weight: torch.Tensor, factors: Mapping[str, Any]) -> torch.Tensor:
    if "grad_norm" in factors and "input_sq" in factors:
        found = score_gblm(weight, **factors)
    elif "grad_norm" in factors:
        found = score_gradient(weight, factors["grad_norm"])
    elif "input_sq" in factors:
        found = score_wanda(weight, **factors)
    else:
        found = score_magnitude(weight)
    assert isinstance(found, torch.Tensor)
    return found
