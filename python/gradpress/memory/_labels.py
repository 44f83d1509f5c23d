"""Telling an accountant what tensors are: weights, gradients, states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from gradpress.memory._accountant import Accountant, Logits
from gradpress.memory._count import tensors_of
from gradpress.optim._sharded import local

#: Attributes of optimizers whose tensors are known otherwise.
_KNOWN = frozenset(("state", "param_groups", "defaults"))


class Labels:
    """Names the tensors of a model and its optimizer, at the start and as they come.

    Args:
        accountant: Is told.
        model: Its gradients are named as they are accumulated.
        optimizer: Its states are named around each of its steps.
    """

    def __init__(
        self,
        accountant: Accountant,
        model: nn.Module | None,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self._accountant = accountant
        self._model = model
        self._optimizer = optimizer
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Names what exists, and what will come until `detach`."""
        self.update()
        if self._model is not None:
            for p in self._model.parameters():
                if p.requires_grad and p.is_leaf:
                    hook: Any = p.register_post_accumulate_grad_hook
                    self._handles.append(_first(p, hook(self._grad)))
        if self._optimizer is not None:
            self._handles.append(self._optimizer.register_step_pre_hook(self._step))
            self._handles.append(self._optimizer.register_step_post_hook(self._step))

    def detach(self) -> None:
        """Leaves model and optimizer as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def update(self) -> None:
        """Names what exists now."""
        if self._model is not None:
            for category, tensor in tensors_of(self._model, None):
                self._accountant.adopt(local(tensor), category)
        self._update_optimizer()

    def _update_optimizer(self) -> None:
        if self._optimizer is None:
            return
        parameters = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for tensor in _beside_states(self._optimizer):
            if id(tensor) not in parameters:
                # Counters stand beside the states too.
                category = "accumulators" if tensor.ndim > 1 else "optimizer_states"
                self._accountant.adopt(local(tensor), category)
        for category, tensor in tensors_of(nn.Module(), self._optimizer):
            self._accountant.adopt(local(tensor), category)

    def _grad(self, p: torch.Tensor) -> None:
        if p.grad is not None:
            self._accountant.adopt(local(p.grad), "gradients")

    def _step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._update_optimizer()


def logits_of(model: nn.Module, rows: int | None = None) -> Logits | None:
    """How the logits of a language model are recognized; None where it has no output head."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if callable(get_output_embeddings) else None
    weight = getattr(head, "weight", None)
    return None if weight is None else Logits(int(weight.shape[0]), rows)


def _first(p: torch.Tensor, handle: Any) -> Any:
    """Puts a hook before others, which may consume the gradient."""
    hooks = getattr(p, "_post_accumulate_grad_hooks", None)
    if hooks is not None:
        hooks.move_to_end(handle.id, last=False)
    return handle


def _beside_states(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Tensors that an optimizer holds in attributes of its own."""
    # The groups stand in many places, with all the parameters.
    seen = {id(group) for group in optimizer.param_groups}
    for name, value in vars(optimizer).items():
        if name not in _KNOWN:
            yield from _tensors_in(value, seen)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors in containers, and in objects of the optimizers' own classes."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, dict):
        inner: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple | set):
        inner = value
    elif type(value).__module__.startswith("gradpress.optim") and hasattr(value, "__dict__"):
        inner = vars(value).values()
    else:
        return
    if id(value) not in seen:
        seen.add(id(value))
        for part in inner:
            yield from _tensors_in(part, seen)
