"""The GPU benchmark, as far as it goes without a card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benches.gpu_sections import models
from benches.gpu_sections.kernels import Kernel, compare_with_cpu
from benches.gpu_sections.processes import run_limited
from benches.gpu_sections.report import Run, collect
from benches.gpu_sections.sanitizer import reports, summary

ROOT = Path(__file__).parents[1]


def test_dry_run(tmp_path):
    kept = ROOT / "benches" / "results" / "gpu.md"
    before = kept.read_bytes() if kept.exists() else None
    command = [sys.executable, str(ROOT / "benches" / "gpu.py"), "--device", "cpu", "--quick"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "quantity" in done.stdout
    (report,) = tmp_path.glob("*.md")
    assert report.name == "gpu-dry-run.md"
    text = report.read_text()
    assert "CPU dry run" in text.splitlines()[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for start in ("parity suite", "quantize INT8", "AdamW8bit step", "refresh_basis", "Q-GaLore"):
        assert any(row.startswith(f"| {start}") for row in rows), start
    # Three optimizers' weights are finite, subspaces refreshed, three integer weights stepped.
    assert "| results of section step | 7 right, 0 wrong |" in text
    # No target is met or missed where nothing is measured.
    assert not any(row.endswith(("| yes |", "| no |")) for row in rows)
    assert (kept.read_bytes() if kept.exists() else None) == before


def test_dry_run_of_the_largest_model(tmp_path):
    command = [sys.executable, str(ROOT / "benches" / "gpu_7b.py"), "--device", "cpu", "--quick"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_7b.json").read_text())
    assert {"7B, gradpress, INT8 weights", "1B, torch AdamW in bfloat16"} <= found.keys()
    for result in found.values():
        assert result["losses"][-1] < result["losses"][0]


def test_the_parameters_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_attention_heads=4,
        num_hidden_layers=4,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    ours = models.Llama("tiny", "meta", torch.bfloat16)
    shapes = [[(n, p.shape) for n, p in m.named_parameters()] for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("place", "where"), [(0, "first"), (-1, "last"), (None, None)])
def test_a_wrong_element_is_noticed(place, where):
    x, out = torch.randn(1024), torch.empty(1024)

    def call(tensors):
        tensors["out"].copy_(tensors["x"])
        if place is not None and tensors["out"] is out:  # as a device would, and the CPU not
            out[place] += 1

    kernel = Kernel("copy", 1024, call, read={"x": x}, written={"out": out})
    assert kernel.moved == 2 * 4096
    text, right = compare_with_cpu(kernel)
    assert right == (place is None)
    assert where is None or f"out of the {where} 512 elements" in text


MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at adamw_step+0x150
=========     by thread (31,0,0) in block (3,0,0)
=========     Access at 0x7f2a1c003c9c is out of bounds
=========
all agree with the CPU
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x60 in void at::native::fill<float>(float *)
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void gemm(float *)+0x1060
=========     and Read access at gram+0x890 [4080 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_errors_of_the_sanitizer_are_told_apart_by_kernel():
    (error,) = reports(MEMCHECK, {"adamw_step", "gram"})
    assert error.startswith("Invalid __global__ write of size 4 bytes at adamw_step+0x150 by")
    assert summary(MEMCHECK) == 2
    assert len(reports(RACECHECK, {"gram"})) == 1
    assert reports(RACECHECK, {"project"}) == []
    assert summary(RACECHECK) == 1
    assert summary("========= COMPUTE-SANITIZER\n") is None


def test_what_was_found_before_the_end_is_kept(tmp_path):
    code = (
        "import pathlib, time; from benches.gpu_sections.findings import Findings;"
        "f = Findings(pathlib.Path('step.json'), dry=False); f.row('half', '1');"
        "f.check('a', False); print('begun', flush=True); time.sleep(60)"
    )
    log = tmp_path / "step.log"
    command = [sys.executable, "-c", code]
    ended = run_limited(command, log, 3, {"PYTHONPATH": str(ROOT)}, tmp_path)
    assert ended is None
    assert log.read_text() == "begun\n"
    assert json.loads((tmp_path / "step.json").read_text())["finished"] is False
    run = Run(collect(tmp_path, ["step", "sanitizer"], False), dry=False, quick=False)
    assert not run.good()
    assert [row[:2] for row in map(tuple, run.summary().rows)] == [
        ("half", "1"),
        ("results of section step", "0 right, 1 wrong"),
        ("section step", "cut off"),
        ("section sanitizer", "not run"),
    ]
    assert run.wrong() == ["step: a"]
