"""The parity tests under AddressSanitizer, which sees every access outside of a tensor."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SELECTED = "every_size or float_moments or with_codes or dequantize or pack or round_bf16"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_access_outside_of_tensors():
    tests = [str(path) for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))]
    pytest_words = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SELECTED, *tests]
    done = subprocess.run(
        [sys.executable, "-m", "tests.emulator.build", "sanitized", sys.executable, *pytest_words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
