"""Kernels that read and write memory once: how near they come to a copy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from benches.gpu_sections.context import Context
from benches.gpu_sections.findings import Findings
from benches.gpu_sections.kernels import Kernel, compare_with_cpu, families
from benches.gpu_sections.timing import in_a_row
from benches.tables import Table, number, percent

#: Bytes of each kernel's floats, where the card has twelve times as much free.
BYTES = 1 << 30
QUICK_BYTES = 1 << 18
REPEATS = 25
TARGET = 0.85

HEAD = ("kernel", "ms, median", "ms, min", "bytes/element", "GB/s", "copy, GB/s", "of copy")


@dataclass(frozen=True)
class Row:
    """What was measured of a kernel.

    Attributes:
        name: Of the kernel.
        count: Elements it works on.
        moved: Bytes it has to read and write.
        times: Seconds of its calls.
        copy_rate: Bytes per second of a copy right before.
    """

    name: str
    count: int
    moved: int
    times: list[float]
    copy_rate: float

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.moved / statistics.median(self.times)

    def cells(self) -> tuple[str, ...]:
        """The columns of `HEAD`."""
        return (
            self.name,
            number(1e3 * statistics.median(self.times)),
            number(1e3 * min(self.times)),
            number(self.moved / self.count),
            number(self.rate / 1e9),
            number(self.copy_rate / 1e9),
            percent(self.rate / self.copy_rate),
        )


def run(context: Context, findings: Findings) -> None:
    """Times every kernel right after a copy, so that both meet the card in the same state."""
    size = QUICK_BYTES if context.quick else BYTES
    while size * 12 > context.free_bytes() and size > QUICK_BYTES:
        size //= 2
    if size < BYTES:
        findings.note(f"Floats of {size / 2**20:g} MiB in place of {BYTES / 2**20:g} MiB.")
    source = torch.empty(size // 4, device=context.device).normal_()
    copy = partial(torch.empty_like(source).copy_, source)
    rows: list[Row] = []
    for make in families(size, context.device):
        before = len(rows)
        try:
            _family(context, findings, make, copy, rows)
        except Exception as error:  # of one kernel: the others are still of interest
            what = f"kernel {len(rows) - before + 1} of {getattr(make, 'func', make).__name__}"
            findings.check(f"{what}: {type(error).__name__}: {error}", right=False)
        context.release()
    rate = statistics.median(row.copy_rate for row in rows) if rows else 0.0
    title = f"Kernels that move memory, {size / 2**20:g} MiB of floats"
    notes = (
        "Bytes are those that have to move: inputs read once, outputs written once. The copy is"
        f" torch's, of {size / 2**20:g} MiB, bytes read and written together, timed right before"
        f" each kernel; the median over all kernels is {number(rate / 1e9)} GB/s.",
        f"Medians of {_repeats(context)} calls in a row; codes, scales, moments and parameters at"
        " both ends of the tensors are compared with the CPU's before.",
    )
    findings.table(Table(title, HEAD, [row.cells() for row in rows], notes))


def _repeats(context: Context) -> int:
    return 5 if context.quick else REPEATS


def _family(
    context: Context,
    findings: Findings,
    make: Callable[[], Iterable[Kernel]],
    copy: Callable[[], torch.Tensor],
    rows: list[Row],
) -> None:
    """Checks and times the kernels of one maker, whose memory is free again afterwards."""
    moved = 2 * copy().nbytes
    for kernel in make():
        findings.check(*compare_with_cpu(kernel))
        copies = in_a_row(context, copy, _repeats(context))
        times = in_a_row(context, kernel.run, _repeats(context))
        row = Row(kernel.name, kernel.count, kernel.moved, times, moved / statistics.median(copies))
        rows.append(row)
        ours, peer = (f"{number(r / 1e9)} GB/s" for r in (row.rate, row.copy_rate))
        findings.share(row.name, ours, f"{peer}, copy", row.rate / row.copy_rate, TARGET)
