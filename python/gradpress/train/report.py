"""Plots and tables of a run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradpress.train.errors import require
from gradpress.train.metrics import EVALUATION, STEP

Records = list[dict[str, Any]]


def figure(columns: int, width: float) -> tuple[Any, list[Any]]:
    """A figure with a row of axes, independent of any display.

    Raises:
        UserError: `matplotlib` is not installed.
    """
    require("matplotlib.backends.backend_agg")
    made = require("matplotlib.figure").Figure(figsize=(width, 4.5), layout="constrained")
    return made, [made.add_subplot(1, columns, index + 1) for index in range(columns)]


def draw_losses(axes: Any, records: Records, label: str = "", color: str = "tab:blue") -> None:
    """Draws the training loss (thin) and the validation loss (dots) of one run."""
    prefix = f"{label} " if label else ""
    steps = [record for record in records if record["kind"] == STEP]
    evaluations = [record for record in records if record["kind"] == EVALUATION]
    axes.plot(
        [record["step"] for record in steps],
        [record["loss"] for record in steps],
        color=color,
        alpha=0.35,
        linewidth=0.8,
        label=f"{prefix}training",
    )
    axes.plot(
        [record["step"] for record in evaluations],
        [record["loss"] for record in evaluations],
        color=color,
        marker="o",
        markersize=4,
        label=f"{prefix}validation",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()


def plot_losses(records: Records, path: Path, title: str) -> None:
    """Writes `loss.png`."""
    made, (axes,) = figure(1, 7.5)
    draw_losses(axes, records)
    axes.set_title(title)
    made.savefig(path, dpi=120)


def median_of(records: Records, key: str) -> float:
    """Median of a value over the steps of a run; NaN when there are none."""
    values = [record[key] for record in records if record["kind"] == STEP]
    return statistics.median(values) if values else float("nan")


def last_evaluation(records: Records) -> dict[str, Any] | None:
    """The newest evaluation, if any."""
    evaluations = [record for record in records if record["kind"] == EVALUATION]
    return evaluations[-1] if evaluations else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain text; the first column to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rendered = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rendered.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(rendered)


def megabytes(count: int) -> str:
    """Bytes as decimal megabytes."""
    return f"{count / 1e6:.2f} MB"
