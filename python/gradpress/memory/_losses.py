"""Forward passes that a plan runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

#: Makes a loss of a model and of int64 token ids ``[batch, sequence + 1]``.
LossFunction: TypeAlias = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def token_loss(logits_dtype: torch.dtype) -> LossFunction:
    """Mean cross-entropy of every token after the first one, the logits converted before."""

    def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        logits = _logits(model(tokens[:, :-1], **_options(model)))
        flat = logits.to(logits_dtype).flatten(0, -2)
        return F.cross_entropy(flat, tokens[:, 1:].flatten())

    return loss


def own_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The loss that a model computes by itself from labels."""
    inputs = tokens[:, :-1]
    loss: torch.Tensor = model(inputs, labels=inputs, **_options(model)).loss
    return loss


def _options(model: nn.Module) -> dict[str, Any]:
    """No cache of keys and values in training, where a model can keep one."""
    names = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in names else {}


def _logits(output: Any) -> torch.Tensor:
    found = getattr(output, "logits", output)
    if not isinstance(found, torch.Tensor):
        raise TypeError(
            "memory.plan: model must return logits or an output that has some, got"
            f" {type(output).__name__}; give a loss of your own"
        )
    return found
