"""What a plan is made for: a model that exists, or one that is described."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from gradpress.memory._on_meta import copy_on_meta

#: An optimizer, or what makes it of a model: a class that takes its parameters, or a callable.
OptimizerLike: TypeAlias = (
    "torch.optim.Optimizer | type[torch.optim.Optimizer]"
    " | Callable[[nn.Module], torch.optim.Optimizer]"
)


def subject(
    model: Any, optimizer: OptimizerLike | None, dtype: torch.dtype | None
) -> tuple[nn.Module, torch.optim.Optimizer, list[torch.Tensor]]:
    """Model and optimizer on the meta device, which nobody else has, and states on the host.

    Raises:
        TypeError: `model` or `optimizer` is nothing that this is made of.
        ValueError: there is no built-in size of this name.
    """
    if isinstance(model, nn.Module):
        given = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        built, copied, offloaded = copy_on_meta(model, given)
        if dtype is not None:
            raise TypeError("memory.plan: dtype is for models that are described, not for modules")
        return built, copied or _make(optimizer, built), offloaded
    if isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "memory.plan: optimizer must be a class or a callable where model is a description, got"
            f" an instance of {type(optimizer).__name__}"
        )
    return *_described(model, optimizer, dtype), []


def _described(
    model: Any, optimizer: OptimizerLike | None, dtype: torch.dtype | None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    from gradpress.train import SIZES, TrainConfig

    if isinstance(model, str):
        if model not in SIZES:
            raise ValueError(
                f"memory.plan: model must be a size among {', '.join(SIZES)}, got {model!r}"
            )
        name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
        model, dtype = TrainConfig.create(size=model, dtype=name), None
    if isinstance(model, TrainConfig):
        from gradpress.train.model import build_model
        from gradpress.train.optimizer import build_optimizer, quantize_weights

        with torch.device("meta"):
            built = build_model(model)
        if dtype is not None:
            built.to(dtype)
        quantize_weights(built, model)
        if optimizer is None:
            return built, build_optimizer(built, model)
        return built, _make(optimizer, built)
    if not hasattr(model, "to_dict") or not hasattr(model, "model_type"):
        raise TypeError(
            "memory.plan: model must be a module, the name of a built-in size, a TrainConfig or a"
            f" configuration of transformers, got {type(model).__name__}"
        )
    import transformers

    with torch.device("meta"):
        maker: Any = transformers.AutoModelForCausalLM
        made = cast(nn.Module, maker.from_config(model))
    made.train()
    if dtype is not None:
        made.to(dtype)
    return made, _make(optimizer, made)


def _make(optimizer: OptimizerLike | None, model: nn.Module) -> torch.optim.Optimizer:
    if isinstance(optimizer, type):
        made: Any = optimizer(model.parameters())
    elif callable(optimizer):
        made = optimizer(model)
    else:
        raise TypeError(
            "memory.plan: optimizer must be an optimizer, a class of one, or a callable that makes"
            f" one of the model, got {type(optimizer).__name__}"
        )
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            f"memory.plan: optimizer made {type(made).__name__}, which is no torch.optim.Optimizer"
        )
    return made
