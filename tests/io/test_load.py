"""Loading: into models in place, or an error that says what is wrong, before anything changes."""

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import gradpress
from gradpress import io, prune


def make_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 4)).to(dtype)
    prune.apply_masks_(model, {"0": torch.rand(12, 16) < 0.4, "2": torch.rand(4, 12) < 0.4})
    return model


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model, state):
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def edit_header(path, change):
    """Rewrites a file with another header of ours."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    own = json.loads(head["__metadata__"]["gradpress"])
    change(own)
    head["__metadata__"]["gradpress"] = json.dumps(own)
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


@pytest.mark.parametrize("format", ["gradpress", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_into_a_model(tmp_path, format, dtype):
    model, other = make_model(0, dtype), make_model(1, dtype)
    io.save(model, tmp_path / "f", format=format)
    parameters = [id(p) for p in other.parameters()]
    version = other[0].weight._version
    assert io.load(tmp_path / "f", other) == ([], [])
    assert_state(other, model.state_dict())
    assert [id(p) for p in other.parameters()] == parameters
    assert all(p.requires_grad for p in other.parameters())
    assert other[0].weight._version > version


@pytest.mark.parametrize("bits", [8, 4])
def test_into_a_quantized_model(tmp_path, bits):
    model, other = (gradpress.nn.quantize_(make_model(seed), bits=bits) for seed in (0, 1))
    io.save(model, tmp_path / "f")
    io.load(tmp_path / "f", other)
    for name, part in model[0].weight.parts.items():
        assert torch.equal(other[0].weight.parts[name], part)
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match="does not fit model") as error:
        io.load(tmp_path / "f", make_model())
    assert (
        f"0.weight must be float32 of shape [12, 16], got float32 as int{bits} in groups of 256"
        in str(error.value)
    )
    io.save(make_model(), tmp_path / "d")
    with pytest.raises(ValueError, match=f"must be float32 as int{bits} in groups of 256"):
        io.load(tmp_path / "d", other)
    assert torch.equal(other[0].weight.codes, before[0].weight.codes)


def test_differences_are_named_and_nothing_is_touched(tmp_path):
    state = make_model().state_dict()
    state["extra"] = torch.ones(1)
    del state["1.running_mean"]
    state["0.bias"] = state["0.bias"].half()
    state["2.weight"] = torch.zeros(5, 12)
    io.save(state, tmp_path / "f")
    model = make_model(1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="f does not fit model") as error:
        io.load(tmp_path / "f", model)
    assert str(error.value).splitlines()[1:] == [
        "  missing in the file: 1.running_mean",
        "  unexpected in the file: extra",
        "  0.bias must be float32 of shape [12], got float16 of shape [12]",
        "  2.weight must be float32 of shape [4, 12], got float32 of shape [5, 12]",
    ]
    assert_state(model, before)
    with pytest.raises(ValueError, match=r"got float16 of shape \[12\]"):
        io.load(tmp_path / "f", model, strict=False)
    assert_state(model, before)
    state["0.bias"], state["2.weight"] = before["0.bias"], before["2.weight"]
    io.save(state, tmp_path / "f")
    got = io.load(tmp_path / "f", model, strict=False)
    assert got.missing_keys == ["1.running_mean"]
    assert got.unexpected_keys == ["extra"]
    assert_state(model, state | {"1.running_mean": before["1.running_mean"]})


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def test_tied_weights(tmp_path):
    model, other = Tied(), Tied()
    io.save(model, tmp_path / "f")
    io.load(tmp_path / "f", other)
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, model.head.weight)
    # A tied model's file fills an untied one.
    loose = Tied(tie=False)
    io.load(tmp_path / "f", loose)
    assert torch.equal(loose.head.weight, model.head.weight)
    # One of the names is enough.
    third = Tied()
    io.save({"embed.weight": model.embed.weight}, tmp_path / "f")
    assert io.load(tmp_path / "f", third) == ([], [])
    assert torch.equal(third.head.weight, model.head.weight)
    with pytest.raises(ValueError, match=r"missing in the file: head.weight"):
        io.load(tmp_path / "f", loose)
    # Two tensors do not fill one.
    io.save(Tied(tie=False), tmp_path / "f")
    with pytest.raises(
        ValueError, match=r"head.weight and embed.weight are one tensor in the model, two"
    ):
        io.load(tmp_path / "f", third)
    assert torch.equal(third.head.weight, model.head.weight)


def test_models_that_cannot_be_filled(tmp_path):
    model = make_model()
    io.save(model, tmp_path / "f")
    with pytest.raises(ValueError, match=r"load: model has 0.weight on the meta device"):
        io.load(tmp_path / "f", copy.deepcopy(model).to("meta"))
    model.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({"0.bias": state["0.bias"].clone()})
    )
    with pytest.raises(ValueError, match=r"load: model makes 0.bias of its state dict anew"):
        io.load(tmp_path / "f", model)


def test_files_that_are_not_ours(tmp_path):
    path = tmp_path / "f"
    with pytest.raises(FileNotFoundError, match="load: path is no file"):
        io.load(path)
    with pytest.raises(FileNotFoundError, match="load: path is no file"):
        io.load(tmp_path)
    for content in (b"", b"PK\x03\x04" + bytes(99), b"\xff" * 99):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="f is no whole safetensors file"):
            io.load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"was not written by gradpress.io.save; plain safe"):
        io.load(path)
    save_file({"a": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="f: it was not written by gradpress"):
        io.load(path)


def test_truncated_files(tmp_path):
    path = tmp_path / "f"
    io.save(make_model(), path)
    content = path.read_bytes()
    model = make_model(1)
    before = snapshot(model)
    for length in (1, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="f is no whole safetensors file"):
            io.load(path, model)
    assert_state(model, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.update(version=2), "version 2, newer than 1, the last one"),
        (lambda own: own.pop("version"), "no version can be read"),
        (lambda own: own.pop("order"), "header is damaged: KeyError"),
        (lambda own: own.update(format="csr"), "unknown format 'csr'"),
        (lambda own: own.update(tensors=[]), "header is damaged"),
        (lambda own: own["order"].append("0.bias"), "names do not fit"),
        (lambda own: own["order"].remove("0.bias"), r"names do not fit the tensors: \['0.bias'\]"),
        (lambda own: own["aliases"].update({"x": "y"}), "aliases do not fit"),
        (lambda own: own["tensors"].pop("0.weight"), "names do not fit"),
        (lambda own: own["tensors"].update(no=own["tensors"]["0.weight"]), "no tensors"),
        (lambda own: own["tensors"]["0.weight"].update(format="csr"), "unknown format 'csr'"),
        (lambda own: own["tensors"]["0.weight"].update(dtype="int8"), "dtype 'int8'"),
        (lambda own: own["tensors"]["0.weight"].update(shape=[-1, 8]), "has shape"),
        (lambda own: own["tensors"]["0.weight"].update(shape=[3, 1]), "places must have 1 bytes"),
        (lambda own: own["tensors"]["0.weight"].update(dtype="float16"), "values must be float16"),
        (
            lambda own: own["tensors"]["0.weight"].update(format="2:4", shape=[32, 6]),
            "format 2:4 and shape",
        ),
        (lambda own: own["tensors"]["0.weight"].update(format="2:4"), "values must hold 96 elem"),
    ],
)
def test_damaged_headers(tmp_path, change, message):
    path = tmp_path / "f"
    io.save(make_model(), path)
    edit_header(path, change)
    with pytest.raises(ValueError, match=f"load: .*f: .*{message}"):
        io.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [12, 15]}, "codes must be uint8 of shape"),
        ({"group_size": 3}, "scale must be float32 of shape"),
        ({"group_size": 0}, "has group_size 0"),
        ({"format": "int4"}, "codes must be uint8 of shape"),
        ({"dtype": "int32"}, "dtype 'int32'"),
    ],
)
def test_damaged_headers_of_quantized_weights(tmp_path, change, message):
    path = tmp_path / "f"
    io.save(gradpress.nn.quantize_(make_model()), path)
    edit_header(path, lambda own: own["tensors"]["0.weight"].update(change))
    with pytest.raises(ValueError, match=f"load: .*f: .*{message}"):
        io.load(path)


def test_without_safetensors(tmp_path, monkeypatch):
    io.save({"a": torch.ones(1)}, tmp_path / "f")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"load: needs safetensors.*gradpress\[io\]"):
        io.load(tmp_path / "f")
