"""Modules with a weight, as matrices with a row for each output and a column for each input."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradpress.nn._select import Targets, select_modules

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def version_of(x: torch.Tensor) -> int:
    """Counts the writes into a tensor's memory, where PyTorch does."""
    return 0 if x.is_inference() else x._version


@dataclass(frozen=True)
class Layer:
    """One module that is compressed.

    Attributes:
        name: Its qualified name.
        module: A Linear, a convolution, or a `Conv1D` of transformers (a Linear whose weight is
            stored as ``[inputs, outputs]``).
    """

    name: str
    module: nn.Module

    @property
    def weight(self) -> torch.Tensor:
        """The module's own weight."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach()

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as ``[rows, columns]``, in the same memory."""
        if _is_transposed(self.module):
            return self.weight.T
        return self.weight.reshape(self.rows, self.columns)

    @property
    def rows(self) -> int:
        """Outputs."""
        return int(self.weight.shape[1 if _is_transposed(self.module) else 0])

    @property
    def columns(self) -> int:
        """Inputs of one output."""
        if _is_transposed(self.module):
            return int(self.weight.shape[0])
        return math.prod(self.weight.shape[1:])

    @property
    def takes_inputs(self) -> bool:
        """Whether every row sees the same inputs: not so in a convolution of several groups."""
        return getattr(self.module, "groups", 1) == 1

    @torch.no_grad()
    def write(self, matrix: torch.Tensor) -> None:
        """Writes ``[rows, columns]`` into the weight."""
        if _is_transposed(self.module):
            self.weight.copy_(matrix.T)
        else:
            self.weight.copy_(matrix.reshape(self.weight.shape))

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """What a call was given, as ``[samples, ..., columns]``."""
        if isinstance(self.module, _CONVOLUTIONS):
            return _patches(self.module, x)
        return x

    def grad_outputs(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of a call's result, as ``[samples, ..., rows]``."""
        if isinstance(self.module, _CONVOLUTIONS):
            return _batched(self.module, grad).flatten(2).transpose(1, 2)
        return grad


def select_layers(op: str, model: nn.Module, targets: Targets) -> list[Layer]:
    """The layers that a recipe is meant for, in the model's order.

    Raises:
        ValueError: nothing matches, or a weight that does cannot be compressed.
    """
    layers: list[Layer] = []
    with contextlib.suppress(ValueError):  # nothing matches
        chosen = select_modules(model, targets, _is_layer)
        layers = [Layer(name, module) for name, module in chosen.items()]
    if not layers:
        every = [name for name, module in model.named_modules() if _is_layer(module)]
        raise ValueError(
            f"{op}: modules must match a layer of the model, got {targets!r}; it has {every}"
        )
    owners: dict[int, str] = {}
    for layer in layers:
        weight = layer.module.weight
        if weight is not layer.module._parameters.get("weight"):
            raise ValueError(
                f"{op}: weight of {layer.name} must be a parameter of its module, got one that is"
                " computed, by a parametrization, say; remove that first"
            )
        if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
            raise ValueError(
                f"{op}: weight of {layer.name} must be a parameter of dtype float32, float16 or"
                f" bfloat16, got {type(weight).__name__} of {weight.dtype}"
            )
        if weight.is_meta:
            raise ValueError(f"{op}: weight of {layer.name} must hold values, got a meta tensor")
        other = owners.setdefault(id(weight), layer.name)
        if other != layer.name:
            raise ValueError(
                f"{op}: modules must not name two layers of one weight, got {other} and"
                f" {layer.name}"
            )
    return layers


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or _is_transposed(
        module
    )


def _batched(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Inputs or outputs of a convolution, with the first dimension that a single one may lack."""
    return x.unsqueeze(0) if x.ndim == len(module.kernel_size) + 1 else x


def _patches(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What a convolution multiplies with its weights: ``[samples, places, columns]``."""
    x = _batched(module, x)
    sides = module._reversed_padding_repeated_twice
    if module.padding != "valid":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, sides, mode=mode)
    for axis, (size, step, gap) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        reach = gap * (size - 1) + 1
        x = x.unfold(axis, reach, step)[..., ::gap]
    spatial = len(module.kernel_size)
    # [samples, channels, places..., kernel...] -> [samples, places, channels * kernel]
    axes = [0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial)]
    x = x.permute(axes)
    places = math.prod(x.shape[1 : 1 + spatial])
    return x.reshape(len(x), places, math.prod(x.shape[1 + spatial :]))
