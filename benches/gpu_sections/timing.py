"""Timing on a card by events, and by the host's clock in a dry run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benches.gpu_sections.context import Context
from benches.harness import Case, Samples, no_collection

Call = Callable[[], object]


def in_a_row(context: Context, run: Call, repeats: int, warm: int = 3) -> list[float]:
    """Seconds of each of several calls that the host issues without waiting.

    The warm-up calls keep the card busy while the host gets ahead of it, so that what is measured
    is the card alone. For calls that take longer on the card than on the host.
    """
    if not context.on_card:
        for _ in range(warm):
            run()
        return [_by_clock(run) for _ in range(repeats)]
    context.synchronize()
    marks = [_event() for _ in range(repeats + 1)]
    with no_collection():
        for _ in range(warm):
            run()
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        context.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def alone(context: Context, run: Call) -> float:
    """Seconds of one call on an idle card: from the call to its last kernel's end."""
    if not context.on_card:
        return _by_clock(run)
    start, end = _event(), _event()
    context.synchronize()
    start.record()
    run()
    end.record()
    context.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def interleave(context: Context, cases: Sequence[Case], rounds: int, warm: int = 1) -> Samples:
    """Times cases in turn, each alone on the card, backwards in every other round."""
    samples = Samples()
    with no_collection():
        for index in range(-warm, rounds):
            times = {}
            for case in cases if index % 2 == 0 else cases[::-1]:
                if case.before is not None:
                    case.before()
                times[case.name] = alone(context, case.run)
            if index >= 0:
                samples.add(times)
    return samples


def _event() -> Any:
    """A mark in what the card is told to do, with a time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _by_clock(run: Call) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
