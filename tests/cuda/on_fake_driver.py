"""What test_driver.py runs in processes that have the fake driver instead of a real one.

`python -m tests.cuda.on_fake_driver SCENARIO`
"""

import ctypes
import sys

import pytest
import torch
from tests.cuda.devices import KERNELS
from tests.cuda.views import OnDevice, use_stream
from tests.emulator.build import build, kernels_in

from gradpress import _core
from gradpress.ops import lowrank, quant, runtime

STREAM, OTHER = 0x1234, 0x77
FAKE = ctypes.CDLL("libcuda.so.1")
FAKE.fake_log.restype = ctypes.c_char_p
FAKE.fake_get_current.restype = ctypes.c_void_p


def log():
    return FAKE.fake_log().decode().split("\n")


def calls(name):
    return log().count(name)


def make(other_context=True):
    """Outputs and arguments of one quantization, on the device."""
    use_stream(STREAM)
    FAKE.fake_current(ctypes.c_void_p(OTHER if other_context else None))
    FAKE.fake_emulator(
        str(build(KERNELS / "quant.cu", {"ELEM": "f32"}, [KERNELS / "include"])).encode()
    )
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    outs = [torch.zeros(1000, dtype=torch.uint8), torch.zeros(4)]
    outs += [torch.zeros(4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)]
    return x, outs


def quantize(x, outs):
    tensors = [OnDevice(t) for t in (x, *outs)]
    _core.quantize_blockwise(*tensors, 8, True, 256, 1, 2, 3)
    return tensors


def launching():
    """Contexts, streams, modules, and the results."""
    x, outs = make()
    want = quant.quantize_blockwise(x, seed=1, tensor_id=2, step=3)
    tensors = quantize(x, outs)
    assert tensors[0].options["stream"] == STREAM
    for got, expected in zip(outs, want[:3], strict=False):
        assert torch.equal(got, expected)
    text = log()
    (launch,) = (line for line in text if " stream " in line)
    assert launch == f"  quantize_blockwise context {0x1000:#x} stream {STREAM:#x}"
    assert FAKE.fake_get_current() == OTHER
    assert not any("Synchronize" in line or "Release" in line for line in text)
    quantize(x, outs)
    again = log()
    assert again.count("cuLaunchKernel") == 1
    assert not {"cuModuleLoadData", "cuModuleGetFunction", "cuDevicePrimaryCtxRetain"} & {*again}
    # Where the device's own context is current, nobody touches it.
    FAKE.fake_current(ctypes.c_void_p(0x1000))
    quantize(x, outs)
    assert calls("cuCtxSetCurrent") == 0
    # No tensor, no launch.
    empty = [torch.zeros(0, dtype=t.dtype) for t in outs[:3]]
    quantize(torch.zeros(0), [*empty, outs[3]])
    assert calls("cuLaunchKernel") == 0


def second_device():
    """A tensor on cuda:1 while cuda:0 is current: its own context and module, and back again."""
    x, outs = make()
    FAKE.fake_number(b"devices", 2)
    first = 0x1000
    FAKE.fake_current(ctypes.c_void_p(first))
    quantize(x, outs)
    log()
    on_second = [torch.zeros_like(t) for t in outs]
    arguments = [OnDevice(t, 1) for t in (x, *on_second)]
    _core.quantize_blockwise(*arguments, 8, True, 256, 1, 2, 3)
    text = log()
    assert text.count("cuModuleLoadData") == 1
    (launch,) = (line for line in text if " stream " in line)
    assert f"context {first + 1:#x} " in launch
    assert FAKE.fake_get_current() == first
    assert all(torch.equal(*pair) for pair in zip(on_second, outs, strict=True))
    mixed = [OnDevice(x), *(OnDevice(t, 1) for t in on_second)]
    with pytest.raises(ValueError, match=r"all tensors must be on one device"):
        _core.quantize_blockwise(*mixed, 8, True, 256, 1, 2, 3)


def products():
    """Products of float32 matrices go to the vendor's library; what is found stays the same."""
    blas = ctypes.CDLL("libcublas.so")
    blas.fake_blas_log.restype = ctypes.c_char_p
    use_stream(STREAM)
    FAKE.fake_current(ctypes.c_void_p(OTHER))
    plain = {"ELEM": "f32", "BASIS_BITS": "32", "TENSOR": "0"}
    for file, defines in [
        ("project", plain), ("orthonormal", {}), ("eigen", {}), ("refresh", {"ELEM": "f32"})
    ]:  # fmt: skip
        path = KERNELS / "lowrank" / f"{file}.cu"
        FAKE.fake_emulator(str(build(path, defines, [KERNELS / "include"])).encode())
    for rows, columns, rank in [(90, 60, 7), (60, 90, 7)]:
        check_products(blas, rows, columns, rank)
    handles = blas.fake_blas_log()
    assert handles == b""


def check_products(blas, rows, columns, rank):
    generator = torch.Generator().manual_seed(rows)
    grad = torch.randn(rows, columns, generator=generator)
    short = min(rows, columns)
    basis, vector = torch.empty(short, rank), torch.empty(short)
    expected = basis.clone(), vector.clone()
    for warm in (False, True):
        (outcome,) = lowrank.refresh_basis(
            [grad], [expected[0]], [expected[1]], warm=[warm], seed=1, tensor_ids=[0], steps=[0]
        )
        outcomes = torch.empty(1, 3, dtype=torch.float64)
        size = _core.refresh_basis_workspace([(rows, columns, rank)])
        space = torch.empty(size, dtype=torch.uint8)
        tensors = [[OnDevice(t)] for t in (grad, basis, vector)]
        _core.refresh_basis(*tensors, OnDevice(outcomes), [warm], 1, [0], [0], OnDevice(space))
        calls = blas.fake_blas_log().decode().split("\n")
        assert sum(line.startswith("create") for line in calls) == (rows > columns and not warm)
        launched = [line for line in calls if line.startswith("sgemm")]
        assert len(launched) >= 10
        assert all(line.endswith(f"stream {STREAM:#x}") for line in launched)
        # What must not run where nothing is to be found anew is left to the kernels.
        own = sum(line.startswith("  project ") for line in log())
        assert (own > 0) == warm
        assert outcomes[0, 0] == outcome.status == 0
        torch.testing.assert_close(basis, expected[0], rtol=0, atol=1e-4)
        assert abs(float(outcomes[0, 2]) - outcome.energy) <= 1e-4
    out = torch.empty(lowrank.projected_shape(rows, columns, rank))
    want = torch.empty_like(out)
    lowrank.project([grad], [basis], [want])
    size = _core.project_workspace([(rows, columns, rank)], True)
    space = OnDevice(torch.empty(size, dtype=torch.uint8))
    _core.project([OnDevice(grad)], [OnDevice(basis)], [OnDevice(out)], None, space)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert blas.fake_blas_log().decode().count("sgemm") == 1


def failing():
    """Statuses become exceptions; the context comes back on every path."""
    x, outs = make()
    cases = [
        ("cuLaunchKernel", 2, torch.OutOfMemoryError, "CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuModuleGetFunction", 500, RuntimeError, "CUDA_ERROR_NOT_FOUND"),
        ("cuModuleLoadData", 209, RuntimeError, "CUDA_ERROR_NO_BINARY_FOR_GPU"),
        ("cuCtxSetCurrent", 201, RuntimeError, "CUDA_ERROR_INVALID_CONTEXT"),
    ]
    for call, status, error, name in reversed(cases):
        FAKE.fake_failure(call.encode(), status)
        message = f"^quantize_blockwise: {call} failed with {name}$"
        with pytest.raises(error, match=message):
            quantize(x, outs)
        assert FAKE.fake_get_current() == OTHER, call
        FAKE.fake_failure(call.encode(), 0)
    assert not any(t.any() for t in outs)
    quantize(x, outs)
    FAKE.fake_failure(b"cuLaunchKernel", 700)
    with pytest.raises(RuntimeError, match="ILLEGAL_ADDRESS") as caught:
        quantize(x, outs)
    assert type(caught.value) is RuntimeError


def no_devices():
    """A driver that starts, without devices, and one that does not start."""
    x, outs = make()
    FAKE.fake_failure(b"cuInit", 100)
    with pytest.raises(RuntimeError, match=r"^quantize_blockwise: cuInit failed with .*NO_DEVICE"):
        quantize(x, outs)
    assert runtime.cuda_status().startswith("cuInit failed with CUDA_ERROR_NO_DEVICE; NVRTC")
    FAKE.fake_failure(b"cuInit", 0)
    FAKE.fake_number(b"devices", 0)
    assert runtime.cuda_status().startswith("no devices; driver for CUDA 13.0; NVRTC")
    with pytest.raises(
        RuntimeError, match=r"^quantize_blockwise: there is no device cuda:0, only 0"
    ):
        quantize(x, outs)


def strange_device():
    """An architecture that NVRTC does not know."""
    x, outs = make(other_context=False)
    FAKE.fake_number(b"architecture", 30)
    assert runtime.cuda_status().startswith("cuda:0 (sm_30); driver for CUDA 13.0; NVRTC")
    with pytest.raises(RuntimeError, match=r"^quantize_blockwise: NVRTC .* knows no sm_30, only"):
        quantize(x, outs)
    assert FAKE.fake_get_current() is None


def missing_function():
    """A driver that lacks a function: the bindings panic, the caller gets an exception."""
    x, outs = make()
    with pytest.raises(RuntimeError, match=r"^quantize_blockwise: the CUDA runtime gave up: "):
        quantize(x, outs)
    assert FAKE.fake_get_current() == OTHER


def warming_up():
    """Every kernel of the files is loaded, in order that capturing a graph finds them."""
    make()
    files = ["direction.cu", "quant.cu", "lowrank/eigen.cu"]
    runtime.warmup("cuda:0", files=files)
    loaded = {line.strip() for line in log() if line.startswith("  ")}
    assert loaded == {n for file in files for n in kernels_in((KERNELS / file).read_text())}
    runtime.warmup(0, files=files)
    assert calls("cuModuleLoadData") == 0
    with pytest.raises(ValueError, match=r"warmup: files must be some of .*, got nothing\.cu"):
        runtime.warmup(0, files=["nothing.cu"])


def old_driver():
    """Before CUDA 12.1 parameters have 4 KiB: shorter lists."""
    use_stream(STREAM)
    FAKE.fake_number(b"version", 12000)
    macros = {"LIST_CAPACITY": "48"}
    library = build(KERNELS / "direction.cu", macros, [KERNELS / "include"])
    FAKE.fake_emulator(str(library).encode())
    grads, m, v = ([torch.ones(3) for _ in range(50)] for _ in range(3))
    want = torch.ones(3)
    hyper = (1e-2, 0.9, 0.999, 1e-8, False, 1.0)
    counter = torch.zeros(1, dtype=torch.int64)
    _core.adamw_direction([want], [torch.ones(3)], [torch.ones(3)], [1], counter, *hyper)
    lists = [[OnDevice(t) for t in ts] for ts in (grads, m, v)]
    _core.adamw_direction(*lists, [1] * 50, OnDevice(counter), *hyper)
    assert calls("cuLaunchKernel") == 2
    assert all(torch.equal(grad, want) for grad in grads)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("done")
