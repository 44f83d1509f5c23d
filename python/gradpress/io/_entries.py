"""The tensors of a model or a state dict that are to be stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from gradpress.nn import QuantizedWeight
from gradpress.ops._arrays import dtype_name

#: What the safetensors format calls PyTorch's dtypes.
DTYPE_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


class Entries(NamedTuple):
    """What is to be stored.

    Attributes:
        tensors: The tensors by name, each memory once.
        aliases: The other names, each with the one under which its tensor is stored.
        order: All names, as they stood in the state.
    """

    tensors: dict[str, torch.Tensor]
    aliases: dict[str, str]
    order: list[str]


def collect(op: str, model: nn.Module | Mapping[str, Any]) -> Entries:
    """The tensors of a model's state, checked, in its order.

    Raises:
        TypeError: `model` is neither, or its state holds something that no file can.
        ValueError: a tensor has no values, or a name cannot be used.
    """
    if isinstance(model, nn.Module):
        state: Mapping[str, Any] = model.state_dict()
    elif isinstance(model, Mapping):
        state = model
    else:
        raise TypeError(
            f"{op}: model must be a torch.nn.Module or a state dict, got {type(model).__name__}"
        )
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    kept: dict[Any, str] = {}
    for name, value in state.items():
        _check(op, name, value)
        key = memory_key(value)
        if key is not None and key in kept:
            aliases[name] = kept[key]
            continue
        tensors[name] = value.detach()
        if key is not None:
            kept[key] = name
    return Entries(tensors, aliases, list(state))


def memory_key(tensor: torch.Tensor) -> Any:
    """The same for two tensors that are one in memory; None where there is no memory."""
    if not tensor.numel():
        return None
    if isinstance(tensor, QuantizedWeight):
        return tensor.dtype, *(memory_key(part) for part in tensor.parts.values())
    place = (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
    return (*place, tensor.dtype, tensor.is_conj(), tensor.is_neg())


def _check(op: str, name: Any, value: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{op}: names must be strings, got {name!r}")
    if name == "__metadata__":
        raise ValueError(f'{op}: the name "__metadata__" belongs to the file format')
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if not isinstance(value, QuantizedWeight):
        if type(value) not in (torch.Tensor, nn.Parameter):
            raise TypeError(
                f"{op}: {name} must be a plain tensor or a gradpress.nn.QuantizedWeight, got"
                f" {type(value).__name__}"
            )
        if value.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be strided, got layout {value.layout}")
    if value.is_meta:
        raise ValueError(f"{op}: {name} is on the meta device and has no values")
    if dtype_name(value) not in DTYPE_CODES:
        raise TypeError(f"{op}: {name} has dtype {dtype_name(value)}, which safetensors has not")
