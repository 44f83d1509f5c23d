"""Who takes the factors of a weight's gradient in place of the gradient."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

#: Takes the weight, the gradient of a layer's output ``[tokens, m]`` and its input ``[tokens, n]``.
Receiver = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

_RECEIVERS: Any = WeakTensorKeyDictionary()


def receive_gradients(weight: torch.Tensor, method: Receiver) -> None:
    """Hands the factors of a weight's gradient to a method, as long as its object lives.

    The gradient itself is not formed then, and ``weight.grad`` stays None.

    Args:
        weight: A parameter that holds a :class:`QuantizedWeight`.
        method: A bound method; called in every backward pass, once for each use of the weight.
    """
    _RECEIVERS[weight] = weakref.WeakMethod(method)


def forget_receiver(weight: torch.Tensor) -> None:
    """The weight's gradient is formed again."""
    _RECEIVERS.pop(weight, None)


def collector_of(weight: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
    """What takes the factors of this weight's gradient; None where the gradient is formed."""
    reference = _RECEIVERS.get(weight)
    method = None if reference is None else reference()
    return None if method is None else functools.partial(method, weight)
