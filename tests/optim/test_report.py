"""What `optimizer.report()` says, beside counts made otherwise."""

import builtins
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.optim.test_drop_in import every, setup, snapshot, train
from torch import nn

import gradpress
from gradpress.nn import QuantizedWeight
from gradpress.optim._report import LayerRow, OptimizerReport, ProjectorReport, ProjectorRow


@pytest.fixture
def pyplot():
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")

    yield plt
    plt.close("all")


def some(layers=3, **changes):
    row = {"shape": (64, 32), "rank": 4, "steps": 5, "refreshes": 2, "interval": 3, "energy": 0.5}
    sizes = {"kind": "int8", "state_bytes": 2 << 20, "projector_bytes": 1024, "weight_bytes": 4096}
    rows = (LayerRow(name=f"layer{i}", **{**row, **sizes, **changes}) for i in range(layers))
    return OptimizerReport(tuple(rows))


@every
def test_bytes_are_those_that_memory_counts(make):
    model, optimizer = setup(make)
    assert optimizer.report().rows == ()
    train(model, optimizer, 0, 3)
    report = optimizer.report()
    counted = gradpress.memory.count(model, optimizer).by_category
    totals = report.totals
    assert totals["state_bytes"] == counted["optimizer_states"]
    assert totals["projector_bytes"] == counted.get("projectors", 0)
    assert totals["weight_bytes"] == counted["weights"] + counted.get("weight_scales", 0)
    assert sum(row.state_bytes for row in report.rows) == totals["state_bytes"]
    assert len(report.rows) == len(list(model.parameters()))


@every
def test_rows_say_how_parameters_are_stored_and_stepped(make):
    model, optimizer = setup(make)
    before = snapshot(model, optimizer)
    train(model, optimizer, 0, 4)
    optimizer.report()
    after = snapshot(model, optimizer)
    reports = optimizer.report(), optimizer.report(codes=False)
    assert all(torch.equal(t, after[name]) for name, t in snapshot(model, optimizer).items())
    assert before.keys() <= after.keys()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    named = "param_names" in optimizer.param_groups[0]
    for i, (p, row, plain) in enumerate(zip(params, *(r.rows for r in reports), strict=True)):
        state = optimizer.state[p]
        assert row.name == (names[id(p)] if named else f"{i}")
        assert (row.shape, row.steps) == (tuple(p.shape), 4)
        assert row.kind == ("int8" if isinstance(p, QuantizedWeight) else "float32")
        assert row.rank == state.get("projector_rank")
        assert (row.interval is None) == (row.rank is None)
        assert (row.refreshes == 0) == (row.rank is None)
        assert (row.weight_saturation is not None) == isinstance(p, QuantizedWeight)
        assert (row.moment_saturation is not None) == any(
            name.endswith("_codes") and not name.startswith(("projector", "error"))
            for name in state
        )
        assert plain.weight_saturation is plain.moment_saturation is None
        assert plain.state_bytes == row.state_bytes
    if hasattr(optimizer, "refresh_counts"):
        counts = {row.name: row.refreshes for row in reports[0].projected}
        assert counts == optimizer.refresh_counts()


def nibbles(packed, numel):
    return np.stack([packed & 15, packed >> 4], 1).reshape(-1)[:numel]


def share_at_ends(moments, bits, block):
    """Counted one by one: (codes, scale, lowest end) of each moment."""
    ends = [
        code in (low, 2**bits - 1) and scale[i // block] != 0
        for codes, scale, low in moments
        for i, code in enumerate(codes)
    ]
    return sum(ends) / len(ends)


@given(
    bits=st.sampled_from([4, 8]),
    numel=st.integers(1, 700),
    block=st.sampled_from([2, 64, 128]),
    seed=st.integers(0, 99),
)
def test_shares_of_moments_are_numpys(bits, numel, block, seed):
    generator = np.random.default_rng(seed)
    p = nn.Parameter(torch.zeros(numel))
    options = {"min_8bit_size": 1, "state_bits": bits, "block_size": block}
    optimizer = gradpress.optim.AdamW8bit([p], **options)
    # Magnitudes over many decades, so that codes of all kinds occur, and a block without any.
    values = generator.standard_normal(numel) * 10.0 ** -generator.integers(0, 9, numel)
    values[: block if numel > block else 0] = 0
    p.grad = torch.tensor(values, dtype=torch.float32)
    optimizer.step()
    state = {name: np.asarray(value) for name, value in optimizer.state[p].items()}
    moments = []
    for name, low in (("exp_avg", 0), ("exp_avg_sq", 1 if bits == 8 else 0)):
        codes = state[f"{name}_codes"]
        codes = codes if bits == 8 else nibbles(codes, numel)
        moments.append((codes, state[f"{name}_scale"], low))
    (row,) = optimizer.report().rows
    assert row.moment_saturation == share_at_ends(moments, bits, block)


def test_momentum_and_projected_moments_count_too():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(9, 7))
    options = {"min_8bit_size": 1, "state_bits": 4, "block_size": 6}
    sgdp = gradpress.optim.SGDP([p], lr=0.1, momentum=0.9, **options)
    galore = gradpress.optim.GaLoreAdamW([p], rank=3, proj_type="full", **options)
    p.grad = torch.randn(9, 7)
    for optimizer, numel in ((sgdp, 63), (galore, 9)):  # odd: half of the last byte is empty
        optimizer.step()
        state = {name: np.asarray(value) for name, value in optimizer.state[p].items()}
        moments = [
            (nibbles(state[f"{name}_codes"], numel), state[f"{name}_scale"], 0)
            for name in ("momentum_buffer", "exp_avg", "exp_avg_sq")
            if f"{name}_codes" in state
        ]
        (row,) = optimizer.report().rows
        assert row.moment_saturation == share_at_ends(moments, 4, 6)


@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 9), columns=st.integers(1, 33))
def test_shares_of_weights_are_numpys(bits, rows, columns):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    weight = QuantizedWeight.from_float(values, bits=bits, group_size=16)
    p = nn.Parameter(weight)
    optimizer = gradpress.optim.AdamW8bit([p], lr=0.0)
    p.grad = torch.zeros(rows, columns)
    optimizer.step()
    codes = p.codes.numpy().reshape(-1)
    codes = codes if bits == 8 else nibbles(codes, rows * columns)
    (row,) = optimizer.report().rows
    assert row.weight_saturation == np.isin(codes, (0, 2**bits - 1)).mean()
    assert row.kind == f"int{bits}"


def test_what_has_no_gradient_is_named():
    a, b, empty = (nn.Parameter(torch.ones(s)) for s in ((2,), (3,), (0, 4)))
    optimizer = gradpress.optim.AdamW8bit([("a", a), ("b", b), ("empty", empty)], min_8bit_size=0)
    a.grad, empty.grad = torch.ones(2), torch.ones(0, 4)
    optimizer.step()
    report = optimizer.report()
    assert [row.name for row in report.rows] == ["a", "empty"]
    assert report.unstepped == ("b",)
    assert str(report).splitlines()[-1] == "not stepped yet: b"
    assert "not stepped yet: b" in report._repr_html_()
    assert report.rows[1].moment_saturation is None


def test_projectors_alone_have_their_old_names():
    assert (ProjectorRow, ProjectorReport) == (LayerRow, OptimizerReport)
    row = ProjectorRow("w", (2, 3), 1, 5, 2, 3, 0.25)
    assert (row.rank, row.steps, row.refreshes, row.interval, row.energy) == (1, 5, 2, 3, 0.25)
    assert ProjectorReport((row,)).to_dict()[0]["energy"] == 0.25


def test_text_is_aligned_and_complete():
    report = some(250)
    lines = str(report).splitlines()
    assert len(lines) == 250 + 4
    assert {len(line) for line in lines} == {len(lines[0])}
    first = "layer0 64x32 int8 4 5 2 3 0.500 - - 4,096 2,097,152 1,024"
    assert " ".join(lines[2].split()) == first
    assert lines[-1].split() == ["total", "1,024,000", "524,288,000", "256,000"]
    assert repr(report) == str(report)
    assert str(OptimizerReport(())).splitlines()[-1].split() == ["total", "0", "0", "0"]


def test_html_is_escaped():
    from html.parser import HTMLParser

    class Cells(HTMLParser):
        def __init__(self):
            super().__init__()
            self.text, self.open = [], []

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            self.text.append(data)

    page = Cells()
    page.feed(OptimizerReport((LayerRow("<script>&", ()),))._repr_html_())
    assert not page.open
    assert "<script>&" in page.text
    assert "scalar" in page.text


def test_pandas():
    import pandas

    report = OptimizerReport((*some().rows, LayerRow("bias", (64,), weight_saturation=0.25)))
    frame = report.to_pandas()
    assert list(frame.index) == [row.name for row in report.rows]
    assert list(frame.columns) == list(report.to_dict()[0])[1:]
    assert frame["state_bytes"].sum() == report.totals["state_bytes"]
    assert frame.loc["layer1", "rank"] == 4
    assert frame["rank"].isna().sum() == 1
    assert frame["weight_saturation"].max() == 0.25
    assert isinstance(OptimizerReport(()).to_pandas(), pandas.DataFrame)
    assert json.loads(json.dumps(some().to_dict()))[0]["shape"] == [64, 32]


@pytest.mark.parametrize("layers", [0, 1, 3, 200])
def test_plot(pyplot, monkeypatch, layers):
    monkeypatch.setattr(pyplot, "show", lambda: pytest.fail("shown"))
    report = some(layers)
    figure, ax = report.plot()
    figure.canvas.draw()
    heights = sum(bar.get_height() for bar in ax.patches)
    assert heights == pytest.approx(sum(report.totals.values()) / 2**20)
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert len(labels) == (layers if layers <= 40 else 40)
    assert set(labels) <= {row.name for row in report.rows}
    # No two labels lie over each other, and all lie on the canvas.
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(one.x1 <= other.x0 for one, other in itertools.pairwise(boxes))
    assert all(figure.bbox.contains(*box.min) for box in boxes)
    others = [a for a in figure.axes if a is not ax]
    if layers:
        assert [list(line.get_ydata()) for line in others[0].lines] == [[0.5] * layers]
    else:
        assert not others


def test_plot_on_given_axes(pyplot):
    figure, (left, right) = pyplot.subplots(1, 2)
    assert some().plot(ax=left) == (figure, left)
    plain = some(rank=None, energy=math.nan, projector_bytes=0)
    assert plain.plot(right)[1] is right
    assert len(figure.axes) == 3  # energies on the left only
    assert not right.get_title()
    assert {t.get_text() for t in right.get_legend().get_texts()} == {"weights", "states"}


@pytest.mark.parametrize(("module", "method"), [("pandas", "to_pandas"), ("matplotlib", "plot")])
def test_missing_packages_are_named(monkeypatch, module, method):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *rest)

    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=rf'{method}: needs {module}.*"gradpress\[plot\]"'):
        getattr(some(), method)()
