"""Stacked bars of bytes by category."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Of what every category has the same colour in all figures, in the order of the stack.
COLORS = {
    "weights": "tab:blue",
    "weight_scales": "lightsteelblue",
    "buffers": "tab:gray",
    "projectors": "tab:cyan",
    "optimizer_states": "tab:green",
    "gradients": "tab:orange",
    "accumulators": "gold",
    "activations": "tab:red",
    "logits": "tab:pink",
    "temporaries": "tab:purple",
}
#: Inches.
NARROWEST, WIDEST, BAR_WIDTH, LEGEND_WIDTH = 4.8, 16.0, 1.2, 2.4
MEBIBYTE, GIBIBYTE = 1 << 20, 1 << 30


def width(bars: int) -> float:
    """Of a figure for so many bars, in inches."""
    return min(max(NARROWEST, BAR_WIDTH * bars + LEGEND_WIDTH), WIDEST)


def draw(ax: Any, bars: Mapping[str, Mapping[str, int]]) -> None:
    """Draws a bar for each name, with its sum above it.

    Args:
        ax: `matplotlib.axes.Axes`.
        bars: Bytes by category, by what the bar is called.
    """
    sums = {name: sum(parts.values()) for name, parts in bars.items()}
    large = max(sums.values(), default=0) >= GIBIBYTE
    unit = GIBIBYTE if large else MEBIBYTE
    places = list(range(len(bars)))
    bottom = [0.0] * len(bars)
    for category, color in COLORS.items():
        heights = [parts.get(category, 0) / unit for parts in bars.values()]
        if any(heights):
            ax.bar(places, heights, 0.6, bottom=bottom, color=color, label=category)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    for place, height in zip(places, bottom, strict=True):
        ax.annotate(
            f"{height:,.2f}",
            (place, height),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    ax.set_xticks(places, list(bars), rotation=20 if len(bars) > 2 else 0)
    ax.set_xlim(-0.6, len(bars) - 0.4)
    ax.margins(y=0.08)
    ax.set_ylabel("GiB" if large else "MiB")
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        # In the order of the stack, from its top.
        ax.legend(
            handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1, 1), frameon=False
        )
