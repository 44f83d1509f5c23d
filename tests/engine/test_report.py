"""The report of a compression: a table, a data frame, a plot."""

import math

import matplotlib
import pytest
import torch
from tests.engine.models import compress
from tests.engine.zoo import Image
from torch import nn

from gradpress import prune
from gradpress.engine import CompressedLayer, CompressionReport


@pytest.fixture
def report():
    torch.manual_seed(0)
    model = nn.Sequential(Image(), nn.Linear(4, 8))
    recipes = [prune.Magnitude(modules="features"), prune.Wanda(modules=["head", "1"])]
    batches = [torch.randn(2, 4, 9, 9)]
    return compress(model, [recipes[0], prune.Wanda(modules="head")], batches)


def test_report_prints(report):
    text = str(report)
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "recipe", "shape", "sparsity", "error", "seconds"]
    assert "0.features.0" in text
    assert "8x4x3x3" in text
    assert "0.5000" in text
    assert "statistics took 0.0 MiB at most, inputs of a block 0.0 MiB" in text
    assert repr(report) == text
    html = report._repr_html_()
    assert "<table" in html
    assert "0.head" in html


def test_report_converts(report):
    dicts = report.to_dict()
    assert [row["name"] for row in dicts] == ["0.features.0", "0.features.3", "0.head"]
    assert dicts[0]["shape"] == (8, 4, 3, 3)
    assert dicts[0]["recipe"] == "Magnitude"
    frame = report.to_pandas()
    assert list(frame.index) == [row["name"] for row in dicts]
    assert frame.loc["0.head", "sparsity"] == 0.5
    total = sum(math.prod(row.shape) for row in report.rows)
    share = sum(row.sparsity * math.prod(row.shape) for row in report.rows) / total
    assert report.sparsity == pytest.approx(share)
    assert report.seconds > 0
    assert all(row.seconds >= 0 for row in report.rows)


def test_report_plots(report):
    matplotlib.use("Agg")
    figure, axes = report.plot()
    assert [bar.get_height() for bar in axes.patches] == [row.sparsity for row in report.rows]
    dots = figure.axes[1].lines[0].get_ydata()
    assert list(dots) == [row.error for row in report.rows]
    same_figure, same_axes = report.plot(ax=figure.subplots())
    assert same_figure is figure
    assert same_axes is not axes
    matplotlib.pyplot.close(figure)
    many = CompressionReport(
        tuple(
            CompressedLayer(f"layers.{i}", "Wanda", (2, 2), 0.5, math.nan, 0.1) for i in range(99)
        )
    )
    figure, axes = many.plot()
    assert len(axes.patches) == 99
    assert len(figure.axes) == 1  # no error is known
    matplotlib.pyplot.close(figure)


def test_empty_report():
    empty = CompressionReport(())
    assert empty.sparsity == 0
    assert "total" in str(empty)
    assert empty.to_dict() == []
    assert len(empty.to_pandas()) == 0
