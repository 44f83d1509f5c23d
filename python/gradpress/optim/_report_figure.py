"""A plot of bytes and captured energies, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradpress._layer_axis import bar_width, draw_dots, name_layers

MEBIBYTE = 1 << 20


def draw(ax: Any, rows: Sequence[Any], sizes: Mapping[str, str]) -> None:
    """Draws rows of a report.

    Args:
        ax: `matplotlib.axes.Axes`.
        rows: Have `name`, `energy`, and the attributes that `sizes` names.
        sizes: Attributes that are bytes, and their labels.
    """
    places = list(range(len(rows)))
    thick = bar_width(len(rows))
    bottom = [0.0] * len(rows)
    for name, label in sizes.items():
        heights = [getattr(row, name) / MEBIBYTE for row in rows]
        if any(heights):
            ax.bar(places, heights, thick, bottom=bottom, label=label)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    name_layers(ax, [row.name for row in rows])
    ax.set_ylabel("MiB")
    right = draw_dots(ax, [row.energy for row in rows], "captured energy (dots)")
    if right is not None:
        right.set_ylim(0.0, 1.05)
    if rows:
        # Above the axes, where it hides nothing.
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(sizes), frameon=False)
