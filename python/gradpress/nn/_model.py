"""Turning a model's weights into integers and back, and saving them as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from gradpress.nn._select import Targets, select_linear
from gradpress.nn._weight import QuantizedWeight

ModelT = TypeVar("ModelT", bound=nn.Module)


def quantize_(
    model: ModelT, bits: int = 8, group_size: int = 256, target_modules: Targets = None
) -> ModelT:
    """Stores the weights of a model's Linear modules as integers that can be trained, in place.

    Each weight becomes a parameter that holds a :class:`QuantizedWeight`: integer codes with a
    scale and a zero point for every group, rounded to nearest. To the rest of the program it
    looks like the floating-point parameter it was. Optimizers of :mod:`gradpress.optim` update
    the codes in place with stochastic rounding, so that no floating-point copy is kept: the
    weights of Q-GaLore (Zhang et al. 2024, arXiv 2407.08296, section 3.4).

    Args:
        model: Changed in place. Call this before the optimizer is made.
        bits: 8 or 4 bits per weight.
        group_size: Consecutive elements (along the rows) that share a scale.
        target_modules: None or ``"all-linear"``: every Linear module but the output head and
            shared weights; otherwise names, parts of names or regular expressions.

    Returns:
        The model itself.

    Raises:
        ValueError: no module matches, or a weight holds NaN or infinite values; the model is
            unchanged then.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> gradpress.nn.quantize_(model)[0].weight
        QuantizedWeight(shape=[64, 64], dtype=float32, bits=8, group_size=256, requires_grad=True)
    """
    chosen = select_linear(model, target_modules)
    quantized = {
        name: QuantizedWeight.from_float(module.weight, bits=bits, group_size=group_size)
        for name, module in chosen.items()
        if not isinstance(module.weight, QuantizedWeight)
    }
    for name, weight in quantized.items():
        module = chosen[name]
        module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    return model


def dequantize_(model: ModelT) -> ModelT:
    """Turns every quantized weight of a model back into a dense parameter, in place.

    Args:
        model: Changed in place; other parameters stay what they are.

    Returns:
        The model itself.
    """
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, QuantizedWeight):
                dense = nn.Parameter(weight.dequantize(), requires_grad=weight.requires_grad)
                setattr(module, name, dense)
    return model


def flatten_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state as plain tensors only, fit for safetensors.

    A quantized weight ``"a.weight"`` gives ``"a.weight.codes"``, ``"a.weight.scale"`` and
    ``"a.weight.zero_point"``; everything else stands under its own name.
    """
    flat: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, QuantizedWeight):
            flat.update({f"{name}.{part}": t.detach() for part, t in value.parts.items()})
        else:
            flat[name] = value
    return flat


def load_flat_state_dict_(model: nn.Module, flat: Mapping[str, torch.Tensor]) -> None:
    """Loads what :func:`flatten_state_dict` returned, bit for bit, in place.

    Args:
        model: A model of the same structure, quantized in the same way.
        flat: The tensors by name.

    Raises:
        ValueError: names or shapes differ; the model is unchanged then.
    """
    own = flatten_state_dict(model)
    missing, unknown = sorted(own.keys() - flat.keys()), sorted(flat.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"load_flat_state_dict_: flat must hold exactly the model's tensors; missing {missing},"
            f" unknown {unknown}"
        )
    for name, target in own.items():
        got, want = flat[name], target
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ValueError(
                f"load_flat_state_dict_: {name} must be {want.dtype} of shape {list(want.shape)},"
                f" got {got.dtype} of shape {list(got.shape)}"
            )
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(flat[name])
