"""Which kernels a call launches, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._C._autograd import DeviceType

from benches.gpu_sections.context import Context
from benches.gpu_sections.findings import Findings
from benches.tables import Table, number, percent
from gradpress.ops import runtime

#: Lines of the profiler that are no kernels.
_NO_KERNELS = ("Memcpy", "Memset", "Optimizer.", "ProfilerStep", "Activity Buffer")
#: Kernels that a table shows.
_SHOWN = 12


@dataclass(frozen=True)
class Launches:
    """The kernels of one call.

    Attributes:
        seconds: On the card, by kernel.
        calls: Launches, by kernel.
        span: From the call to the last kernel's end, with the profiler's own cost.
    """

    seconds: dict[str, float]
    calls: dict[str, int]
    span: float

    def count(self, ours: bool) -> int:
        """Launches of gradpress's kernels, or of all others."""
        own = own_kernels()
        return sum(n for name, n in self.calls.items() if (name in own) == ours)

    @property
    def busy(self) -> float:
        """Seconds that the card computed."""
        return sum(self.seconds.values())

    def table(self, title: str) -> Table:
        """The kernels that take longest."""
        names = sorted(self.seconds, key=self.seconds.__getitem__, reverse=True)
        rows = [
            (
                _short(name),
                str(self.calls[name]),
                number(1e3 * self.seconds[name]),
                percent(self.seconds[name] / self.busy),
            )
            for name in names[:_SHOWN]
        ]
        rows.append(("all", str(sum(self.calls.values())), number(1e3 * self.busy), percent(1.0)))
        return Table(title, ("kernel", "launches", "ms on the card", "share"), rows)


def own_kernels() -> set[str]:
    """The names of gradpress's kernels."""
    return {name for *_, kernels in runtime.kernel_modules() for name in kernels}


def profile(
    context: Context, findings: Findings, run: Callable[[], object], what: str
) -> Launches | None:
    """The kernels of one call, or None where there is no card or the profiler does not work."""
    if not context.on_card:
        findings.note(f"{what}: kernels are counted on a card only.")
        run()
        return None
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=kinds) as profiler:
            start = time.perf_counter()
            run()
            context.synchronize()
            span = time.perf_counter() - start
        events = list(profiler.events() or [])
    except Exception as error:  # CUPTI may be missing or forbidden, which is told in many ways
        findings.note(f"{what}: torch.profiler does not work here: {error}")
        return None
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in events:
        if event.device_type != DeviceType.CUDA:
            continue
        if event.name.startswith(_NO_KERNELS) or getattr(event, "is_user_annotation", False):
            continue
        calls[event.name] = calls.get(event.name, 0) + 1
        seconds[event.name] = seconds.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6
    if not calls:
        findings.note(f"{what}: torch.profiler saw no kernel.")
        return None
    return Launches(seconds, calls, span)


def _short(name: str) -> str:
    """Without the template arguments of torch's kernels, and without a table's separator."""
    plain = name.replace("|", "/").replace("\n", " ")
    return plain if len(plain) <= 60 else plain[:57] + "..."
