import math

import pytest
import torch

from gradpress.train import DivergedError, start_run, steps
from gradpress.train.device import Clock
from gradpress.train.loop import Trainer
from gradpress.train.metrics import read_metrics
from gradpress.train.steps import Step, UnreadSteps

from .test_loop import assert_same_run

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def seldom_read(monkeypatch):
    """Lets steps on the CPU go unread as on a device that works on its own; gives the reads."""
    reads = []
    begin, read = UnreadSteps.__init__, UnreadSteps.read

    def patient(self, *arguments):
        begin(self, *arguments)
        self.most = 3

    def noted(self):
        found = [step.fields["step"] for step in self._steps]
        if found:
            reads.append(found)
        return read(self)

    monkeypatch.setattr(UnreadSteps, "__init__", patient)
    monkeypatch.setattr(UnreadSteps, "read", noted)
    monkeypatch.setattr(steps, "_LONGEST_UNREAD_SECONDS", math.inf)
    return reads


@pytest.mark.parametrize("optimizer", ["adamw", "qgalore"])
def test_reading_seldom_changes_no_bit(small, quiet, tmp_path, request, optimizer):
    config = small(optimizer=optimizer, steps=11, accumulate=2, clip=1.0, eval_every=4)
    options = quiet(save_every=6)
    start_run(config, options, tmp_path / "each")
    reads = request.getfixturevalue("seldom_read")
    start_run(config, options, tmp_path / "seldom")
    # Every third step, and before each evaluation and each checkpoint.
    assert reads == [[1, 2, 3], [4], [5, 6], [7, 8], [9, 10, 11]]
    assert_same_run(tmp_path / "each", tmp_path / "seldom", 11)


def test_divergence_between_two_reads(small, quiet, tmp_path, monkeypatch, seldom_read):
    original = Trainer.train_step

    def train_step(self):
        if self.step == 4:
            with torch.no_grad():
                next(iter(self.model.parameters())).fill_(float("nan"))
        original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    folder = tmp_path / "run"
    with pytest.raises(DivergedError, match="step 5: loss nan, gradient norm nan; lower --lr"):
        start_run(small(), quiet(), folder)
    assert seldom_read == [[1, 2], [3, 4], [5, 6]]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-4"]
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 4


def step_of(number, loss=1.0, norm=1.0, marks=(0.0, 0.5, 0.75, 2.0), issued=0.0):
    values = torch.tensor([loss, norm], dtype=torch.float64)
    return Step({"step": number}, values, issued, marks)


def test_records_share_an_interval_and_keep_their_own_times(monkeypatch):
    unread = UnreadSteps(CPU, Clock(CPU), 100)
    assert not unread.are_due
    unread.add(step_of(1, issued=10.0))
    unread.add(step_of(2, loss=2.0, marks=(2.0, 2.5, 3.5, 5.0), issued=11.0))
    assert unread.are_due
    monkeypatch.setattr(steps.time, "perf_counter", lambda: 14.0)
    first, second = unread.read()
    assert [first["loss"], second["loss"]] == [1.0, 2.0]
    assert [first["step_seconds"], second["step_seconds"]] == [2.0, 3.0]
    assert [first["optimizer_seconds"], second["optimizer_seconds"]] == [0.25, 1.0]
    assert [r["tokens_per_second"] for r in (first, second)] == [50.0, 50.0]
    assert "cuda_peak_bytes" not in first
    assert list(unread.read()) == []


def test_steps_on_other_devices_are_read_in_groups_or_when_they_take_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now[0])
    unread = UnreadSteps(META, Clock(META), 1)
    for number in range(1, 10):
        unread.add(step_of(number))
        assert not unread.are_due
    now[0] = 1.5
    assert unread.are_due
    now[0] = 0.0
    unread.add(step_of(10))
    assert unread.are_due


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf)])
def test_records_before_a_loss_that_is_not_finite_are_given(loss, norm):
    unread = UnreadSteps(CPU, Clock(CPU), 1)
    for step in (step_of(1), step_of(2, loss, norm), step_of(3)):
        unread.add(step)
    reading = unread.read()
    assert next(reading)["step"] == 1
    with pytest.raises(DivergedError, match=f"step 2: loss {loss}, gradient norm {norm}"):
        next(reading)


def test_peak_of_cuda_stands_beside_the_memory_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda which: 7 + which.index)
    unread = UnreadSteps(torch.device("cuda:1"), Clock(CPU), 1)
    unread.add(step_of(1))
    (record,) = unread.read()
    assert record["cuda_peak_bytes"] == 8
    assert record["memory_bytes"] > 10**6
