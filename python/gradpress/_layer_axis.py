"""An axis of figures with a place for each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

#: Layers that are named on the axis at most; of more, every second, third and so on is.
MOST_LABELS = 40
#: Letters of a name that are shown, the last ones.
_LABEL_LETTERS = 28
#: Inches.
_NARROWEST, _WIDEST, _LAYER_WIDTH = 6.4, 16.0, 0.25


def width(layers: int) -> float:
    """Of a figure for so many layers, in inches."""
    return min(max(_NARROWEST, _LAYER_WIDTH * layers), _WIDEST)


def bar_width(layers: int) -> float:
    """Of a bar, in places."""
    return 0.8 if layers <= MOST_LABELS else 1.0


def draw_dots(ax: Any, values: Sequence[float], label: str) -> Any:
    """Draws a dot for each value that is a number, on an axis of their own at the right.

    Returns:
        The axis, or None where no value is a number.
    """
    places = [i for i, value in enumerate(values) if not math.isnan(value)]
    if not places:
        return None
    right = ax.twinx()
    size = 5 if len(values) <= MOST_LABELS else 3
    right.plot(places, [values[i] for i in places], "ok", markersize=size, markeredgecolor="white")
    right.set_ylabel(label)
    return right


def name_layers(ax: Any, names: Sequence[str]) -> None:
    """Sets the ticks and limits of the horizontal axis of `matplotlib.axes.Axes`."""
    shown = range(0, len(names), max(1, math.ceil(len(names) / MOST_LABELS)))
    ax.set_xticks(shown, [_short(names[i]) for i in shown], rotation=90, fontsize=7)
    ax.set_xlim(-0.6, len(names) - 0.4)


def _short(name: str) -> str:
    return name if len(name) <= _LABEL_LETTERS else "…" + name[1 - _LABEL_LETTERS :]
