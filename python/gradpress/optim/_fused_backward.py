"""Stepping while the gradients are computed, so that they never exist all at once."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from gradpress._handle import Handle
from gradpress.optim._base import Group, LowBitOptimizer
from gradpress.optim._scaling import Scale
from gradpress.optim._sharded import is_fully_sharded

#: As in `torch.nn.utils.clip_grad_norm_`.
NORM_EPSILON = 1e-6


class FusedBackward(Handle):
    """What :func:`fused_backward` switched on; `remove` switches it off.

    Also a context manager that does so at its end.
    """

    def __init__(
        self, optimizer: LowBitOptimizer, accumulation_steps: int, max_grad_norm: float | None
    ) -> None:
        self._optimizer = optimizer
        self._accumulation_steps = accumulation_steps
        self._max_grad_norm = max_grad_norm
        self._passes = 0
        self._in_pass = False
        self._squares: dict[torch.device, torch.Tensor] = {}
        self._norm: torch.Tensor | None = None
        self._groups: dict[torch.Tensor, Group] = {}
        self._handles: list[Any] = []
        self._nodes: list[Any] = []  # which would not outlive a backward pass by themselves
        self._attach()
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The norm of all gradients of the last whole step, on their device; None before it.

        Only where `max_grad_norm` is given.
        """
        return self._norm

    @grad_norm.setter
    def grad_norm(self, norm: torch.Tensor) -> None:
        """The norm that the next step is clipped by, as a run that is resumed had it."""
        self._norm = norm

    def remove(self) -> None:
        """Gradients stay again, for `step` to use. Those of a step half done stay too."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach(self) -> None:
        """Watches parameters that are new to the optimizer."""
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if p not in self._groups and p.requires_grad:
                    self._watch(p)
                self._groups[p] = group

    def _watch(self, p: torch.Tensor) -> None:
        if p not in getattr(self._optimizer, "_factored", {}):
            handle = p.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            self._handles.append(handle)
            return
        # Where no gradient is formed there is nothing to accumulate: what runs when all uses of the
        # weight are through is the node that would.
        node = torch.autograd.graph.get_gradient_edge(p).node
        self._nodes.append(node)

        def arrived(_gradients: Any) -> None:
            if self._optimizer._has_gradient(p):
                self._arrived(p)

        self._handles.append(node.register_prehook(arrived))

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, options: Any) -> None:
        self._attach()
        if self._passes % self._accumulation_steps:
            raise RuntimeError(
                f"fused_backward: step was called after {self._passes} of"
                f" {self._accumulation_steps} backward passes (accumulation_steps)"
            )

    def _arrived(self, p: torch.Tensor) -> None:
        """A parameter's gradient of this pass is there."""
        if not self._in_pass:
            self._in_pass = True
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end_of_pass)
            self._attach()  # a state that was loaded came with new groups
        if (self._passes + 1) % self._accumulation_steps == 0:
            self._step(p)

    def _step(self, p: torch.Tensor) -> None:
        with torch.no_grad():
            optimizer = self._optimizer
            optimizer._check_gradients([p])
            scale = Scale()
            if self._max_grad_norm is not None:
                square = optimizer._gradient_square(p)
                sums = self._squares.get(p.device)
                self._squares[p.device] = square if sums is None else sums + square
                scale = Scale(tensor=self._divisor(p.device))
            optimizer._step_params(self._groups[p], [p], scale)
            p.grad = None

    def _divisor(self, device: torch.device) -> torch.Tensor | None:
        """What brings gradients of the last step's norm down to the largest that is allowed."""
        if self._norm is None or self._max_grad_norm is None:
            return None
        ratio = (self._norm + NORM_EPSILON) / self._max_grad_norm
        return ratio.clamp(min=1.0).to(device, non_blocking=True).reshape(1)

    def _end_of_pass(self) -> None:
        self._in_pass = False
        self._passes += 1
        if self._passes % self._accumulation_steps:
            return
        self._passes = 0
        # Parameters that had a gradient in an earlier pass of the step only.
        for p in self._groups:
            if self._optimizer._has_gradient(p):
                self._step(p)
        if self._squares:
            sums = list(self._squares.values())
            total = sums[0] + sum(
                (s.to(sums[0].device) for s in sums[1:]), torch.zeros_like(sums[0])
            )
            self._norm = total.sqrt()
            self._squares = {}


def fused_backward(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
) -> FusedBackward:
    """Makes `loss.backward()` step each parameter as soon as its gradient is there, and drop it.

    The gradients of a model then never exist all at once. The training loop stays as it is:
    `optimizer.step()` finds nothing left to do, schedulers and `zero_grad` work as ever.

    Args:
        model: Every trainable parameter has to belong to `optimizer`, embeddings and norms too.
        optimizer: One of this package's.
        accumulation_steps: Backward passes that make up a step. Gradients stay until the last of
            them, in which they go one by one.
        max_grad_norm: Clips by the norm of all gradients of the *previous* step, since this step's
            is known only when it is over; the first step is not clipped.

    Returns:
        A handle with `remove()` and the last step's `grad_norm`.

    Raises:
        TypeError: `optimizer` is another package's, or `model` averages gradients in a way that
            comes too late (`DistributedDataParallel`, `fully_shard`).
        ValueError: A trainable parameter is not in `optimizer`, or an argument is out of range.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
        >>> optimizer = gradpress.optim.AdamW8bit(model.parameters())
        >>> handle = gradpress.optim.fused_backward(model, optimizer)
        >>> model(torch.randn(4, 8)).square().sum().backward()
        >>> [p.grad for p in model.parameters()]
        [None, None, None, None]
        >>> handle.remove()
    """
    if not isinstance(optimizer, LowBitOptimizer):
        raise TypeError(
            "fused_backward: optimizer must be one of gradpress.optim, got"
            f" {type(optimizer).__name__}"
        )
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise TypeError(
            "fused_backward: model must not be DistributedDataParallel, which averages gradients"
            " after they have been used; pass gradients over ranks by other means"
        )
    if is_fully_sharded(model):
        raise TypeError(
            "fused_backward: model must not be sharded by fully_shard, which hands gradients over"
            " when the backward pass is done; call optimizer.step() as ever"
        )
    if accumulation_steps < 1:
        raise ValueError(
            f"fused_backward: accumulation_steps must be at least 1, got {accumulation_steps}"
        )
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"fused_backward: max_grad_norm must be positive, got {max_grad_norm}")
    known = set(itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups))
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p not in known]
    if missing:
        raise ValueError(f"fused_backward: optimizer must have every parameter, lacks {missing}")
    return FusedBackward(optimizer, accumulation_steps, max_grad_norm)
