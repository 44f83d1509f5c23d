"""Products with quantized weights, of which a part is dequantized at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch

from gradpress.ops.quant import dequantize_blockwise

#: Elements that are dequantized at a time: two MiB of float32 on a CPU, and four million on a
#: device, as the update of quantized weights takes there.
PART = {"cpu": 1 << 19}
PART_OF_DEVICES = 1 << 22
#: Weights up to this size are dequantized whole; larger ones in two parts where groups allow it.
SMALL = 1 << 12


class Codes(NamedTuple):
    """A quantized matrix.

    Attributes:
        codes: As :func:`gradpress.ops.quant.quantize_blockwise` makes them.
        scale: float32, one per group.
        zero_point: uint8, one per group; None for symmetric codes.
        shape: ``(rows, columns)``.
        bits: 4 or 8.
        group_size: Elements that share a scale.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    shape: tuple[int, int]
    bits: int
    group_size: int

    def rows(
        self, first: int, last: int, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The rows from `first` to before `last`, which begin and end with a group's.

        `out`, of their shape and dtype, is written and returned where it is given.
        """
        columns = self.shape[1]
        begin, end, size = first * columns, last * columns, self.group_size
        groups = slice(begin // size, -(-end // size))
        if self.bits == 4:
            codes = self.codes[begin // 2 : -(-end // 2)]
        else:
            codes = self.codes.view(-1)[begin:end].view(last - first, columns)
        zero_point = None if self.zero_point is None else self.zero_point[groups]
        shape = (last - first, columns)
        return self._values(codes, self.scale[groups], zero_point, shape, dtype, out)

    def all_rows(self, dtype: torch.dtype) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The rows part by part, in memory that the next part takes over."""
        buffer: torch.Tensor | None = None
        for first, last in self.row_parts():
            if buffer is None:
                buffer = self.scale.new_empty((last - first, self.shape[1]), dtype=dtype)
            yield first, last, self.rows(first, last, dtype, buffer[: last - first])

    def columns(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """The columns from `first` to before `last`, where groups end with rows and with these."""
        rows, columns = self.shape
        size = self.group_size
        groups = slice(first // size, last // size)

        def part(numbers: torch.Tensor) -> torch.Tensor:
            return numbers.view(rows, -1)[:, groups].contiguous().view(-1)

        if self.bits == 4:
            packed = self.codes.view(rows, columns // 2)[:, first // 2 : last // 2]
            codes = packed.contiguous().view(-1)
        else:
            codes = self.codes.view(rows, columns)[:, first:last].contiguous()
        zero_point = None if self.zero_point is None else part(self.zero_point)
        return self._values(codes, part(self.scale), zero_point, (rows, last - first), dtype)

    def _values(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        shape: tuple[int, int],
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        direct = dtype in (torch.float32, torch.float16, torch.bfloat16)
        values = dequantize_blockwise(
            codes,
            scale,
            zero_point,
            shape=shape,
            dtype=str(dtype).removeprefix("torch.") if direct else "float32",
            bits=self.bits,
            group_size=self.group_size,
            out=out if direct else None,
        )
        if direct or out is None:
            return cast(torch.Tensor, values).to(dtype)
        return out.copy_(cast(torch.Tensor, values))

    def row_parts(self) -> Iterator[tuple[int, int]]:
        """Runs of rows that begin and end with a group's."""
        rows, columns = self.shape
        unit = math.lcm(self.group_size, max(columns, 1), 2) // max(columns, 1)
        return _parts(rows, columns, unit, self.codes.device)

    def column_parts(self) -> Iterator[tuple[int, int]] | None:
        """Runs of columns that begin and end with a group's; None where a row does not."""
        rows, columns = self.shape
        size = self.group_size
        if columns % size or (self.bits == 4 and size % 2) or columns == size:
            return None
        return _parts(columns, rows, size, self.codes.device)


def _parts(count: int, width: int, unit: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Divides `count` rows (or columns) of `width` elements into runs of whole units."""
    numel = count * width
    most = PART.get(device.type, PART_OF_DEVICES)
    most = min(most, numel // 2) if numel > SMALL else numel
    run = max(unit, most // max(width * unit, 1) * unit)
    return ((first, min(first + run, count)) for first in range(0, count, run))


@torch.no_grad()
def linear_blockwise(
    x: torch.Tensor,
    weight: Codes,
    bias: torch.Tensor | None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias`` in the dtype of `x`, with a part of the weight at a time.

    Args:
        x: ``[..., columns]``.
        weight: ``[rows, columns]``.
        bias: ``[rows]`` or None.
        out: Written in place of a new tensor: ``[..., rows]``, contiguous, in the dtype of `x`.

    Returns:
        ``[..., rows]``.
    """
    if out is None:
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
    flat, flat_out = _wide(x), _matrix(out)
    for first, last, values in weight.all_rows(flat.dtype):
        _multiply(flat, values.t(), flat_out[:, first:last])
    if bias is not None:
        flat_out += bias
    return out


@torch.no_grad()
def linear_blockwise_input_grad(grad: torch.Tensor, weight: Codes) -> torch.Tensor:
    """``grad @ weight`` in the dtype of `grad`, with a part of the weight at a time.

    Args:
        grad: ``[..., rows]``.
        weight: ``[rows, columns]``.

    Returns:
        ``[..., columns]``.
    """
    out = grad.new_empty(*grad.shape[:-1], weight.shape[1])
    flat, flat_out = _wide(grad), _matrix(out)
    narrow = flat.dtype not in (torch.float32, torch.float64)
    columns = weight.column_parts() if narrow else None
    if columns is None:
        _sum_over_rows(flat, weight, flat_out)
    else:
        for first, last in columns:
            _multiply(flat, weight.columns(first, last, flat.dtype), flat_out[:, first:last])
    return out


def _sum_over_rows(grad: torch.Tensor, weight: Codes, out: torch.Tensor) -> None:
    """``grad @ weight`` as a sum of products with some rows each, in float32 at least."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = out if out.dtype == wide else torch.empty_like(out, dtype=wide)
    if wide != grad.dtype or not weight.shape[0]:
        total.zero_()
    for first, last, values in weight.all_rows(grad.dtype):
        part = grad[:, first:last]
        if wide == grad.dtype:
            total.addmm_(part, values, beta=float(first > 0))
        else:
            total += torch.mm(part, values, out=grad.new_empty(out.shape))
    if total is not out:
        out.copy_(total)


def _matrix(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _wide(x: torch.Tensor) -> torch.Tensor:
    """As a matrix; narrow floats as float32 on the CPU, where their own products crawl."""
    x = _matrix(x)
    return x.float() if x.device.type == "cpu" and x.dtype != torch.float64 else x


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)  # which autocasting leaves alone
    else:
        out.copy_(torch.mm(a, b, out=a.new_empty(out.shape)))
