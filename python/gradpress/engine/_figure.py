"""A plot of sparsities and errors, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradpress._layer_axis import bar_width, dot_size, name_layers


def draw(ax: Any, rows: Sequence[Any]) -> None:
    """Draws rows that have `name`, `sparsity` and `error` on `matplotlib.axes.Axes`."""
    places = list(range(len(rows)))
    ax.bar(places, [row.sparsity for row in rows], bar_width(len(rows)))
    name_layers(ax, [row.name for row in rows])
    ax.set_ylim(0.0, 1.05)
    ax.set_ylabel("sparsity (bars)")
    measured = [i for i in places if not math.isnan(rows[i].error)]
    if measured:
        right = ax.twinx()
        errors = [rows[i].error for i in measured]
        dot = dot_size(len(rows))
        right.plot(measured, errors, "ok", markersize=dot, markeredgecolor="white")
        right.set_ylim(bottom=0.0)
        right.set_ylabel("relative error of the output (dots)")
