"""Which Linear modules of a model are meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from torch import nn

Targets: TypeAlias = "str | Sequence[str] | None"


def select_linear(model: nn.Module, target_modules: Targets = None) -> dict[str, nn.Linear]:
    """The Linear modules of a model that are to be compressed, by qualified name.

    Args:
        model: Any module.
        target_modules: None or ``"all-linear"``: every ``nn.Linear`` but the output head (what
            ``model.get_output_embeddings()`` returns, or a module named ``lm_head``) and those
            whose weight is shared with another module. Otherwise one string or several: a module
            is meant when its qualified name contains one of them, or matches it as a regular
            expression.

    Raises:
        ValueError: `target_modules` was given and matches no Linear module.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if target_modules is None or target_modules == "all-linear":
        left_out = _left_out(model)
        return {name: m for name, m in linear.items() if id(m.weight) not in left_out}
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    chosen = {
        name: module
        for name, module in linear.items()
        if any(target in name or re.fullmatch(target, name) for target in targets)
    }
    if not chosen:
        raise ValueError(
            f"target_modules must match a Linear module of the model, got {target_modules!r};"
            f" it has {sorted(linear)}"
        )
    return chosen


def _left_out(model: nn.Module) -> set[int]:
    """Weights of the head, and weights that several modules share, by identity."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    shared = {key for key, count in owners.items() if count > 1}
    heads = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] == "lm_head"]
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if callable(get_output_embeddings):
        heads.append(get_output_embeddings())
    return shared | {id(m.weight) for m in heads if isinstance(m, nn.Linear)}
