import json

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gradpress
from gradpress.train import UserError, device, resume_run, start_run
from gradpress.train.device import Clock, choose_device, describe, kernel_refusal, to_device
from gradpress.train.evaluate import evaluate
from gradpress.train.loop import Trainer
from gradpress.train.model import build_model

from .test_loop import assert_same_run

CPU = torch.device("cpu")


@pytest.fixture
def cards(monkeypatch):
    """Makes PyTorch see CUDA devices, of which the second is current."""

    def make(count, refusal=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: min(1, count - 1))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda which: f"Card {which.index}")
        monkeypatch.setattr(device, "kernel_refusal", lambda _: refusal)

    return make


@pytest.mark.parametrize(
    ("name", "count", "chosen"),
    [
        ("auto", 0, "cpu"),
        ("auto", 1, "cuda:0"),
        ("auto", 2, "cuda:1"),
        ("cpu", 2, "cpu"),
        ("cuda", 2, "cuda:1"),
        ("cuda:0", 2, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_choice(cards, name, count, chosen):
    cards(count)
    assert choose_device(name) == torch.device(chosen)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("mps", 0, "--device mps: takes auto, cpu, cuda or cuda:N"),
        ("cuda:", 2, "--device cuda:: takes auto, cpu, cuda or cuda:N"),
        ("cuda:-1", 2, "--device cuda:-1: takes auto, cpu, cuda or cuda:N"),
        ("CPU", 2, "--device CPU: takes auto, cpu, cuda or cuda:N"),
        ("", 2, "--device : takes auto, cpu, cuda or cuda:N"),
        ("cuda", 0, "--device cuda: PyTorch sees no CUDA device; takes auto or cpu here"),
        ("cuda:0", 0, "--device cuda:0: PyTorch sees no CUDA device; takes auto or cpu here"),
        (
            "cuda:7",
            2,
            "--device cuda:7: PyTorch sees 2 of them; takes auto, cpu, cuda, cuda:0, cuda:1 here",
        ),
    ],
)
def test_wrong_names(cards, name, count, message):
    cards(count)
    with pytest.raises(UserError) as raised:
        choose_device(name)
    assert str(raised.value) == message


def test_card_that_the_kernels_refuse(cards, capsys):
    cards(2, "no compiler")
    assert choose_device("auto") == CPU
    said = capsys.readouterr().out
    assert said == "cuda:1 is left out: gradpress's kernels cannot run there (no compiler)\n"
    with pytest.raises(UserError, match=r"--device cuda:0: gradpress's .* there \(no compiler\)"):
        choose_device("cuda:0")


def test_trial_of_the_kernels(monkeypatch):
    before = torch.random.get_rng_state()
    assert kernel_refusal(CPU) is None

    def failing(*args, **options):
        raise RuntimeError("project: NVRTC knows no sm_30,\n  only sm_75")

    monkeypatch.setattr(gradpress.ops.lowrank, "project", failing)
    assert kernel_refusal(CPU) == "project: NVRTC knows no sm_30, only sm_75"
    assert torch.equal(torch.random.get_rng_state(), before)


def test_description(cards):
    cards(2)
    assert describe(torch.device("cuda:1")) == "cuda:1 (Card 1)"
    assert describe(CPU).startswith("cpu (")


def test_default_without_cuda_is_the_cpu_bit_by_bit(small, quiet, tmp_path, cards, capsys):
    cards(0)
    config = small(optimizer="qgalore", steps=4)
    start_run(config, quiet(device="auto"), tmp_path / "auto")
    assert f"on {describe(CPU)}\n" in capsys.readouterr().out
    start_run(config, quiet(device="cpu"), tmp_path / "cpu")
    assert_same_run(tmp_path / "auto", tmp_path / "cpu", 4)
    stored = json.loads((tmp_path / "auto" / "config.json").read_text())
    assert stored["options"]["device"] == "cpu"
    summary = json.loads((tmp_path / "auto" / "summary.json").read_text())
    assert summary["device"] == describe(CPU)


def test_resumed_run_keeps_or_changes_its_device(small, quiet, tmp_path, cards):
    cards(0)
    folder = tmp_path / "run"
    start_run(small(steps=1), quiet(), folder)
    path = folder / "config.json"

    def stored_device():
        return json.loads(path.read_text())["options"].get("device")

    with pytest.raises(UserError, match="--device cuda: PyTorch sees no CUDA device"):
        resume_run(folder, {}, {"device": "cuda"})
    assert stored_device() == "cpu"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda:1"'))
    with pytest.raises(UserError, match="--device cuda:1: PyTorch sees no CUDA device"):
        resume_run(folder, {}, {})
    assert stored_device() == "cuda:1"
    assert resume_run(folder, {}, {"device": "auto"}).exit_code == 0
    assert stored_device() == "cpu"
    path.write_text(path.read_text().replace('    "device": "cpu",\n', ""))
    assert stored_device() is None
    assert resume_run(folder, {}, {}).exit_code == 0
    assert stored_device() == "cpu"


def test_unusable_device_leaves_no_folder(small, quiet, tmp_path, cards):
    cards(0)
    with pytest.raises(UserError, match="--device cuda:3"):
        start_run(small(), quiet(device="cuda:3"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_model_is_made_on_the_cpu_whatever_the_default_device(small, quiet, tmp_path):
    expected = build_model(small()).state_dict()
    with torch.device("meta"):
        trainer = Trainer(small(), quiet(), tmp_path)
    torch.testing.assert_close(trainer.model.state_dict(), expected, rtol=0, atol=0)


def test_training_steps_read_nothing_on_the_host(small, quiet, tmp_path):
    # Tensors on "meta" have no values: every read of one raises, and so does nearly every
    # operation that mixes them with tensors on the CPU.
    config = small(accumulate=2, clip=1.0, weight_decay=0.01)
    trainer = Trainer(config, quiet(device="meta"), tmp_path)
    for _ in range(3):
        trainer.train_step()
    assert trainer.step == 3
    assert {p.device.type for p in trainer.model.parameters()} == {"meta"}
    with pytest.raises(NotImplementedError, match="meta"):
        list(trainer._unread.read())


class HostRead(Exception):
    """Stands for the one read at an evaluation's end."""


def test_evaluation_stays_on_the_device_up_to_one_read(small, monkeypatch):
    # Fake tensors carry a CUDA device through an operation, refuse to mix it with the CPU's, and
    # have no values.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    model = build_model(small())
    tokens = np.arange(200, dtype=np.uint16) % 256
    read = []

    def as_float(tensor):
        read.append((tensor.device, tensor.dtype))
        raise HostRead

    monkeypatch.setattr(torch.Tensor, "__float__", as_float)
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(HostRead):
            evaluate(model.to("cuda:0"), tokens, sequence_length=16, batch_size=2, batches=3)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    assert read == [(torch.device("cuda:0"), torch.float64)]


def test_batches_go_to_cuda_from_pinned_memory(monkeypatch):
    calls = []

    class Batch:
        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, where, non_blocking=False):
            calls.append((where, non_blocking))

    to_device(Batch(), torch.device("cuda:1"))
    to_device(Batch(), CPU)
    assert calls == ["pinned", (torch.device("cuda:1"), True), (CPU, False)]


def test_clock_of_cuda_makes_events_in_the_devices_queue(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.stream = None

        def record(self, stream):
            self.stream = stream

        def elapsed_time(self, end):
            assert end.stream == self.stream == "queue of cuda:1"
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda which: f"queue of {which}")
    clock = Clock(torch.device("cuda:1"))
    assert clock.seconds(clock.mark(), clock.mark()) == 0.25
