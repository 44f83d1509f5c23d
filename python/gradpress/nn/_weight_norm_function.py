"""Norms of rows and their gradients, some rows at a time, so that no second matrix is held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from gradpress.nn._weight import QuantizedWeight

#: Elements of a matrix that are in flight at a time, in the dtype of arithmetic.
BLOCK_ELEMENTS = 1 << 22

#: What a norm is at least where something is divided by it: rows of zeros stay zeros.
TINY = 1e-12


def arithmetic_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.promote_types(tensor.dtype, torch.float32)


def dense_values(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight's values in a dtype; the weight itself where it has that dtype and is dense."""
    return weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)


def row_norms(
    weight: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """The norms of the rows of ``weight + scaling * b @ a``, without a gradient.

    Args:
        weight: ``[m, n]``, of any floating-point dtype, or quantized.
        a: ``[rank, n]``; None adds nothing.
        b: ``[m, rank]``.
        scaling: A factor.

    Returns:
        ``[m]``, float32 (float64 for a float64 weight).
    """
    norms = torch.empty(weight.shape[0], dtype=arithmetic_dtype(weight), device=weight.device)
    with torch.no_grad(), _no_autocast(weight.device):
        for rows, block in _row_blocks(weight, a, b, scaling):
            norms[rows] = torch.linalg.vector_norm(block, dim=1)
    return norms


def adapted_row_norms(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`row_norms` with exact gradients.

    Holds the arguments and the result until the backward pass, which builds some rows of the sum
    at a time anew.
    """
    return cast(torch.Tensor, _AdaptedRowNorms.apply(weight, a, b, scaling))


def normalized_linear(
    x: torch.Tensor, direction: torch.Tensor, magnitude: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x @ W.T + bias`` with the rows ``W_i = magnitude_i * direction_i / |direction_i|``.

    Until the backward pass it holds the arguments and one norm for each row, but neither W nor the
    output. The backward pass computes W's gradient into the memory that becomes `direction`'s.

    Args:
        x: ``[..., n]``.
        direction: ``[m, n]``, dense or quantized.
        magnitude: ``[m]``.
        bias: ``[m]`` or None.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return cast(torch.Tensor, _NormalizedLinear.apply(x, direction, magnitude, bias))


def scale_channels(
    z: torch.Tensor, factor: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``z * factor + bias`` with one rounding to the dtype of `z`, whatever the factor's."""
    y = z * factor
    return (y if bias is None else y + bias).to(z.dtype)


class _AdaptedRowNorms(torch.autograd.Function):
    """See `adapted_row_norms`: the gradient of a norm is its row, divided by it."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        norms = row_norms(weight, a, b, scaling)
        ctx.save_for_backward(weight, a, b, norms)
        ctx.scaling = scaling
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, a, b, norms = ctx.saved_tensors
        factors = grads[0] / norms.clamp_min(TINY)
        dtype = factors.dtype
        wide, tall = a.to(dtype), b.to(dtype)
        grad_a, grad_b = torch.zeros_like(wide), torch.empty_like(tall)
        grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        with _no_autocast(weight.device):
            for rows, block in _row_blocks(weight, a, b, ctx.scaling):
                scaled = block * factors[rows, None]
                grad_a.addmm_(tall[rows].T, scaled, alpha=ctx.scaling)
                grad_b[rows] = ctx.scaling * (scaled @ wide.T)
                if grad_weight is not None:
                    grad_weight[rows] = scaled.to(grad_weight.dtype)
        return grad_weight, grad_a.to(a.dtype), grad_b.to(b.dtype), None


class _NormalizedLinear(torch.autograd.Function):
    """See `normalized_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        direction: torch.Tensor,
        magnitude: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        values = dense_values(direction, x.dtype)
        # Of the values that are multiplied, so that W has the norms that it shall have.
        norms = row_norms(values).clamp_min_(TINY)
        ctx.save_for_backward(x, direction, magnitude, norms)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return scale_channels(F.linear(x, values), magnitude / norms, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, direction, magnitude, norms = ctx.saved_tensors
        grad_x = grad_direction = grad_magnitude = grad_bias = None
        values = dense_values(direction, x.dtype)
        factor = magnitude / norms
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = (grad * factor).to(grad.dtype) @ values
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_direction = flat.T @ x.reshape(-1, x.shape[-1])
            along = _to_direction_gradient_(grad_direction, values, factor, norms)
            grad_direction, grad_magnitude = (
                grad_direction.to(direction.dtype),
                along.to(magnitude.dtype),
            )
        if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
            grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_direction, grad_magnitude, grad_bias


def _to_direction_gradient_(
    grad: torch.Tensor, values: torch.Tensor, factor: torch.Tensor, norms: torch.Tensor
) -> torch.Tensor:
    """Turns W's gradient into that of the direction, in place.

    Returns:
        The gradient of the magnitude: what W's gradient has along the rows.
    """
    magnitudes = torch.empty_like(norms)
    for rows, block in _row_blocks(values):
        unit = block / norms[rows, None]
        part = grad[rows].to(unit.dtype)
        along = (part * unit).sum(1)
        magnitudes[rows] = along
        grad[rows] = ((part - along[:, None] * unit) * factor[rows, None]).to(grad.dtype)
    return magnitudes


def _row_blocks(
    weight: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of ``weight + scaling * b @ a`` in the dtype of arithmetic; not to be written."""
    dtype = arithmetic_dtype(weight)
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(dtype)
    count = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], count):
        rows = slice(start, start + count)
        block = weight[rows].to(dtype)
        if a is not None and b is not None:
            block = torch.addmm(block, b[rows].to(dtype), a.to(dtype), alpha=scaling)
        yield rows, block


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products that make up norms are not rounded to the dtype of autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
