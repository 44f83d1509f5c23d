"""What this machine and this installation offer."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

_OPTIONAL = ("transformers", "tokenizers", "safetensors", "matplotlib", "psutil")


@dataclass(frozen=True)
class Environment:
    """Facts for a bug report; printing it gives a table.

    Attributes:
        versions: Version by package; `"not installed"` for an optional package that is missing.
        processor: Model of the CPU.
        cores: Cores that this process may use.
        threads: Threads that torch and this package use.
        simd: Instruction set that the kernels chose.
        devices: CUDA devices as torch sees them.
        cuda_status: Driver and compiler of CUDA as the kernels find them, or what is missing.
        cache_folder: Where compiled kernels are kept.
    """

    versions: dict[str, str]
    processor: str
    cores: int
    threads: int
    simd: str
    devices: tuple[str, ...]
    cuda_status: str
    cache_folder: Path

    def to_dict(self) -> dict[str, object]:
        """The same as JSON-ready values."""
        values = dataclasses.asdict(self)
        return {**values, "devices": list(self.devices), "cache_folder": str(self.cache_folder)}

    def __str__(self) -> str:
        """One fact per line."""
        rows = [
            *self.versions.items(),
            ("CPU", self.processor),
            ("cores", str(self.cores)),
            ("threads", str(self.threads)),
            ("SIMD", self.simd),
            ("CUDA devices", "; ".join(self.devices) or "none"),
            ("CUDA kernels", self.cuda_status),
            ("cache folder", str(self.cache_folder)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def report() -> Environment:
    """Collects versions, processor, threads, devices and folders.

    Returns:
        The environment; printing it gives a table.
    """
    from gradpress import __version__
    from gradpress.ops import runtime

    return Environment(
        versions={
            "gradpress": __version__,
            "Python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": _version("numpy"),
            **{name: _version(name) for name in _OPTIONAL},
        },
        processor=processor_name(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        simd=runtime.simd_level(),
        devices=_devices(),
        cuda_status=runtime.cuda_status(),
        cache_folder=cache_folder(),
    )


def cache_folder() -> Path:
    """`$GRADPRESS_CACHE_DIR`, else `$XDG_CACHE_HOME/gradpress`, else `~/.cache/gradpress`."""
    own = os.environ.get("GRADPRESS_CACHE_DIR")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "gradpress"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """The name in `/proc/cpuinfo` where there is one, else what the platform says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _devices() -> tuple[str, ...]:
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(
            f"cuda:{index} {properties.name} (sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB)"
        )
    return tuple(names)
