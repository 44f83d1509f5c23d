import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gradpress import environment
from gradpress.cli import main
from gradpress.train import demo, loop

TINY = ["--hidden-size", "16", "--intermediate-size", "16", "--heads", "1", "--layers", "1"]
TINY += ["--vocab-size", "260", "--steps", "3", "--batch-size", "2", "--sequence-length", "8"]
TINY += ["--eval-batches", "1", "--threads", "1", "--no-plot"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {number} of a text\n" for number in range(2000)))
    threads = torch.get_num_threads()
    yield str(path)
    torch.set_num_threads(threads)


def test_train_and_resume(text, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", *TINY, "--text", text, "--out", out]) == 0
    assert "done: 3 steps, validation loss" in capsys.readouterr().out
    assert main(["train", "--resume", "--out", out, "--steps", "3"]) == 0
    assert main(["train", "--resume", "--out", out, "--steps", "4"]) == 2
    assert "--steps 4: this run has 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: command"),
        (["press"], "invalid choice: 'press'"),
        (["train", "--size", "3M"], "invalid choice: '3M'"),
        (["train", "--steps", "many"], "--steps: invalid int value"),
        (["train", "--momentum", "1"], "unrecognized arguments: --momentum"),
        (["train", "--optimizer", "qgalore", "--rank", "4096"], "--rank 4096"),
        (["train", "--text", "does-not-exist"], "does-not-exist: no such file or folder"),
        (["train", "--text", ".", "--steps", "0"], "--steps 0"),
        (["train", "--resume"], "holds no run to resume"),
        (["demo", "--steps", "0"], "--steps 0"),
        (["train", "--device", "mps"], "--device mps: takes auto, cpu, cuda or cuda:N"),
        (["demo", "--device", "mps"], "--device mps: takes auto, cpu, cuda or cuda:N"),
    ],
)
def test_mistakes_are_one_line_and_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as ended:  # argparse's own way
        code = ended.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("package", ["transformers", "tokenizers", "safetensors", "matplotlib"])
def test_missing_packages_are_named(package, text, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["train", "--text", text, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert package in error
    assert "pip install 'gradpress[demo]'" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)]
)
def test_interruption_and_full_disk(error, code, text, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(loop, "prepare_tokens", fail)
    assert main(["train", *TINY, "--text", text, "--out", str(tmp_path / "run")]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_device_of_both_commands(text, tmp_path, capsys, monkeypatch):
    given = []
    monkeypatch.setattr(loop, "start_run", lambda _, options, __: given.append(options) or ended)
    monkeypatch.setattr(demo, "run_demo", lambda _, **options: given.append(options) or 0)
    ended = loop.Outcome(tmp_path, 3, 0, 1.0)
    for device in ([], ["--device", "cuda:1"]):
        assert main(["train", *device]) == 0
        assert main(["demo", *device, "--threads", "2", "--steps", "9"]) == 0
    assert [given[0].device, given[2].device] == ["auto", "cuda:1"]
    shared = {"threads": 2, "steps": 9}
    assert [given[1], given[3]] == [shared, {**shared, "device": "cuda:1"}]


def test_stopped_run_says_how_to_continue(text, tmp_path, capsys, monkeypatch):
    stopped = loop.Outcome(tmp_path, 2, 130, None)
    monkeypatch.setattr(loop, "start_run", lambda *_: stopped)
    assert main(["train", *TINY, "--text", text, "--out", str(tmp_path / "run")]) == 130
    assert f"gradpress train --resume --out {tmp_path}" in capsys.readouterr().out


def test_environment_report(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADPRESS_CACHE_DIR", str(tmp_path))
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    found = environment.report()
    assert printed == f"{found}\n"
    assert found.versions["torch"] == torch.__version__
    assert found.cache_folder == tmp_path
    assert found.threads == torch.get_num_threads()
    shown = (found.processor, found.simd, found.cuda_status, str(tmp_path))
    for value in (*found.versions.values(), *shown):
        assert value in printed
    assert found.to_dict()["cache_folder"] == str(tmp_path)


def test_environment_numbers_the_cards(monkeypatch):
    card = SimpleNamespace(name="Card", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    shown = "cuda:0 Card (sm_90, 80 GiB); cuda:1 Card (sm_90, 80 GiB)"
    assert f"CUDA devices  {shown}" in str(environment.report())


def test_module_prints_the_report():
    done = subprocess.run(
        [sys.executable, "-m", "gradpress"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("gradpress ")
    assert f"torch         {torch.__version__}" in done.stdout
