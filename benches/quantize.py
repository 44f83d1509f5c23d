"""Quantizing and dequantizing: time per element, bytes moved, and what peers take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch

from benches.harness import Case, Options, Samples, copy_case, interleave, peer
from benches.report import Report
from benches.tables import Table, number, percent
from gradpress import _core
from gradpress.ops import dynamic, quant

GROUP = 256
NF4_BLOCK = 64
SAMPLE_SECONDS = 0.02

_FLOATS = "copy of the floats"
_DYNAMIC = "bitsandbytes quantize_blockwise"
_UNSIGNED = "bitsandbytes quantize_blockwise, unsigned"
_NF4 = "bitsandbytes quantize_4bit nf4"
_EAGER = "torch eager, INT8 affine stochastic"


@dataclass(frozen=True)
class Row:
    """A kernel, what it moves, and whom it is compared with.

    Attributes:
        case: The timed call.
        moved: Bytes read and written once each; None where an algorithm makes several passes.
        peer: The case whose time is set against this one's.
    """

    case: Case
    moved: int | None
    peer: str | None = None


def run(options: Options) -> Report:
    """Times every section on every size."""
    bitsandbytes = peer("bitsandbytes")
    sizes = [1 << 18] if options.quick else [1 << 20, 1 << 24]
    rounds = options.rounds(11)
    tables = []
    for count in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            for title, build in _SECTIONS:
                rows = build(count, dtype, bitsandbytes)
                if rows:
                    name = f"{title}, {str(dtype).removeprefix('torch.')}, {count:,} elements"
                    tables.append(_measure(name, rows, count, dtype, rounds))
    return Report("Quantizing and dequantizing", _ABOUT, rounds, tables)


_ABOUT = (
    "Rows without a prefix are the native functions of gradpress on outputs made beforehand, as an"
    " optimizer calls them; rows that begin with `ops.` are the public functions, which allocate"
    " their outputs. bitsandbytes and torch allocate in every call (the `out=` of bitsandbytes does"
    " not work on a CPU): it is the `ops.` rows that compare like with like. This matters most"
    " where a dequantizer's output has tens of MiB, which the allocator fetches from the system"
    " in every call, as pages yet to be cleared.",
    "Not all of this is the same work. `bitsandbytes quantize_blockwise` rounds to the nearest of"
    " 256 values of the dynamic map: the same job as `quantize_dynamic`, and another one than the"
    " uniform grids. `quantize_4bit nf4` rounds to the nearest of 16 fixed values in blocks of"
    f" {NF4_BLOCK}; INT4 here is a uniform grid. Neither rounds stochastically. `torch eager` does"
    " the job of the INT8 and bfloat16 rows with torch's own random numbers.",
    "`x` is how many times as long the peer of the row takes. `of float copy` is the time of"
    " `copy_` of the floats (input of a quantizer, output of a dequantizer) over the row's time;"
    " `of equal copy` that of a copy which reads and writes together exactly the bytes that the"
    " row must move: inputs read once, outputs written once. Numbers are normally distributed,"
    " groups have 256 elements where no other size is given.",
)


def _measure(title: str, rows: Sequence[Row], count: int, dtype: torch.dtype, rounds: int) -> Table:
    copies = {f"copy {row.moved}": row.moved for row in rows if row.moved is not None}
    floats = copy_case(_FLOATS, 2 * count * dtype.itemsize)
    cases = [
        floats,
        *(row.case for row in rows),
        *(copy_case(name, moved) for name, moved in copies.items()),
    ]
    samples = interleave(cases, rounds, SAMPLE_SECONDS)
    everything = [Row(floats, 2 * count * dtype.itemsize), *rows]
    head = (
        "kernel",
        "ns/element",
        "min, ns",
        "bytes/element",
        "GB/s",
        "of float copy",
        "of equal copy",
        "x",
        "peer",
    )
    return Table(title, head, [_cells(row, samples, count) for row in everything])


def _cells(row: Row, samples: Samples, count: int) -> tuple[str, ...]:
    name = row.case.name
    seconds = samples.median(name)
    moved, rate, equal = "-", "-", "-"
    if row.moved is not None:
        moved, rate = number(row.moved / count), number(row.moved / seconds / 1e9)
        twin = f"copy {row.moved}"
        equal = percent(samples.ratio(twin if twin in samples.seconds else _FLOATS, name))
    ratio = "-"
    if row.peer is not None and row.peer in samples.seconds:
        ratio = number(samples.ratio(row.peer, name))
    return (
        name,
        number(1e9 * seconds / count),
        number(1e9 * samples.minimum(name) / count),
        moved,
        rate,
        percent(samples.ratio(_FLOATS, name)),
        equal,
        ratio,
        row.peer if ratio != "-" and row.peer else "-",
    )


def _bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def _integer_rows(x: torch.Tensor) -> list[Row]:
    rows = []
    counter = torch.zeros(1, dtype=torch.int64)
    for bits, group in ((8, GROUP), (4, GROUP), (4, NF4_BLOCK)):
        for symmetric in (False, True):
            parts = quant.allocate_codes(x, tuple(x.shape), bits, group, symmetric)
            grid = "symmetric" if symmetric else "affine"
            for stochastic in (True, False):
                rounding = "stochastic" if stochastic else "nearest"
                size = f", groups of {group}" if group != GROUP else ""
                call = partial(
                    _core.quantize_blockwise, x, *parts, counter, bits, stochastic, group, 1, 0, 0
                )
                name = f"INT{bits} {grid} {rounding}{size}"
                against = _NF4 if bits == 4 else _EAGER if stochastic else _DYNAMIC
                rows.append(Row(Case(name, call), _bytes(x, *parts), against))
    return rows


def _quantize_rows(count: int, dtype: torch.dtype, bitsandbytes: ModuleType | None) -> list[Row]:
    x = torch.randn(count).to(dtype)
    rows = _integer_rows(x)
    public = partial(quant.quantize_blockwise, x, bits=8, group_size=GROUP)
    eager = partial(_eager_int8, x)
    moved = rows[0].moved
    rows += [
        Row(Case("ops.quantize_blockwise, INT8 affine stochastic", public), moved, _EAGER),
        Row(Case(_EAGER, eager), None),
    ]
    if bitsandbytes is not None:
        call = partial(
            bitsandbytes.functional.quantize_4bit, x, quant_type="nf4", blocksize=NF4_BLOCK
        )
        moved = x.nbytes + count // 2 + 4 * count // NF4_BLOCK
        rows.append(Row(Case(_NF4, call), moved))
        rows.append(Row(Case(_DYNAMIC, _bnb_dynamic(bitsandbytes, x)), _dynamic_bytes(x)))
    return rows


def _bnb_dynamic(
    bitsandbytes: ModuleType, x: torch.Tensor, code: torch.Tensor | None = None
) -> Callable[[], object]:
    return partial(bitsandbytes.functional.quantize_blockwise, x, code=code, blocksize=GROUP)


def _dynamic_bytes(x: torch.Tensor) -> int:
    return x.nbytes + x.numel() + 4 * x.numel() // GROUP


def _dynamic_rows(count: int, dtype: torch.dtype, bitsandbytes: ModuleType | None) -> list[Row]:
    x = torch.randn(count).to(dtype)
    positive = x.square()
    codes, scale = torch.empty(count, dtype=torch.uint8), torch.empty(count // GROUP)
    counter = torch.zeros(1, dtype=torch.int64)
    moved = _dynamic_bytes(x)

    def native(values: torch.Tensor, signed: bool) -> Callable[[], object]:
        return partial(_core.quantize_dynamic, values, codes, scale, counter, signed, 8, GROUP)

    public = partial(dynamic.quantize_dynamic, x)
    rows = [
        Row(Case("dynamic signed", native(x, True)), moved, _DYNAMIC),
        Row(Case("dynamic unsigned, of squares", native(positive, False)), moved, _UNSIGNED),
        Row(Case("ops.quantize_dynamic, signed", public), moved, _DYNAMIC),
    ]
    if bitsandbytes is not None:
        unsigned = bitsandbytes.functional.create_dynamic_map(signed=False)
        rows += [
            Row(Case(_DYNAMIC, _bnb_dynamic(bitsandbytes, x)), moved),
            Row(Case(_UNSIGNED, _bnb_dynamic(bitsandbytes, positive, unsigned)), moved),
        ]
    return rows


def _dequantize_rows(count: int, dtype: torch.dtype, bitsandbytes: ModuleType | None) -> list[Row]:
    x = torch.randn(count).to(dtype)
    out = torch.empty_like(x)
    by_map, by_nf4 = "bitsandbytes dequantize_blockwise", "bitsandbytes dequantize_4bit nf4"
    rows = []
    for bits, symmetric in ((8, False), (8, True), (4, False), (4, True)):
        parts = quant.quantize_blockwise(x, bits=bits, group_size=GROUP, symmetric=symmetric)
        codes, scale, zero_point, _ = parts
        name = f"INT{bits} {'symmetric' if symmetric else 'affine'}"
        call = partial(_core.dequantize_blockwise, codes, scale, zero_point, out, bits, GROUP)
        moved = _bytes(codes, scale, zero_point, out)
        against = by_map if bits == 8 else by_nf4
        rows.append(Row(Case(name, call), moved, against))
        if not symmetric:
            public = partial(
                quant.dequantize_blockwise,
                codes,
                scale,
                zero_point,
                shape=tuple(x.shape),
                dtype=str(dtype).removeprefix("torch."),
                bits=bits,
            )
            rows.append(Row(Case(f"ops.dequantize_blockwise, {name}", public), moved, against))
    if dtype == torch.float32:
        levels, scale, _ = dynamic.quantize_dynamic(x)
        call = partial(_core.dequantize_dynamic, levels, scale, out, True, 8, GROUP)
        public = partial(dynamic.dequantize_dynamic, levels, scale)
        for name, run_it in (("dynamic signed", call), ("ops.dequantize_dynamic, signed", public)):
            rows.append(Row(Case(name, run_it), _bytes(levels, scale, out), by_map))
    if bitsandbytes is not None:
        functional = bitsandbytes.functional
        packed, state = functional.quantize_blockwise(x, blocksize=GROUP)
        call = partial(functional.dequantize_blockwise, packed, state)
        rows.append(Row(Case(by_map, call), _bytes(packed, state.absmax, out)))
        packed, state = functional.quantize_4bit(x, quant_type="nf4", blocksize=NF4_BLOCK)
        call = partial(functional.dequantize_4bit, packed, state)
        rows.append(Row(Case(by_nf4, call), _bytes(packed, state.absmax, out)))
    return rows


def _bfloat16_rows(count: int, dtype: torch.dtype, _: ModuleType | None) -> list[Row]:
    if dtype != torch.float32:
        return []
    x = torch.randn(count)
    out = torch.empty(count, dtype=torch.bfloat16)
    moved, eager = _bytes(x, out), "torch eager, bfloat16 stochastic"
    native = partial(_core.round_bf16_stochastic, x, out, 1, 0, 0)
    nearest = "torch copy_ to bfloat16, nearest"
    return [
        Row(Case("bfloat16 stochastic", native), moved, eager),
        Row(
            Case("ops.round_bf16_stochastic", partial(quant.round_bf16_stochastic, x)),
            moved,
            eager,
        ),
        Row(Case(eager, partial(_eager_bfloat16, x)), None),
        Row(Case(nearest, partial(out.copy_, x)), moved),
    ]


def _eager_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = x.float().view(-1, GROUP)
    low = groups.amin(1, keepdim=True).clamp_(max=0)
    scale = (groups.amax(1, keepdim=True).clamp_(min=0) - low) / 255
    zero = torch.round(-low / scale)
    codes = (groups / scale).add_(torch.rand_like(groups)).floor_().add_(zero).clamp_(0, 255)
    return codes.to(torch.uint8).view_as(x), scale, zero.to(torch.uint8)


def _eager_bfloat16(x: torch.Tensor) -> torch.Tensor:
    bits = x.view(torch.int32)
    noisy = torch.randint_like(bits, 1 << 16).add_(bits).bitwise_and_(-(1 << 16))
    return noisy.view(torch.float32).to(torch.bfloat16)


_SECTIONS = (
    ("Integer grids", _quantize_rows),
    ("Dynamic map", _dynamic_rows),
    ("Dequantize", _dequantize_rows),
    ("Stochastic rounding to bfloat16", _bfloat16_rows),
)
