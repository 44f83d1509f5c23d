"""The fixtures are CUDA too: NVRTC compiles the same files."""

import pytest
from tests.emulator import nvrtc
from tests.emulator.build import build, kernels_in
from tests.emulator.conftest import FIXTURES

pytestmark = pytest.mark.skipif(nvrtc.find() is None, reason="needs nvidia-cuda-nvrtc")


@pytest.mark.parametrize("name", ["basics", "warps", "convert", "faulty"])
def test_fixtures_compile_for_devices(name):
    path = FIXTURES / f"{name}.cu"
    for cubin in nvrtc.compile_file(path, ["sm_80", "sm_90"], options=["--fmad=false"]):
        assert cubin.image.startswith(b"\x7fELF")
        assert set(cubin.usage) == set(kernels_in(path.read_text()))
        for kernel, usage in cubin.usage.items():
            assert 0 < usage.registers < 64
            assert name == "faulty" or usage.spill_stores == usage.spill_loads == 0, kernel


def test_usage_is_read_from_the_log():
    (cubin,) = nvrtc.compile_file(FIXTURES / "basics.cu", ["sm_90"])
    assert cubin.usage["matmul"].shared_bytes == 2 * 16 * 17 * 4
    assert cubin.usage["histogram"].shared_bytes == 1024
    (cubin,) = nvrtc.compile_file(FIXTURES / "faulty.cu", ["sm_90"])
    assert cubin.usage["recursion"].stack_bytes >= 4096  # of the function that it calls


def test_errors_hold_the_compilers_message():
    with pytest.raises(nvrtc.NvrtcError, match=r"one\.cu\(1\): error: .*\n?.*missing"):
        nvrtc.compile_source('extern "C" __global__ void f() { missing(); }', "one.cu", "sm_90")
    assert "sm_90" in nvrtc.supported_architectures()
    assert nvrtc.version() >= (11, 0)


def test_the_same_file_builds_for_the_host():
    assert build(FIXTURES / "warps.cu").exists()
