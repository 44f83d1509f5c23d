"""Pruned tensors in the space that their zeros leave."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from gradpress.ops._arrays import Array, check_array, dtype_name
from gradpress.prune._statistics import as_tensor

FORMATS = ("bitmask", "2:4")
_GROUP, _KEPT = 4, 2
_BITS: dict[str, Any] = {
    "float32": (torch.float32, torch.int32),
    "float16": (torch.float16, torch.int16),
    "bfloat16": (torch.bfloat16, torch.int16),
}


@dataclass(frozen=True)
class PackedSparse:
    """A tensor without its zeros, as :func:`pack_sparse` makes it.

    Attributes:
        format: ``"bitmask"`` or ``"2:4"``.
        shape: The tensor's shape.
        dtype: The tensor's dtype by name.
        values: What is stored, in order and in that dtype: ``[kept]``, or half the elements.
        places: uint8. Of a bitmask one bit for each element, the first in the lowest bit,
            ``[ceil(numel / 8)]``. Of 2:4 two bits for each value, its place among its four columns,
            the first in the lowest bits, ``[ceil(numel / 8)]`` too.
    """

    format: str
    shape: tuple[int, ...]
    dtype: str
    values: Array
    places: Array

    @property
    def nbytes(self) -> int:
        """Bytes of values and places together."""
        return int(self.values.nbytes) + int(self.places.nbytes)


def packed_bytes(numel: int, kept: int, itemsize: int, format: str = "bitmask") -> int:
    """The bytes that a tensor takes when packed: what :attr:`PackedSparse.nbytes` will be.

    Args:
        numel: Elements of the tensor.
        kept: How many of them are not zero; of 2:4 it does not matter.
        itemsize: Bytes of an element.
        format: ``"bitmask"``: ``kept * itemsize + ceil(numel / 8)``; ``"2:4"``: ``numel / 2 *
            itemsize + ceil(numel / 8)``.
    """
    _check_format("packed_bytes", format)
    stored = kept if format == "bitmask" else numel // _GROUP * _KEPT
    return stored * itemsize + -(-numel // 8)


def _check_format(op: str, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f'{op}: format must be "bitmask" or "2:4", got {format!r}')


def _pack_bits(fields: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 fields of so many bits, the first in the lowest bits of a byte."""
    count = 8 // width
    padded = torch.nn.functional.pad(fields, (0, -fields.numel() % count)).view(-1, count)
    packed = torch.zeros(len(padded), dtype=torch.uint8, device=fields.device)
    for i in range(count):
        packed |= padded[:, i] << i * width
    return packed


def _unpack_bits(packed: torch.Tensor, width: int, count: int) -> torch.Tensor:
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & ((1 << width) - 1)).flatten()[:count]


def pack_sparse(weight: Array, format: str = "bitmask") -> PackedSparse:
    """Packs a tensor without its zeros; :func:`unpack_sparse` gives back the same bits.

    An element is stored unless all its bits are zero: a negative zero, which a product with a mask
    leaves, costs as much as any other value. 16-bit weights of which half are zero take 9 bits each
    in either format.

    Args:
        weight: float32, float16 or bfloat16 of any shape; PyTorch or NumPy.
        format: ``"bitmask"`` for any zeros; ``"2:4"`` where at most two of every four consecutive
            elements are not zero, and four divides the last dimension.

    Raises:
        TypeError: `weight` is no tensor or array of these dtypes.
        ValueError: the format is unknown, or does not fit.

    Example:
        >>> import torch, gradpress
        >>> weight = torch.tensor([[0, 1, 2, 0, 3, 0, 0, 4]], dtype=torch.bfloat16)
        >>> packed = gradpress.prune.pack_sparse(weight, "2:4")
        >>> packed.nbytes, torch.equal(gradpress.prune.unpack_sparse(packed), weight)
        (9, True)
    """
    op = "pack_sparse"
    _check_format(op, format)
    check_array(op, "weight", weight)
    name = dtype_name(weight)
    if name not in _BITS:
        raise TypeError(f"{op}: weight must have dtype float32, float16 or bfloat16, got {name}")
    flat = as_tensor(weight).contiguous().flatten()
    kept = flat.view(_BITS[name][1]) != 0
    if format == "bitmask":
        values, places = flat[kept], _pack_bits(kept.to(torch.uint8), 1)
    else:
        if not weight.ndim or weight.shape[-1] % _GROUP:
            raise ValueError(
                f"{op}: format 2:4 needs a last dimension that {_GROUP} divides, got shape"
                f" {list(weight.shape)}"
            )
        index = _places_of_two(kept.view(-1, _GROUP))
        values = flat.view(-1, _GROUP).gather(1, index).flatten()
        places = _pack_bits(index.flatten().to(torch.uint8), 2)
    shape = tuple(weight.shape)
    if isinstance(weight, torch.Tensor):
        return PackedSparse(format, shape, name, values, places)
    return PackedSparse(format, shape, name, values.numpy(), places.numpy())


def _places_of_two(kept: torch.Tensor) -> torch.Tensor:
    """Two ascending places of every group, those that are kept among them."""
    count = kept.sum(1)
    if bool((count > _KEPT).any()):
        worst = int(count.argmax())
        raise ValueError(
            f"pack_sparse: format 2:4 needs at most {_KEPT} of 4 elements that are not zero, got"
            f" {int(count[worst])} in group {worst}"
        )
    bits = kept.to(torch.int8)
    first, last = bits.argmax(1), _GROUP - 1 - bits.flip(1).argmax(1)
    # A group with one value, or none, also stores a zero.
    first = torch.where(count < _KEPT, 0, first)
    last = torch.where(count == 0, 1, last.clamp(min=1))
    return torch.stack([first, last], 1)


def unpack_sparse(packed: PackedSparse) -> Array:
    """The tensor that :func:`pack_sparse` packed, bit for bit, as the same kind of array.

    Raises:
        ValueError: the parts do not fit together.
    """
    op = "unpack_sparse"
    _check_format(op, packed.format)
    values, places = as_tensor(packed.values), as_tensor(packed.places)
    numel = math.prod(packed.shape)
    if places.numel() != -(-numel // 8):
        raise ValueError(
            f"{op}: places must have {-(-numel // 8)} bytes for shape {list(packed.shape)},"
            f" got {places.numel()}"
        )
    flat = torch.zeros(numel, dtype=_BITS[packed.dtype][0], device=values.device)
    if packed.format == "bitmask":
        kept = _unpack_bits(places, 1, numel).view(torch.bool)
        expected = int(kept.sum())
    else:
        expected = numel // _GROUP * _KEPT
    if values.numel() != expected:
        raise ValueError(f"{op}: values must hold {expected} elements, got {values.numel()}")
    if packed.format == "bitmask":
        flat[kept] = values
    else:
        index = _unpack_bits(places, 2, expected).to(torch.int64).view(-1, _KEPT)
        flat.view(-1, _GROUP).scatter_(1, index, values.view(-1, _KEPT))
    result = flat.reshape(packed.shape)
    return result if isinstance(packed.values, torch.Tensor) else result.numpy()
