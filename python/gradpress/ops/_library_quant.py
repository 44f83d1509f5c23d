"""Operators that quantize, dequantize, pack and round, and the product with quantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from gradpress import _core
from gradpress.ops import dynamic, linear, quant
from gradpress.ops._arrays import contiguous, new_counter
from gradpress.ops._library import LIBRARY, NAMESPACE, define, unsigned
from gradpress.ops.linear import Codes

Tensor = torch.Tensor

#: What the kernels dequantize into; values of other dtypes are converted from float32.
_DIRECT = (torch.float32, torch.float16, torch.bfloat16)


# Integers with scales


def _new_codes(
    x: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quant.check_format("quantize_blockwise", bits, group_size)
    codes, scale, zero_point = quant.allocate_codes(x, tuple(x.shape), bits, group_size, symmetric)
    if zero_point is None:
        zero_point = x.new_empty(0, dtype=torch.uint8)
    return cast("tuple[Tensor, Tensor, Tensor, Tensor]", (codes, scale, zero_point, new_counter(x)))


def _quantize_blockwise(
    x: Tensor,
    *,
    bits: int = 8,
    group_size: int = 256,
    symmetric: bool = False,
    rounding: str = "stochastic",
    seed: int = 0,
    tensor_id: int = 0,
    step: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stochastic = quant.check_rounding("quantize_blockwise", rounding)
    codes, scale, zero_point, nonfinite = results = _new_codes(x, bits, group_size, symmetric)
    _core.quantize_blockwise(
        contiguous(x),
        codes,
        scale,
        None if symmetric else zero_point,
        nonfinite,
        bits,
        stochastic,
        group_size,
        unsigned(seed),
        tensor_id,
        step,
    )
    return results


def _quantize_blockwise_fake(
    x: Tensor, *, bits: int = 8, group_size: int = 256, symmetric: bool = False, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_codes(x, bits, group_size, symmetric)


define(
    "quantize_blockwise(Tensor x, *, int bits=8, int group_size=256, bool symmetric=False,"
    " str rounding='stochastic', SymInt seed=0, SymInt tensor_id=0, SymInt step=0)"
    " -> (Tensor codes, Tensor scale, Tensor zero_point, Tensor nonfinite)",
    _quantize_blockwise,
    _quantize_blockwise_fake,
)


def _dequantize_blockwise(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    bits: int = 8,
    group_size: int = 256,
) -> Tensor:
    values = codes.new_empty(shape, dtype=dtype if dtype in _DIRECT else torch.float32)
    _core.dequantize_blockwise(codes, scale, zero_point, values, bits, group_size)
    return values.to(dtype)


def _dequantize_blockwise_fake(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    **_: Any,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


define(
    "dequantize_blockwise(Tensor codes, Tensor scale, Tensor? zero_point, *, SymInt[] shape,"
    " ScalarType dtype=float, int bits=8, int group_size=256) -> Tensor",
    _dequantize_blockwise,
    _dequantize_blockwise_fake,
)


def _linear_blockwise(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    *,
    shape: Sequence[int],
    bits: int = 8,
    group_size: int = 256,
) -> Tensor:
    weight = Codes(codes, scale, zero_point, (shape[0], shape[1]), bits, group_size)
    return linear.linear_blockwise(x, weight, bias)


def _linear_blockwise_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    *,
    shape: Sequence[int],
    **_: Any,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


# The weight is dequantized inside the operators: where compilers see its values in both passes,
# some versions merge them and keep them in between, which takes the memory of a dense model.
define(
    "linear_blockwise(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias, *,"
    " SymInt[] shape, int bits=8, int group_size=256) -> Tensor",
    _linear_blockwise,
    _linear_blockwise_fake,
)


def _linear_blockwise_input_grad(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    shape: Sequence[int],
    bits: int = 8,
    group_size: int = 256,
) -> Tensor:
    weight = Codes(codes, scale, zero_point, (shape[0], shape[1]), bits, group_size)
    return linear.linear_blockwise_input_grad(grad, weight)


def _linear_blockwise_input_grad_fake(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    shape: Sequence[int],
    **_: Any,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], shape[1]))


define(
    "linear_blockwise_input_grad(Tensor grad, Tensor codes, Tensor scale, Tensor? zero_point, *,"
    " SymInt[] shape, int bits=8, int group_size=256) -> Tensor",
    _linear_blockwise_input_grad,
    _linear_blockwise_input_grad_fake,
)


def _linear_blockwise_save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    _, codes, scale, zero_point, _ = inputs
    ctx.save_for_backward(codes, scale, zero_point)
    ctx.layout = keyword_only_inputs


def _linear_blockwise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.gradpress.linear_blockwise_input_grad(
            grad, *ctx.saved_tensors, **ctx.layout
        )
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias


torch.library.register_autograd(
    f"{NAMESPACE}::linear_blockwise",
    _linear_blockwise_backward,
    setup_context=_linear_blockwise_save,
    lib=LIBRARY,
)


# Packing and rounding


def _pack_int4_fake(codes: Tensor) -> Tensor:
    return codes.new_empty((codes.numel() + 1) // 2, dtype=torch.uint8)


define("pack_int4(Tensor codes) -> Tensor", quant.pack_int4, _pack_int4_fake)


def _unpack_int4_fake(packed: Tensor, count: int) -> Tensor:
    return packed.new_empty(count, dtype=torch.uint8)


define("unpack_int4(Tensor packed, SymInt count) -> Tensor", quant.unpack_int4, _unpack_int4_fake)


def _round_bf16_stochastic(x: Tensor, *, seed: int = 0, tensor_id: int = 0, step: int = 0) -> Any:
    return quant.round_bf16_stochastic(x, seed=unsigned(seed), tensor_id=tensor_id, step=step)


def _round_bf16_stochastic_fake(x: Tensor, **_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16)


define(
    "round_bf16_stochastic(Tensor x, *, SymInt seed=0, SymInt tensor_id=0, SymInt step=0)"
    " -> Tensor",
    _round_bf16_stochastic,
    _round_bf16_stochastic_fake,
)


# The dynamic maps of optimizer states


def _new_dynamic(
    x: Tensor, bits: int, block_size: int | None
) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    size = dynamic._layout("quantize_dynamic", bits, block_size)
    codes = x.new_empty(dynamic.stored_shape(tuple(x.shape), bits), dtype=torch.uint8)
    scale = x.new_empty(-(-x.numel() // max(size, 1)), dtype=torch.float32)
    return (codes, scale, cast(Tensor, new_counter(x))), size


def _quantize_dynamic(
    x: Tensor, *, signed: bool = True, bits: int = 8, block_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    results, size = _new_dynamic(x, bits, block_size)
    _core.quantize_dynamic(contiguous(x), *results, signed, bits, size)
    return results


def _quantize_dynamic_fake(
    x: Tensor, *, bits: int = 8, block_size: int | None = None, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_dynamic(x, bits, block_size)[0]


define(
    "quantize_dynamic(Tensor x, *, bool signed=True, int bits=8, int? block_size=None)"
    " -> (Tensor codes, Tensor scale, Tensor nonfinite)",
    _quantize_dynamic,
    _quantize_dynamic_fake,
)


def _dequantize_dynamic_fake(
    codes: Tensor, scale: Tensor, *, bits: int = 8, shape: Sequence[int] | None = None, **_: Any
) -> Tensor:
    if shape is None:
        shape = codes.shape if bits == 8 else (2 * codes.numel(),)
    return codes.new_empty(shape, dtype=torch.float32)


define(
    "dequantize_dynamic(Tensor codes, Tensor scale, *, bool signed=True, int bits=8,"
    " int? block_size=None, SymInt[]? shape=None) -> Tensor",
    dynamic.dequantize_dynamic,
    _dequantize_dynamic_fake,
)
