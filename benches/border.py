"""What a call into the native core costs before any arithmetic.

Tensors of 16 elements, and lists of tensors of one element: what is left is the work at the
border, that is reading tensors, checking them, letting go of the interpreter, and coming back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benches.harness import Case, Options, Samples, interleave
from benches.report import Report
from benches.tables import Table, number
from gradpress import _core
from gradpress.ops import dynamic, lowrank, optim, quant

ELEMENTS = 16
TENSORS = 300
ONE_TENSOR_TARGET = 1.5e-6
LIST_TARGET = 60e-6
SAMPLE_SECONDS = 0.01

_ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


@dataclass(frozen=True)
class Row:
    """A call, and how many tensors cross in it."""

    name: str
    run: Callable[[], object]
    tensors: int
    target: float | None = None

    @property
    def case(self) -> Case:
        """For the harness."""
        return Case(self.name, self.run)


def run(options: Options) -> Report:
    """Times one-tensor calls and list calls."""
    rounds = options.rounds(15)
    single, lists = _single_rows(), _list_rows()
    # Two comparisons, since the lists would evict the small tensors from the first cache.
    tables = [
        _table(
            f"One call, {ELEMENTS} elements",
            single,
            interleave([row.case for row in single], rounds, SAMPLE_SECONDS),
        ),
        _table(
            "One call, lists of tensors of one element",
            lists,
            interleave([row.case for row in lists], rounds, SAMPLE_SECONDS),
        ),
    ]
    return Report("Cost of a call into the native core", _ABOUT, rounds, tables)


_ABOUT = (
    "Compared are calls on so few elements that arithmetic does not count: `_core.*` is the native"
    " function itself, on outputs made beforehand; `ops.*` is the public function around it, which"
    " also checks, allocates its outputs where it returns them, and tells autograd what was"
    " written. `torch` calls are of the same size, not of the same meaning. `empty call` is the"
    " loop and a Python function that does nothing; it is contained in every number.",
    f"Targets, to be read beside the medians and asserted nowhere: {ONE_TENSOR_TARGET * 1e6:g} µs"
    f" for a call on one tensor, {LIST_TARGET * 1e6:g} µs for a call with {TENSORS} tensors.",
    "`tensors` counts every tensor that the call reads: an Adam step on one parameter reads four."
    " No native function takes a single list. The one with least to do per tensor is"
    " `adamw_direction` with float32 moments: three lists, a few operations per element. With 100"
    " entries it is the call of 300 tensors that the target speaks of.",
)


def _nothing() -> None:
    pass


def _single_rows() -> list[Row]:
    x, other, out = (torch.ones(ELEMENTS) for _ in range(3))
    rounded = torch.empty(ELEMENTS, dtype=torch.bfloat16)
    packed = torch.zeros(ELEMENTS // 2, dtype=torch.uint8)
    codes = torch.empty(ELEMENTS, dtype=torch.uint8)
    scale, zero = torch.ones(1), torch.zeros(1, dtype=torch.uint8)
    levels = torch.zeros(ELEMENTS, dtype=torch.uint8)
    target = ONE_TENSOR_TARGET
    core_quantize = partial(
        _core.quantize_blockwise, x, codes, scale, zero, _counter(), 8, True, ELEMENTS, 0, 0, 0
    )
    return [
        Row("empty call", _nothing, 0),
        Row("_core.unpack_int4", partial(_core.unpack_int4, packed, codes), 2, target),
        Row(
            "_core.round_bf16_stochastic",
            partial(_core.round_bf16_stochastic, x, rounded, 0, 0, 0),
            2,
            target,
        ),
        Row(
            "_core.dequantize_dynamic",
            partial(_core.dequantize_dynamic, levels, scale, out, True, 8, 256),
            3,
            target,
        ),
        Row("_core.quantize_blockwise", core_quantize, 4, target),
        Row("ops.quant.unpack_int4", partial(quant.unpack_int4, packed, ELEMENTS), 2),
        Row("ops.quant.round_bf16_stochastic", partial(quant.round_bf16_stochastic, x), 2),
        Row(
            "ops.dynamic.dequantize_dynamic",
            partial(dynamic.dequantize_dynamic, levels, scale),
            3,
        ),
        Row("ops.quant.quantize_blockwise", partial(quant.quantize_blockwise, x), 4),
        Row("torch.empty (one output)", partial(torch.empty, (ELEMENTS,)), 1),
        Row("torch.add(out=)", partial(torch.add, x, other, out=out), 3),
        Row("torch.Tensor.copy_", partial(out.copy_, x), 2),
    ]


def _list_rows() -> list[Row]:
    count = TENSORS // 3
    native = "_core.adamw_direction"
    return [
        Row("empty call", _nothing, 0),
        Row(f"{native}, {count} entries", _core_direction(count), TENSORS + 1, LIST_TARGET),
        Row(f"{native}, {TENSORS} entries", _core_direction(TENSORS), 3 * TENSORS + 1),
        Row(
            f"ops.optim.adamw_direction, {TENSORS} entries",
            _public_direction(TENSORS),
            3 * TENSORS + 1,
        ),
        Row(f"_core.project, {count} entries", partial(_core.project, *_matrices(count)), TENSORS),
        Row(
            f"ops.lowrank.project, {TENSORS} entries",
            partial(lowrank.project, *_matrices(TENSORS)),
            3 * TENSORS,
        ),
        Row(f"ops.optim.adamw_step, {TENSORS} entries", _public_step(), 4 * TENSORS + 1),
        Row(f"ops.optim.adamw_blockwise_step, {TENSORS} entries", _public_8bit(), 6 * TENSORS + 1),
        Row(
            f"torch._foreach_add_(xs, 1), {TENSORS} entries",
            partial(torch._foreach_add_, _zeros(TENSORS), 1.0),
            TENSORS,
        ),
        Row(
            f"torch._foreach_add_(xs, ys), {TENSORS} entries",
            partial(torch._foreach_add_, _zeros(TENSORS), _zeros(TENSORS)),
            2 * TENSORS,
        ),
    ]


def _zeros(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    # Zero gradients keep zero moments: no call drifts into numbers that are slow to compute with.
    return [torch.zeros(1, dtype=dtype) for _ in range(count)]


def _matrices(count: int) -> tuple[list[torch.Tensor], ...]:
    grads, bases, outs = ([torch.ones(1, 1) for _ in range(count)] for _ in range(3))
    return grads, bases, outs


def _counter() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64)


def _core_direction(count: int) -> Callable[[], object]:
    lists = [_zeros(count) for _ in range(3)]
    numbers = (*_ADAM.values(), False, 1.0)
    return partial(_core.adamw_direction, *lists, [1] * count, _counter(), *numbers)


def _public_direction(count: int) -> Callable[[], object]:
    lists = [_zeros(count) for _ in range(3)]
    return partial(optim.adamw_direction, *lists, steps=[1] * count, nonfinite=_counter(), **_ADAM)


def _step_options() -> dict[str, object]:
    return {
        "steps": [1] * TENSORS,
        "tensor_ids": list(range(TENSORS)),
        "nonfinite": _counter(),
        "weight_decay": 0.0,
        **_ADAM,
    }


def _public_step() -> Callable[[], object]:
    lists = [_zeros(TENSORS) for _ in range(4)]
    return partial(optim.adamw_step, *lists, **_step_options())


def _public_8bit() -> Callable[[], object]:
    lists = [_zeros(TENSORS), _zeros(TENSORS)]
    for _ in range(2):
        lists += [_zeros(TENSORS, torch.uint8), _zeros(TENSORS)]
    return partial(optim.adamw_blockwise_step, *lists, **_step_options())


def _table(title: str, rows: list[Row], samples: Samples) -> Table:
    head = ("call", "tensors", "µs, median", "µs, min", "µs per tensor", "target, µs")
    cells = []
    for row in rows:
        median, least = samples.median(row.name), samples.minimum(row.name)
        each = number(1e6 * median / row.tensors) if row.tensors else "-"
        target = number(1e6 * row.target, 2) if row.target else "-"
        cells.append(
            (row.name, str(row.tensors), number(1e6 * median), number(1e6 * least), each, target)
        )
    return Table(title, head, cells)
