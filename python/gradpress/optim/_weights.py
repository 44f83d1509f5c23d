"""Updating quantized weights in place."""

from __future__ import annotations

from typing import Any

import torch

from gradpress.nn._weight import QuantizedWeight
from gradpress.ops import lowrank as kernels


def requantize_with_update(
    weight: QuantizedWeight,
    update: torch.Tensor,
    *,
    decay: float,
    rounding: str,
    seed: int,
    tensor_id: int,
    step: int,
    found_inf: torch.Tensor | None = None,
) -> None:
    """``weight = round(weight * (1 - decay) + update)`` for a dense float32 update."""
    shape = (1, weight.numel())
    codes = weight.codes if weight.bits == 4 else weight.codes.view(shape)
    kernels.project_back_requantize(
        [codes],
        [weight.scale],
        [weight.zero_point],
        [shape],
        [update.reshape(shape)],
        [],
        bits=weight.bits,
        group_size=weight.group_size,
        scale=1.0,
        decay=decay,
        stochastic=rounding == "stochastic",
        seed=seed,
        tensor_ids=[tensor_id],
        steps=[step],
        found_inf=found_inf,
    )


def add_update(
    p: torch.Tensor,
    update: torch.Tensor,
    group: dict[str, Any],
    state: dict[str, Any],
    *,
    decay: float,
    found_inf: torch.Tensor | None,
) -> None:
    """``p = round(p * (1 - decay) + update)`` for a float32 update of the parameter's elements.

    Elements that would not be finite stay what they are.
    """
    tensor_id, step = state["tensor_id"], int(state["step"].item())
    if isinstance(p, QuantizedWeight):
        requantize_with_update(
            p,
            update,
            decay=decay,
            rounding=group["weight_rounding"],
            seed=group["seed"],
            tensor_id=tensor_id,
            step=step,
            found_inf=found_inf,
        )
        return
    target = p.detach().contiguous()
    # One column or one row: products with a basis of one element, tiled for threads or for blocks.
    shape = (-1, 1) if p.device.type == "cpu" else (1, -1)
    kernels.project_back_add(
        [target.view(shape)],
        [update.view(shape)],
        [torch.ones(1, 1, device=p.device)],
        scale=1.0,
        decay=decay,
        stochastic_rounding=group["stochastic_rounding"],
        seed=group["seed"],
        tensor_ids=[tensor_id],
        steps=[step],
        found_inf=found_inf,
    )
    if target.data_ptr() != p.data_ptr():
        p.copy_(target)
