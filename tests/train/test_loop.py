import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from gradpress.train import DivergedError, UserError, resume_run, start_run
from gradpress.train.folder import locked
from gradpress.train.loop import Trainer
from gradpress.train.metrics import read_metrics

OPTIMIZERS = ("adamw", "adamw8bit", "qgalore")
LEAST = {"memory": "least"}
TIMINGS = ("tokens_per_second", "step_seconds", "optimizer_seconds", "memory_bytes", "seconds")


class Died(Exception):
    """Stands for a process that ends between two instructions."""


def stop_before(monkeypatch, step, action):
    """Does something when a run is about to take a step (counted from 1)."""
    original = Trainer.train_step

    def train_step(self):
        if self.step + 1 == step:
            action()
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def die():
    raise Died


def final_tensors(folder, step):
    checkpoint = folder / "checkpoints" / f"step-{step}"
    return (
        load_file(checkpoint / "model.safetensors"),
        load_file(folder / "model" / "model.safetensors"),
        torch.load(checkpoint / "optimizer.pt", weights_only=True),
    )


def what_was_computed(folder):
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


def assert_same_run(one, other, step):
    *weights, optimizer = final_tensors(one, step)
    *other_weights, other_optimizer = final_tensors(other, step)
    assert optimizer["param_groups"] == other_optimizer["param_groups"]
    ours, theirs = [*weights, optimizer["state"]], [*other_weights, other_optimizer["state"]]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert what_was_computed(one) == what_was_computed(other)


@pytest.mark.parametrize("method", [*({"optimizer": name} for name in OPTIMIZERS), LEAST])
def test_resumed_run_is_the_same_bit_by_bit(small, quiet, tmp_path, monkeypatch, method):
    config = small(**method, accumulate=2, clip=1.0, weight_decay=0.01)
    start_run(config, quiet(), tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_before(patch, 6, die)
        with pytest.raises(Died):
            start_run(config, quiet(), tmp_path / "killed")
    assert read_metrics(tmp_path / "killed" / "metrics.jsonl")[-1]["step"] == 5
    assert (tmp_path / "killed" / "checkpoints" / "step-4").is_dir()
    outcome = resume_run(tmp_path / "killed", {}, {})
    assert (outcome.step, outcome.exit_code) == (8, 0)
    assert_same_run(tmp_path / "straight", tmp_path / "killed", 8)


def test_interrupted_everywhere_is_still_the_same(small, quiet, tmp_path, monkeypatch):
    config = small()
    start_run(config, quiet(), tmp_path / "straight")
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        stop_before(patch, 1, die)
        with pytest.raises(Died):
            start_run(config, quiet(), folder)
    for step in range(2, 9):
        with monkeypatch.context() as patch:
            stop_before(patch, step, die)
            with pytest.raises(Died):
                resume_run(folder, {}, {"save_every": 1})
    resume_run(folder, {}, {})
    assert_same_run(tmp_path / "straight", folder, 8)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_finishes_the_step_and_saves(small, quiet, tmp_path, monkeypatch, number, code):
    config = small(eval_every=3)
    folder = tmp_path / "run"
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_before(patch, 3, lambda: os.kill(os.getpid(), number))
        outcome = start_run(config, quiet(save_every=0), folder)
    assert (outcome.step, outcome.exit_code) == (3, code)
    assert signal.getsignal(number) is handler
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-3"]
    assert not (folder / "model").exists()
    assert resume_run(folder, {}, {}).exit_code == 0
    start_run(config, quiet(save_every=0), tmp_path / "straight")
    assert_same_run(tmp_path / "straight", folder, 8)


@pytest.fixture
def usual_interrupt():
    """Python's own handler, also where a shell started the tests with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_second_signal_ends_at_once(small, quiet, tmp_path, monkeypatch, usual_interrupt):
    def twice():
        # In this thread: of two that wait in another one, the system may keep one.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop_before(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        start_run(small(), quiet(), tmp_path / "run")


def test_run_folder_tells_the_whole_run(small, quiet, tmp_path):
    config = small()
    outcome = start_run(config, quiet(plot=True), tmp_path / "run")
    folder = outcome.folder
    records = read_metrics(folder / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert [record["step"] for record in evaluations] == [0, 4, 8]
    assert steps[-1]["tokens"] == 8 * 2 * 16
    assert all(record["memory_bytes"] > 10**6 for record in steps)
    assert all(0 < r["optimizer_seconds"] < r["step_seconds"] for r in steps)
    assert outcome.validation_loss == evaluations[-1]["loss"]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    for name in ("config.json", "tokenizer.json", "memory.txt", "memory.json", "summary.json"):
        assert (folder / name).stat().st_size > 0
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation"]["loss"] == outcome.validation_loss


def test_finished_run_can_be_resumed_without_effect(small, quiet, tmp_path):
    start_run(small(), quiet(), tmp_path / "run")
    before = what_was_computed(tmp_path / "run"), final_tensors(tmp_path / "run", 8)
    assert resume_run(tmp_path / "run", {}, {}).exit_code == 0
    assert what_was_computed(tmp_path / "run") == before[0]
    torch.testing.assert_close(final_tensors(tmp_path / "run", 8), before[1], rtol=0, atol=0)


def test_learning_rates_of_both_groups(small, quiet, tmp_path):
    start_run(small(lr=0.0, lr_rest=0.5, warmup=0.0, steps=2), quiet(), tmp_path / "run")
    final, _, optimizer = final_tensors(tmp_path / "run", 2)
    start_run(small(lr=0.0, lr_rest=0.0, warmup=0.0, steps=2), quiet(), tmp_path / "still")
    initial, _, _ = final_tensors(tmp_path / "still", 2)
    moved = {name for name in final if not torch.equal(final[name], initial[name])}
    matrices = {name for name in final if ("attn" in name or "mlp" in name)}
    assert moved == set(final) - matrices
    assert [group["lr"] for group in optimizer["param_groups"]] == [0.0, 0.5 * 0.55]


def test_accumulation_is_a_larger_batch(small, quiet, tmp_path):
    start_run(small(batch_size=4, steps=3), quiet(), tmp_path / "one")
    start_run(small(batch_size=2, accumulate=2, steps=3), quiet(), tmp_path / "two")
    one, two = final_tensors(tmp_path / "one", 3)[0], final_tensors(tmp_path / "two", 3)[0]
    # Equal but for the order of float32 sums; Adam's ratio may amplify that where a gradient is
    # nearly zero, yet no step is larger than the learning rates, 1e-3 in all.
    torch.testing.assert_close(one, two, rtol=0, atol=2e-4)
    losses = {
        name: [
            record["loss"]
            for record in read_metrics(tmp_path / name / "metrics.jsonl")
            if record["kind"] == "step"
        ]
        for name in ("one", "two")
    }
    assert losses["one"] == pytest.approx(losses["two"], rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_least_memory_computes_what_the_ordinary_way_does(small, quiet, tmp_path, accumulate):
    shared = {"optimizer": "qgalore", "accumulate": accumulate, "update_proj_gap": 20}
    losses = []
    for name in ("ordinary", "least"):
        start_run(small(**shared, memory=name), quiet(), tmp_path / name)
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        losses.append([record["loss"] for record in records])
    # With several passes a first basis comes from the first of them, and the runs part a little.
    rtol = 1e-3 if accumulate == 1 else 2e-2
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=rtol, atol=0)
    assert losses[1][-1] < losses[1][0]


def test_divergence_is_reported_and_the_last_checkpoint_stays(small, quiet, tmp_path, monkeypatch):
    def poison(self):
        with torch.no_grad():
            next(iter(self.model.parameters())).fill_(float("nan"))

    original = Trainer.train_step

    def train_step(self):
        if self.step == 4:
            poison(self)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(DivergedError, match="step 5: loss nan"):
        start_run(small(), quiet(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-4"]


def test_folders_that_cannot_be_used(small, quiet, tmp_path):
    config = small(steps=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        start_run(config, quiet(), tmp_path / "file")
    with pytest.raises(UserError, match="cannot be made"):
        start_run(config, quiet(), tmp_path / "file" / "below")
    with pytest.raises(UserError, match="is not empty"):
        start_run(config, quiet(), tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        resume_run(tmp_path / "nothing", {}, {})
    start_run(config, quiet(), tmp_path / "run")
    with pytest.raises(UserError, match="continue it with --resume"):
        start_run(config, quiet(), tmp_path / "run")
    with pytest.raises(UserError, match=r"--lr 0.5: this run has 0.001"):
        resume_run(tmp_path / "run", {"lr": 0.5, "size": "tiny"}, {})
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        resume_run(tmp_path / "run", {}, {})
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="format"):
        resume_run(tmp_path / "run", {}, {})


def test_run_that_never_started_leaves_no_folder(small, quiet, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        start_run(small(text=("missing",)), quiet(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_changed_text_is_noticed(small, quiet, tmp_path, monkeypatch):
    stop_before(monkeypatch, 4, die)
    with pytest.raises(Died):
        start_run(small(), quiet(), tmp_path / "run")
    description = tmp_path / "run" / "data" / "data.json"
    stored = json.loads(description.read_text())
    description.write_text(json.dumps({**stored, "digest": "0" * 64}))
    with pytest.raises(UserError, match="the text is not the one"):
        resume_run(tmp_path / "run", {}, {})
