"""AdamW with small moments: one large tensor, and the parameter list of a model."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benches.harness import Case, Options, Samples, copy_case, interleave, peer, timed
from benches.report import Report
from benches.tables import Table, number, percent
from benches.workloads import parameter_shapes, state_bytes
from gradpress.optim import AdamW8bit

LR = 1e-4
WEIGHT_DECAY = 1e-2
GRADIENT_SETS = 2

_OURS = "gradpress AdamW8bit"
_FUSED = "torch AdamW(fused=True)"

Params = list[torch.nn.Parameter]
Make = Callable[[Params], torch.optim.Optimizer]


@dataclass
class Contender:
    """An optimizer on parameters of its own.

    Attributes:
        name: Unique within a comparison.
        params: Its copies of the parameters.
        optimizer: Already stepped once.
        first_step: Seconds of that step, which allocates, and compiles where that is done.
    """

    name: str
    params: Params
    optimizer: torch.optim.Optimizer
    first_step: float

    def moved(self) -> int:
        """Bytes a step must move: gradients read, parameters and states read and written."""
        weights = sum(p.nbytes for p in self.params)
        return 3 * weights + 2 * state_bytes(self.optimizer)


def run(options: Options) -> Report:
    """Times one large tensor in float32 and bfloat16, and a list of tensors."""
    side = 1024 if options.quick else 4096
    size = "tiny" if options.quick else "60M"
    rounds = options.rounds(11)
    with _fresh_compilations():
        notes: list[str] = []
        sections = [
            (f"One tensor of {side} x {side}, float32", [(side, side)], torch.float32),
            (f"One tensor of {side} x {side}, bfloat16", [(side, side)], torch.bfloat16),
            (f"All tensors of a LLaMA, {size}, float32", parameter_shapes(size), torch.float32),
        ]
        tables = []
        for index, (title, shapes, dtype) in enumerate(sections):
            # Each shape and dtype is compiled anew, which a quick run need not wait for.
            makers = _makers(dtype, notes, compiled=index == 0 or not options.quick)
            tables.append(_measure(title, shapes, dtype, makers, rounds))
    return Report("AdamW with small moments", [*_ABOUT, *dict.fromkeys(notes)], rounds, tables)


_ABOUT = (
    "Every row is `optimizer.step()` with weight decay on the same gradients, which change from"
    " step to step. 8-bit rows of gradpress, bitsandbytes and torchao do nearly the same job:"
    " moments of one byte with a float32 scale for 256 elements. They differ in rounding:"
    " on bfloat16 parameters gradpress rounds stochastically, and torchao is asked to;"
    " bitsandbytes rounds to nearest. `torch AdamW(fused=True)` keeps moments in the parameters'"
    " dtype, so that in bfloat16 its arithmetic is another one. torchao compiles its step for every"
    " shape and dtype: `first step` is the very first call, with the compilation and an empty"
    " cache; all other numbers leave it out.",
    "`bytes/param` is the least a step can move: gradients read, parameters and states read and"
    " written. `of equal copy` is the time of a copy of so many bytes, read and written together,"
    " over the step's time. `x` is how many times as long the row takes as `gradpress AdamW8bit`.",
)


@contextmanager
def _fresh_compilations() -> Iterator[None]:
    """An empty compilation cache, so that compile times do not depend on earlier runs."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    folder = tempfile.mkdtemp(prefix="gradpress-bench-")
    os.environ[variable] = folder
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before
        shutil.rmtree(folder, ignore_errors=True)


def _makers(dtype: torch.dtype, notes: list[str], compiled: bool) -> dict[str, Make]:
    shared: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY}
    makers: dict[str, Make] = {_OURS: partial(AdamW8bit, **shared)}
    for bits in (4, 32):
        try:
            AdamW8bit([torch.nn.Parameter(torch.zeros(1))], state_bits=bits)
        except ValueError as error:
            notes.append(f"Left out: `AdamW8bit(state_bits={bits})`: {error}.")
            continue
        makers[f"{_OURS}(state_bits={bits})"] = partial(AdamW8bit, state_bits=bits, **shared)
    makers[_FUSED] = partial(torch.optim.AdamW, fused=True, **shared)
    if (bitsandbytes := peer("bitsandbytes")) is not None:
        makers["bitsandbytes AdamW8bit"] = partial(bitsandbytes.optim.AdamW8bit, **shared)
    if (torchao := peer("torchao.optim")) is None or shutil.which("g++") is None:
        notes.append("Left out: torchao, which is not installed or has no g++ to compile with.")
    elif compiled:
        rounding = {"bf16_stochastic_round": True} if dtype == torch.bfloat16 else {}
        names = ["AdamW8bit"]
        if f"{_OURS}(state_bits=4)" in makers:
            names.append("AdamW4bit")
        for name in names:
            makers[f"torchao {name}"] = partial(getattr(torchao, name), **rounding, **shared)
    return makers


def _measure(
    title: str,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    makers: dict[str, Make],
    rounds: int,
) -> Table:
    values = [torch.randn(tuple(shape)).mul_(0.02).to(dtype) for shape in shapes]
    gradients = [
        [torch.randn(tuple(shape)).mul_(1e-3).to(dtype) for shape in shapes]
        for _ in range(GRADIENT_SETS)
    ]
    contenders, cases = [], []
    for name, make in makers.items():
        params = [torch.nn.Parameter(value.clone()) for value in values]
        optimizer = make(params)
        case = Case(name, optimizer.step, _next_gradients(params, gradients))
        contenders.append(Contender(name, params, optimizer, timed(case)))
        cases.append(case)
    copies = {f"copy {c.moved()}": c.moved() for c in contenders}
    cases += [copy_case(name, moved) for name, moved in copies.items()]
    samples = interleave(cases, rounds)
    return _table(title, contenders, samples, sum(v.numel() for v in values))


def _next_gradients(
    params: Params, gradients: Sequence[Sequence[torch.Tensor]]
) -> Callable[[], None]:
    sets = itertools.cycle(gradients)

    def assign() -> None:
        for p, grad in zip(params, next(sets), strict=True):
            p.grad = grad

    return assign


def _table(title: str, contenders: Sequence[Contender], samples: Samples, count: int) -> Table:
    head = (
        "optimizer",
        "ms/step",
        "min, ms",
        "ns/param",
        "x",
        "state B/param",
        "bytes/param",
        "of equal copy",
        "first step, s",
    )
    rows = []
    for contender in contenders:
        name, moved = contender.name, contender.moved()
        seconds = samples.median(name)
        rows.append(
            (
                name,
                number(1e3 * seconds),
                number(1e3 * samples.minimum(name)),
                number(1e9 * seconds / count),
                number(samples.ratio(name, _OURS)),
                number(state_bytes(contender.optimizer) / count),
                number(moved / count),
                percent(samples.ratio(f"copy {moved}", name)),
                number(contender.first_step),
            )
        )
    return Table(title, head, rows)
