"""How each tensor is stored: in which of the formats, and in which parts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch

from gradpress import prune
from gradpress.io._report import StoredTensor
from gradpress.nn import QuantizedWeight
from gradpress.ops._arrays import dtype_name

FILE_FORMATS = ("gradpress", "dense")
#: The formats of pruned tensors, the preferred one first where both take the same space.
_SPARSE = ("2:4", "bitmask")
_SPARSE_PARTS = ("values", "places")
_QUANTIZED_PARTS = ("codes", "scale", "zero_point")
_PACKABLE = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class Part(NamedTuple):
    """One tensor of a file.

    Attributes:
        dtype: Its dtype by name.
        shape: Its shape.
        nbytes: Its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Part:
        """What describes a tensor that exists."""
        return cls(dtype_name(tensor), tuple(tensor.shape), tensor.nbytes)


class Layout(NamedTuple):
    """How one tensor is stored.

    Attributes:
        row: Its line in the table.
        parts: The file's tensors that hold it, by the names they will have.
        record: What it takes beside them to build it again; None of a dense tensor.
    """

    row: StoredTensor
    parts: dict[str, Part]
    record: dict[str, Any] | None


def part_names(name: str, format: str) -> list[str]:
    """The names of a file's tensors that hold a tensor of this name."""
    if format == "dense":
        return [name]
    parts = _SPARSE_PARTS if format in _SPARSE else _QUANTIZED_PARTS
    return [f"{name}.{part}" for part in parts]


def plan(op: str, tensors: dict[str, torch.Tensor], format: str) -> dict[str, Layout]:
    """The layout of every tensor of a file.

    Raises:
        ValueError: `format` is unknown, or a part of a quantized weight would bear the name of
            another tensor.
    """
    if format not in FILE_FORMATS:
        raise ValueError(f'{op}: format must be "gradpress" or "dense", got {format!r}')
    layouts: dict[str, Layout] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedWeight):
            layouts[name] = _of_quantized(op, name, tensor, tensors if format != "dense" else None)
        else:
            layouts[name] = _of_plain(name, tensor, tensors if format != "dense" else None)
    return layouts


def _of_quantized(
    op: str, name: str, weight: QuantizedWeight, others: dict[str, torch.Tensor] | None
) -> Layout:
    dtype, shape = dtype_name(weight), tuple(weight.shape)
    dense = weight.numel() * weight.dtype.itemsize
    if others is None:
        row = StoredTensor(name, shape, dtype, None, 0, "dense", dense, dense)
        return Layout(row, {name: Part(dtype, shape, dense)}, None)
    format = f"int{weight.bits}"
    parts = {f"{name}.{part}": Part.of(value) for part, value in weight.parts.items()}
    taken = sorted(parts.keys() & others.keys())
    if taken:
        raise ValueError(f"{op}: {name} is stored as {taken}, which other tensors are called too")
    row = StoredTensor(name, shape, dtype, None, 0, format, dense, weight.stored_bytes)
    record = {"format": format, "shape": list(shape), "dtype": dtype}
    return Layout(row, parts, {**record, "group_size": weight.group_size})


def _of_plain(name: str, tensor: torch.Tensor, others: dict[str, torch.Tensor] | None) -> Layout:
    dtype, shape, numel = dtype_name(tensor), tuple(tensor.shape), tensor.numel()
    zeros = numel - int(torch.count_nonzero(_countable(tensor)))
    dense = numel * tensor.dtype.itemsize
    format, size, kept = "dense", dense, numel
    if others is not None and tensor.dtype in _PACKABLE:
        bits = tensor.contiguous().view(-1).view(_PACKABLE[tensor.dtype])
        kept = int(torch.count_nonzero(bits))
        free = not any(key in others for key in part_names(name, "bitmask"))
        for candidate in _SPARSE if free else ():
            packed = prune.packed_bytes(numel, kept, tensor.dtype.itemsize, candidate)
            if packed < size and (candidate != "2:4" or _fits_two_of_four(bits, shape, kept)):
                format, size = candidate, packed
    negative = zeros - (numel - kept) if format in _SPARSE else 0
    row = StoredTensor(name, shape, dtype, zeros / max(numel, 1), negative, format, dense, size)
    if format == "dense":
        return Layout(row, {name: Part(dtype, shape, dense)}, None)
    values, places = part_names(name, format)
    stored = kept if format == "bitmask" else numel // 2
    parts = {
        values: Part(dtype, (stored,), stored * tensor.dtype.itemsize),
        places: Part("uint8", (math.ceil(numel / 8),), math.ceil(numel / 8)),
    }
    return Layout(row, parts, {"format": format, "shape": list(shape), "dtype": dtype})


def _countable(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the same zeros, of a dtype whose zeros PyTorch can count."""
    name = dtype_name(tensor)
    if name.startswith("float8"):
        return tensor.float()
    return tensor.view(getattr(torch, name[1:])) if name.startswith("uint") else tensor


def _fits_two_of_four(bits: torch.Tensor, shape: tuple[int, ...], kept: int) -> bool:
    if not shape or shape[-1] % 4 or 2 * kept > bits.numel():
        return False
    return bool(((bits.view(-1, 4) != 0).sum(1) <= 2).all())


def split(tensor: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """The file's tensors for one tensor, as its layout says.

    Raises:
        RuntimeError: the tensor has changed since its layout was made.
    """
    format, names = layout.row.format, list(layout.parts)
    if format == "dense":
        values = [tensor.dequantize() if isinstance(tensor, QuantizedWeight) else tensor]
    elif isinstance(tensor, QuantizedWeight):
        values = list(tensor.parts.values())
    else:
        packed = prune.pack_sparse(tensor, format)
        values = [cast(torch.Tensor, packed.values), cast(torch.Tensor, packed.places)]
    parts = dict(zip(names, values, strict=True))
    for name, part in parts.items():
        if Part.of(part) != layout.parts[name]:
            raise RuntimeError(f"save: {layout.row.name} was changed while it was saved")
    return parts


def join(record: dict[str, Any], parts: list[torch.Tensor]) -> torch.Tensor:
    """The tensor of a record, from its parts, bit for bit.

    Raises:
        ValueError: the parts do not fit the record.
    """
    format, shape, dtype = record["format"], tuple(record["shape"]), record["dtype"]
    if format in _SPARSE:
        return _join_sparse(format, shape, dtype, parts)
    codes, scale, zero_point = parts
    bits, group_size = int(format.removeprefix("int")), int(record["group_size"])
    numel = math.prod(shape)
    groups = math.ceil(numel / group_size)
    wanted = [
        Part("uint8", shape if bits == 8 else (math.ceil(numel / 2),), math.ceil(numel * bits / 8)),
        Part("float32", (groups,), 4 * groups),
        Part("uint8", (groups,), groups),
    ]
    for name, part, want in zip(_QUANTIZED_PARTS, parts, wanted, strict=True):
        if Part.of(part) != want:
            raise ValueError(
                f"{name} must be {want.dtype} of shape {list(want.shape)}, got {dtype_name(part)}"
                f" of shape {list(part.shape)}"
            )
    return QuantizedWeight(
        codes,
        scale,
        zero_point,
        shape=shape,
        dtype=getattr(torch, dtype),
        bits=bits,
        group_size=group_size,
    )


def _join_sparse(
    format: str, shape: tuple[int, ...], dtype: str, parts: list[torch.Tensor]
) -> torch.Tensor:
    values, places = parts
    for name, part, want in (("values", values, dtype), ("places", places, "uint8")):
        if part.ndim != 1 or dtype_name(part) != want:
            raise ValueError(
                f"{name} must be {want} with one dimension, got {dtype_name(part)} of shape"
                f" {list(part.shape)}"
            )
    packed = prune.PackedSparse(format, shape, dtype, values, places)
    return cast(torch.Tensor, prune.unpack_sparse(packed))
