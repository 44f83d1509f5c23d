"""Copies of models and optimizers on the meta device, where nothing is allocated."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn

from gradpress.nn._weight import QuantizedWeight
from gradpress.optim._base import LowBitOptimizer
from gradpress.optim._fused_backward import FusedBackward

PairT = TypeVar("PairT")


def copy_on_meta(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[nn.Module, torch.optim.Optimizer | None, list[torch.Tensor]]:
    """Copies of both that belong together, without gradients; the originals stay untouched.

    Hooks on parameters come along, with copies of what they are bound to, and so do steps in the
    backward pass.

    Args:
        model: On any device.
        optimizer: Has its parameters.

    Returns:
        The copies, and copies of states that are on the host while their parameters are not.
    """
    memo: dict[int, Any] = {}
    originals = list({id(t): t for t in _tensors(model, optimizer)}.values())
    for tensor in originals:
        memo[id(tensor)] = _like(tensor)
    pair = copy.deepcopy((model, optimizer), memo)
    for tensor in originals:
        _carry_attributes(tensor, memo)
    _step_in_backward(optimizer, pair[1])
    return *pair, [memo[id(tensor)] for tensor in _offloaded(optimizer)]


def _step_in_backward(
    optimizer: torch.optim.Optimizer | None, copied: torch.optim.Optimizer | None
) -> None:
    """Switches on what :func:`gradpress.optim.fused_backward` has switched on."""
    if not isinstance(optimizer, LowBitOptimizer) or not isinstance(copied, LowBitOptimizer):
        return
    for hook in optimizer._optimizer_step_pre_hooks.values():
        fused = getattr(hook, "__self__", None)
        if isinstance(fused, FusedBackward):
            FusedBackward(copied, fused._accumulation_steps, fused._max_grad_norm)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[torch.Tensor]:
    for module in model.modules():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        yield from group["params"]
    yield from (value for _, value in _states(optimizer))


def _states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for p, state in optimizer.state.items():
        for value in state.values():
            # Those of one element are counters, whose values steps may ask for.
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                yield p, value


def _offloaded(optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    states = () if optimizer is None else _states(optimizer)
    return [value for p, value in states if value.device.type == "cpu" != p.device.type]


def _like(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach()
    if isinstance(plain, QuantizedWeight):
        parts = [torch.empty_like(part, device="meta") for part in plain.parts.values()]
        plain = plain._with_parts(parts)
    else:
        plain = torch.empty_like(plain, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(plain, requires_grad=tensor.requires_grad)
    return plain.requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _carry_attributes(tensor: torch.Tensor, memo: dict[int, Any]) -> None:
    target = cast(torch.Tensor, memo[id(tensor)])
    for name, value in vars(tensor).items():
        if name not in vars(target):
            setattr(target, name, copy.deepcopy(value, memo))
    hooks = getattr(tensor, "_post_accumulate_grad_hooks", None)
    for hook in (hooks or {}).values():
        if isinstance(getattr(hook, "__self__", None), FusedBackward):
            continue
        target.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            copy.deepcopy(hook, memo)
        )
