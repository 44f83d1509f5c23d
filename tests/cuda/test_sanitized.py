"""Kernels under AddressSanitizer, which sees every access outside of a tensor."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
#: Files, and which of their tests: every kernel, in few sizes.
SELECTED = {
    "elements": (
        sorted((TESTS / "kernels").glob("test_*.py")),
        "every_size or float_moments or with_codes or dequantize or pack or round_bf16",
    ),
    "low rank": (
        [TESTS / "cuda" / "test_parity_lowrank.py"],
        "test_refresh_basis[emulator-odd] or test_refresh_basis[emulator-bf16]"
        " or test_svd[emulator-wide] or (test_project_back_add and dtype2-4)"
        " or (from_factors and 8-4)",
    ),
    "pruning": (
        [TESTS / "cuda" / "test_parity_prune.py"],
        "(dtype2 and (rows or below or accumulate)) or (groups and 7-3-dtype0) or many_blocks"
        " or prune_columns[emulator-40]",
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", SELECTED)
def test_no_access_outside_of_tensors(family):
    files, selected = SELECTED[family]
    pytest_words = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selected, *files]
    done = subprocess.run(
        [sys.executable, "-m", "tests.emulator.build", "sanitized", sys.executable, *pytest_words],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
