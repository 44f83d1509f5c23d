"""Compression of whole models, block by block, for every recipe."""

from gradpress.engine._batches import Calibration
from gradpress.engine._compress import compress
from gradpress.engine._layers import Layer
from gradpress.engine._recipe import (
    GradientStatistic,
    InputStatistic,
    Observed,
    Outcome,
    Recipe,
)
from gradpress.engine._report import CompressedLayer, CompressionReport
from gradpress.nn._select import matches

__all__ = [
    "Calibration",
    "CompressedLayer",
    "CompressionReport",
    "GradientStatistic",
    "InputStatistic",
    "Layer",
    "Observed",
    "Outcome",
    "Recipe",
    "compress",
    "matches",
]
