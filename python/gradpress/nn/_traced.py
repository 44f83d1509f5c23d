"""Quantized weights in graphs: the operators that stand for the kernels where nothing has values.

Outside of graphs the kernels are called directly, which takes some microseconds less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from gradpress.nn._weight import QuantizedWeight

Tensor = torch.Tensor


def is_traced(part: Tensor) -> bool:
    """Whether a graph is being made, or a part of a weight has no values."""
    return torch.compiler.is_compiling() or type(part) is not Tensor or part.is_meta


def _codes(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    return weight.codes, weight.scale, weight.zero_point


def _layout(weight: QuantizedWeight) -> dict[str, Any]:
    return {"shape": weight.shape, "bits": weight.bits, "group_size": weight.group_size}


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`."""
    operator = torch.ops.gradpress.dequantize_blockwise
    return cast(Tensor, operator(*_codes(weight), dtype=dtype, **_layout(weight)))


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``."""
    operator = torch.ops.gradpress.linear_blockwise
    return cast(Tensor, operator(x, *_codes(weight), bias, **_layout(weight)))


def linear_input_grad(grad: Tensor, weight: QuantizedWeight) -> Tensor:
    """``grad @ weight``."""
    operator = torch.ops.gradpress.linear_blockwise_input_grad
    return cast(Tensor, operator(grad, *_codes(weight), **_layout(weight)))
