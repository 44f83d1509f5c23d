"""Activation checkpointing of a model's repeated blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradpress._handle import Handle


class _Checkpointed:
    """A block's forward that keeps its inputs and is computed again in the backward pass."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        functools.update_wrapper(self, forward, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


class CheckpointedBlocks(Handle):
    """What :func:`checkpoint_blocks_` switched on; `remove` switches it off.

    Also a context manager that does so at its end.

    Attributes:
        blocks: The modules whose activations are computed again; empty where the model of
            transformers chose them itself.
    """

    def __init__(self, blocks: Sequence[nn.Module], switch_off: Callable[[], None]) -> None:
        self.blocks = tuple(blocks)
        self._switch_off: Callable[[], None] | None = switch_off

    def remove(self) -> None:
        """Activations are kept again."""
        if self._switch_off is not None:
            self._switch_off()
            self._switch_off = None


def checkpoint_blocks_(
    model: nn.Module, *, blocks: Sequence[nn.Module] | None = None
) -> CheckpointedBlocks:
    """Computes the activations of a model's repeated blocks again in the backward pass, in place.

    Between forward and backward only the inputs of each block are kept (Chen, Xu, Zhang, Guestrin:
    "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv 1604.06174), for about a third more
    arithmetic. Gradients are the same, dropout included. Models of transformers use their own
    switch (in training mode only, as ever); of others the modules of the longest `ModuleList` are
    taken, or of the longest `Sequential` of modules of one class.

    Args:
        model: Any module.
        blocks: The modules instead, each of which is then a segment of its own.

    Returns:
        A handle with `remove()`.

    Raises:
        ValueError: `model` has no repeated blocks, or `blocks` is empty or not in it.

    Example:
        >>> import torch, gradpress
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32)
        >>> model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        >>> handle = gradpress.nn.checkpoint_blocks_(model)
        >>> len(handle.blocks)
        3
        >>> model(torch.randn(5, 1, 16)).square().sum().backward()
        >>> handle.remove()
    """
    if blocks is None and _has_own_switch(model):
        return _use_own_switch(model)
    chosen = _repeated_blocks(model) if blocks is None else list(dict.fromkeys(blocks))
    inside = {id(module) for module in model.modules()}
    if not chosen or any(id(block) not in inside for block in chosen):
        raise ValueError("checkpoint_blocks_: blocks must be modules of model, at least one")
    before = [(block, block.__dict__.get("forward")) for block in chosen]
    for block in chosen:
        block.forward = _Checkpointed(block.forward)
    return CheckpointedBlocks(chosen, functools.partial(_restore, before))


def _restore(before: list[tuple[nn.Module, Any]]) -> None:
    for block, forward in before:
        if forward is None:
            del block.forward
        else:
            block.forward = forward


def _has_own_switch(model: nn.Module) -> bool:
    return getattr(model, "supports_gradient_checkpointing", False) is True


def _use_own_switch(model: Any) -> CheckpointedBlocks:
    options = {"use_reentrant": False}
    was_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    # The later name; the earlier one warns where there are both.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        switch_off = model.activation_checkpointing_disable
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        switch_off = model.gradient_checkpointing_disable
    return CheckpointedBlocks((), (lambda: None) if was_on else switch_off)


def _repeated_blocks(model: nn.Module) -> list[nn.Module]:
    stacks = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not stacks:
        sequences = [list(m) for m in model.modules() if isinstance(m, nn.Sequential)]
        stacks = [s for s in sequences if len(s) > 1 and len({type(block) for block in s}) == 1]
    if not stacks:
        raise ValueError(
            "checkpoint_blocks_: model must have a ModuleList, or a Sequential of modules of one"
            f" class, got {type(model).__name__}; name the modules by blocks"
        )
    return max(stacks, key=len)
