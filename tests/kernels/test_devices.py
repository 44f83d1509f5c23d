"""Every module compiles for every architecture, without spills; registers are printed (`-s`)."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.emulator import nvrtc
from tests.kernels.launch import INCLUDE, KERNELS, MODULES

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

pytestmark = pytest.mark.skipif(nvrtc.find() is None, reason="needs nvidia-cuda-nvrtc")


def usage(file, defines, architecture):
    (cubin,) = nvrtc.compile_file(
        KERNELS / file, [architecture], INCLUDE, defines, ["--fmad=false"]
    )
    return cubin.usage


def check(modules, architectures):
    jobs = [(*module, architecture) for module in modules for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: usage(*job), jobs))
    rows = {}
    for (file, defines, _), kernels in zip(jobs, results, strict=True):
        for name, used in kernels.items():
            rows.setdefault((file, *defines.values(), name), []).append(used)
    for name, row in rows.items():
        print(f"{' '.join(name):60}", *(f"{used.registers:3}" for used in row))
    for name, row in rows.items():
        assert not any(u.spill_stores + u.spill_loads + u.stack_bytes for u in row), (name, row)
        assert all(used.shared_bytes <= 16384 for used in row), (name, row)


def test_bfloat16_modules_on_the_oldest_and_the_newest_architecture():
    check([m for m in MODULES if set(m[1].values()) <= {"bf16"}], ("sm_75", "sm_120"))


def test_every_module_on_one_architecture():
    check(MODULES, ("sm_90",))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_module_on_every_architecture():
    check(MODULES, ARCHITECTURES)
