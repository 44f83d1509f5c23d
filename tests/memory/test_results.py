"""Results print, convert and plot."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import gradpress
from gradpress.memory import compare, count, plan, watch

os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture
def results():
    model = nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 300))
    optimizer = gradpress.optim.AdamW8bit(model.parameters())
    planned = plan(model, optimizer, batch=2, sequence=8)
    with watch(model, optimizer) as watched:
        model(torch.arange(16)).sum().backward()
        optimizer.step()
    return {"planned": planned, "measured": watched, "counted": count(model, optimizer)}


def test_tables(results):
    for name in ("planned", "measured"):
        result = results[name]
        lines = str(result).splitlines()
        assert lines[0].split() == ["at", "the", "peak", "bytes", "MiB", "share"]
        (peak,) = (line for line in lines if line.startswith("peak"))
        assert f"{result.peak:,}" in peak
        for category, size in result.peak_by_category.items():
            assert any(line.split()[:2] == [category, f"{size:,}"] for line in lines)
        assert any(line.startswith("largest tensor made: ") for line in lines)
        assert repr(result) == str(result)
        assert "<table" in result._repr_html_()


def test_dicts_are_fit_for_json(results):
    for result in (results["planned"], results["measured"]):
        read = json.loads(json.dumps(result.to_dict()))
        assert read["peak"] == sum(read["peak_by_category"].values()) == result.peak
        assert read["largest"]["operator"] == result.largest.operator


def test_data_frames(results):
    frame = results["measured"].to_dataframe()
    assert frame["bytes"].to_dict() == results["measured"].peak_by_category
    assert frame["share"].sum() == pytest.approx(1)
    both = compare(results).to_dataframe()
    assert list(both.columns) == ["planned", "measured", "counted"]
    assert both["counted"].sum() == results["counted"].total


def heights(ax):
    return sum(bar.get_height() for bar in ax.patches)


def test_plots(results):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    _, ax = results["planned"].plot(label="AdamW8bit")
    # Heights add up to the peak, in MiB.
    assert heights(ax) == pytest.approx(results["planned"].peak / 2**20)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["AdamW8bit"]
    _, given = pyplot.subplots()
    assert compare(results).plot(given)[1] is given
    assert heights(given) == pytest.approx(sum(compare(results).totals.values()) / 2**20)
    labels = [text.get_text() for text in given.get_legend().get_texts()]
    assert labels[-1] == "weights"
    pyplot.close("all")


def test_comparisons(results):
    compared = compare(list(results.values()))
    assert list(compared.columns) == ["1", "2", "3"]
    assert compared.totals["1"] == results["planned"].peak
    lines = str(compare(results)).splitlines()
    assert lines[0].split() == ["MiB", "planned", "measured", "counted"]
    assert lines[-1].split()[0] == "total"
    assert json.loads(json.dumps(compared.to_dict()))["3"]["total"] == results["counted"].total
    with pytest.raises(TypeError, match=r"memory\.compare: .* got int"):
        compare([3])


def test_an_empty_watch_prints():
    with watch() as watched:
        pass
    assert (watched.peak, watched.largest, watched.largest_floating) == (0, None, None)
    assert "peak" in str(watched)
    assert watched.to_dict()["largest"] is None


def test_nothing_of_it_is_imported_before_it_is_used():
    code = (
        "import sys, gradpress.memory;"
        "assert not {'pandas', 'matplotlib', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
