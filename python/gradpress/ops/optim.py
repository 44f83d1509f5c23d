"""Fused AdamW steps over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from gradpress import _core
from gradpress.ops._arrays import written

Tensors = Sequence[torch.Tensor]
Steps = Sequence[int] | Tensors


def _scales(grad_scale: float | torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """The part of the scale that is a number, and the part that only the device knows."""
    if isinstance(grad_scale, torch.Tensor):
        return 1.0, grad_scale
    return grad_scale, None


def _rate(lr: float | torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """The learning rate as a number, or as what only the device knows."""
    return (0.0, lr) if isinstance(lr, torch.Tensor) else (lr, None)


def _counts(steps: Steps) -> tuple[Sequence[int], Tensors | None]:
    """The steps as numbers, or as counters on the device."""
    if any(isinstance(step, torch.Tensor) for step in steps):
        return [], cast(Tensors, steps)
    return cast("Sequence[int]", steps), None


def adamw_blockwise_step(
    params: Tensors,
    grads: Tensors,
    exp_avg_codes: Tensors,
    exp_avg_scale: Tensors,
    exp_avg_sq_codes: Tensors,
    exp_avg_sq_scale: Tensors,
    *,
    steps: Steps,
    tensor_ids: Sequence[int],
    nonfinite: torch.Tensor,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: float | torch.Tensor = 1.0,
    found_inf: torch.Tensor | None = None,
    stochastic_rounding: bool = True,
    seed: int = 0,
    bits: int = 8,
    block_size: int = 256,
) -> None:
    """Steps parameters in place by AdamW with moments of 8 or 4 bits.

    Args:
        params: float32, float16 or bfloat16, contiguous, in any mix.
        grads: As `params`, of the same shapes.
        exp_avg_codes: uint8 of the parameters' shapes, or packed ``[ceil(numel / 2)]`` for 4 bits:
            first moments in the signed map of :func:`gradpress.ops.dynamic.quantize_dynamic`.
        exp_avg_scale: float32, one for each block of a moment.
        exp_avg_sq_codes: uint8: second moments in the unsigned map.
        exp_avg_sq_scale: float32, one for each block of a moment.
        steps: How often each parameter was stepped, this time included: numbers from 1 on, or a
            float32 tensor of one element for each on the tensors' device, of which values below 1
            are taken for 1.
        tensor_ids: Key of each parameter's random numbers.
        nonfinite: int64 of one element, increased by the number of gradient elements that are NaN
            or infinite; parameter and moments keep their values there.
        lr: Learning rate: a number, or a float32 tensor of one element on the tensors' device.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, times the learning rate.
        maximize: Ascend.
        grad_scale: Gradients are divided by it: a number, or a float32 tensor of one element on
            the tensors' device, as `torch.amp.GradScaler` sets it. Nobody waits for the values of
            tensors, which give the bits that the same numbers give.
        found_inf: float32 of one element on the tensors' device: where it is not zero nothing is
            written.
        stochastic_rounding: How bfloat16 parameters are rounded.
        seed: Key of the random numbers.
        bits: 8 or 4: of the codes.
        block_size: Elements that share a scale.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument does not fit; nothing is written.
    """
    states = (exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale)
    number, tensor = _scales(grad_scale)
    lr, lr_tensor = _rate(lr)
    counts, step_tensors = _counts(steps)
    _core.adamw_blockwise_step(
        params,
        grads,
        *states,
        counts,
        tensor_ids,
        nonfinite,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        maximize,
        number,
        stochastic_rounding,
        seed,
        bits,
        block_size,
        tensor,
        found_inf,
        lr_tensor,
        step_tensors,
    )
    written(t for tensors in (params, *states) for t in tensors)


def adamw_step(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    *,
    steps: Steps,
    tensor_ids: Sequence[int],
    nonfinite: torch.Tensor,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: float | torch.Tensor = 1.0,
    found_inf: torch.Tensor | None = None,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> None:
    """:func:`adamw_blockwise_step` with float32 moments `exp_avg` and `exp_avg_sq`."""
    number, tensor = _scales(grad_scale)
    lr, lr_tensor = _rate(lr)
    counts, step_tensors = _counts(steps)
    _core.adamw_step(
        params,
        grads,
        exp_avg,
        exp_avg_sq,
        counts,
        tensor_ids,
        nonfinite,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        maximize,
        number,
        stochastic_rounding,
        seed,
        tensor,
        found_inf,
        lr_tensor,
        step_tensors,
    )
    written(t for tensors in (params, exp_avg, exp_avg_sq) for t in tensors)


def adamw_blockwise_direction(
    grads: Tensors,
    exp_avg_codes: Tensors,
    exp_avg_scale: Tensors,
    exp_avg_sq_codes: Tensors,
    exp_avg_sq_scale: Tensors,
    *,
    steps: Steps,
    nonfinite: torch.Tensor,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool = False,
    grad_scale: float | torch.Tensor = 1.0,
    found_inf: torch.Tensor | None = None,
    bits: int = 8,
    block_size: int = 256,
    previous_grads: Tensors | None = None,
    friction: str | None = None,
) -> None:
    """Turns float32 gradients into AdamW's update without decay, times minus the learning rate.

    The arguments are those of :func:`adamw_blockwise_step`; the update is zero where the gradient
    is not finite. With `previous_grads`, the float32 or bfloat16 gradients of the step before, and
    a `friction`, the update is diffGrad's: of the difference d of both gradients it is multiplied
    by ``sigmoid(|d|)`` (``"abs"``), ``sigmoid(d)`` (``"signed"``) or ``9 sigmoid(|d| / 2) - 4``
    (``"wide"``). Gradients that are finite become the previous ones.
    """
    states = (exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale)
    number, tensor = _scales(grad_scale)
    lr, lr_tensor = _rate(lr)
    counts, step_tensors = _counts(steps)
    _core.adamw_blockwise_direction(
        grads,
        *states,
        counts,
        nonfinite,
        lr,
        beta1,
        beta2,
        eps,
        maximize,
        number,
        bits,
        block_size,
        tensor,
        found_inf,
        previous_grads,
        friction,
        lr_tensor,
        step_tensors,
    )
    written(t for tensors in (grads, *states, previous_grads or []) for t in tensors)


def adamw_direction(
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    *,
    steps: Steps,
    nonfinite: torch.Tensor,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool = False,
    grad_scale: float | torch.Tensor = 1.0,
    found_inf: torch.Tensor | None = None,
    previous_grads: Tensors | None = None,
    friction: str | None = None,
) -> None:
    """:func:`adamw_blockwise_direction` with float32 moments."""
    number, tensor = _scales(grad_scale)
    lr, lr_tensor = _rate(lr)
    counts, step_tensors = _counts(steps)
    _core.adamw_direction(
        grads,
        exp_avg,
        exp_avg_sq,
        counts,
        nonfinite,
        lr,
        beta1,
        beta2,
        eps,
        maximize,
        number,
        tensor,
        found_inf,
        previous_grads,
        friction,
        lr_tensor,
        step_tensors,
    )
    written(t for tensors in (grads, exp_avg, exp_avg_sq, previous_grads or []) for t in tensors)
