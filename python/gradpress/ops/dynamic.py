"""The dynamic 8-bit maps of optimizer states."""

from __future__ import annotations

from gradpress import _core
from gradpress.ops._arrays import Array, check_array, contiguous, empty_like_kind, numel

#: Elements of a state that share a scale.
BLOCK_SIZE = 256
_SIGNED_ZERO = 127


def zero_code(*, signed: bool) -> int:
    """The code of zero in the signed or the unsigned map."""
    return _SIGNED_ZERO if signed else 0


def quantize_dynamic(
    x: Array, *, signed: bool = True, block_size: int = BLOCK_SIZE
) -> tuple[Array, Array, int]:
    """Quantizes with the dynamic map of bitsandbytes (Dettmers et al. 2021, arXiv 2110.02861).

    Args:
        x: float32, float16 or bfloat16 of any shape.
        signed: The map of first moments; otherwise that of second moments, in which a positive
            value never becomes zero.
        block_size: Consecutive elements that share a scale.

    Returns:
        Codes (uint8, the shape of `x`), scales (float32, the largest magnitude of each block), and
        the number of values that were NaN or infinite.
    """
    x = contiguous(check_array("quantize_dynamic", "x", x))
    codes = empty_like_kind(x, tuple(x.shape), "uint8")
    scale = empty_like_kind(x, (-(-numel(x) // max(block_size, 1)),), "float32")
    nonfinite = _core.quantize_dynamic(x, codes, scale, signed, block_size)
    return codes, scale, nonfinite


def dequantize_dynamic(
    codes: Array, scale: Array, *, signed: bool = True, block_size: int = BLOCK_SIZE
) -> Array:
    """The float32 values behind dynamic codes; see :func:`quantize_dynamic`."""
    out = empty_like_kind(codes, tuple(codes.shape), "float32")
    _core.dequantize_dynamic(codes, scale, out, signed, block_size)
    return out
