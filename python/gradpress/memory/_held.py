"""Predicting what `count` will find, from shapes alone."""

from __future__ import annotations

import torch
from torch import nn

from gradpress.memory._count import MemoryCount, category_of_state, count

_CATEGORIES = (
    "weights",
    "weight_scales",
    "buffers",
    "gradients",
    "optimizer_states",
    "projectors",
)


def plan_held(model: nn.Module, optimizer: torch.optim.Optimizer) -> MemoryCount:
    """What is held between a backward pass and the next.

    Raises:
        TypeError: `optimizer` is another package's.
    """
    if not hasattr(optimizer, "_planned_state"):
        raise TypeError(
            f"memory.plan: optimizer must be one of gradpress.optim, got {type(optimizer).__name__}"
        )
    totals = dict(count(model).by_category)
    totals.pop("gradients", None)

    def add(category: str, tensor: torch.Tensor) -> None:
        totals[category] = totals.get(category, 0) + tensor.nbytes

    never_formed = getattr(optimizer, "_factored", {})
    for group in optimizer.param_groups:
        for p in group["params"]:
            like = torch.empty(p.shape, dtype=p.dtype, device="meta")
            if p.requires_grad and p not in never_formed:
                add("gradients", like)
            for name, value in optimizer._planned_state(group, like).items():
                if isinstance(value, torch.Tensor):
                    add(category_of_state(name), value)
    return MemoryCount({name: totals[name] for name in _CATEGORIES if totals.get(name)})
