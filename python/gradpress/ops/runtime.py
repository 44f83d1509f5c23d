"""What the native core says about itself, and what it uses: instruction sets, CUDA devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gradpress import _core

# Kernels run on PyTorch's threads, which a fork of this process would wait for in vain.
_core.own_threads()

_emulated = False


def core_version() -> str:
    """The version of the native core, which is the package's."""
    return _core.version()


def simd_level() -> str:
    """The instruction set that the CPU kernels use: ``"scalar"``, ``"avx2"`` or ``"avx512"``.

    It is the best one of the processor, unless the environment variable ``GRADPRESS_SIMD`` or
    :func:`set_simd_level` asked for less.
    """
    return _core.simd_level()


def simd_levels() -> list[str]:
    """The instruction sets that this processor offers, the least capable first."""
    return _core.simd_levels()


def set_simd_level(level: str) -> None:
    """Makes the CPU kernels use another instruction set; element-wise results do not change.

    Args:
        level: One of :func:`simd_levels`.

    Raises:
        ValueError: the processor does not offer it.
    """
    _core.set_simd_level(level)


def cuda_status() -> str:
    """CUDA devices, driver and compiler as text, or what is missing of them; never raises."""
    return _core.cuda_status()


def warmup(
    device: torch.device | str | int | None = None, *, files: Sequence[str] | None = None
) -> None:
    """Compiles and loads kernels for a CUDA device, so that no later call has to.

    Without it a kernel is compiled when it is first needed, which takes a fraction of a second, or
    comes from the cache (``$GRADPRESS_CACHE_DIR``, else ``$XDG_CACHE_HOME/gradpress``, else
    ``~/.cache/gradpress``). Call it before capturing a CUDA graph: nothing can be loaded then.

    Args:
        device: As PyTorch names it; the current CUDA device when left out.
        files: Of :func:`kernel_modules`, as in ``"optim.cu"``; all of them when left out, which
            takes up to a minute where the cache has none.

    Raises:
        RuntimeError: there is no such device, or no driver or compiler for it.
        ValueError: `device` is no CUDA device, or there is no such file.
    """
    named = torch.device("cuda", device) if isinstance(device, int) else device
    chosen = torch.device("cuda" if named is None else named)
    if chosen.type != "cuda":
        raise ValueError(f"warmup: device must be a CUDA device, got {chosen}")
    index = chosen.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    _core.warmup(index, None if files is None else list(files))


def kernel_modules() -> list[tuple[str, list[str], list[str]]]:
    """Every CUDA module that ops may need: file of ``kernels/``, defines, its kernels' names."""
    return _core.kernel_modules()


def compile_kernels(
    architecture: str, files: Sequence[str] | None = None
) -> list[tuple[str, list[str], int]]:
    """Compiles kernels for an architecture into the cache; needs NVRTC, but no device.

    Args:
        architecture: As in ``"sm_90"``.
        files: Of ``kernels/``, as in ``"quant.cu"``; all of them when left out.

    Returns:
        File, defines, and size in bytes of every module.

    Raises:
        RuntimeError: NVRTC is missing, or does not know the architecture.
        ValueError: `architecture` is not written like that, or there is no such file.
    """
    number = architecture.removeprefix("sm_")
    if not number.isdecimal():
        raise ValueError(
            f'compile_kernels: architecture must be like "sm_90", got {architecture!r}'
        )
    return _core.compile_kernels(int(number), None if files is None else list(files))


def set_emulator(
    build: Callable[[str, list[str]], str] | None,
    *,
    order: int = 0,
    seed: int = 0,
    list_capacity: int = 400,
) -> None:
    """Makes ops on CPU tensors take their CUDA half, on kernels compiled for the CPU: for tests.

    Args:
        build: Called with a file of ``kernels/`` and defines; returns the path of a library that
            ``tests/emulator/build.py`` made. None switches back.
        order: Which thread goes on where several can; see ``tests/emulator/README.md``.
        seed: For random orders.
        list_capacity: How many tensors one launch takes.
    """
    global _emulated
    _core.set_emulator(build, order, seed, list_capacity)
    _emulated = build is not None


def is_emulated() -> bool:
    """Whether ops on CPU tensors take their CUDA half; see :func:`set_emulator`."""
    return _emulated
