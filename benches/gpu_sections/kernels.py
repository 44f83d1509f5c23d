"""The kernels that move memory, with inputs of any size, and their comparison with the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from gradpress import _core
from gradpress.ops import dynamic, lowrank, optim, quant

GROUP = 256
#: Elements that are compared with the CPU at each end of a tensor.
SAMPLE = 1 << 18

Tensors = dict[str, torch.Tensor]
_KEY = (7, 3, 5)  # seed, tensor id, step
_SCALARS = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """A kernel on tensors made beforehand.

    Attributes:
        name: Unique.
        count: Elements it works on.
        call: Does it, on tensors under the names below.
        read: Tensors that are read.
        written: Tensors that are written.
        updated: Tensors that are read and written.
        counter: Counts what is not finite; of one element.
        dithered: Names of the tensors in which random numbers decide about a last step.
        packed: Of these the ones that hold two codes in a byte.
    """

    name: str
    count: int
    call: Callable[[Tensors], object]
    read: Tensors = field(default_factory=dict)
    written: Tensors = field(default_factory=dict)
    updated: Tensors = field(default_factory=dict)
    counter: torch.Tensor | None = None
    dithered: tuple[str, ...] = ()
    packed: bool = False

    @property
    def moved(self) -> int:
        """Bytes that have to be read or written."""
        once = (*self.read.values(), *self.written.values())
        return sum(t.nbytes for t in once) + 2 * sum(t.nbytes for t in self.updated.values())

    def tensors(self) -> Tensors:
        """All tensors by name."""
        found = {**self.read, **self.written, **self.updated}
        return found if self.counter is None else {**found, "counter": self.counter}

    def run(self) -> None:
        """Calls it."""
        self.call(self.tensors())


def compare_with_cpu(kernel: Kernel) -> tuple[str, bool]:
    """Whether the first and the last elements are what the CPU makes of the same inputs.

    The random numbers of an element come from its place in the tensor: at the beginning every bit
    has to be equal, at the end codes and bfloat16 may be a step apart where they are rounded
    stochastically.
    """
    size = min(SAMPLE, kernel.count // 2)
    first = {name: _part(kernel, t, size, end=False) for name, t in kernel.tensors().items()}
    last = {name: _part(kernel, t, size, end=True) for name, t in kernel.tensors().items()}
    kernel.run()
    wrong = []
    for where, before, end in (("first", first, False), ("last", last, True)):
        kernel.call(before)
        for name, want in before.items():
            got = _part(kernel, kernel.tensors()[name], size, end)
            steps = 1 if end and name in kernel.dithered else 0
            packed = kernel.packed and name in kernel.dithered
            if name != "counter" and not _close(got, want, steps, packed):
                wrong.append(f"{name} of the {where} {size} elements")
    if kernel.counter is not None and int(kernel.counter.item()):
        wrong.append("the count of what is not finite")
    return f"{kernel.name}: {', '.join(wrong) or 'equal to the CPU'}", not wrong


def _part(kernel: Kernel, tensor: torch.Tensor, size: int, end: bool) -> torch.Tensor:
    """A copy on the CPU of what belongs to so many elements."""
    if tensor is kernel.counter:
        return torch.zeros(1, dtype=torch.int64)
    length = tensor.numel() * size // kernel.count
    part = tensor[-length:] if end else tensor[:length]
    return part.detach().to("cpu", copy=True)


def _close(got: torch.Tensor, want: torch.Tensor, steps: int, packed: bool) -> bool:
    if not steps:
        return torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    a, b = (_ordered(t, packed) for t in (got, want))
    return bool(((a - b).abs() <= steps).all())


def _ordered(values: torch.Tensor, packed: bool) -> torch.Tensor:
    """Integers that follow each other as the values do."""
    if packed:
        return torch.stack([values & 15, values >> 4]).int()
    if values.dtype == torch.bfloat16:
        bits = values.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)
    return values.int()


def families(size: int, device: torch.device) -> list[Callable[[], Iterable[Kernel]]]:
    """Makers of kernels whose floats have `size` bytes; each holds its memory while it runs."""
    makers: list[Callable[[], Iterable[Kernel]]] = []
    for dtype in _DTYPES:
        makers += [
            partial(_grids, size, device, dtype),
            partial(_maps, size, device, dtype),
            partial(_adamw, size, device, dtype),
        ]
    return [*makers, partial(_bytes, size, device), partial(_updates, size, device)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size // dtype.itemsize, dtype=dtype, device=device).normal_()


def _counter(device: torch.device) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)


def _grids(size: int, device: torch.device, dtype: torch.dtype) -> Iterable[Kernel]:
    x = _random(size, device, dtype)
    counter = _counter(device)
    for bits in (8, 4):
        codes, scale, zero_point = quant.allocate_codes(x, tuple(x.shape), bits, GROUP, False)
        parts: Any = {"codes": codes, "scale": scale, "zero_point": zero_point}
        for stochastic in (True, False):

            def quantize(t: Tensors, bits: int = bits, stochastic: bool = stochastic) -> None:
                out = (t["codes"], t["scale"], t["zero_point"], t["counter"])
                _core.quantize_blockwise(t["x"], *out, bits, stochastic, GROUP, *_KEY)

            yield Kernel(
                f"quantize INT{bits} {'stochastic' if stochastic else 'nearest'}, {_name(dtype)}",
                x.numel(),
                quantize,
                read={"x": x},
                written=parts,
                counter=counter,
                dithered=("codes",) if stochastic else (),
                packed=bits == 4,
            )

        def dequantize(t: Tensors, bits: int = bits) -> None:
            _core.dequantize_blockwise(
                t["codes"], t["scale"], t["zero_point"], t["out"], bits, GROUP
            )

        yield Kernel(
            f"dequantize INT{bits}, {_name(dtype)}",
            x.numel(),
            dequantize,
            read=parts,
            written={"out": torch.empty_like(x)},
        )


def _maps(size: int, device: torch.device, dtype: torch.dtype) -> Iterable[Kernel]:
    x = _random(size, device, dtype)
    counter = _counter(device)
    for bits in (8, 4):
        block = dynamic.BLOCK_SIZES[bits]
        parts = {
            "codes": torch.empty(x.numel() * bits // 8, dtype=torch.uint8, device=device),
            "scale": torch.empty(x.numel() // block, device=device),
        }

        def quantize(t: Tensors, bits: int = bits, block: int = block) -> None:
            out = (t["codes"], t["scale"], t["counter"])
            _core.quantize_dynamic(t["x"], *out, True, bits, block)

        yield Kernel(
            f"quantize dynamic, {bits} bits, {_name(dtype)}",
            x.numel(),
            quantize,
            read={"x": x},
            written=parts,
            counter=counter,
        )
        if dtype != torch.float32:  # the map's inverse gives float32 only
            continue

        def dequantize(t: Tensors, bits: int = bits, block: int = block) -> None:
            _core.dequantize_dynamic(t["codes"], t["scale"], t["out"], True, bits, block)

        yield Kernel(
            f"dequantize dynamic, {bits} bits",
            x.numel(),
            dequantize,
            read=parts,
            written={"out": torch.empty_like(x)},
        )


def _adamw(size: int, device: torch.device, dtype: torch.dtype) -> Iterable[Kernel]:
    param, grad = (_random(size, device, dtype) for _ in range(2))
    count, counter = param.numel(), _counter(device)
    rounded = ("param",) if dtype == torch.bfloat16 else ()
    common: Any = {**_SCALARS, "steps": [5], "tensor_ids": [3], "weight_decay": 0.01, "seed": 7}
    for bits in (8, 4):
        block = dynamic.BLOCK_SIZES[bits]
        states: Any = {}
        for name, signed in (("m", True), ("v", False)):
            values = torch.empty(count, device=device).normal_(std=1e-2)
            codes, scale, _ = dynamic.quantize_dynamic(
                values if signed else values.square_(), signed=signed, bits=bits
            )
            states |= {name: codes, f"{name}_scale": scale}
            del values

        def blockwise(t: Tensors, bits: int = bits, block: int = block) -> None:
            lists = [[t[n]] for n in ("param", "grad", "m", "m_scale", "v", "v_scale")]
            kind: Any = {"bits": bits, "block_size": block}
            step: Any = optim.adamw_blockwise_step
            step(*lists, nonfinite=t["counter"], **common, **kind)

        yield Kernel(
            f"adamw_blockwise_step, {bits} bits, {_name(dtype)}",
            count,
            blockwise,
            read={"grad": grad},
            updated={"param": param, **states},
            counter=counter,
            dithered=rounded,
        )
        del states
    moments = {
        "m": torch.empty(count, device=device).normal_(std=1e-2),
        "v": torch.empty(count, device=device).normal_(std=1e-2).square_(),
    }

    def plain(t: Tensors) -> None:
        lists = [[t[n]] for n in ("param", "grad", "m", "v")]
        optim.adamw_step(*lists, nonfinite=t["counter"], **common)

    yield Kernel(
        f"adamw_step, {_name(dtype)}",
        count,
        plain,
        read={"grad": grad},
        updated={"param": param, **moments},
        counter=counter,
        dithered=rounded,
    )


def _bytes(size: int, device: torch.device) -> Iterable[Kernel]:
    codes = torch.randint(16, (size,), dtype=torch.uint8, device=device)
    packed = torch.empty(size // 2, dtype=torch.uint8, device=device)

    def pack(t: Tensors) -> None:
        _core.pack_int4(t["codes"], t["packed"])

    def unpack(t: Tensors) -> None:
        _core.unpack_int4(t["packed"], t["codes"])

    yield Kernel("pack_int4", size, pack, read={"codes": codes}, written={"packed": packed})
    yield Kernel("unpack_int4", size, unpack, read={"packed": packed}, written={"codes": codes})
    del codes, packed
    x = _random(size, device, torch.float32)
    out = torch.empty(x.numel(), dtype=torch.bfloat16, device=device)

    def narrow(t: Tensors) -> None:
        _core.round_bf16_stochastic(t["x"], t["out"], *_KEY)

    yield Kernel(
        "round_bf16_stochastic",
        x.numel(),
        narrow,
        read={"x": x},
        written={"out": out},
        dithered=("out",),
    )


def _updates(size: int, device: torch.device) -> Iterable[Kernel]:
    update = _random(size, device, torch.float32)
    count = update.numel()
    for bits in (8, 4):
        codes, scale, zero_point, _ = quant.quantize_blockwise(
            torch.randn(count, device=device), bits=bits, group_size=GROUP
        )
        parts: Any = {"codes": codes, "scale": scale, "zero_point": zero_point}

        def requantize(t: Tensors, bits: int = bits) -> None:
            shape = (t["update"].numel() // GROUP, GROUP)
            lowrank.project_back_requantize(
                [t["codes"] if bits == 4 else t["codes"].view(shape)],
                [t["scale"]],
                [t["zero_point"]],
                [shape],
                [t["update"].view(shape)],
                [],
                bits=bits,
                group_size=GROUP,
                scale=1e-3,
                decay=1e-4,
                seed=7,
                tensor_ids=[3],
                steps=[5],
            )

        yield Kernel(
            f"requantize INT{bits} with a dense update",
            count,
            requantize,
            read={"update": update},
            updated=parts,
            dithered=("codes",),
            packed=bits == 4,
        )
