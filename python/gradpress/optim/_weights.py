"""Updating quantized weights in place."""

from __future__ import annotations

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
