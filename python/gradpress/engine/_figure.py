"""A plot of sparsities and errors, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradpress._layer_axis import bar_width, draw_dots, name_layers


def draw(ax: Any, rows: Sequence[Any]) -> None:
    """Draws rows that have `name`, `sparsity` and `error` on `matplotlib.axes.Axes`."""
    places = list(range(len(rows)))
    ax.bar(places, [row.sparsity for row in rows], bar_width(len(rows)))
    name_layers(ax, [row.name for row in rows])
    ax.set_ylim(0.0, 1.05)
    ax.set_ylabel("sparsity (bars)")
    right = draw_dots(ax, [row.error for row in rows], "relative error of the output (dots)")
    if right is not None:
        right.set_ylim(bottom=0.0)
