"""CPU memory under the name of another device, as DLPack lends it."""

import ctypes
from types import SimpleNamespace
from typing import Any

import torch

CUDA = 2
_NAME = b"dltensor_versioned"


def _pointer(capsule: Any) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return get(capsule, _NAME)


class OnDevice:
    """A producer that says its tensor lies on a CUDA device."""

    def __init__(self, tensor: torch.Tensor, ordinal: int = 0) -> None:
        self.tensor = tensor
        self.ordinal = ordinal
        self.options: dict[str, Any] = {}

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.ordinal

    def __dlpack__(self, **options: Any) -> Any:
        self.options = options
        capsule = self.tensor.__dlpack__(max_version=(1, 0))
        # Version (8 bytes), context, deleter, flags, data; then the device's kind and number.
        device = (ctypes.c_int32 * 2).from_address(_pointer(capsule) + 40)
        device[:] = [CUDA, self.ordinal]
        return capsule


def use_stream(raw: int) -> None:
    """Makes PyTorch's current stream of every device this one."""
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=raw)  # type: ignore[assignment]
