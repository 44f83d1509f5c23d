"""What was made under a watch: how large, by which operator, from which line."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

_HERE = os.path.dirname(os.path.abspath(__file__))
#: Whose lines say nothing about where a tensor comes from: they allocate for others.
_ALLOCATORS = (
    os.path.join(os.path.dirname(torch.__file__), ""),
    os.path.join(_HERE, ""),
    os.path.join(os.path.dirname(_HERE), "ops", ""),
)


@dataclass(frozen=True)
class Creation:
    """Storages of one size that one operator made at one place.

    Attributes:
        bytes: Of one storage.
        shape: Of the tensor as the operator returned it.
        dtype: Of the tensor, as in ``"float32"``.
        operator: As in ``"aten.mm.default"``.
        source: ``"file.py:line function"`` of the innermost Python frame outside of PyTorch and of
            :mod:`gradpress.ops`. What a backward pass computes by itself has the line that called
            it.
        count: How often.
    """

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    operator: str
    source: str
    count: int = 1

    @property
    def is_floating_point(self) -> bool:
        """Whether the values are floating-point."""
        return "float" in self.dtype

    @property
    def numel(self) -> int:
        """The number of elements of the tensor."""
        return torch.Size(self.shape).numel()

    def to_dict(self) -> dict[str, Any]:
        """The attributes, fit for JSON."""
        return {**asdict(self), "shape": list(self.shape)}

    def __str__(self) -> str:
        """One line."""
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"{self.bytes:,} B  {self.dtype} {shape}  {self.operator}  {self.source}"


class Creations:
    """Counts equal creations together, so that a long training does not fill the memory.

    Args:
        min_bytes: Storages below it are not kept.
    """

    def __init__(self, min_bytes: int) -> None:
        self.min_bytes = min_bytes
        self._counts: dict[tuple[Any, ...], int] = {}

    def add(self, func: Any, tensor: torch.Tensor, size: int) -> None:
        """Takes up one."""
        if size >= self.min_bytes:
            key = (size, tensor.shape, tensor.dtype, func, *_source())
            self._counts[key] = self._counts.get(key, 0) + 1

    def of_at_least(self, min_bytes: int) -> list[Creation]:
        """All of a size, the largest first."""
        found = [
            Creation(
                size,
                tuple(shape),
                str(dtype).removeprefix("torch."),
                str(func),
                f"{_short(path)}:{line} {function}",
                count,
            )
            for (size, shape, dtype, func, path, line, function), count in self._counts.items()
            if size >= min_bytes
        ]
        return sorted(found, key=lambda creation: -creation.bytes)


def _source() -> tuple[str, int, str]:
    """The file, line and function that asked for a tensor."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_ALLOCATORS):
        frame = frame.f_back
    code = frame.f_code
    return code.co_filename, frame.f_lineno, code.co_name


def _short(path: str) -> str:
    """The last two names of a path."""
    return "/".join(path.split(os.sep)[-2:])
