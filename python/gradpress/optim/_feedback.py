"""Error feedback: what the steps of a parameter left out, kept for the ones after it.

Seide, Fu, Droppo, Li, Yu: "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel
Distributed Training of Speech DNNs" (2014). The gradient itself is never written: the feedback is a
state tensor of its own, in the units of gradients from which the scale is taken off, and in the
sign of gradients that are descended.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from gradpress.ops import lowrank
from gradpress.ops import quant as kernels
from gradpress.optim._adam import AdamHyper
from gradpress.optim._base import plain_gradient
from gradpress.optim._projector import matrix_shape
from gradpress.optim._weights import add_update

State = dict[str, Any]
Group = dict[str, Any]

#: State tensors that keep their dtype when a checkpoint is loaded.
KEEP: tuple[str, ...] = ("error", "error_codes", "error_scale")

#: How many bits an element of the feedback may take.
BITS = (4, 8, 16, 32)

#: Added to the seed: the parameter's own rounding has the same tensor and step.
_SEED = 0x6C8E9CF570932BD5


def new_error(state: State, p: torch.Tensor, group: Group) -> None:
    """Adds a feedback of zero to a state: ``error``, or ``error_codes`` and ``error_scale``.

    Args:
        state: Of the parameter.
        p: The parameter; may be on the meta device.
        group: `error_bits`: 32 for float32, 16 for bfloat16, 8 or 4 for symmetric integers with a
            float32 scale for every `error_group_size` elements.
    """
    bits = group["error_bits"]
    if bits >= 16:
        dtype = torch.float32 if bits == 32 else torch.bfloat16
        state["error"] = torch.zeros(p.shape, dtype=dtype, device=p.device)
        return
    parts = kernels.quantize_blockwise(
        torch.zeros(p.shape, dtype=torch.float32, device=p.device),
        bits=bits,
        group_size=group["error_group_size"],
        symmetric=True,
        rounding="nearest",
    )
    state["error_codes"], state["error_scale"] = parts.codes, parts.scale


def add_gradient(p: torch.Tensor, state: State, group: Group, hyper: AdamHyper) -> torch.Tensor:
    """The gradient, to be descended and without its scale, plus the feedback where there is one.

    Returns:
        A new float32 tensor ``[rows, columns]``.
    """
    shape = matrix_shape(p)
    total = _load_error(p, state, group).view(shape)
    grad = plain_gradient(p).view(shape)
    sign = -1.0 if hyper.maximize else 1.0
    if isinstance(hyper.grad_scale, torch.Tensor):
        return total.addcdiv_(grad, hyper.grad_scale, value=sign)
    return total.add_(grad, alpha=sign / hyper.grad_scale)


def _load_error(p: torch.Tensor, state: State, group: Group) -> torch.Tensor:
    """A copy of the feedback in float32."""
    if "error" in state:
        return cast(torch.Tensor, state["error"].to(torch.float32, copy=True))
    if "error_codes" not in state:
        return torch.zeros(p.shape, dtype=torch.float32, device=p.device)
    values = kernels.dequantize_blockwise(
        state["error_codes"],
        state["error_scale"],
        None,
        shape=tuple(p.shape),
        bits=group["error_bits"],
        group_size=group["error_group_size"],
    )
    return cast(torch.Tensor, values)


def store_error(
    state: State, values: torch.Tensor, group: Group, found_inf: torch.Tensor | None
) -> None:
    """Keeps `values` as the feedback, rounded stochastically so that nothing is lost on average.

    Elements that are not finite leave what was there, and so does everything where `found_inf` is
    not zero. Nobody waits for the device.
    """
    seed = group["seed"] ^ _SEED
    if "error" in state:
        numbers = {"seed": seed, "stochastic_rounding": True}
        add_update(state["error"], values, numbers, state, decay=1.0, found_inf=found_inf)
        return
    replace_codes(
        [state["error_codes"], state["error_scale"]],
        values,
        bits=group["error_bits"],
        group_size=group["error_group_size"],
        stochastic=True,
        seed=seed,
        state=state,
        found_inf=found_inf,
    )


def replace_codes(
    parts: list[torch.Tensor],
    values: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    stochastic: bool,
    seed: int,
    state: State,
    found_inf: torch.Tensor | None,
) -> None:
    """Quantizes `values` into tensors that exist, without waiting for the device.

    The kernel that updates quantized weights, with all of the old value decayed.

    Args:
        parts: Codes and scales, and the zero points of codes that are not symmetric; written.
        values: float32; elements that are not finite leave what was there.
        bits: 4 or 8.
        group_size: Elements that share a scale.
        stochastic: Round stochastically, or to nearest.
        seed: Key of the random numbers, with the state's.
        state: Has `step` and `tensor_id`.
        found_inf: float32 of one element: where it is not zero nothing is written.
    """
    codes, scale, *zero_points = parts
    shape = (1, values.numel())
    lowrank.project_back_requantize(
        [codes if bits == 4 else codes.view(shape)],
        [scale],
        zero_points,
        [shape],
        [values.reshape(shape)],
        [],
        bits=bits,
        group_size=group_size,
        scale=1.0,
        decay=1.0,
        stochastic=stochastic,
        seed=seed,
        tensor_ids=[state["tensor_id"]],
        steps=[int(state["step"].item())],
        found_inf=found_inf,
    )
