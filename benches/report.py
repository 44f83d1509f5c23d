"""Tables, the facts they stand under, and the files they are written to."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benches.harness import Options, measure_limits
from gradpress import _core, environment

RESULTS = Path(__file__).parent / "results"
_PEERS = ("bitsandbytes", "torchao", "galore-torch", "q-galore-torch")


@dataclass(frozen=True)
class Table:
    """Rows under a head, with remarks below."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Aligned plain text."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]

        def line(row: Sequence[str]) -> str:
            first, *rest = row
            cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
            return "  ".join([f"{first:<{widths[0]}}", *cells]).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([self.title, line(self.head), rule, *map(line, self.rows), *self.notes])

    def markdown(self) -> str:
        """The same for a result file."""
        rule = ["---", *["---:"] * (len(self.head) - 1)]
        rows = ["| " + " | ".join(row) + " |" for row in (self.head, rule, *self.rows)]
        notes = [f"\n{note}" for note in self.notes]
        return "\n".join([f"## {self.title}\n", *rows, *notes])


@dataclass(frozen=True)
class Report:
    """What a benchmark found: what was compared, in words, and the tables."""

    title: str
    about: Sequence[str]
    rounds: int
    tables: Sequence[Table]


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def facts(options: Options, rounds: int) -> list[tuple[str, str]]:
    """Where and with what the numbers were taken."""
    machine = environment.report()
    versions = {"gradpress": machine.versions["gradpress"], "torch": machine.versions["torch"]}
    for package in _PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    limits = options.limits
    return [
        ("date", datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
        ("commit", _commit()),
        ("native core", _build()),
        ("CPU", machine.processor),
        ("cores, threads, SIMD", f"{machine.cores}, {options.threads}, {machine.simd}"),
        ("load average at the end", f"{os.getloadavg()[0]:.2f}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("sizes", "quick: too small to quote" if options.quick else "full"),
        ("timed rounds", str(rounds)),
        ("copy out of cache", f"{limits.copy / 1e9:.1f} GB/s, read and written together"),
        ("float32 torch.mm", f"{limits.flops / 1e9:.0f} GFLOP/s"),
    ]


def _commit() -> str:
    def git(*command: str) -> str:
        folder = Path(__file__).parent
        # Without the lock that `status` takes in passing: somebody else may be working here.
        call = ["git", "--no-optional-locks", *command]
        return subprocess.check_output(call, cwd=folder, text=True).strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _build() -> str:
    """Whether the native core is the optimized one: release builds are stripped."""
    path = Path(_core.__file__ or "")
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    # As a section's name, between zeros: the word alone stands in every Rust library.
    if b"\0.debug_info\0" in path.read_bytes():
        return f"{size} with debug information: a development build, not to be quoted"
    return f"{size}, release"


def run(
    name: str,
    bench: Callable[[Options], Report],
    threads: int,
    repeats: int | None,
    quick: bool,
    write: bool,
) -> None:
    """Runs one benchmark, prints it, and writes its result file where asked."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    options = Options(threads, repeats, quick, measure_limits(quick))
    report = bench(options)
    rows = facts(options, report.rounds)
    about = "\n\n".join(report.about)
    if write:
        table = Table("Run", ("fact", "value"), rows).markdown().replace("---:", "---")
        parts = [f"# {report.title}", about, table, *(t.markdown() for t in report.tables)]
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    width = max(len(key) for key, _ in rows)
    lines = "\n".join(f"{key:<{width}}  {value}" for key, value in rows)
    print("\n\n".join([report.title, about, lines, *(t.text() for t in report.tables)]) + "\n")
