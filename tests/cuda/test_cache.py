"""Compiled modules on disk: kept, checked, and never in the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.emulator import nvrtc

from gradpress import environment
from gradpress.ops import runtime

pytestmark = pytest.mark.skipif(nvrtc.find() is None, reason="needs nvidia-cuda-nvrtc")
FILES = ["update.cu"]


def compile_one():
    ((file, defines, size),) = runtime.compile_kernels("sm_75", FILES)
    assert (file, defines) == ("update.cu", [])
    return size


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADPRESS_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    return environment.cache_folder()


def only(folder):
    (path,) = folder.iterdir()
    return path


def test_modules_are_kept_and_checked(folder):
    size = compile_one()
    path = only(folder)
    assert path.name.startswith("update-sm75-")
    assert path.suffix == ".cubin"
    whole = path.read_bytes()
    assert whole.startswith(b"\x7fELF")
    assert len(whole) == size + 32
    before = path.stat()
    assert compile_one() == size
    assert only(folder).stat().st_ino == before.st_ino
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for broken in (whole[: len(whole) // 2], b"", bytes(flipped)):
        path.write_bytes(broken)
        assert compile_one() == size
        assert only(folder).read_bytes() == whole


def test_other_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("GRADPRESS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_one()
    assert only(environment.cache_folder()).parent == tmp_path / "gradpress"
    file = tmp_path / "file"
    file.write_text("in the way")
    for nowhere in (file, file / "below", Path("/proc/none")):
        monkeypatch.setenv("GRADPRESS_CACHE_DIR", str(nowhere))
        assert compile_one() > 0
    assert file.read_text() == "in the way"


def test_two_processes_at_once(folder):
    code = "from gradpress.ops import runtime; print(runtime.compile_kernels('sm_75', {!r}))"
    command = [sys.executable, "-c", code.format(FILES)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1]
    size = compile_one()
    assert only(folder).stat().st_size == size + 32
