"""Running a benchmark: the facts its tables stand under, and the file they are written to."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benches.harness import Options, measure_limits
from benches.tables import Table, commit, facts_markdown
from gradpress import _core, environment

RESULTS = Path(__file__).parent / "results"
_PEERS = ("bitsandbytes", "torchao", "galore-torch", "q-galore-torch")


@dataclass(frozen=True)
class Report:
    """What a benchmark found: what was compared, in words, and the tables."""

    title: str
    about: Sequence[str]
    rounds: int
    tables: Sequence[Table]


def origin() -> list[tuple[str, str]]:
    """When and with which build numbers are taken."""
    return [
        ("date", datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
        ("commit", commit()),
        ("native core", _build()),
    ]


def versions() -> str:
    """The versions of gradpress, torch and the peers that are installed."""
    installed = environment.report().versions
    found = {"gradpress": installed["gradpress"], "torch": installed["torch"]}
    for package in _PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return ", ".join(f"{name} {version}" for name, version in found.items())


def facts(options: Options, rounds: int) -> list[tuple[str, str]]:
    """Where and with what the numbers were taken."""
    machine = environment.report()
    limits = options.limits
    return [
        *origin(),
        ("CPU", machine.processor),
        ("cores, threads, SIMD", f"{machine.cores}, {options.threads}, {machine.simd}"),
        ("load average at the end", f"{os.getloadavg()[0]:.2f}"),
        ("versions", versions()),
        ("sizes", "quick: too small to quote" if options.quick else "full"),
        ("timed rounds", str(rounds)),
        ("copy out of cache", f"{limits.copy / 1e9:.1f} GB/s, read and written together"),
        ("float32 torch.mm", f"{limits.flops / 1e9:.0f} GFLOP/s"),
    ]


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
        tables = [t.markdown() for t in report.tables]
        parts = [f"# {report.title}", about, facts_markdown(rows), *tables]
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    width = max(len(key) for key, _ in rows)
    lines = "\n".join(f"{key:<{width}}  {value}" for key, value in rows)
    print("\n\n".join([report.title, about, lines, *(t.text() for t in report.tables)]) + "\n")
