"""The parameters of a model by the names that they have in its modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class Place(NamedTuple):
    """Where a parameter stands; a shared one stands in several places.

    Attributes:
        name: Its qualified name, as if it were not parametrized.
        module: The module that has it.
        attribute: Its name there.
        parameter: The parameter itself; of a parametrized one, the one that is trained.
        parametrized: Whether the module computes what it uses from it.
    """

    name: str
    module: nn.Module
    attribute: str
    parameter: torch.Tensor
    parametrized: bool

    @property
    def value(self) -> torch.Tensor:
        """What the module computes with."""
        return getattr(self.module, self.attribute).detach()  # type: ignore[no-any-return]


def places(model: nn.Module) -> Iterator[Place]:
    """Every place of every parameter, in the order of the modules."""
    for prefix, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        start = f"{prefix}." if prefix else ""
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield Place(start + attribute, module, attribute, parameter, False)
        if parametrize.is_parametrized(module):
            lists: Any = module.parametrizations
            for attribute, computed in lists.items():
                original = next(computed.parameters(recurse=False), None)
                if original is not None:
                    yield Place(start + attribute, module, attribute, original, True)


def prunable(model: nn.Module) -> list[Place]:
    """The first place of every parameter that pruning is for.

    These are the floating-point parameters of two or more dimensions that no embedding has: the
    weights of linear layers and convolutions, not biases and norms.
    """
    everywhere = list(places(model))
    embedded = {id(p.parameter) for p in everywhere if isinstance(p.module, _EMBEDDINGS)}
    chosen: dict[int, Place] = {}
    for place in everywhere:
        parameter = place.parameter
        if id(parameter) in embedded or parameter.ndim < 2 or not parameter.is_floating_point():
            continue
        chosen.setdefault(id(parameter), place)
    return list(chosen.values())
