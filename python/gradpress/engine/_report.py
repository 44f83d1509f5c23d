"""What became of each layer: rows that print, convert and plot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gradpress._layer_axis import width
from gradpress._optional import require
from gradpress._tables import Table, TableReport, shape_text
from gradpress.engine import _figure

_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class CompressedLayer:
    """One layer.

    Attributes:
        name: Its qualified name.
        recipe: What was done to it.
        shape: Of its weight.
        sparsity: The share of the weight that is zero.
        error: Of its output, relative to it: the root of the ratio of squared norms over the
            calibration inputs, as far as the recipe knows them: by the sums of their squares
            (inputs taken as uncorrelated), or by all their products; without inputs the same of
            the weight.
        seconds: To compress it, without the runs of the model.
        note: What has to be known of it, or nothing.
    """

    name: str
    recipe: str
    shape: tuple[int, ...]
    sparsity: float
    error: float
    seconds: float
    note: str = ""


@dataclass(frozen=True, repr=False)
class CompressionReport(TableReport):
    """What :func:`gradpress.compress` did; prints as a table, in notebooks too.

    Attributes:
        rows: One :class:`CompressedLayer` for each layer, in the order they were compressed.
        seconds: In all, the runs of the model included.
        statistics_bytes: The most that statistics of inputs and gradients took together.
        stream_bytes: The most that the calibration inputs of one block take, with what else the
            model gives its blocks, such as masks.
    """

    rows: tuple[CompressedLayer, ...]
    seconds: float = 0.0
    statistics_bytes: int = 0
    stream_bytes: int = 0

    @property
    def sparsity(self) -> float:
        """The share of zeros in all layers' weights together."""
        last = {row.name: row for row in self.rows}.values()  # of several recipes
        total = sum(math.prod(row.shape) for row in last)
        return sum(row.sparsity * math.prod(row.shape) for row in last) / max(total, 1)

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draws the sparsity of every layer as a bar, and its error as a dot.

        Args:
            ax: `matplotlib.axes.Axes` to draw on; a figure is made when left out. The errors get
                an axis of their own, at the right.

        Returns:
            The figure and `ax`. Nothing is shown or saved.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            pyplot = require("matplotlib.pyplot", "plot")
            _, ax = pyplot.subplots(figsize=(width(len(self.rows)), 4.8), layout="constrained")
        _figure.draw(ax, self.rows)
        return ax.figure, ax

    def _table(self) -> Table:
        rows = [
            [
                row.name,
                row.recipe,
                shape_text(row.shape),
                f"{row.sparsity:.4f}",
                "-" if math.isnan(row.error) else f"{row.error:.4f}",
                f"{row.seconds:.2f}",
            ]
            for row in self.rows
        ]
        totals = ["total", "", "", f"{self.sparsity:.4f}", "", f"{self.seconds:.2f}"]
        return Table(["layer", "recipe", "shape", "sparsity", "error", "seconds"], rows, totals)

    def _remark(self) -> str:
        lines = [
            f"statistics took {self.statistics_bytes / _MEBIBYTE:,.1f} MiB at most, inputs of a"
            f" block {self.stream_bytes / _MEBIBYTE:,.1f} MiB"
        ]
        lines += [f"{row.name}: {row.note}" for row in self.rows if row.note]
        return "\n".join(lines)
