import json

import pytest
import torch

from gradpress.train import UserError
from gradpress.train.checkpoint import (
    clean_checkpoints,
    newest_checkpoint,
    save_checkpoint,
)
from gradpress.train.evaluate import token_losses
from gradpress.train.files import remove_leftovers, whole_folder, write_atomically
from gradpress.train.model import build_model
from gradpress.train.optimizer import build_optimizer, quantize_weights


def trained(seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_round_trip_bit_by_bit(tmp_path):
    model, optimizer = trained(0)
    save_checkpoint(tmp_path, model, optimizer, {"step": 7, "data_digest": "x"}, keep=1)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint.step == 7
    assert checkpoint.trainer["data_digest"] == "x"
    other, other_optimizer = trained(1)
    checkpoint.load(other, other_optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    torch.testing.assert_close(other_optimizer.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_newest_are_kept(tmp_path):
    model, optimizer = trained(0)
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, model, optimizer, {"step": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]
    assert newest_checkpoint(tmp_path).step == 11


def test_saving_twice_keeps_the_first(tmp_path):
    model, optimizer = trained(0)
    first = save_checkpoint(tmp_path, model, optimizer, {"step": 1}, keep=1)
    before = first.stat().st_ino
    save_checkpoint(tmp_path, model, optimizer, {"step": 1}, keep=1)
    assert first.stat().st_ino == before


def test_incomplete_folders_are_ignored_and_cleaned(tmp_path):
    assert newest_checkpoint(tmp_path / "missing") is None
    model, optimizer = trained(0)
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, model, optimizer, {"step": step}, keep=9)
    (tmp_path / "step-2" / "trainer.json").write_text("{")
    (tmp_path / "step-3" / "optimizer.pt").unlink()
    with open(tmp_path / "step-4" / "model.safetensors", "ab") as file:
        file.truncate(10)
    (tmp_path / "step-5").mkdir()
    (tmp_path / ".step-6.tmp").mkdir()
    (tmp_path / ".step-6.tmp" / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path).step == 1
    clean_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_checkpoint_of_another_model_is_refused(tmp_path):
    model, optimizer = trained(0)
    save_checkpoint(tmp_path, model, optimizer, {"step": 1}, keep=1)
    other = torch.nn.Linear(5, 2)
    with pytest.raises(UserError, match="step-1: cannot be loaded"):
        newest_checkpoint(tmp_path).load(other, torch.optim.AdamW(other.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "qgalore"])
def test_states_follow_the_parameters_to_another_device(small, tmp_path, optimizer):
    config = small(optimizer=optimizer)
    made = []
    for device in ("cpu", "meta"):
        model = build_model(config)
        quantize_weights(model, config)
        model.to(device)
        made.append((model, build_optimizer(model, config)))
    (model, one), (moved, other) = made
    token_losses(model, torch.zeros(1, 5, dtype=torch.int64)).mean().backward()
    one.step()
    save_checkpoint(tmp_path, model, one, {"step": 1}, keep=1)
    newest_checkpoint(tmp_path).load(moved, other)
    assert {parameter.device.type for parameter in moved.parameters()} == {"meta"}
    large = [state for state in other.state.values() if state]
    assert len(large) == len(list(model.parameters()))
    for state in large:
        moments = [tensor for name, tensor in state.items() if name.startswith("exp_avg")]
        assert moments
        assert {tensor.device.type for tensor in moments} == {"meta"}
        # Counters are read at every step: they stay where reading waits for nothing.
        assert state["step"].device.type == "cpu"


def test_checkpoint_of_a_cuda_run_loads_without_cuda(tmp_path, monkeypatch):
    model, optimizer = trained(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        save_checkpoint(tmp_path, model, optimizer, {"step": 1}, keep=1)
    other, other_optimizer = trained(1)
    newest_checkpoint(tmp_path).load(other, other_optimizer)
    torch.testing.assert_close(other_optimizer.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model, optimizer = trained(0)
    save_checkpoint(tmp_path, model, optimizer, {"step": 1}, keep=1)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, model, optimizer, {"step": 2}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_whole_folder_replaces(tmp_path):
    for content in ("old", "new"):
        with whole_folder(tmp_path / "model") as folder:
            (folder / content).write_text(content)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_write_atomically_and_leftovers(tmp_path):
    path = tmp_path / "config.json"
    write_atomically(path, json.dumps({"a": 1}).encode())
    write_atomically(path, b"[]")
    (tmp_path / ".config.json.tmp").write_text("half")
    remove_leftovers(tmp_path)
    assert path.read_text() == "[]"
    assert list(tmp_path.iterdir()) == [path]
