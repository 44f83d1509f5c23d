"""Which modules of a model are meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

from torch import nn

Targets: TypeAlias = "str | re.Pattern[str] | Sequence[str | re.Pattern[str]] | None"


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
    chosen = select_modules(model, target_modules, lambda module: isinstance(module, nn.Linear))
    return cast(dict[str, nn.Linear], chosen)


def select_modules(
    model: nn.Module, targets: Targets, is_meant: Callable[[nn.Module], bool]
) -> dict[str, nn.Module]:
    """The same for modules of other kinds; convolutions only where a target names them.

    Args:
        model: Any module.
        targets: As for :func:`select_linear`; compiled expressions too, which have to be found
            somewhere in the name.
        is_meant: The kinds.

    Raises:
        ValueError: `targets` was given and matches no such module.
    """
    every = {name: module for name, module in model.named_modules() if is_meant(module)}
    if targets is None or targets == "all-linear":
        left_out = _left_out(model)
        return {
            name: module
            for name, module in every.items()
            if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            and id(module.weight) not in left_out
        }
    wanted = [targets] if isinstance(targets, str | re.Pattern) else list(targets)
    chosen = {
        name: module
        for name, module in every.items()
        if any(matches(name, target) for target in wanted)
    }
    if not chosen:
        raise ValueError(
            f"target_modules must match a Linear module of the model, got {targets!r};"
            f" it has {sorted(every)}"
        )
    return chosen


def matches(name: str, target: str | re.Pattern[str]) -> bool:
    """Whether a qualified name contains `target`, or is or contains what it describes."""
    if isinstance(target, re.Pattern):
        return target.search(name) is not None
    return target in name or re.fullmatch(target, name) is not None


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
