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
#: Weights up to this size are dequantized whole; larger ones in four parts where groups allow it.
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

    def rows(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """The rows from `first` to before `last`, which begin and end with a group's."""
        columns = self.shape[1]
        begin, end, size = first * columns, last * columns, self.group_size
        groups = slice(begin // size, -(-end // size))
        if self.bits == 4:
            codes = self.codes[begin // 2 : -(-end // 2)]
        else:
            codes = self.codes.view(-1)[begin:end].view(last - first, columns)
        zero_point = None if self.zero_point is None else self.zero_point[groups]
        return self._values(codes, self.scale[groups], zero_point, (last - first, columns), dtype)

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
        )
        return cast(torch.Tensor, values).to(dtype)

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
    most = min(most, numel // 4) if numel > SMALL else numel
    run = max(unit, most // max(width * unit, 1) * unit)
    return ((first, min(first + run, count)) for first in range(0, count, run))


@torch.no_grad()
def linear_blockwise(x: torch.Tensor, weight: Codes, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` in the dtype of `x`, with a part of the weight at a time.

    Args:
        x: ``[..., columns]``.
        weight: ``[rows, columns]``.
        bias: ``[rows]`` or None.

    Returns:
        ``[..., rows]``.
    """
    flat = _wide(x)
    out = x.new_empty(flat.shape[0], weight.shape[0])
    for first, last in weight.row_parts():
        _multiply(flat, weight.rows(first, last, flat.dtype).t(), out[:, first:last])
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], weight.shape[0])


@torch.no_grad()
def linear_blockwise_input_grad(grad: torch.Tensor, weight: Codes) -> torch.Tensor:
    """``grad @ weight`` in the dtype of `grad`, with a part of the weight at a time.

    Args:
        grad: ``[..., rows]``.
        weight: ``[rows, columns]``.

    Returns:
        ``[..., columns]``.
    """
    flat = _wide(grad)
    out = grad.new_empty(flat.shape[0], weight.shape[1])
    columns = weight.column_parts()
    if columns is not None:
        for first, last in columns:
            _multiply(flat, weight.columns(first, last, flat.dtype), out[:, first:last])
    else:
        # Groups span rows: a sum over parts, in float32 at least.
        total = torch.zeros_like(out, dtype=torch.promote_types(out.dtype, torch.float32))
        for first, last in weight.row_parts():
            part = total.new_empty(out.shape, dtype=flat.dtype)
            total += torch.mm(flat[:, first:last], weight.rows(first, last, flat.dtype), out=part)
        out.copy_(total)
    return out.view(*grad.shape[:-1], weight.shape[1])


def _wide(x: torch.Tensor) -> torch.Tensor:
    """As a matrix; narrow floats as float32 on the CPU, where their own products crawl."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x.float() if x.device.type == "cpu" and x.dtype != torch.float64 else x


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)  # which autocasting leaves alone
    else:
        out.copy_(torch.mm(a, b, out=a.new_empty(out.shape)))
