"""Plans and measurements side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from gradpress import _text_tables
from gradpress._optional import require
from gradpress.memory._breakdown import MEBIBYTE, Breakdown, plot_bars
from gradpress.memory._count import MemoryCount
from gradpress.memory._tensors import in_order

Result: TypeAlias = "Breakdown | MemoryCount"


@dataclass(frozen=True, repr=False)
class Comparison:
    """Bytes by category of several results; prints as a table in MiB, a column for each.

    Attributes:
        columns: Bytes by category, by the results' names.
    """

    columns: dict[str, dict[str, int]]

    @property
    def totals(self) -> dict[str, int]:
        """The sum of each."""
        return {name: sum(parts.values()) for name, parts in self.columns.items()}

    def to_dict(self) -> dict[str, Any]:
        """The columns and their totals, fit for JSON."""
        return {
            name: {"by_category": dict(parts), "total": self.totals[name]}
            for name, parts in self.columns.items()
        }

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame` of bytes: categories by results.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = require("pandas", "to_dataframe")
        rows = [[parts.get(name, 0) for parts in self.columns.values()] for name in self._names()]
        index = pandas.Index(self._names(), name="category")
        return pandas.DataFrame(rows, index=index, columns=list(self.columns))

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draws a stacked bar for each result.

        Args:
            ax: `matplotlib.axes.Axes` to draw on; a figure is made when left out.

        Returns:
            The figure and `ax`. Nothing is shown or saved.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plot_bars(self.columns, ax)

    def __str__(self) -> str:
        """The table."""
        return _text_tables.plain(self._table(), "")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return _text_tables.html(self._table(), "")

    def _names(self) -> list[str]:
        present = {name for parts in self.columns.values() for name in parts}
        return list(in_order(dict.fromkeys(present, 1)))

    def _table(self) -> _text_tables.Table:
        rows = [
            [name, *(f"{parts.get(name, 0) / MEBIBYTE:,.2f}" for parts in self.columns.values())]
            for name in self._names()
        ]
        totals = ["total", *(f"{size / MEBIBYTE:,.2f}" for size in self.totals.values())]
        return _text_tables.Table(["MiB", *self.columns], rows, totals)


def compare(results: Mapping[str, Result] | Sequence[Result]) -> Comparison:
    """Sets plans, measurements and counts side by side.

    Args:
        results: What :func:`plan`, :func:`watch` and :func:`count` return, by name, or in a list,
            in which they are named 1, 2 and so on.

    Raises:
        TypeError: one of them is something else.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Sequential(torch.nn.Embedding(256, 64), torch.nn.Linear(64, 256))
        >>> plans = {
        ...     kind.__name__: gradpress.memory.plan(model, kind, batch=2, sequence=8)
        ...     for kind in (torch.optim.AdamW, gradpress.optim.AdamW8bit)
        ... }
        >>> gradpress.memory.compare(plans)
        MiB               AdamW  AdamW8bit
        ----------------------------------
        weights            0.13       0.13
        optimizer_states   0.25       0.07
        gradients          0.13       0.13
        activations        0.00       0.00
        temporaries        0.19       0.00
        ----------------------------------
        total              0.69       0.32
    """
    if not isinstance(results, Mapping):
        results = {str(i): result for i, result in enumerate(results, 1)}
    columns = {}
    for name, result in results.items():
        if isinstance(result, Breakdown):
            columns[name] = result.peak_by_category
        elif isinstance(result, MemoryCount):
            columns[name] = dict(result.by_category)
        else:
            raise TypeError(
                "memory.compare: results must be plans, watches or counts, got"
                f" {type(result).__name__}"
            )
    return Comparison(columns)
