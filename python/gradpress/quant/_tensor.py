"""A tensor as integer codes with a scale for each group of elements."""

from __future__ import annotations

from dataclasses import dataclass

from gradpress.ops import quant as kernels
from gradpress.ops._arrays import Array, dtype_name


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes, and the grid of each group: ``value = (code - zero_point) * scale``.

    Attributes:
        codes: uint8 (affine) or int8 (symmetric) in the tensor's shape; for 4 bits uint8 of shape
            ``[ceil(numel / 2)]``, two codes to the byte, the first in the low nibble; symmetric
            4-bit codes are stored with 8 added.
        scale: float32 ``[groups]``, the step of each group's grid.
        zero_point: uint8 ``[groups]``, the code of zero; None for symmetric codes.
        shape: The shape of the values.
        bits: 4 or 8.
        group_size: Consecutive elements that share a grid; the last group may have fewer.
        dtype: The name of the dtype that was quantized and that `dequantize` gives back.
    """

    codes: Array
    scale: Array
    zero_point: Array | None
    shape: tuple[int, ...]
    bits: int
    group_size: int
    dtype: str

    @property
    def symmetric(self) -> bool:
        """Whether the codes are signed, around zero."""
        return self.zero_point is None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        parts = [self.codes, self.scale, self.zero_point]
        return sum(int(part.nbytes) for part in parts if part is not None)

    def dequantize(self, dtype: str | None = None) -> Array:
        """The values, as the kind of array that was quantized.

        Args:
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; that of the quantized tensor
                when left out.
        """
        return kernels.dequantize_blockwise(
            self.codes,
            self.scale,
            self.zero_point,
            shape=self.shape,
            dtype=dtype or self.dtype,
            bits=self.bits,
            group_size=self.group_size,
        )

    def __repr__(self) -> str:
        """One line: what it holds and how large it is."""
        kind = "symmetric" if self.symmetric else "affine"
        return (
            f"QuantizedTensor(shape={list(self.shape)}, dtype={self.dtype}, {self.bits}-bit {kind},"
            f" group_size={self.group_size}, nbytes={self.nbytes})"
        )


def quantize(
    x: Array,
    bits: int = 8,
    group_size: int = 256,
    symmetric: bool = False,
    rounding: str = "stochastic",
    seed: int = 0,
) -> QuantizedTensor:
    """Quantizes a tensor in groups of consecutive elements.

    A group's grid covers its values and zero: affine codes run from 0 to ``2**bits - 1`` with
    ``scale = (max - min) / (2**bits - 1)`` and an integer zero point, symmetric ones from
    ``-(2**(bits-1) - 1)`` to ``2**(bits-1) - 1`` with ``scale = amax / (2**(bits-1) - 1)``. This
    is the quantizer of Q-GaLore (Zhang et al. 2024, arXiv 2407.08296, section 3.2), with the range
    widened to zero so that groups of one sign and constant groups stay exact within half a step.

    Stochastic rounding keeps the mean: a value goes to the next code up with the probability of
    its distance from the code below, in 65536 steps. The decision depends on the seed and the
    element's index alone: the result is the same bit for bit whatever the number of threads or
    the instruction set. A value that already lies on its grid is kept.

    Args:
        x: float32, float16 or bfloat16 of any shape; PyTorch, on the CPU or a CUDA device, or
            NumPy.
        bits: 8 or 4; 4-bit codes are packed two to the byte.
        group_size: Elements that share a scale. Groups run over the contiguous tensor; the last
            one may have fewer elements.
        symmetric: Signed codes around zero in place of unsigned codes with a zero point.
        rounding: ``"stochastic"`` or ``"nearest"`` (half to even).
        seed: Key of the random numbers, 0 to 2**64 - 1.

    Returns:
        A :class:`QuantizedTensor` of the same kind of arrays.

    Raises:
        TypeError: `x` is neither a tensor nor an array.
        ValueError: an option is out of its range, or `x` holds NaN or infinite values.
        NotImplementedError: the dtype or the device is not supported.

    Example:
        >>> import torch, gradpress
        >>> q = gradpress.quant.quantize(torch.linspace(-1, 1, 512), bits=4)
        >>> q.codes.shape, q.nbytes
        (torch.Size([256]), 266)
        >>> bool((q.dequantize() - torch.linspace(-1, 1, 512)).abs().max() <= q.scale.max())
        True
    """
    parts = kernels.quantize_blockwise(
        x, bits=bits, group_size=group_size, symmetric=symmetric, rounding=rounding, seed=seed
    )
    if parts.nonfinite:
        raise ValueError(
            f"quantize: x must be finite, got {parts.nonfinite} NaN or infinite values"
        )
    return QuantizedTensor(
        codes=parts.codes,
        scale=parts.scale,
        zero_point=parts.zero_point,
        shape=tuple(x.shape),
        bits=bits,
        group_size=group_size,
        dtype=dtype_name(x),
    )
