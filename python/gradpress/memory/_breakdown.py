"""Bytes by category that print, convert and plot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from gradpress import _text_tables
from gradpress._optional import require
from gradpress.memory import _figure

MEBIBYTE = 1 << 20


class Breakdown(ABC):
    """A peak and what it consists of."""

    @property
    @abstractmethod
    def peak(self) -> int:
        """The most bytes that were, or will be, live at a time."""

    @property
    @abstractmethod
    def peak_by_category(self) -> dict[str, int]:
        """What is live at that time; the sum is the peak."""

    def _remarks(self) -> list[str]:
        """Lines below the table."""
        return []

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything, fit for JSON."""

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame` with a row for each category: its bytes and its share of the peak.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = require("pandas", "to_dataframe")
        rows = [
            {"category": name, "bytes": size, "share": size / self.peak}
            for name, size in self.peak_by_category.items()
        ]
        return pandas.DataFrame(rows, columns=["category", "bytes", "share"]).set_index("category")

    def plot(self, ax: Any = None, *, label: str = "peak") -> tuple[Any, Any]:
        """Draws the categories as one stacked bar; :func:`compare` draws several side by side.

        Args:
            ax: `matplotlib.axes.Axes` to draw on; a figure is made when left out.
            label: What the bar is called.

        Returns:
            The figure and `ax`. Nothing is shown or saved.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plot_bars({label: self.peak_by_category}, ax)

    def __str__(self) -> str:
        """The table."""
        return _text_tables.plain(self._table(), "\n".join(self._remarks()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return _text_tables.html(self._table(), "; ".join(self._remarks()))

    def _table(self) -> _text_tables.Table:
        whole = self.peak or 1
        rows = [
            [name, f"{size:,}", f"{size / MEBIBYTE:,.2f}", f"{size / whole:.1%}"]
            for name, size in self.peak_by_category.items()
        ]
        totals = ["peak", f"{self.peak:,}", f"{self.peak / MEBIBYTE:,.2f}", ""]
        return _text_tables.Table(["at the peak", "bytes", "MiB", "share"], rows, totals)


def plot_bars(bars: dict[str, dict[str, int]], ax: Any = None) -> tuple[Any, Any]:
    """Draws stacked bars side by side; see :meth:`Breakdown.plot`."""
    if ax is None:
        pyplot = require("matplotlib.pyplot", "plot")
        size = (_figure.width(len(bars)), 4.8)
        _, ax = pyplot.subplots(figsize=size, layout="constrained")
    _figure.draw(ax, bars)
    return ax.figure, ax
