"""Block-wise integer quantization, packing, and stochastic rounding to bfloat16."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gradpress import _core
from gradpress.ops._arrays import (
    Array,
    check_array,
    contiguous,
    dtype_name,
    empty_like_kind,
    new_counter,
    numel,
    written,
)

_MAX_SEED = 1 << 64


class Quantized(NamedTuple):
    """What :func:`quantize_blockwise` makes of a tensor.

    Attributes:
        codes: uint8 (affine) or int8 (symmetric) in the tensor's shape; for 4 bits uint8 of shape
            ``[ceil(numel / 2)]``, the first code of a pair in the low nibble.
        scale: float32, one per group.
        zero_point: uint8, one per group; None for symmetric codes.
        nonfinite: How many values were NaN or infinite.
    """

    codes: Array
    scale: Array
    zero_point: Array | None
    nonfinite: int


def check_seed(op: str, seed: int) -> int:
    """`seed` when it is a 64-bit unsigned integer.

    Raises:
        ValueError: it is out of range.
    """
    if not 0 <= seed < _MAX_SEED:
        raise ValueError(f"{op}: seed must be from 0 to 2**64 - 1, got {seed}")
    return seed


def check_rounding(op: str, rounding: str) -> bool:
    """Whether `rounding` is stochastic.

    Raises:
        ValueError: it is neither ``"stochastic"`` nor ``"nearest"``.
    """
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(f'{op}: rounding must be "stochastic" or "nearest", got {rounding!r}')
    return rounding == "stochastic"


def check_format(op: str, bits: int, group_size: int) -> None:
    """Checks what describes the codes.

    Raises:
        ValueError: `bits` is neither 4 nor 8, or `group_size` is below 1.
    """
    if bits not in (4, 8):
        raise ValueError(f"{op}: bits must be 4 or 8, got {bits}")
    if group_size < 1:
        raise ValueError(f"{op}: group_size must be at least 1, got {group_size}")


def allocate_codes(
    like: Array, shape: tuple[int, ...], bits: int, group_size: int, symmetric: bool
) -> tuple[Array, Array, Array | None]:
    """Uninitialized codes, scales and zero points for values of `shape`."""
    count = 1
    for size in shape:
        count *= size
    groups = -(-count // group_size)
    if bits == 4:
        codes = empty_like_kind(like, (-(-count // 2),), "uint8")
    else:
        codes = empty_like_kind(like, shape, "int8" if symmetric else "uint8")
    zero_point = None if symmetric else empty_like_kind(like, (groups,), "uint8")
    return codes, empty_like_kind(like, (groups,), "float32"), zero_point


def quantize_blockwise(
    x: Array,
    *,
    bits: int = 8,
    group_size: int = 256,
    symmetric: bool = False,
    rounding: str = "stochastic",
    seed: int = 0,
    tensor_id: int = 0,
    step: int = 0,
) -> Quantized:
    """Quantizes in groups of consecutive elements; see :func:`gradpress.quant.quantize`.

    The kernel counts on the device; this function waits for the count.

    Args:
        x: float32, float16 or bfloat16, any shape; a copy is made when it is not contiguous. A
            tensor on the meta device gives results there: their shapes.
        bits: 4 or 8.
        group_size: Elements that share a scale; the last group may have fewer.
        symmetric: Signed codes around zero in place of unsigned codes with a zero point.
        rounding: ``"stochastic"`` or ``"nearest"`` (half to even).
        seed: Key of the random numbers, with `tensor_id` and `step`.
        tensor_id: Which tensor of several that share a seed.
        step: Which time it is rounded.

    Raises:
        TypeError: `x` is no tensor.
        NotImplementedError: its dtype or device is not supported.
        ValueError: an option is out of its range.
    """
    op = "quantize_blockwise"
    check_format(op, bits, group_size)
    stochastic = check_rounding(op, rounding)
    check_seed(op, seed)
    x = contiguous(check_array(op, "x", x))
    codes, scale, zero_point = allocate_codes(x, tuple(x.shape), bits, group_size, symmetric)
    if isinstance(x, torch.Tensor) and x.is_meta:
        return Quantized(codes, scale, zero_point, 0)
    nonfinite = new_counter(x)
    _core.quantize_blockwise(
        x, codes, scale, zero_point, nonfinite, bits, stochastic, group_size, seed, tensor_id, step
    )
    return Quantized(codes, scale, zero_point, int(nonfinite[0]))


def dequantize_blockwise(
    codes: Array,
    scale: Array,
    zero_point: Array | None,
    *,
    shape: tuple[int, ...],
    dtype: str = "float32",
    bits: int = 8,
    group_size: int = 256,
    out: Array | None = None,
) -> Array:
    """The values behind codes.

    Args:
        codes: As :func:`quantize_blockwise` returns them.
        scale: float32, one per group.
        zero_point: uint8, one per group, or None for symmetric codes.
        shape: The values' shape.
        dtype: The values' dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        bits: 4 or 8.
        group_size: Elements that share a scale.
        out: Written in place of a new array: contiguous, of `shape` and `dtype`.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`quantize_blockwise`.
    """
    if out is None:
        out = empty_like_kind(codes, shape, dtype)
    _core.dequantize_blockwise(codes, scale, zero_point, out, bits, group_size)
    written([out])
    return out


def pack_int4(codes: Array) -> Array:
    """Packs 4-bit codes two to the byte, the first in the low nibble.

    Args:
        codes: uint8, values 0 to 15, any shape.

    Returns:
        uint8 of shape ``[ceil(numel / 2)]``.
    """
    codes = contiguous(check_array("pack_int4", "codes", codes))
    packed = empty_like_kind(codes, (-(-numel(codes) // 2),), "uint8")
    _core.pack_int4(codes, packed)
    return packed


def unpack_int4(packed: Array, count: int) -> Array:
    """The inverse of :func:`pack_int4`.

    Args:
        packed: uint8 of shape ``[ceil(count / 2)]``.
        count: The number of codes.
    """
    codes = empty_like_kind(check_array("unpack_int4", "packed", packed), (count,), "uint8")
    _core.unpack_int4(contiguous(packed), codes)
    return codes


def round_bf16_stochastic(x: Array, *, seed: int = 0, tensor_id: int = 0, step: int = 0) -> Array:
    """Rounds float32 to one of the two nearest bfloat16, keeping the mean.

    Args:
        x: A float32 tensor of any shape; PyTorch only, since NumPy has no bfloat16.
        seed: Key of the random numbers, with `tensor_id` and `step`.
        tensor_id: Which tensor of several that share a seed.
        step: Which time it is rounded.

    Returns:
        A bfloat16 tensor. Infinities and NaNs stay what they are; a finite value stays finite.
    """
    op = "round_bf16_stochastic"
    x = contiguous(check_array(op, "x", x))
    if dtype_name(x) != "float32":
        raise TypeError(f"{op}: x must have dtype float32, got {dtype_name(x)}")
    out = empty_like_kind(x, tuple(x.shape), "bfloat16")
    _core.round_bf16_stochastic(x, out, check_seed(op, seed), tensor_id, step)
    return out
