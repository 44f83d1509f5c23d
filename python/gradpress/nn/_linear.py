"""The product with a quantized weight, and its derivatives."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F

from gradpress.nn import _traced
from gradpress.nn._receivers import collector_of
from gradpress.nn._weight import FUNCTIONS, QuantizedWeight
from gradpress.ops import linear as kernels


def _codes(weight: QuantizedWeight) -> kernels.Codes:
    rows, columns = weight.shape
    layout = (rows, columns), weight.bits, weight.group_size
    return kernels.Codes(weight.codes, weight.scale, weight.zero_point, *layout)


def _input_grad(grad: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    if _traced.is_traced(weight.codes):
        return _traced.linear_input_grad(grad, weight)
    return kernels.linear_blockwise_input_grad(grad, _codes(weight))


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` with a part of the weight dequantized at a time.

    Outside of graphs the result has yet to be filled in: checkpointing, which computes activations
    again, ends with the last tensor that is saved, and shall do so before that layer's product.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        if _traced.is_traced(weight.codes):
            ctx.collect = None
            return _traced.linear(x, weight, bias)
        # Here, since checkpointing hands a copy of the weight to the backward pass.
        ctx.collect = collector_of(weight)
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_grad(grad, weight)
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            flat_x = x.reshape(-1, x.shape[-1])
            if ctx.collect is not None:
                ctx.collect(flat, flat_x)
            else:
                grad_weight = (flat.T @ flat_x).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        return grad_x, grad_weight, grad_bias


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear` where an argument is a quantized weight; gradients of weights are dense."""
    if not isinstance(weight, QuantizedWeight):
        dense = [t.dequantize() if isinstance(t, QuantizedWeight) else t for t in (input, bias)]
        return F.linear(cast(torch.Tensor, dense[0]), weight, dense[1])
    device = input.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, bias = input.to(dtype), bias.to(dtype) if bias is not None else None
    out = cast(torch.Tensor, _Linear.apply(input, weight, bias))
    if not _traced.is_traced(weight.codes):
        kernels.linear_blockwise(input, _codes(weight), bias, out=out.detach())
    return out


FUNCTIONS[F.linear] = linear
