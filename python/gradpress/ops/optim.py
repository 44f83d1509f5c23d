"""Fused AdamW steps over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradpress import _core
from gradpress.ops._arrays import written

Tensors = Sequence[torch.Tensor]


def _scales(grad_scale: float | torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """The part of the scale that is a number, and the part that only the device knows."""
    if isinstance(grad_scale, torch.Tensor):
        return 1.0, grad_scale
    return grad_scale, None


def adamw_blockwise_step(
    params: Tensors,
    grads: Tensors,
    exp_avg_codes: Tensors,
    exp_avg_scale: Tensors,
    exp_avg_sq_codes: Tensors,
    exp_avg_sq_scale: Tensors,
    *,
    steps: Sequence[int],
    tensor_ids: Sequence[int],
    nonfinite: torch.Tensor,
    lr: float,
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
        steps: How often each parameter was stepped, this time included.
        tensor_ids: Key of each parameter's random numbers.
        nonfinite: int64 of one element, increased by the number of gradient elements that are NaN
            or infinite; parameter and moments keep their values there.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, times the learning rate.
        maximize: Ascend.
        grad_scale: Gradients are divided by it: a number, or a float32 tensor of one element on
            the tensors' device, as `torch.amp.GradScaler` sets it. Nobody waits for its value.
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
    _core.adamw_blockwise_step(
        params,
        grads,
        *states,
        steps,
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
    )
    written(t for tensors in (params, *states) for t in tensors)


def adamw_step(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    *,
    steps: Sequence[int],
    tensor_ids: Sequence[int],
    nonfinite: torch.Tensor,
    lr: float,
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
    _core.adamw_step(
        params,
        grads,
        exp_avg,
        exp_avg_sq,
        steps,
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
    )
    written(t for tensors in (params, exp_avg, exp_avg_sq) for t in tensors)


def adamw_blockwise_direction(
    grads: Tensors,
    exp_avg_codes: Tensors,
    exp_avg_scale: Tensors,
    exp_avg_sq_codes: Tensors,
    exp_avg_sq_scale: Tensors,
    *,
    steps: Sequence[int],
    nonfinite: torch.Tensor,
    lr: float,
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
    _core.adamw_blockwise_direction(
        grads,
        *states,
        steps,
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
    )
    written(t for tensors in (grads, *states, previous_grads or []) for t in tensors)


def adamw_direction(
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    *,
    steps: Sequence[int],
    nonfinite: torch.Tensor,
    lr: float,
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
    _core.adamw_direction(
        grads,
        exp_avg,
        exp_avg_sq,
        steps,
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
    )
    written(t for tensors in (grads, exp_avg, exp_avg_sq, previous_grads or []) for t in tensors)
