"""A compression that was stopped goes on where it was, to the same bits."""

import copy
import json

import pytest
import torch
from tests.engine.models import (
    VOCABULARY,
    compress,
    llama,
    same,
    square_loss,
    stack,
    token_batches,
    vector_batches,
)
from tests.engine.zoo import Scaled, bart

import gradpress
from gradpress import prune
from gradpress.engine import _resume

BATCHES = token_batches(count=2, samples=2, tokens=6)


class Killed(Exception):
    pass


def kill_after(monkeypatch, recipe, blocks):
    """Compressing fails when so many blocks are done; returns how many began."""
    own = type(recipe).compress
    begun = []

    def compress_block(self, observed):
        if len(begun) == blocks:
            raise Killed
        begun.append([one.layer.name for one in observed])
        return own(self, observed)

    monkeypatch.setattr(type(recipe), "compress", compress_block)
    return begun


def rows(report):
    return [(row.name, row.shape, row.sparsity, row.error, row.note) for row in report.rows]


def weight_bytes(model):
    return 4 * sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)


def check_resumed(model, recipe, batches, folder, monkeypatch, blocks, **options):
    """Kills after each number of blocks, goes on, and compares."""
    expected = copy.deepcopy(model)
    whole = compress(expected, recipe, batches, **options)
    for done in range(blocks):
        place = folder / str(done)
        stopped = copy.deepcopy(model)
        with monkeypatch.context() as patch:
            kill_after(patch, recipe, done)
            with pytest.raises(Killed):
                compress(stopped, recipe, batches, resume=place, **options)
        found = copy.deepcopy(model)
        with monkeypatch.context() as patch:
            begun = kill_after(patch, recipe, blocks + 1)
            report = compress(found, recipe, batches, resume=place, **options)
        assert len(begun) == blocks - done
        assert same(found, expected)
        assert rows(report) == rows(whole)


@pytest.mark.parametrize(
    ("recipe", "groups"),
    [
        (prune.Magnitude(), 1),
        (prune.Wanda(), 1),
        (prune.SparseGPT(), 1),
        (prune.GBLM(), 1),
        (prune.GBLM(norm="l2", sparsity=0.7), 2),
        (prune.GBLM(allocation="gradient"), 3),
        (prune.Gradient(), 3),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, int) else None,
)
def test_same_bits(recipe, groups, tmp_path, monkeypatch):
    model = llama(layers=3, hidden=16)
    with torch.no_grad():  # zeros of both signs are kept, and told from those that are made
        model.model.layers[1].mlp.up_proj.weight[0, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    blocks = -(-3 // groups)
    memory = None if groups == 1 else weight_bytes(model) // 3 * blocks
    batches = None if isinstance(recipe, prune.Magnitude) else BATCHES
    options = {"gradient_memory": memory}
    check_resumed(model, recipe, batches, tmp_path, monkeypatch, 3, **options)


def test_whole_model_runs(tmp_path, monkeypatch):
    model = stack(model=Scaled)
    check_resumed(model, prune.GBLM(), vector_batches(), tmp_path, monkeypatch, 3, loss=square_loss)


def test_encoder_and_decoder(tmp_path, monkeypatch):
    case = bart()
    check_resumed(case.model, prune.Wanda(), case.batches, tmp_path, monkeypatch, 5)


def test_bfloat16(tmp_path, monkeypatch):
    model = llama(hidden=16).bfloat16()
    memory = weight_bytes(model) // 2
    check_resumed(model, prune.GBLM(), BATCHES, tmp_path, monkeypatch, 2, gradient_memory=memory)


def test_several_recipes(tmp_path, monkeypatch):
    model = llama(layers=2)
    recipes = [prune.Wanda(sparsity=0.3), prune.SparseGPT(pattern="2:4")]
    expected = copy.deepcopy(model)
    whole = compress(expected, recipes, BATCHES)
    with monkeypatch.context() as patch:
        kill_after(patch, recipes[1], 1)
        with pytest.raises(Killed):
            compress(copy.deepcopy(model), recipes, BATCHES, resume=tmp_path)
    found = copy.deepcopy(model)
    report = compress(found, recipes, BATCHES, resume=tmp_path)
    assert same(found, expected)
    assert rows(report) == rows(whole)
    # A finished one is taken as it is, without a run of the model.
    again = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        begun = [kill_after(patch, recipe, 0) for recipe in recipes]
        report = compress(again, recipes, BATCHES, resume=str(tmp_path))
    assert begun == [[], []]
    assert same(again, expected)
    assert rows(report) == rows(whole)


@pytest.mark.parametrize("write", range(8))
def test_kill_while_a_block_is_written(write, tmp_path, monkeypatch):
    """Of a file that is not whole nothing is known."""
    model = llama(layers=3)
    expected = copy.deepcopy(model)
    compress(expected, prune.Wanda(), BATCHES)
    count = []
    replace = _resume.os.replace

    def stop(source, target):
        if len(count) == write:
            source.write_bytes(b"half")
            raise Killed
        count.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(_resume.os, "replace", stop)
        with pytest.raises(Killed):
            compress(copy.deepcopy(model), prune.Wanda(), BATCHES, resume=tmp_path)
    found = copy.deepcopy(model)
    compress(found, prune.Wanda(), BATCHES, resume=tmp_path)
    assert same(found, expected)


def other_model():
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    return model


def changed_batches():
    batches = token_batches()
    batches[-1][0, 0] = (batches[-1][0, 0] + 1) % VOCABULARY
    return batches


@pytest.mark.parametrize(
    ("model", "recipe", "batches"),
    [
        (other_model, prune.Wanda(), BATCHES),
        (llama, prune.Wanda(sparsity=0.4), BATCHES),
        (llama, prune.SparseGPT(), BATCHES),
        (llama, prune.Wanda(), changed_batches()),
        (llama, prune.Wanda(), BATCHES[:-1]),
        (llama, prune.Wanda(), [{"input_ids": batch} for batch in BATCHES]),
    ],
    ids=["model", "sparsity", "recipe", "values", "count", "keys"],
)
def test_folder_of_another(model, recipe, batches, tmp_path):
    compress(llama(), prune.Wanda(), BATCHES, resume=tmp_path)
    found = model()
    with pytest.raises(ValueError, match=r"compress: resume must be the folder .* of another"):
        compress(found, recipe, batches, resume=tmp_path)
    assert same(found, model())


def test_files(tmp_path):
    """Tensors that load safely, and no more inputs than those of the next block."""
    compress(llama(layers=3), prune.Wanda(), BATCHES, resume=tmp_path)
    folder = tmp_path / "0"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["block-0.pt", "block-1.pt", "block-2.pt", "inputs-3.pt", "state.json"]
    assert torch.load(folder / "inputs-3.pt", weights_only=True) == []
    block = torch.load(folder / "block-1.pt", weights_only=True)
    assert len(block) == 7
    state = json.loads((folder / "state.json").read_text())
    assert [len(block) for block in state["blocks"]] == [7, 7, 7]


def test_without_gradients_anew(tmp_path):
    """Gradients of finished groups are not collected again."""
    model = llama(layers=2)
    calls = []

    def loss(model, batch):
        calls.append(1)
        return model(batch, labels=batch).loss

    memory = weight_bytes(model) // 2
    options = {"loss": loss, "gradient_memory": memory, "resume": tmp_path}
    compress(copy.deepcopy(model), prune.GBLM(), BATCHES, **options)
    assert len(calls) == 2 * 4
    gradpress.compress(model, prune.GBLM(), calibration=BATCHES, progress=False, **options)
    assert len(calls) == 2 * 4
