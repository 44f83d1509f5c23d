"""Compiles CUDA sources for real devices with NVRTC, no GPU needed, and reads what they use."""

import contextlib
import ctypes
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class NvrtcError(RuntimeError):
    """NVRTC is missing or refuses the source."""


@dataclass(frozen=True)
class Usage:
    """What a thread, or for shared memory a block, of a kernel occupies."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Cubin:
    """A module for one architecture."""

    architecture: str
    image: bytes
    log: str
    usage: dict[str, Usage]


def find() -> Path | None:
    """NVRTC's library: the one that torch has loaded, else that of an installed wheel."""
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401  (maps its CUDA libraries)
    maps = Path("/proc/self/maps")
    loaded = re.findall(r"/\S*libnvrtc\.so\S*", maps.read_text()) if maps.exists() else []
    if loaded:
        return Path(loaded[0])
    wheels = [p for folder in sys.path for p in Path(folder).glob("nvidia/*/lib/libnvrtc.so.*")]
    return max(wheels, default=None, key=lambda p: p.name)


@functools.cache
def _library() -> ctypes.CDLL:
    path = find()
    if path is None:
        raise NvrtcError("NVRTC is not installed (pip install nvidia-cuda-nvrtc)")
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _check(status: int) -> None:
    if status:
        raise NvrtcError(_library().nvrtcGetErrorString(status).decode())


def version() -> tuple[int, int]:
    """Major and minor version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def supported_architectures() -> list[str]:
    """What this NVRTC can compile for, as `sm_90`."""
    count = ctypes.c_int()
    _check(_library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    numbers = (ctypes.c_int * count.value)()
    _check(_library().nvrtcGetSupportedArchs(numbers))
    return [f"sm_{number}" for number in numbers]


def read_headers(*folders: Path) -> dict[str, str]:
    """Every header in the folders, by the name that an `#include` gives it."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".cuh", ".h")
    }


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_NUMBERS = {
    "registers": r"Used (\d+) registers",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
    "stack_bytes": r"(\d+) bytes stack frame",
    "shared_bytes": r"(\d+) bytes smem",
}


def parse_usage(log: str) -> dict[str, Usage]:
    """Kernel name to what ptxas says about it.

    Functions that were not inlined are listed after a kernel that calls them and count for it.
    """
    parts = _ENTRY.split(log)[1:]
    return {
        name: Usage(**{k: sum(map(int, re.findall(p, text))) for k, p in _NUMBERS.items()})
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, text))
    return text.raw


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def compile_source(
    source: str,
    name: str,
    architecture: str,
    headers: Mapping[str, str] | None = None,
    defines: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Cubin:
    """Compiles one source for one architecture.

    Args:
        source: The text.
        name: The file's name, for messages.
        architecture: A real one, `sm_90`.
        headers: Text by name; NVRTC reads no files.
        defines: Macros.
        options: Further options, such as `--fmad=false`.

    Raises:
        NvrtcError: With the compiler's messages.
    """
    headers = headers or {}
    program = ctypes.c_void_p()
    _check(
        _library().nvrtcCreateProgram(
            ctypes.byref(program),
            source.encode(),
            name.encode(),
            len(headers),
            _strings(list(headers.values())),
            _strings(list(headers)),
        )
    )
    arguments = [
        *(f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v"),
        *(f"-D{macro}={value}" for macro, value in (defines or {}).items()),
        *options,
    ]
    try:
        status = _library().nvrtcCompileProgram(program, len(arguments), _strings(arguments))
        log = _read(program, "ProgramLog").rstrip(b"\0").decode()
        if status:
            raise NvrtcError(f"{name} for {architecture}:\n{log}")
        return Cubin(architecture, _read(program, "CUBIN"), log, parse_usage(log))
    finally:
        _library().nvrtcDestroyProgram(ctypes.byref(program))


def compile_file(
    path: Path,
    architectures: Sequence[str],
    include: Sequence[Path] = (),
    defines: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> list[Cubin]:
    """Compiles a file for each architecture, with the headers beside it and in `include`."""
    headers = read_headers(path.parent, *include)
    return [
        compile_source(path.read_text(), path.name, architecture, headers, defines, options)
        for architecture in architectures
    ]
