"""Compiles a `.cu` file for the CPU and launches its kernels there."""

import argparse
import ctypes
import functools
import hashlib
import operator
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUNTIME = HERE / "runtime"
UNITS = ("scheduler", "warp", "checks", "launch")
SANITIZE_VARIABLE = "GRADPRESS_EMULATOR_SANITIZE"

# No contraction and no fast-math: the bits of + - * / and sqrt are the device's. `no-math-errno`
# changes no result, it only lets sqrt be an instruction. Hidden and not unique: nothing may be
# shared between two libraries in one process.
FLAGS = (
    *("-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno"),
    *("-fvisibility=hidden", "-fno-gnu-unique"),
    "-fmax-errors=5",
)
# What the device would do differently, or not survive. Reported by runtime/checks.cpp.
CHECKS = (
    "-fsanitize=null,alignment,bounds,shift-exponent,float-cast-overflow"
    ",integer-divide-by-zero,signed-integer-overflow"
)
ERRORS = ("-Werror=return-type", "-Werror=uninitialized", "-Werror=frame-larger-than=16384")
ADDRESS = ("-fsanitize=address", "-fsanitize-sections=cushared")

BOUND = r"(?:__launch_bounds__\s*\((?P<{}>(?:[^()]|\([^()]*\))*)\)\s*)?"
KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+'
    + BOUND.format("before")
    + r"void\s+"
    + BOUND.format("after")
    + r"(?P<name>\w+)\s*\("
)


class BuildError(RuntimeError):
    """The compiler is missing or refuses the source."""


class EmulatorError(RuntimeError):
    """A launch was refused, or its kernel did what it must not."""


def compiler() -> str:
    """The host's C++ compiler: `$CXX` or g++."""
    return os.environ.get("CXX", "g++")


def _run(*arguments: str | Path, text: str | None = None) -> str:
    command = [compiler(), *map(str, arguments)]
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BuildError(f"no C++ compiler: {command[0]} (the variable CXX names one)") from None
    if done.returncode:
        raise BuildError(done.stderr)
    return done.stdout


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _emulator_key(compiler: str, flags: tuple[str, ...]) -> str:
    """Stands for everything but the kernel: emulator, flags, compiler."""
    files = sorted(p for p in HERE.rglob("*") if p.suffix in (".h", ".cpp", ".ld"))
    texts = [p.read_text() for p in [*files, Path(__file__)]]
    return _digest(_run("--version"), *flags, *texts)


def cache_folder() -> Path:
    """Where libraries are kept. Only its owner may write there, because they are executed."""
    given = os.environ.get("GRADPRESS_CACHE_DIR")
    if given:
        folder = Path(given) / "emulator"
    else:
        folder = Path(tempfile.gettempdir()) / f"gradpress-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BuildError(f"{folder} can be written by others; set GRADPRESS_CACHE_DIR")
    return folder


def _runtime(key: str, flags: tuple[str, ...]) -> list[Path]:
    """Objects of the scheduler, compiled once."""
    folder = cache_folder()
    objects = [folder / f"{unit}-{key}.o" for unit in UNITS]
    for unit, target in zip(UNITS, objects, strict=True):
        if target.exists():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, target.name)
            _run(*flags, "-O2", "-c", RUNTIME / f"{unit}.cpp", "-o", made)
            made.replace(target)
    return objects


def kernels_in(preprocessed: str) -> dict[str, str]:
    """Kernel name to the arguments of its `__launch_bounds__`, empty without."""
    found = {m["name"]: m["before"] or m["after"] or "" for m in KERNEL.finditer(preprocessed)}
    if len(KERNEL.findall(preprocessed)) != len(re.findall(r"\b__global__\b", preprocessed)):
        raise BuildError('a kernel is declared as: extern "C" __global__ void NAME(...)')
    return found


def _translation_unit(source: Path, kernels: Mapping[str, str]) -> str:
    """The source and the table of its kernels.

    The unnamed namespace makes shared memory in templates and inline functions ordinary local
    variables, which may lie in a section of their own.
    """
    rows = [
        f'{{"{name}", ::cuemu::Entry<&{name}>::run, ::cuemu::Entry<&{name}>::parameters, '
        f"::cuemu::launch_bound({bound or 1024})}},"
        for name, bound in kernels.items()
    ]
    return "\n".join(
        [
            "namespace {",
            f'#include "{source}"',
            "constexpr ::cuemu::Kernel cuemu_table[] = {",
            *rows,
            "};",
            "}",
            "const cuemu::Kernel* const cuemu::kernel_table = cuemu_table;",
            f"const unsigned cuemu::kernel_count = {len(rows)};",
            "",
        ]
    )


def build(
    source: Path,
    defines: Mapping[str, str] | None = None,
    include: Sequence[Path] = (),
    sanitize: bool = False,
) -> Path:
    """Compiles one `.cu` file to a shared library, or finds it in the cache.

    Args:
        source: The file.
        defines: Macros, as NVRTC gets them (`-DELEM=f32`). `CUEMU_UCONTEXT` switches threads by
            ucontext, as on machines without a switch of our own.
        include: Folders of the headers it includes.
        sanitize: For AddressSanitizer; see `sanitizer_environment`.
    """
    source = Path(source).resolve()
    options = [f"-D{name}={value}" for name, value in (defines or {}).items()]
    options += [f"-I{Path(folder).resolve()}" for folder in include]
    # The preprocessed text holds every header, so it is both the key and where to look for
    # kernels: conditions are decided and names put together by then.
    text = _run("-E", "-std=c++17", "-DGRADPRESS_EMULATOR=1", *options, "-x", "c++", source)
    runtime_flags = (*FLAGS, *(o for o in options if o.startswith("-DCUEMU_")))
    runtime_flags += ("-DCUEMU_ASAN",) if sanitize else ()
    runtime_key = _emulator_key(compiler(), runtime_flags)
    library = cache_folder() / f"{source.stem}-{_digest(text, *options, runtime_key)}.so"
    if library.exists():
        return library
    kernels = kernels_in(text)
    if not kernels:
        raise BuildError(f"{source}: no kernel")
    objects = _runtime(runtime_key, runtime_flags)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        unit, made = Path(scratch, "kernel.o"), Path(scratch, library.name)
        mode = ["-O1", "-g1", *ADDRESS] if sanitize else ["-O2", *ERRORS]
        force = ["-include", str(HERE / "cuda_emulator.h"), "-DGRADPRESS_EMULATOR=1"]
        sections = "-fdata-sections"  # see shared.ld
        compile_flags = [*FLAGS, sections, *mode, CHECKS, *force, *options, "-x", "c++", "-"]
        _run(*compile_flags, "-c", "-o", unit, text=_translation_unit(source, kernels))
        complete = [] if sanitize else ["-Wl,-z,defs"]  # AddressSanitizer is preloaded
        script = f"-Wl,-T,{RUNTIME / 'shared.ld'}"
        _run("-shared", "-pthread", unit, *objects, script, *complete, "-o", made)
        made.replace(library)
    return library


def sanitizer_environment() -> dict[str, str]:
    """Environment for a process that uses sanitized libraries: the sanitizer comes first."""
    library = Path(_run("-print-file-name=libasan.so").strip())
    if not library.is_absolute():
        raise BuildError("the compiler has no libasan")
    library = library.resolve()
    if not library.read_bytes().startswith(b"\x7fELF"):  # a linker script that names the library
        library = Path(re.findall(r"/\S*libasan\S*", library.read_text())[0])
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        SANITIZE_VARIABLE: "1",
    }


_ORDERS = {"forward": 0, "reverse": 1, "random": 2}
_SHUFFLE_BLOCKS, _EXITED_MAY_MISS_BARRIERS = 4, 8
_NUMBERS: dict[str, Any] = {
    **{f"i{bits // 8}": getattr(ctypes, f"c_int{bits}") for bits in (8, 16, 32, 64)},
    **{f"u{bits // 8}": getattr(ctypes, f"c_uint{bits}") for bits in (8, 16, 32, 64)},
    **{"f4": ctypes.c_float, "f8": ctypes.c_double},
}


def _pointer(value: Any, size: int) -> ctypes.c_void_p:
    """Address of an array or CPU tensor, whose elements have the size that the kernel expects."""
    if value is None or isinstance(value, ctypes.c_void_p):
        return value or ctypes.c_void_p()
    if hasattr(value, "data_ptr"):
        if value.device.type != "cpu":
            raise TypeError(f"a tensor on {value.device}; the emulator reads the host's memory")
        address, itemsize = value.data_ptr(), value.element_size()
    elif hasattr(value, "ctypes"):
        address, itemsize = value.ctypes.data, value.itemsize
    else:
        raise TypeError(f"{type(value).__name__} for a pointer")
    # Vector types (float4 *) read several elements at once.
    if size and (itemsize > size or size % itemsize or (size <= 8 and itemsize != size)):
        raise TypeError(f"elements of {itemsize} bytes for a pointer to {size} bytes")
    return ctypes.c_void_p(address)


def _argument(value: Any, parameter: str) -> Any:
    """The value as the C type of a parameter (see `Parameter` in runtime/interface.h)."""
    kind, size = parameter[0], int(parameter[1:])
    if kind == "p":
        return _pointer(value, size)
    if isinstance(value, ctypes._SimpleCData | ctypes.Structure | ctypes.Array):
        if ctypes.sizeof(value) != size:
            raise TypeError(f"{type(value).__name__} for a parameter of {size} bytes")
        return value
    if kind == "f":
        return _NUMBERS[parameter](float(value))
    if kind == "s":
        raise TypeError("a struct parameter takes a ctypes.Structure")
    number = operator.index(value)
    low, bits = (-1 << 8 * size - 1, 8 * size - 1) if kind == "i" else (0, 8 * size)
    if not low <= number < 1 << bits:
        raise OverflowError(f"{number} in a parameter of kind {parameter}")
    return _NUMBERS[parameter](number)


def _three(extent: int | Sequence[int]) -> ctypes.Array[ctypes.c_uint]:
    given = (extent,) if isinstance(extent, int) else tuple(extent)
    return (ctypes.c_uint * 3)(*given, *[1] * (3 - len(given)))


class EmulatedModule:
    """The kernels of one `.cu` file, compiled for the CPU."""

    def __init__(
        self,
        source: Path,
        defines: Mapping[str, str] | None = None,
        include: Sequence[Path] = (),
        sanitize: bool | None = None,
    ) -> None:
        """Builds or finds the library and loads it. Arguments as for `build`."""
        if sanitize is None:
            sanitize = os.environ.get(SANITIZE_VARIABLE, "0") not in ("", "0")
        self._library = ctypes.CDLL(str(build(source, defines, include, sanitize)))
        self._library.cuemu_launch.restype = ctypes.c_char_p
        self._library.cuemu_kernels.restype = ctypes.c_char_p
        self._library.cuemu_signature.restype = ctypes.c_char_p
        names = self._library.cuemu_kernels().decode().split("\n")
        self._signatures = {
            name: self._library.cuemu_signature(name.encode()).decode().split() for name in names
        }

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels."""
        return list(self._signatures)

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        order: str = "forward",
        seed: int = 0,
        shuffle_blocks: bool = False,
        exited_may_miss_barriers: bool = False,
    ) -> None:
        """Runs a kernel to its end.

        Args:
            name: The kernel.
            grid: Blocks in x, y, z.
            block: Threads of a block in x, y, z.
            args: Arrays, tensors or None for pointers, numbers, ctypes structures.
            shared_bytes: Dynamic shared memory.
            order: Which thread goes on where several can: forward, reverse or random.
            seed: For the random orders.
            shuffle_blocks: Visit the blocks in a random order.
            exited_may_miss_barriers: Let `__syncthreads` go on without threads that have exited,
                as GPUs since sm_70 do.

        Raises:
            EmulatorError: With the emulator's message.
        """
        parameters = self._signatures.get(name, [])
        if name in self._signatures and len(args) != len(parameters):
            raise TypeError(f"{name} takes {len(parameters)} arguments, not {len(args)}")
        values = [_argument(a, p) for a, p in zip(args, parameters, strict=False)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        flags = _ORDERS[order]
        flags |= shuffle_blocks * _SHUFFLE_BLOCKS
        flags |= exited_may_miss_barriers * _EXITED_MAY_MISS_BARRIERS
        message = self._library.cuemu_launch(
            name.encode(),
            _three(grid),
            _three(block),
            ctypes.c_uint(shared_bytes),
            pointers,
            ctypes.c_int(flags),
            ctypes.c_uint(seed),
        )
        if message is not None:
            raise EmulatorError(message.decode())


def main() -> None:
    """The command line: see README.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulator.build", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    library = commands.add_parser("library", help="build, and print where the library is")
    library.add_argument("source", type=Path)
    library.add_argument("-D", action="append", default=[], metavar="NAME=VALUE", dest="defines")
    library.add_argument("-I", action="append", default=[], type=Path, dest="include")
    library.add_argument("--sanitize", action="store_true")
    sanitized = commands.add_parser("sanitized", help="run a command under AddressSanitizer")
    sanitized.add_argument("words", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.command == "sanitized":
        if not given.words:
            parser.error("no command")
        os.execvpe(given.words[0], given.words, sanitizer_environment())
    defines = dict(define.partition("=")[::2] for define in given.defines)
    print(build(given.source, defines, given.include, given.sanitize))


if __name__ == "__main__":
    main()
