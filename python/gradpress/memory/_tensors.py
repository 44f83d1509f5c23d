"""Tensors among arguments, what they are made of, and the categories they count in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

#: What is live, in the order of tables.
CATEGORIES = (
    "weights",
    "weight_scales",
    "buffers",
    "projectors",
    "optimizer_states",
    "gradients",
    "accumulators",
    "activations",
    "logits",
    "temporaries",
)


def tensors_in(*groups: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among arguments or results of an operator, in lists and tuples too."""
    for group in groups:
        for value in group:
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, list | tuple):
                yield from tensors_in(value)


def plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors without further ones inside that hold a tensor's values."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    inner = (getattr(tensor, name) for name in flatten()[0])
    return [part for t in inner if t is not None for part in plain_parts(t)]


def in_order(totals: dict[str, int]) -> dict[str, int]:
    """What is not zero, in the order of tables."""
    return {name: totals[name] for name in CATEGORIES if totals.get(name)}
