"""NVRTC compiles every module for real devices: registers are printed, spills fail."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.emulator import nvrtc
from tests.kernels_lowrank.launcher import KERNELS

pytestmark = pytest.mark.skipif(nvrtc.find() is None, reason="needs nvidia-cuda-nvrtc")

ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
FOLDER = KERNELS / "lowrank"
#: Static shared memory that a block may have without asking.
SHARED_BYTES = 48 * 1024

PLAIN = {"ELEM": "f32", "BASIS_BITS": 32, "TENSOR": 0}
TENSOR = {"ELEM": "bf16", "BASIS_BITS": 4, "TENSOR": 1}
FILES = [
    ("project", PLAIN),
    ("project", TENSOR),
    ("requantize_span", {}),
    ("orthonormal", {}),
    ("eigen", {}),
    ("refresh", {"ELEM": "bf16"}),
]
#: The slowest to compile: sm_75 has no tensor cores to speak of, and sm_80, 86, 89 are of a kind.
BACK = {architecture: [PLAIN, TENSOR] for architecture in ARCHITECTURES}
BACK |= {"sm_75": [PLAIN], "sm_86": [PLAIN], "sm_89": [TENSOR]}
#: Other ways to compile the products, each value of each define in some.
VARIANTS = [
    *(
        ("project", {"ELEM": elem, "BASIS_BITS": bits, "TENSOR": tensor, "BASIS_PARTS": parts})
        for elem, bits, tensor, parts in [
            ("f32", 32, 1, 2), ("f32", 8, 0, 2), ("f16", 32, 0, 2), ("f16", 32, 1, 2),
            ("f16", 4, 1, 1), ("bf16", 32, 0, 2), ("bf16", 32, 1, 2), ("bf16", 8, 1, 1),
        ]
    ),
    *(
        ("project_back", {"ELEM": elem, "BASIS_BITS": bits, "TENSOR": tensor})
        for elem, bits, tensor in [("f16", 32, 0), ("bf16", 8, 0), ("bf16", 32, 1), ("f32", 8, 1)]
    ),
]  # fmt: skip


def check(task: tuple[str, dict[str, str | int], str]) -> str:
    name, defines, architecture = task
    texts = {key: str(value) for key, value in defines.items()}
    (cubin,) = nvrtc.compile_file(
        FOLDER / f"{name}.cu", [architecture], [KERNELS / "include"], texts, ["--fmad=false"]
    )
    assert cubin.image.startswith(b"\x7fELF")
    assert "warning" not in cubin.log, cubin.log
    for kernel, usage in cubin.usage.items():
        where = f"{kernel} of {name} {texts} for {architecture}: {usage}"
        assert usage.spill_stores == usage.spill_loads == usage.stack_bytes == 0, where
        assert usage.shared_bytes <= SHARED_BYTES, where
    registers = ", ".join(f"{kernel} {usage.registers}" for kernel, usage in cubin.usage.items())
    return f"{name} {' '.join(texts.values())} {architecture}: {registers}"


def compile_all(tasks) -> None:
    with ThreadPoolExecutor(2) as pool:
        for line in pool.map(check, tasks):
            print(line)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_modules_compile_without_spills(architecture):
    files = [*FILES, *(("project_back", defines) for defines in BACK[architecture])]
    compile_all([(name, defines, architecture) for name, defines in files])


def test_variants_compile_without_spills():
    compile_all([(name, defines, "sm_90") for name, defines in VARIANTS])
