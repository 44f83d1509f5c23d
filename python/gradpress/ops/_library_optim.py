"""Operators that step parameters by AdamW in place, or turn gradients into its updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradpress.ops import optim
from gradpress.ops._library import define, nothing, unsigned

_PARAMS = "Tensor(a!)[] params, Tensor[] grads"
_GRADS = "Tensor(a!)[] grads"
_FLOATS = "Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq"
_CODES = (
    "Tensor(b!)[] exp_avg_codes, Tensor(c!)[] exp_avg_scale, Tensor(d!)[] exp_avg_sq_codes,"
    " Tensor(e!)[] exp_avg_sq_scale"
)
_NUMBERS = "Tensor(f!) nonfinite, float lr, float beta1, float beta2, float eps"
_SCALING = (
    "bool maximize=False, float grad_scale=1.0, Tensor? grad_scale_tensor=None,"
    " Tensor? found_inf=None"
)
_COUNTING = "Tensor? lr_tensor=None, Tensor[]? step_tensors=None"
_ROUNDING = "bool stochastic_rounding=True, SymInt seed=0"
_LAYOUT = "int bits=8, int block_size=256"


def _define(step: Callable[..., None], lists: str, numbers: str) -> None:
    """Registers a step as an operator.

    Scale, learning rate and steps have two arguments each: numbers, and tensors in their place.
    """
    name = f"{step.__name__}_"

    def kernel(
        *tensors: Sequence[torch.Tensor],
        grad_scale: float = 1.0,
        grad_scale_tensor: torch.Tensor | None = None,
        lr_tensor: torch.Tensor | None = None,
        step_tensors: Sequence[torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        if lr_tensor is not None:
            options["lr"] = lr_tensor
        if step_tensors is not None:
            if options["steps"]:
                raise ValueError(
                    f"{name}: steps must be empty where step_tensors are given, got"
                    f" {options['steps']}"
                )
            options["steps"] = step_tensors
        if grad_scale_tensor is not None and grad_scale != 1.0:
            raise ValueError(
                f"{name}: grad_scale must be 1 where grad_scale_tensor is given, got {grad_scale}"
            )
        if "seed" in options:
            options["seed"] = unsigned(options["seed"])
        scale = grad_scale if grad_scale_tensor is None else grad_scale_tensor
        step(*tensors, grad_scale=scale, **options)

    define(f"{name}({lists}, *, {numbers}) -> ()", kernel, nothing)


_STEP = (
    f"SymInt[] steps, SymInt[] tensor_ids, {_NUMBERS}, float weight_decay, {_SCALING}, {_COUNTING}"
)
_DIRECTION = f"SymInt[] steps, {_NUMBERS}, {_SCALING}, {_COUNTING}"

_define(optim.adamw_step, f"{_PARAMS}, {_FLOATS}", f"{_STEP}, {_ROUNDING}")
_define(optim.adamw_blockwise_step, f"{_PARAMS}, {_CODES}", f"{_STEP}, {_ROUNDING}, {_LAYOUT}")
_define(optim.adamw_direction, f"{_GRADS}, {_FLOATS}", _DIRECTION)
_define(optim.adamw_blockwise_direction, f"{_GRADS}, {_CODES}", f"{_DIRECTION}, {_LAYOUT}")
