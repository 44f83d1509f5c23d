"""What the native core says about itself, and the instruction set it uses."""

from gradpress import _core


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
