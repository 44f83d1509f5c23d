"""The caller's kind of array: PyTorch's tensors and NumPy's arrays alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch

Array: TypeAlias = "torch.Tensor | np.ndarray[Any, Any]"

_TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


def dtype_name(x: Array) -> str:
    """The dtype's name as PyTorch spells it, without the module."""
    return str(x.dtype).removeprefix("torch.")


def check_array(op: str, name: str, x: object) -> Array:
    """`x` itself when it is a plain tensor or array.

    Raises:
        TypeError: it is neither a ``torch.Tensor`` nor a ``numpy.ndarray``.
    """
    if not isinstance(x, torch.Tensor | np.ndarray):
        raise TypeError(
            f"{op}: {name} must be a torch.Tensor or a numpy.ndarray, got {type(x).__name__}"
        )
    return x


def empty_like_kind(x: Array, shape: Sequence[int], dtype: str) -> Array:
    """An uninitialized array of `x`'s kind and device.

    Args:
        x: Decides between PyTorch and NumPy, and the device.
        shape: The result's shape.
        dtype: The result's dtype by name, as in ``"uint8"``.
    """
    if isinstance(x, torch.Tensor):
        return torch.empty(tuple(shape), dtype=_TORCH_DTYPES[dtype], device=x.device)
    return np.empty(tuple(shape), dtype=dtype)


def zeros_like_kind(x: Array, shape: Sequence[int], dtype: str) -> Array:
    """The same, of zeros."""
    if isinstance(x, torch.Tensor):
        return torch.zeros(tuple(shape), dtype=_TORCH_DTYPES[dtype], device=x.device)
    return np.zeros(tuple(shape), dtype=dtype)


def new_counter(x: Array) -> Array:
    """An int64 zero of one element, of `x`'s kind and device, for kernels to count in."""
    if isinstance(x, torch.Tensor):
        return torch.zeros(1, dtype=torch.int64, device=x.device)
    return np.zeros(1, dtype=np.int64)


def contiguous(x: Array) -> Array:
    """`x`, or a copy of it when its elements do not lie in order."""
    if isinstance(x, torch.Tensor):
        return x.detach().resolve_neg().contiguous()
    return np.ascontiguousarray(x)


def numel(x: Array) -> int:
    """The number of elements."""
    return x.numel() if isinstance(x, torch.Tensor) else int(x.size)


def written(tensors: Iterable[object]) -> None:
    """Tells autograd that these were written, so that it notices stale saved values."""
    touched = cast("list[torch.Tensor]", list(tensors))
    try:
        torch.autograd.graph.increment_version(touched)
    except (RuntimeError, AttributeError):  # inference tensors keep no count, arrays neither
        for tensor in touched:
            if isinstance(tensor, torch.Tensor) and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
