"""Counting on the meta device, where operators that need values find zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from gradpress.memory._accountant import Accountant, Logits
from gradpress.memory._creations import Creations
from gradpress.memory._tensors import tensors_in

aten = torch.ops.aten

#: What they make on the host is looked at, though kernels have not written it.
_UNINITIALIZED = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)

#: Take the sides of a matrix; other operators that take numbers make as many elements at most.
_OF_MATRICES = (aten.eye.default, aten.eye.m)

#: Tensors up to so many elements may stay on the host, where they have values: counters and such.
HOST_ELEMENTS = 1024


class SimulatedAccountant(Accountant):  # type: ignore[no-untyped-call]
    """Counts on the meta device, and answers what needs values: they are zero there.

    Args:
        device: What the meta device stands for.
        creations: Keeps what was made.
        logits: Which tensors count as logits.

    Attributes:
        host: Counts what is on the host, where that is another device.
    """

    def __init__(
        self,
        device: torch.device,
        creations: Creations | None = None,
        logits: Logits | None = None,
    ) -> None:
        super().__init__(meta=True, creations=creations, logits=logits)
        self._device = device
        self.host = Accountant(meta=True)

    def _counts(self, tensor: torch.Tensor) -> bool:
        return super()._counts(tensor) and not self.host.knows(tensor)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch._C.DisableTorchFunction():
            if func is aten._local_scalar_dense.default and args[0].is_meta:
                return torch.zeros((), dtype=args[0].dtype).item()
            if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
                return args[0]  # what the host knows stays
            if _is_to_host(func, args, kwargs):
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.zeros(args[0].shape, dtype=dtype)
            if _is_large(func, args, kwargs):
                kwargs = {**kwargs, "device": torch.device("meta"), "pin_memory": False}
                result = func(*args, **_accepted(func, kwargs))
                if self._device.type != "cpu":
                    self.host.adopt(result, "temporaries")
                return result
            elif _is_mixed(args, kwargs):
                args, kwargs = tree_map_only(torch.Tensor, _moved, (args, kwargs))
        result = super()._run(func, args, kwargs)
        if func in _UNINITIALIZED and not result.is_meta:
            result.zero_()
        return result


def _accepted(func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = {argument.name for argument in func._schema.arguments}
    return {name: value for name, value in kwargs.items() if name in names}


def _is_to_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether few values are asked for, as of a status."""
    device = kwargs.get("device")
    return (
        func is aten._to_copy.default
        and device is not None
        and device.type == "cpu"
        and args[0].is_meta
        and args[0].numel() <= HOST_ELEMENTS
    )


def _is_large(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator is to make a tensor on the host that is not made there in earnest."""
    device = kwargs.get("device")
    if device is None or device.type != "cpu":
        return False
    given = [a for a in args if isinstance(a, torch.Tensor)]
    if given:
        return given[0].is_meta or given[0].numel() > HOST_ELEMENTS
    if args and isinstance(args[0], Sequence):
        return math.prod(args[0]) > HOST_ELEMENTS
    numbers = [abs(a) for a in args if isinstance(a, int | float)]
    return (
        math.prod(numbers) > HOST_ELEMENTS if func in _OF_MATRICES else sum(numbers) > HOST_ELEMENTS
    )


def _is_mixed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether tensors on the meta device meet others that are no scalars."""
    meta = host = False
    for tensor in tensors_in(args, kwargs.values()):
        if tensor.is_meta:
            meta = True
        elif tensor.ndim:
            host = True
    return meta and host


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta or not tensor.ndim:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
