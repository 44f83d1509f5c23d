"""A plot of bytes and captured energies, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

#: Layers that are named on the axis at most; of more, every second, third and so on is.
MOST_LABELS = 40
#: Letters of a name that are shown, the last ones.
LABEL_LETTERS = 28
#: Inches.
NARROWEST, WIDEST, LAYER_WIDTH = 6.4, 16.0, 0.25
MEBIBYTE = 1 << 20


def width(layers: int) -> float:
    """Of a figure for so many layers, in inches."""
    return min(max(NARROWEST, LAYER_WIDTH * layers), WIDEST)


def draw(ax: Any, rows: Sequence[Any], sizes: Mapping[str, str]) -> None:
    """Draws rows of a report.

    Args:
        ax: `matplotlib.axes.Axes`.
        rows: Have `name`, `energy`, and the attributes that `sizes` names.
        sizes: Attributes that are bytes, and their labels.
    """
    places = list(range(len(rows)))
    thick = 0.8 if len(rows) <= MOST_LABELS else 1.0
    bottom = [0.0] * len(rows)
    for name, label in sizes.items():
        heights = [getattr(row, name) / MEBIBYTE for row in rows]
        if any(heights):
            ax.bar(places, heights, thick, bottom=bottom, label=label)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    shown = places[:: max(1, math.ceil(len(rows) / MOST_LABELS))]
    ax.set_xticks(shown, [_label(rows[i].name) for i in shown], rotation=90, fontsize=7)
    ax.set_xlim(-0.6, len(rows) - 0.4)
    ax.set_ylabel("MiB")
    measured = [i for i in places if not math.isnan(rows[i].energy)]
    if measured:
        right = ax.twinx()
        energies = [rows[i].energy for i in measured]
        dot = 5 if len(rows) <= MOST_LABELS else 3
        right.plot(measured, energies, "ok", markersize=dot, markeredgecolor="white")
        right.set_ylim(0.0, 1.05)
        right.set_ylabel("captured energy (dots)")
    if rows:
        # Above the axes, where it hides nothing.
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(sizes), frameon=False)


def _label(name: str) -> str:
    return name if len(name) <= LABEL_LETTERS else "…" + name[1 - LABEL_LETTERS :]
