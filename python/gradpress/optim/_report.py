"""What an optimizer is doing, layer by layer: numbers that print, convert and plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

import torch

from gradpress import _text_tables
from gradpress._layer_axis import width
from gradpress._optional import require
from gradpress.optim import _report_figure

#: The attributes of a row that are bytes, and what a plot calls them.
BYTES = {"weight_bytes": "weights", "state_bytes": "states", "projector_bytes": "projectors"}


@dataclass(frozen=True)
class LayerRow:
    """One parameter that was stepped.

    Attributes:
        name: The parameter's name, or its ordinal.
        shape: The parameter's shape.
        rank: Directions kept; None for a parameter that is not projected.
        steps: Steps taken.
        refreshes: How often the projector was found anew, or drawn; 0 where there is none.
        interval: Steps between refreshes now; None where there are none.
        energy: Share of the gradient's squared norm that the projector captured at its last
            refresh; NaN where none was measured: without a projector, or with a random one.
        kind: How the parameter is stored: its dtype, or ``"int8"`` or ``"int4"``.
        weight_saturation: Share of an integer weight's codes that are the smallest or the largest,
            0 or ``2**bits - 1``. The range of a group ends where its values do, so that one or two
            of its codes are: a share far above ``2 / group_size`` tells of values that crowd
            there. None for other parameters.
        moment_saturation: Share of the codes of 8-bit and 4-bit moments that lie at an end of
            their map. Of a moment with signs the ends are the most negative and the most positive
            code; of a second moment the largest one, and the smallest that is positive, to which
            values below it are raised. Blocks whose scale is zero count as having none. The scale
            of any other block is its largest magnitude, so that ``1 / block_size`` of the codes
            are at an end at least. None where all moments are floating-point.
        state_bytes: Bytes of moments and counters.
        projector_bytes: Bytes of projectors, and of what is kept to refresh them.
        weight_bytes: Bytes of the parameter, with an integer one's scales and zero points.
    """

    name: str
    shape: tuple[int, ...]
    rank: int | None = None
    steps: int = 0
    refreshes: int = 0
    interval: int | None = None
    energy: float = math.nan
    kind: str = ""
    weight_saturation: float | None = None
    moment_saturation: float | None = None
    state_bytes: int = 0
    projector_bytes: int = 0
    weight_bytes: int = 0

    @classmethod
    def of(cls, name: str, p: torch.Tensor, state: dict[str, Any]) -> LayerRow:
        """What the numbers in an optimizer's state say; its tensors are not looked into."""
        return cls(
            name=name,
            shape=tuple(p.shape),
            rank=state.get("projector_rank"),
            steps=int(state["step"].item()),
            refreshes=state.get("projector_refreshes", 0),
            interval=state.get("projector_interval"),
            energy=state.get("projector_energy", math.nan),
        )


@dataclass(frozen=True)
class OptimizerReport:
    """All parameters of an optimizer that were stepped; prints as a table, in notebooks too.

    Bytes are those that this process holds. Those of states and projectors add up to what
    :func:`gradpress.memory.count` finds.

    Attributes:
        rows: One :class:`LayerRow` for each parameter that was stepped, in the optimizer's order.
        unstepped: Names of the other parameters, which had no gradient so far.
    """

    rows: tuple[LayerRow, ...]
    unstepped: tuple[str, ...] = ()

    @property
    def projected(self) -> tuple[LayerRow, ...]:
        """The rows of parameters that are projected."""
        return tuple(row for row in self.rows if row.rank is not None)

    @property
    def totals(self) -> dict[str, int]:
        """The sums of ``weight_bytes``, ``state_bytes`` and ``projector_bytes``."""
        return {name: sum(getattr(row, name) for row in self.rows) for name in BYTES}

    def to_dict(self) -> list[dict[str, Any]]:
        """One dict for each row; its keys are the attributes of :class:`LayerRow`."""
        return [asdict(row) for row in self.rows]

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row for each parameter, and the names as its index.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = require("pandas", "to_pandas")
        columns = [field.name for field in fields(LayerRow)]
        frame = pandas.DataFrame(self.to_dict(), columns=columns).set_index("name")
        return frame.astype(dict.fromkeys(_OPTIONAL_INTEGERS, "Int64"))

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draws the bytes of every layer as stacked bars, and the captured energies as dots.

        Args:
            ax: `matplotlib.axes.Axes` to draw on; a figure is made when left out. The energies,
                where there are any, take an axis of their own on the right.

        Returns:
            The figure and `ax`. Nothing is shown or saved.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            pyplot = require("matplotlib.pyplot", "plot")
            size = (width(len(self.rows)), 4.8)
            _, ax = pyplot.subplots(figsize=size, layout="constrained")
        _report_figure.draw(ax, self.rows, BYTES)
        return ax.figure, ax

    def __str__(self) -> str:
        """The whole table, with a line of totals."""
        return _text_tables.plain(self._table(), self._remark())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return _text_tables.html(self._table(), self._remark())

    def _table(self) -> _text_tables.Table:
        totals = [f"{size:,}" for size in self.totals.values()]
        return _text_tables.Table(
            list(_COLUMNS),
            [_cells(row) for row in self.rows],
            ["total", *[""] * (len(_COLUMNS) - len(totals) - 1), *totals],
        )

    def _remark(self) -> str:
        if not self.unstepped:
            return ""
        return f"not stepped yet: {', '.join(self.unstepped)}"


#: Attributes that pandas would turn into floats.
_OPTIONAL_INTEGERS = ("rank", "interval")

#: What the rows and the report are called where projectors are all that matters.
ProjectorRow: TypeAlias = LayerRow
ProjectorReport: TypeAlias = OptimizerReport

_COLUMNS = (
    "name",
    "shape",
    "kind",
    "rank",
    "steps",
    "refreshes",
    "interval",
    "energy",
    "weight ends",
    "moment ends",
    "weight bytes",
    "state bytes",
    "projector bytes",
)


def _cells(row: LayerRow) -> Sequence[str]:
    """A row as text, as `_COLUMNS` says."""
    energy = None if math.isnan(row.energy) else row.energy
    return [
        row.name,
        "x".join(map(str, row.shape)) or "scalar",
        row.kind,
        _or_dash(row.rank),
        f"{row.steps}",
        f"{row.refreshes}" if row.rank is not None else "-",
        _or_dash(row.interval),
        _or_dash(energy, ".3f"),
        _or_dash(row.weight_saturation, ".2%"),
        _or_dash(row.moment_saturation, ".2%"),
        *(f"{getattr(row, name):,}" for name in BYTES),
    ]


def _or_dash(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)
