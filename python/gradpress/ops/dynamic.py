"""The dynamic maps of optimizer states, of 8 and of 4 bits."""

from __future__ import annotations

from gradpress import _core
from gradpress.ops._arrays import (
    Array,
    check_array,
    contiguous,
    empty_like_kind,
    new_counter,
    numel,
)

#: Elements of a state that share a scale, by the bits of its codes.
BLOCK_SIZES = {8: 256, 4: 128}
_SIGNED_ZEROS = {8: 127, 4: 0x77}


def zero_byte(*, signed: bool, bits: int = 8) -> int:
    """The byte that holds the code of zero, or two of them for 4 bits."""
    return _SIGNED_ZEROS[bits] if signed else 0


def stored_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """The shape of the codes of values: the values' own, or packed two to the byte."""
    if bits == 8:
        return shape
    count = 1
    for size in shape:
        count *= size
    return (-(-count // 2),)


def _layout(op: str, bits: int, block_size: int | None) -> int:
    if bits not in BLOCK_SIZES:
        raise ValueError(f"{op}: bits must be 4 or 8, got {bits}")
    return BLOCK_SIZES[bits] if block_size is None else block_size


def quantize_dynamic(
    x: Array, *, signed: bool = True, bits: int = 8, block_size: int | None = None
) -> tuple[Array, Array, int]:
    """Quantizes with a non-uniform map that serves optimizer states.

    The maps of 8 bits are those of bitsandbytes (Dettmers et al. 2021, arXiv 2110.02861): seven
    decades with ever finer steps. Of 4 bits, first moments take the dynamic map with three exponent
    bits, second moments sixteenths without zero (Li et al. 2023, arXiv 2309.01507).

    Args:
        x: float32, float16 or bfloat16 of any shape.
        signed: The map of first moments; otherwise that of second moments, in which a positive
            value never becomes zero.
        bits: 8 or 4.
        block_size: Consecutive elements that share a scale: 256 for 8 bits, 128 for 4 when left
            out. Even for 4 bits.

    Returns:
        Codes (uint8, the shape of `x`; for 4 bits ``[ceil(numel / 2)]``, the first of a pair in
        the low nibble), scales (float32, the largest magnitude of each block), and the number of
        values that were NaN or infinite, for which this function waits.

    Raises:
        TypeError: `x` is no tensor of these dtypes.
        ValueError: an option is out of its range.
    """
    op = "quantize_dynamic"
    size = _layout(op, bits, block_size)
    x = contiguous(check_array(op, "x", x))
    codes = empty_like_kind(x, stored_shape(tuple(x.shape), bits), "uint8")
    scale = empty_like_kind(x, (-(-numel(x) // max(size, 1)),), "float32")
    nonfinite = new_counter(x)
    _core.quantize_dynamic(x, codes, scale, nonfinite, signed, bits, size)
    return codes, scale, int(nonfinite[0])


def dequantize_dynamic(
    codes: Array,
    scale: Array,
    *,
    signed: bool = True,
    bits: int = 8,
    block_size: int | None = None,
    shape: tuple[int, ...] | None = None,
) -> Array:
    """The float32 values behind dynamic codes; see :func:`quantize_dynamic`.

    Args:
        codes: As :func:`quantize_dynamic` returns them.
        scale: float32, one for each block.
        signed: The map of first moments.
        bits: 8 or 4.
        block_size: Consecutive elements that share a scale.
        shape: The values' shape; for 8 bits that of the codes when left out, for 4 bits all codes
            in a row.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    op = "dequantize_dynamic"
    size = _layout(op, bits, block_size)
    if shape is None:
        shape = tuple(codes.shape) if bits == 8 else (2 * numel(codes),)
    out = empty_like_kind(codes, shape, "float32")
    _core.dequantize_dynamic(codes, scale, out, signed, bits, size)
    return out
