"""NVRTC compiles every module for every architecture: registers are printed (`-s`), spills fail."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
from tests.cuda.devices import KERNELS
from tests.emulator import nvrtc

from gradpress.ops import runtime

pytestmark = pytest.mark.skipif(nvrtc.find() is None, reason="needs nvidia-cuda-nvrtc")

#: Where sources differ (below and from sm_80 on), and the newest: every module.
THOROUGH = ["sm_75", "sm_80", "sm_120"]
#: The same sources for other processors: one module of each file, all in the slow profile.
BETWEEN = ["sm_86", "sm_89", "sm_90", "sm_100"]
#: Static shared memory that a block may have without asking.
SHARED_BYTES = 48 * 1024
MODULES = runtime.kernel_modules()


def compiled(file, defines, kernels, architecture):
    """Registers of each kernel, as text; fails on spills."""
    macros = dict(define.split("=") for define in defines)
    include, options = [KERNELS / "include"], ["--fmad=false"]
    (cubin,) = nvrtc.compile_file(KERNELS / file, [architecture], include, macros, options)
    assert cubin.image.startswith(b"\x7fELF")
    assert "warning" not in cubin.log, cubin.log
    assert set(cubin.usage) >= set(kernels)
    for kernel, usage in cubin.usage.items():
        where = f"{kernel} of {file} {macros} for {architecture}: {usage}"
        assert usage.spill_stores == usage.spill_loads == usage.stack_bytes == 0, where
        assert usage.shared_bytes <= SHARED_BYTES, where
    return ", ".join(f"{kernel} {usage.registers}" for kernel, usage in cubin.usage.items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_module_compiles_for_every_architecture_without_spills():
    slow = os.environ.get("HYPOTHESIS_PROFILE") == "slow"
    one_of_each = {module[0]: module for module in MODULES}.values()
    some = MODULES if slow else list(one_of_each)
    tasks = [(*module, architecture) for architecture in THOROUGH for module in MODULES]
    tasks += [(*module, architecture) for architecture in BETWEEN for module in some]
    # NVRTC compiles one at a time in a process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        results = pool.map(compiled, *zip(*tasks, strict=True), chunksize=8)
        for (file, defines, _, architecture), used in zip(tasks, results, strict=True):
            print(f"{architecture} {file} {' '.join(defines)}: {used}")


def test_every_file_is_a_module():
    files = {str(path.relative_to(KERNELS)) for path in KERNELS.rglob("*.cu")}
    assert {file for file, *_ in MODULES} == files
