import json

import pytest
import torch

from gradpress.train import resume_run, start_run
from gradpress.train.loop import Trainer
from gradpress.train.metrics import read_metrics
from gradpress.train.model import build_model

from .test_loop import OPTIMIZERS, Died, die, stop_before

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def losses(folder):
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_run_goes_on_on_the_other_device(
    small, quiet, tmp_path, monkeypatch, optimizer, first, second
):
    config = small(optimizer=optimizer, accumulate=2, clip=1.0)
    start_run(config, quiet(), tmp_path / "straight")
    folder = tmp_path / "moved"
    with monkeypatch.context() as patch:
        stop_before(patch, 5, die)
        with pytest.raises(Died):
            start_run(config, quiet(device=first), folder)
    assert resume_run(folder, {}, {"device": second}).exit_code == 0
    # Sums in another order, which turns a few stochastic roundings: far less than what 8 steps of
    # training change in the loss (5 %).
    assert losses(folder) == pytest.approx(losses(tmp_path / "straight"), rel=5e-3)


def test_weights_begin_as_on_the_cpu(small, quiet, tmp_path):
    trainer = Trainer(small(), quiet(device="cuda:0"), tmp_path)
    assert {parameter.device.type for parameter in trainer.model.parameters()} == {"cuda"}
    on_host = {name: value.cpu() for name, value in trainer.model.state_dict().items()}
    torch.testing.assert_close(on_host, build_model(small()).state_dict(), rtol=0, atol=0)


def test_steps_wait_for_nothing(small, quiet, tmp_path):
    trainer = Trainer(small(clip=1.0, accumulate=2), quiet(device="cuda:0"), tmp_path)
    trainer.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [record["step"] for record in trainer._unread.read()] == [1, 2]


def test_what_a_run_tells_of_its_card(small, quiet, tmp_path, capsys):
    start_run(small(), quiet(device="cuda:0"), tmp_path / "run")
    name = f"cuda:0 ({torch.cuda.get_device_name(0)})"
    assert f"on {name}\n" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["device"] == name
    steps = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert all(0 < r["optimizer_seconds"] < r["step_seconds"] for r in steps)
    assert summary["cuda_peak_bytes"] >= steps[-1]["cuda_peak_bytes"] > 10**5
