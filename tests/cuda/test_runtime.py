"""CUDA where there is none: what is said, and that importing needs nothing of it."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from tests.cuda.views import OnDevice
from tests.emulator import nvrtc

from gradpress import _core
from gradpress.ops import quant, runtime

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
with_compiler = pytest.mark.skipif(nvrtc.find() is None, reason="needs nvidia-cuda-nvrtc")
NO_DRIVER = "no CUDA driver was found|cuInit failed|no devices|there is no device"


def test_status_is_text():
    status = runtime.cuda_status()
    if torch.cuda.is_available():
        assert status.startswith("cuda:0 (sm_")
    if nvrtc.find():
        assert status.endswith("; NVRTC {}.{}".format(*nvrtc.version()))


@without_cuda
def test_warmup_says_what_is_missing():
    for device in (None, 0, "cuda:0", torch.device("cuda")):
        with pytest.raises(RuntimeError, match=f"^warmup: ({NO_DRIVER})"):
            runtime.warmup(device)
    with pytest.raises(ValueError, match="warmup: device must be a CUDA device, got cpu"):
        runtime.warmup("cpu")


@without_cuda
def test_tensors_on_a_device_without_a_driver():
    tensor = OnDevice(torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match=f"^unpack_int4: ({NO_DRIVER})"):
        _core.unpack_int4(OnDevice(torch.zeros(4, dtype=torch.uint8)), tensor)
    with pytest.raises(ValueError, match=r"all tensors must be on one device, got .* cuda:0"):
        _core.unpack_int4(torch.zeros(4, dtype=torch.uint8), tensor)


ALONE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("gradpress._core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
assert "torch" not in sys.modules
print(core.cuda_status())
try:
    core.compile_kernels(90)
except RuntimeError as error:
    print(error)
"""


@without_cuda
def test_the_core_alone_has_neither_driver_nor_compiler():
    path = importlib.util.find_spec("gradpress._core").origin
    done = subprocess.run(
        [sys.executable, "-c", ALONE, path], capture_output=True, text=True, check=True
    )
    status, *error = done.stdout.splitlines()
    if "NVRTC, CUDA's compiler, was not found" in status:  # a toolkit may be on the path
        assert error[0].startswith("compile_kernels: NVRTC, CUDA's compiler, was not found")
    assert done.stderr == ""  # a panic would have written there


@with_compiler
def test_what_cannot_be_compiled_for():
    with pytest.raises(RuntimeError, match=r"^compile_kernels: NVRTC .* knows no sm_30, only \[7"):
        runtime.compile_kernels("sm_30")
    with pytest.raises(ValueError, match='architecture must be like "sm_90", got'):
        runtime.compile_kernels("hopper")
    with pytest.raises(ValueError, match=r'files must be some of \{"direction.cu", .*got x.cu'):
        runtime.compile_kernels("sm_90", ["x.cu"])


def test_the_emulator_says_what_went_wrong():
    def build(module, defines):
        raise OSError(f"no {module} with {defines}")

    x = torch.ones(8)
    runtime.set_emulator(build)
    try:
        with pytest.raises(RuntimeError, match=r"^quantize_blockwise: the emulator: OSError: no q"):
            quant.quantize_blockwise(x)
        runtime.set_emulator(lambda module, defines: "/no/such/library.so")
        with pytest.raises(RuntimeError, match=r"^quantize_blockwise: the emulator: .*library\.so"):
            quant.quantize_blockwise(x)
    finally:
        runtime.set_emulator(None)
    assert quant.quantize_blockwise(x).nonfinite == 0
    with pytest.raises(ValueError, match="set_emulator: list_capacity must be at least 1, got 0"):
        runtime.set_emulator(build, list_capacity=0)
