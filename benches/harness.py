"""Interleaved timing, and the machine's limits.

The contenders of a comparison run in turn, in one process and on the same input, so that a change
of clock or load hits all of them alike. A ratio is the median of the ratios inside the rounds, not
the ratio of two medians.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

import torch

_MAX_CALLS = 1 << 20
#: Idle time before every sample. The threads of a pool spin for some milliseconds after their work,
#: and would take the core that the next contender's pool needs.
_REST_SECONDS = 0.015


@dataclass(frozen=True)
class Limits:
    """What the machine does at best, measured in this run.

    Attributes:
        copy: Bytes per second, read and written together, of a copy that fits no cache.
        flops: Float32 operations per second of `torch.mm`.
    """

    copy: float
    flops: float


@dataclass(frozen=True)
class Options:
    """What a benchmark is asked to do."""

    threads: int
    repeats: int | None
    quick: bool
    limits: Limits

    def rounds(self, default: int) -> int:
        """Timed rounds: what the caller asked for, or the benchmark's own number."""
        return self.repeats or default


@dataclass(frozen=True)
class Case:
    """One contender.

    Attributes:
        name: Unique within a comparison.
        run: The timed call.
        before: Called before each timed call, untimed.
    """

    name: str
    run: Callable[[], object]
    before: Callable[[], object] | None = None


@dataclass
class Samples:
    """Seconds per call of every contender, one entry for each round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, times: dict[str, float]) -> None:
        """Adds a round."""
        for name, value in times.items():
            self.seconds.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        """The median of a contender."""
        return statistics.median(self.seconds[name])

    def minimum(self, name: str) -> float:
        """The fastest round of a contender."""
        return min(self.seconds[name])

    def ratio(self, above: str, below: str) -> float:
        """The median over the rounds of one contender's time over another's."""
        pairs = zip(self.seconds[above], self.seconds[below], strict=True)
        return statistics.median(a / b for a, b in pairs)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keeps Python's garbage collector out of the timings."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def timed(case: Case, calls: int = 1) -> float:
    """Seconds per call, over so many calls in a row."""
    if case.before is not None:
        case.before()
    time.sleep(_REST_SECONDS)
    run = case.run
    start = time.perf_counter()
    for _ in itertools.repeat(None, calls):
        run()
    return (time.perf_counter() - start) / calls


def one_round(
    cases: Sequence[Case], index: int, calls: dict[str, int] | None = None
) -> dict[str, float]:
    """Times every case once, backwards in odd rounds: no case always follows the same one."""
    order = cases if index % 2 == 0 else cases[::-1]
    return {case.name: timed(case, calls[case.name] if calls else 1) for case in order}


def interleave(cases: Sequence[Case], rounds: int, sample_seconds: float = 0.0) -> Samples:
    """Times cases in turn.

    Args:
        cases: The contenders; each is called once or more for warming up.
        rounds: Timed rounds.
        sample_seconds: A short call is repeated until a sample takes about so long; one with a
            `before` is not.
    """
    samples = Samples()
    with no_collection():
        calls = {case.name: _calls(case, sample_seconds) for case in cases}
        for index in range(rounds):
            samples.add(one_round(cases, index, calls))
    return samples


def _calls(case: Case, sample_seconds: float) -> int:
    """How many calls make a sample; this is the warm-up, too."""
    calls, seconds = 1, timed(case)
    if case.before is not None:
        return 1
    while calls * seconds < sample_seconds / 2 and calls < _MAX_CALLS:
        # In steps, since the first calls are slower than what follows.
        calls = min(8 * calls, math.ceil(sample_seconds / seconds), _MAX_CALLS)
        seconds = timed(case, calls)
    return calls


def copy_case(name: str, moved: int) -> Case:
    """`torch`'s copy that reads half of `moved` bytes and writes the other half."""
    # Written pages: fresh ones would all be the system's one page of zeros.
    source = torch.ones(moved // 2, dtype=torch.uint8)
    return Case(name, partial(torch.empty_like(source).copy_, source))


def measure_limits(quick: bool) -> Limits:
    """The copy bandwidth and the rate of float32 matrix products."""
    moved = (64 if quick else 512) << 20
    size = 512 if quick else 1024
    a, b, out = (torch.randn(size, size) for _ in range(3))
    cases = [copy_case("copy", moved), Case("mm", partial(torch.mm, a, b, out=out))]
    samples = interleave(cases, rounds=5, sample_seconds=0.05)
    return Limits(moved / samples.minimum("copy"), 2 * size**3 / samples.minimum("mm"))


def peer(module: str) -> ModuleType | None:
    """Another package, or None where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None
