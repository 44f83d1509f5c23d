import json

import pytest

from gradpress.train import UserError
from gradpress.train.demo import CHOSEN, TRIED, run_demo


def test_both_optimizers_train_the_rest_alike():
    assert CHOSEN["adamw"]["lr_rest"] == CHOSEN["qgalore"]["lr_rest"]
    assert len(TRIED["adamw"]) == len(TRIED["qgalore"])
    assert all(CHOSEN[name]["lr"] in TRIED[name] for name in CHOSEN)


def test_demo_compares_two_runs_on_the_same_data(small, tmp_path, capsys):
    names = ("hidden_size", "intermediate_size", "heads", "layers", "vocab_size", "rank", "text")
    values = small().to_dict()
    options = {name: values[name] for name in names}
    options.update(text=tuple(options["text"]), steps=4, eval_every=2, sequence_length=16)
    with pytest.raises(UserError, match="--device mps"):
        run_demo(tmp_path / "demo", device="mps")
    assert run_demo(tmp_path / "demo", threads=1, device="cpu", **options) == 0
    folder = tmp_path / "demo"
    written = json.loads((folder / "demo.json").read_text())["runs"]
    assert list(written) == ["adamw", "qgalore"]
    assert written["qgalore"]["weight_bytes"] < written["adamw"]["weight_bytes"]
    assert written["qgalore"]["optimizer_bytes"] < written["adamw"]["optimizer_bytes"]
    assert written["qgalore"]["summary"]["refreshes"] >= 7
    text = (folder / "demo.txt").read_text()
    assert text in capsys.readouterr().out
    assert "tokens on cpu (" in text
    for run in written.values():
        assert f"{run['summary']['validation']['loss']:.4f}" in text
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    arrays = [(folder / name / "data" / "train.npy").read_bytes() for name in written]
    assert arrays[0] == arrays[1]
    with pytest.raises(UserError, match="exists already"):
        run_demo(folder)
