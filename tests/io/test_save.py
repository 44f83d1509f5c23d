"""Files of models: the bits that come back, and the bytes that they take."""

import json
import os
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import gradpress
from gradpress import io, prune

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Every dtype that the file format has, with values that it can hold.
ALL_DTYPES = [
    *DTYPES,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]


def bits(x):
    x = x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return torch.view_as_real(x) if x.is_complex() else x.view(torch.uint8)


def same(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(bits(got), bits(want))


def on_disk(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def pruned(shape, dtype, pattern, sparsity, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g).to(dtype)
    if pattern == "2:4":
        groups = weight.view(-1, 4)
        groups.scatter_(1, torch.rand(groups.shape, generator=g).argsort(1)[:, :2], 0)
    else:
        weight[torch.rand(shape, generator=g) < sparsity] = 0
    return weight


def quantized_model(bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(31, 17), nn.ReLU(), nn.Linear(17, 5)).bfloat16()
    return gradpress.nn.quantize_(model, bits=bits, group_size=64)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(), (0,), (1,), (3, 5), (2, 0), (7, 9, 2), (4, 64), (33, 31)]),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_bits_and_bytes(tmp_path_factory, shape, dtype, sparsity, seed):
    weight = pruned(shape, dtype, "unstructured", sparsity, seed)
    path = tmp_path_factory.mktemp("bits") / "model.safetensors"
    saved = io.save({"w": weight}, path)
    same(io.load(path)["w"], weight)
    tensors, _ = on_disk(path)
    numel, kept = weight.numel(), int((weight != 0).sum())
    (row,) = saved.rows
    choices = {
        "dense": numel * dtype.itemsize,
        "bitmask": prune.packed_bytes(numel, kept, dtype.itemsize),
    }
    if weight.ndim and shape[-1] % 4 == 0 and ((weight.view(-1, 4) != 0).sum(1) <= 2).all():
        choices["2:4"] = prune.packed_bytes(numel, kept, dtype.itemsize, "2:4")
    assert row.stored_bytes == choices[row.format] == min(choices.values())
    assert sum(t.nbytes for t in tensors.values()) == saved.stored_bytes == row.stored_bytes
    assert saved.dense_bytes == weight.nbytes
    assert saved.file_bytes == path.stat().st_size
    assert row.sparsity == ((numel - kept) / numel if numel else 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_of_the_weights_take_the_bits_of_the_formulas(tmp_path, dtype):
    # Bits of a weight of b bits: b / 2 + 1, in either format (compare 16 (1 - s) + 1 and 8 + 1).
    g = torch.Generator().manual_seed(0)
    any_half = torch.ones(64 * 128, dtype=dtype)
    any_half[torch.randperm(any_half.numel(), generator=g)[: any_half.numel() // 2]] = 0
    weights = {
        "any": any_half.view(64, 128),
        "grouped": pruned((64, 128), dtype, "2:4", 0.5, 1),
        "quarter": pruned((64, 128), dtype, "2:4", 0.5, 2) * (torch.arange(128) % 8 < 4),
    }
    weights["quarter"][weights["quarter"] == 0] = 0
    saved = io.save(weights, tmp_path / "f")
    formats = {row.name: row.format for row in saved.rows}
    assert formats == {"any": "bitmask", "grouped": "2:4", "quarter": "bitmask"}
    stored = {row.name: row.stored_bytes for row in saved.rows}
    per_weight = dtype.itemsize * 8
    assert stored["any"] * 8 == stored["grouped"] * 8 == 64 * 128 * (per_weight // 2 + 1)
    assert stored["quarter"] * 8 == 64 * 128 * (per_weight // 4 + 1)
    tensors, _ = on_disk(tmp_path / "f")
    assert sum(t.nbytes for t in tensors.values()) == saved.stored_bytes
    back = io.load(tmp_path / "f")
    for name, weight in weights.items():
        same(back[name], weight)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("format", ["gradpress", "dense"])
def test_every_dtype(tmp_path, dtype, format):
    values = torch.tensor([0.0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0] * 3).to(dtype)
    state = {
        "flat": values,
        "strided": values.view(6, 6).t()[::2],
        "scalar": values[1],
        "empty": values[:0],
    }
    io.save(state, tmp_path / "f", format=format)
    back = io.load(tmp_path / "f")
    assert list(back) == list(state)
    for name, value in state.items():
        same(back[name], value)


def test_every_bit_comes_back(tmp_path):
    odd = [-0.0, 0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-40, 1.0] + [0.0] * 56
    state = {str(dtype): torch.tensor(odd).to(dtype) for dtype in DTYPES}
    z = torch.tensor([1 + 2j, 0])
    state |= {"conjugate": z.conj(), "negative": z.conj().imag}
    saved = io.save(state, tmp_path / "f")
    assert [row.format for row in saved.rows[:3]] == ["bitmask"] * 3
    back = io.load(tmp_path / "f")
    for name, value in state.items():
        same(back[name], value)


def test_groups_of_three_are_no_two_of_four(tmp_path):
    weight = torch.tensor([1.0, 1, 1, 0, 1, 0, 0, 0]).repeat(16)
    (row,) = io.save({"w": weight}, tmp_path / "f").rows
    assert row.format == "bitmask"
    same(io.load(tmp_path / "f")["w"], weight)


def test_negative_zeros_are_counted_and_cost(tmp_path):
    weight = torch.zeros(64, 64)
    weight[:8] = -0.0
    weight[0, 0] = 1
    saved = io.save({"w": weight}, tmp_path / "f")
    (row,) = saved.rows
    assert row.format == "bitmask"
    assert row.negative_zeros == 8 * 64 - 1
    assert row.sparsity == 1 - 1 / 4096
    assert row.stored_bytes == prune.packed_bytes(4096, 8 * 64, 4)
    assert "511 negative zeros" in str(saved)
    same(io.load(tmp_path / "f")["w"], weight)


@pytest.mark.parametrize("bits_", [8, 4])
def test_quantized_weights(tmp_path, bits_):
    model = quantized_model(bits_)
    saved = io.save(model, tmp_path / "f")
    rows = {row.name: row for row in saved.rows}
    weight = model[0].weight
    groups = -(-31 * 17 // 64)
    assert rows["0.weight"].format == f"int{bits_}"
    assert rows["0.weight"].sparsity is None
    assert rows["0.weight"].stored_bytes == -(-31 * 17 * bits_ // 8) + 5 * groups
    assert rows["0.weight"].dense_bytes == 31 * 17 * 2
    tensors, _ = on_disk(tmp_path / "f")
    assert sum(t.nbytes for t in tensors.values()) == saved.stored_bytes
    back = io.load(tmp_path / "f")["0.weight"]
    assert isinstance(back, gradpress.nn.QuantizedWeight)
    assert (back.dtype, back.shape, back.bits, back.group_size) == (
        torch.bfloat16,
        weight.shape,
        bits_,
        64,
    )
    for name, part in weight.parts.items():
        same(back.parts[name], part)
    dense = io.save(model, tmp_path / "d", format="dense")
    assert {row.format for row in dense.rows} == {"dense"}
    same(load_file(tmp_path / "d")["0.weight"], weight.dequantize())


def test_dense_files_load_anywhere(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    prune.apply_masks_(model, {"0": torch.rand(8, 8) < 0.2})
    saved = io.save(model, tmp_path / "f", format="dense")
    assert saved.stored_bytes == saved.dense_bytes
    state = load_file(tmp_path / "f")
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        same(state[name], value)
        same(io.load(tmp_path / "f")[name], value)


@pytest.mark.parametrize("format", ["gradpress", "dense"])
def test_shared_memory_is_stored_once(tmp_path, format):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("view", self.embed.weight.detach()[1:3])
            self.register_buffer("none", torch.ones(0))
            self.register_buffer("nothing", torch.ones(0))

    model = Tied()
    saved = io.save(model, tmp_path / "f", format=format)
    assert saved.aliases == {"head.weight": "embed.weight"}
    assert "stored once: head.weight = embed.weight" in str(saved)
    assert saved.stored_bytes == saved.dense_bytes == 4 * (24 + 8)
    back = io.load(tmp_path / "f")
    assert list(back) == list(model.state_dict())
    assert back["head.weight"] is back["embed.weight"]
    for name, value in model.state_dict().items():
        same(back[name], value)
    shared = quantized_model(8)[0].weight
    io.save({"a": shared, "b": shared.detach()}, tmp_path / "q")
    back = io.load(tmp_path / "q")
    assert back["a"] is back["b"]
    same(back["a"].codes, shared.codes)


def test_names_of_parts_may_be_taken(tmp_path):
    state = {"a": torch.zeros(99), "a.values": torch.ones(3), "ü \"'\n": torch.zeros(64)}
    saved = io.save(state, tmp_path / "f")
    assert [row.format for row in saved.rows] == ["dense", "dense", "bitmask"]
    back = io.load(tmp_path / "f")
    for name, value in state.items():
        same(back[name], value)
    weight = quantized_model(8)[0].weight
    with pytest.raises(ValueError, match=r"save: w is stored as \['w.scale'\], which other"):
        io.save({"w": weight, "w.scale": torch.ones(3)}, tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_layout(tmp_path):
    weight = torch.zeros(4, 16)
    weight[0, 0], weight[1, 2] = 5, 7
    io.save({"w": weight, "b": torch.ones(1)}, tmp_path / "f")
    tensors, metadata = on_disk(tmp_path / "f")
    assert tensors["w.values"].tolist() == [5, 7]
    assert tensors["w.places"].tolist() == [1, 0, 4, 0, 0, 0, 0, 0]
    assert metadata["format"] == "pt"
    assert json.loads(metadata["gradpress"]) == {
        "version": 1,
        "format": "gradpress",
        "tensors": {"w": {"format": "bitmask", "shape": [4, 16], "dtype": "float32"}},
        "aliases": {},
        "order": ["w", "b"],
    }


def test_tensors_are_aligned(tmp_path):
    state = OrderedDict((str(n), torch.zeros(n, dtype=torch.bool)) for n in range(4))
    state |= {"w": torch.eye(13), "d": torch.ones(3).double(), "h": torch.ones(3).half()}
    io.save(state, tmp_path / "f")
    content = (tmp_path / "f").read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    head = json.loads(content[8 : 8 + size])
    widths = {"BOOL": 1, "U8": 1, "F16": 2, "F32": 4, "F64": 8}
    for name, entry in head.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % widths[entry["dtype"]] == 0


def test_a_file_is_replaced_or_left(tmp_path, monkeypatch):
    path = tmp_path / "f"
    io.save({"w": torch.ones(3)}, path)
    before = path.read_bytes()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask

    def fails(*_):
        raise OSError("no space")

    monkeypatch.setattr("gradpress.io._write._write_tensor", fails)
    with pytest.raises(OSError, match="no space"):
        io.save({"w": torch.zeros(3)}, path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["f"]
    io.save({"w": torch.zeros(3)}, path)
    assert io.load(path)["w"].sum() == 0
    assert os.listdir(tmp_path) == ["f"]


def test_changes_while_saving_are_noticed(tmp_path, monkeypatch):
    weight = torch.zeros(99)
    split = gradpress.io._write.split

    def later(tensor, layout):
        tensor[0] = 1
        return split(tensor, layout)

    monkeypatch.setattr("gradpress.io._write.split", later)
    with pytest.raises(RuntimeError, match="save: w was changed while it was saved"):
        io.save({"w": weight}, tmp_path / "f")
    assert os.listdir(tmp_path) == []


def test_table():
    state = {"w": torch.eye(64), "b": torch.ones(64)}
    table = io.size_table(state)
    assert isinstance(table, io.SizeTable)
    assert table.to_dict()[0] == {
        "name": "w",
        "shape": (64, 64),
        "dtype": "float32",
        "sparsity": 1 - 1 / 64,
        "negative_zeros": 0,
        "format": "bitmask",
        "dense_bytes": 16384,
        "stored_bytes": 768,
    }
    frame = table.to_pandas()
    assert list(frame.index) == ["w", "b"]
    assert frame["stored_bytes"].sum() == table.stored_bytes == 768 + 256
    assert "16,640" in str(table)
    assert "<td" in table._repr_html_()
    assert io.size_table(state, format="dense").stored_bytes == table.dense_bytes
    empty = io.size_table({})
    assert "total" in str(empty)
    assert len(empty.to_pandas()) == 0


def test_errors(tmp_path):
    path = tmp_path / "f"
    one = torch.ones(1)
    cases = [
        ([one], TypeError, "save: model must be a torch.nn.Module or a state dict, got list"),
        ({"a": 1}, TypeError, "save: a must be a tensor, got int"),
        ({3: one}, TypeError, "save: names must be strings, got 3"),
        ({"__metadata__": one}, ValueError, "belongs to the file format"),
        ({"a": one.to("meta")}, ValueError, "save: a is on the meta device and has no values"),
        ({"a": one.to(torch.complex128)}, TypeError, "save: a has dtype complex128"),
        ({"a": one.to_sparse()}, TypeError, "save: a must be strided, got layout torch.sparse"),
        ({"a": nn.UninitializedParameter()}, TypeError, "got UninitializedParameter"),
    ]
    for state, kind, message in cases:
        with pytest.raises(kind, match=message):
            io.save(state, path)
    with pytest.raises(ValueError, match=r"save: format must be .* or .*, got 'csr'"):
        io.save({"a": one}, path, format="csr")
    with pytest.raises(TypeError, match="size_table: a must be a tensor, got int"):
        io.size_table({"a": 1})
    with pytest.raises(FileNotFoundError, match="save: the folder of path does not exist"):
        io.save({"a": one}, tmp_path / "no" / "f")
    assert os.listdir(tmp_path) == []
