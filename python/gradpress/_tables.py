"""Rows of numbers that print as a table, in notebooks too, and convert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, fields
from typing import Any

from gradpress._optional import require
from gradpress._text_tables import Table, html, plain

__all__ = ["Table", "TableReport", "shape_text"]


class TableReport(ABC):
    """What reports have in common that consist of one dataclass for each tensor."""

    rows: tuple[Any, ...]

    @abstractmethod
    def _table(self) -> Table:
        """The rows as text, with a line of totals."""

    def _remark(self) -> str:
        """What stands below the table."""
        return ""

    def to_dict(self) -> list[dict[str, Any]]:
        """One dict for each row; its keys are the row's attributes."""
        return [asdict(row) for row in self.rows]

    def _columns(self) -> list[str]:
        """The attributes of a row, where there may be none to ask."""
        return [field.name for field in fields(self.rows[0])] if self.rows else ["name"]

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row for each tensor, and the names as its index.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = require("pandas", "to_pandas")
        return pandas.DataFrame(self.to_dict(), columns=self._columns()).set_index("name")

    def __str__(self) -> str:
        """The whole table, with a line of totals."""
        return plain(self._table(), self._remark())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return html(self._table(), self._remark())


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape as it stands in a table."""
    return "x".join(map(str, shape)) or "scalar"
