"""Kernels that are wrong: each fault is found, and the message says where it is."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.emulator import build as builder
from tests.emulator.build import EmulatedModule, EmulatorError
from tests.emulator.conftest import FIXTURES

ROOT = Path(__file__).parents[2]
FAULTY = (FIXTURES / "faulty.cu").read_text().splitlines()


def line(mark):
    """`file:line` of the line that carries the mark, as it stands in a message."""
    (number,) = (n for n, text in enumerate(FAULTY, 1) if text.endswith(f"// HERE {mark}"))
    return f"faulty.cu:{number}"


def fault(module, name, args, block=64, **options):
    with pytest.raises(EmulatorError) as caught:
        module.launch(name, 1, block, args, **options)
    text = str(caught.value)
    assert text.startswith(name)
    return text


def floats(count=64):
    return np.zeros(count, np.float32)


def ints(count=64):
    return np.zeros(count, np.int32)


@pytest.mark.parametrize(
    ("name", "threads", "expected"),
    [
        ("no_barrier", 256, lambda x: x[np.arange(256) ^ 32]),
        ("no_second_barrier", 256, lambda x: 6 * x[::-1]),
        ("no_warp_barrier", 32, lambda x: x[::-1]),
    ],
)
def test_missing_barriers_change_the_result(faulty, name, threads, expected):
    x = np.arange(1, threads + 1, dtype=np.float32)
    for order in ("forward", "reverse", "random"):
        y = np.zeros_like(x)
        faulty.launch(name, 1, threads, [x, y], order=order)
        assert (y != expected(x)).any(), order


def test_uninitialized_shared_memory_is_nan_in_every_block(faulty):
    y = floats(96)
    faulty.launch("uninitialized", 3, 32, [y], shared_bytes=128)
    assert np.isnan(y).all()


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_exited_threads_are_missed_at_barriers(faulty, order):
    text = fault(faulty, "divergent_barrier", [floats(), 16], order=order)
    assert f"thread (0, 0, 0) waits at __syncthreads ({line('divergent_barrier')})" in text
    assert "thread (16, 0, 0) has exited" in text
    y = floats()
    faulty.launch("divergent_barrier", 1, 64, [y, 16], order=order, exited_may_miss_barriers=True)
    assert y.sum() == 16


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("two_barriers", ["__syncthreads first_barrier", "__syncthreads second_barrier"]),
        ("one_line", ["__shfl_sync one_line", "__shfl_sync one_line"]),
        ("barrier_against_shuffle", ["__shfl_sync shuffle", "__syncthreads barrier"]),
    ],
)
@pytest.mark.parametrize("excused", [False, True])
def test_threads_at_different_barriers(faulty, name, places, order, excused):
    y = ints() if name == "one_line" else floats()
    text = fault(faulty, name, [y], order=order, exited_may_miss_barriers=excused)
    assert "divergent barrier" in text
    pattern = r"thread \(\d+, 0, 0\) waits at (\w+) \((faulty\.cu:\d+)"
    expected = [(op, line(mark)) for op, mark in map(str.split, places)]
    assert re.findall(pattern, text) == expected


def test_shuffles_without_partners(faulty):
    text = fault(faulty, "lone_lane", [floats()])
    assert f"thread (0, 0, 0) waits at __shfl_down_sync ({line('lone_lane')}, mask 0xffff" in text
    assert "thread (1, 0, 0) has exited" in text
    text = fault(faulty, "inactive_source", [ints()])
    assert f"__shfl_sync ({line('inactive_source')}) reads lane 20" in text
    text = fault(faulty, "outside_mask", [ints()])
    assert f"thread (28, 0, 0): __shfl_sync ({line('outside_mask')}) is called by lane 28" in text
    text = fault(faulty, "different_masks", [ints()])
    assert f"{line('different_masks')}, mask 0xffffffff" in text
    assert f"{line('different_masks')}, mask 0xfffffffe" in text
    assert "width 24" in fault(faulty, "bad_width", [ints()])


def test_lanes_that_the_block_does_not_have(basics):
    x, y = floats(), floats(2)
    with pytest.raises(EmulatorError, match=r"__shfl_xor_sync \(basics.cu:\d+\) reads lane 16"):
        basics.launch("row_sum", 1, 48, [x, y, 2, 32])


def test_a_kernel_runs_after_a_failed_one(faulty, basics):
    for _ in range(3):
        fault(faulty, "two_barriers", [floats()])
        y = floats()
        faulty.launch("divergent_barrier", 1, 64, [y, 64])
        assert y.sum() == 64


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("misaligned", [floats(400)[1:], floats(400)], "misaligned address"),
        ("null_pointer", [None], "null pointer to 'float'"),
        ("null_atomic", [None], "null pointer to 'int'"),
        ("outside_array", [floats(), 8], "index 8 is outside 'float [8]'"),
        ("outside_array", [floats(), -1], "index -1 is outside"),
        ("long_shift", [ints(), 32], "shift by"),
        ("cast", [ints(), 3e9], "floating point value outside"),
        ("divide", [ints(), 0], "division by zero"),
        ("overflow", [ints(), 2**31 - 1], "overflow of a signed addition"),
    ],
)
def test_what_a_device_would_do_otherwise(faulty, name, args, message):
    text = fault(faulty, name, args, block=32)
    assert re.search(r"block \(0, 0, 0\), thread \(\d+, 0, 0\): ", text)
    assert message in text
    assert line(name) in text


def test_faults_do_not_end_the_process(faulty):
    assert "fault: signal" in fault(faulty, "wild_pointer", [0x123456780])
    assert "stack" in fault(faulty, "recursion", [ints(), 20])
    assert "assertion failed: x > 0 (faulty.cu" in fault(faulty, "asserting", [-1])


def test_refused_launches(faulty):
    y = ints()
    assert "__launch_bounds__(64)" in fault(faulty, "bounded", [y], block=65)
    faulty.launch("bounded", 1, 64, [y])
    assert "is outside" in fault(faulty, "bounded", [y], block=(2, 2, 65))
    assert "is outside" in fault(faulty, "bounded", [y], block=0)
    assert "shared memory" in fault(faulty, "bounded", [y], shared_bytes=1 << 18)
    with pytest.raises(EmulatorError, match="grid"):
        faulty.launch("bounded", (1, 65536), 1, [y])
    with pytest.raises(EmulatorError, match=r"no kernel named nothing; there are: no_barrier, "):
        faulty.launch("nothing", 1, 1, [])


def test_refused_arguments(faulty):
    with pytest.raises(TypeError, match="takes 1 arguments, not 2"):
        faulty.launch("bounded", 1, 1, [ints(), 3])
    with pytest.raises(TypeError, match="elements of 8 bytes"):
        faulty.launch("bounded", 1, 1, [np.zeros(9)])
    with pytest.raises(TypeError, match="int for a pointer"):
        faulty.launch("bounded", 1, 1, [1234])
    with pytest.raises(OverflowError):
        faulty.launch("recursion", 1, 1, [ints(), 1 << 31])
    with pytest.raises(TypeError):
        faulty.launch("recursion", 1, 1, [ints(), 1.5])


def test_only_launchable_kernels_are_taken():
    text = 'extern "C" __global__ void {} f(int) {{}}\nextern "C" __global__ {} void g() {{}}'
    bound = "__launch_bounds__(f(2), 1)"
    assert builder.kernels_in(text.format("", bound)) == {"f": "", "g": "f(2), 1"}
    assert builder.kernels_in(text.format(bound, "")) == {"f": "f(2), 1", "g": ""}
    with pytest.raises(builder.BuildError, match='extern "C"'):
        builder.kernels_in("__global__ void f() {}")


def test_cache_knows_sources_headers_and_defines(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADPRESS_CACHE_DIR", str(tmp_path / "cache"))
    source, folder = tmp_path / "one.cu", tmp_path / "include"
    folder.mkdir()
    (folder / "value.cuh").write_text("#define VALUE 1\n")
    kernel = 'extern "C" __global__ void {}(int* y) {{ *y = VALUE + EXTRA; }}\n'
    source.write_text('#include "value.cuh"\n' + kernel.format("first"))

    def run(name="first", extra="0"):
        y = ints(1)
        EmulatedModule(source, {"EXTRA": extra}, [folder], sanitize=False).launch(name, 1, 1, [y])
        return y[0]

    def libraries():
        return len(list((tmp_path / "cache" / "emulator").glob("one-*.so")))

    assert (run(), run(), libraries()) == (1, 1, 1)
    assert (run(extra="5"), libraries()) == (6, 2)
    (folder / "value.cuh").write_text("#define VALUE 2\n")
    assert (run(), libraries()) == (2, 3)
    source.write_text('#include "value.cuh"\n' + kernel.format("second"))
    assert (run("second"), libraries()) == (2, 4)
    with pytest.raises(builder.BuildError, match="EXTRA"):
        builder.build(source, include=[folder])


SANITIZED = """
import sys
import numpy as np
from tests.emulator.build import EmulatedModule, EmulatorError
from tests.emulator.conftest import FIXTURES
x, y = np.ones(1024, np.float32), np.zeros(1, np.float32)
module = EmulatedModule(FIXTURES / "basics.cu")
for order in ("forward", "reverse", "random"):
    module.launch("block_sum", 4, 128, [x, y, 1024], shared_bytes=512, order=order)
assert y[0] == 3072
module = EmulatedModule(FIXTURES / "faulty.cu")
try:
    module.launch("two_barriers", 1, 64, [x])
    raise AssertionError
except EmulatorError as error:
    assert "divergent" in str(error)
print("clean", flush=True)
module.launch(sys.argv[1], 1, 32, eval(sys.argv[2]), shared_bytes=128)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args", "kind"),
    [
        ("outside_input", "[np.ones(32, np.float32), x, 1]", "heap-buffer-overflow"),
        ("outside_dynamic", "[x, 1]", "heap-buffer-overflow"),
        ("outside_static", "[x, 1]", "global-buffer-overflow"),
    ],
)
def test_address_sanitizer(name, args, kind):
    try:
        environment = builder.sanitizer_environment()
    except builder.BuildError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, name, args],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "clean\n", done.stderr
    assert kind in done.stderr
    assert line(name) in done.stderr
