"""The device half of the runtime on a fake driver: contexts, streams, modules, failures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.emulator import nvrtc
from tests.emulator.build import compiler

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(nvrtc.find() is None, reason="needs nvidia-cuda-nvrtc"),
    pytest.mark.skipif(sys.platform != "linux", reason="replaces libcuda.so.1"),
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled modules, shared by the processes of a session."""
    return tmp_path_factory.mktemp("cubins")


def build_fake(source, library, *flags):
    source = Path(__file__).parent / source
    command = [compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", *flags, source, "-o", library]
    subprocess.run([*map(str, command), "-ldl"], check=True)


def run(folder, cache, scenario, *flags):
    build_fake("fake_driver.cpp", folder / "libcuda.so.1", *flags)
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    # The emulator's libraries stay where all tests have them.
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(paths),
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": str(ROOT),
        # A library that only the tests of products replace.
        "GRADPRESS_CUBLAS": str(int((folder / "libcublas.so").exists())),
    }
    environment.pop("GRADPRESS_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.on_fake_driver", scenario],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "scenario", ["launching", "failing", "no_devices", "strange_device", "old_driver"]
)
def test_on_a_fake_driver(tmp_path, cache, scenario):
    assert "panicked" not in run(tmp_path, cache, scenario)


def test_a_driver_without_a_function(tmp_path, cache):
    run(tmp_path, cache, "missing_function", "-DWITHOUT_LAUNCH")


def test_products_by_the_vendors_library(tmp_path, cache):
    build_fake("fake_blas.cpp", tmp_path / "libcublas.so")
    run(tmp_path, cache, "products")


def test_a_device_that_is_not_current(tmp_path, cache):
    run(tmp_path, cache, "second_device")


@pytest.mark.slow
def test_warming_up(tmp_path, cache):
    run(tmp_path, cache, "warming_up")
