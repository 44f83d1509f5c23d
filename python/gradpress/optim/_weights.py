"""Updating weights in place."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from gradpress.nn._weight import QuantizedWeight
from gradpress.ops import lowrank as kernels
from gradpress.ops.runtime import is_emulated

#: Elements of weights that kernels and PyTorch step by turns: little enough to stay in a cache,
#: enough that their pools of threads, which spin for a while after their work, seldom meet.
TOGETHER = 1 << 22
#: Elements of a task that adds an update on the CPU, and columns of one that rounds randomly.
RUN, WIDTH = 1 << 15, 16


def requantize_with_update(
    weight: QuantizedWeight,
    update: torch.Tensor,
    *,
    decay: float,
    rounding: str,
    seed: int,
    tensor_id: int,
    step: int,
    found_inf: torch.Tensor | None = None,
) -> None:
    """``weight = round(weight * (1 - decay) + update)`` for a dense float32 update."""
    shape = (1, weight.numel())
    codes = weight.codes if weight.bits == 4 else weight.codes.view(shape)
    kernels.project_back_requantize(
        [codes],
        [weight.scale],
        [weight.zero_point],
        [shape],
        [update.reshape(shape)],
        [],
        bits=weight.bits,
        group_size=weight.group_size,
        scale=1.0,
        decay=decay,
        stochastic=rounding == "stochastic",
        seed=seed,
        tensor_ids=[tensor_id],
        steps=[step],
        found_inf=found_inf,
    )


def add_update(
    p: torch.Tensor,
    update: torch.Tensor,
    group: dict[str, Any],
    state: dict[str, Any],
    *,
    decay: float,
    found_inf: torch.Tensor | None,
) -> None:
    """``p = round(p * (1 - decay) + update)`` for a float32 update of the parameter's elements.

    Elements that would not be finite stay what they are.
    """
    tensor_id, step = state["tensor_id"], int(state["step"].item())
    if isinstance(p, QuantizedWeight):
        requantize_with_update(
            p,
            update,
            decay=decay,
            rounding=group["weight_rounding"],
            seed=group["seed"],
            tensor_id=tensor_id,
            step=step,
            found_inf=found_inf,
        )
        return
    target = p.detach().contiguous()
    random = group["stochastic_rounding"] and p.dtype == torch.bfloat16
    targets, updates, basis = _divided(target.view(-1), update.view(-1), random)
    kernels.project_back_add(
        targets,
        updates,
        [basis] * len(targets),
        scale=1.0,
        decay=decay,
        stochastic_rounding=random,
        seed=group["seed"],
        tensor_ids=[tensor_id] * len(targets),
        steps=[step] * len(targets),
        found_inf=found_inf,
    )
    if target.data_ptr() != p.data_ptr():
        p.copy_(target)


def _divided(
    target: torch.Tensor, update: torch.Tensor, random: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """A vector and its update as products with a unit matrix, tiled for threads or for blocks.

    Random numbers depend on the place in a tensor, which then has to stay in one piece. A unit
    matrix of more than one row would spread what is not finite.
    """
    one = torch.ones(1, 1, device=target.device)
    if not on_host(target):
        return [target.view(1, -1)], [update.view(1, -1)], one
    if not random:
        pairs = zip(torch.split(target, RUN), torch.split(update, RUN), strict=True)
        runs = [(t.view(1, -1), u.view(1, -1)) for t, u in pairs if t.numel()]
        return [t for t, _ in runs], [u for _, u in runs], one
    tall = target.numel() % WIDTH == 0 and target.numel() >= WIDTH**2
    width = WIDTH if tall and update.sum().isfinite() else 1
    return [target.view(-1, width)], [update.view(-1, width)], torch.eye(width)


# Several weights at a time, on the CPU


def on_host(x: torch.Tensor) -> bool:
    """Whether values of a tensor may be looked at without waiting for a device."""
    return x.device.type == "cpu" and not is_emulated()


def adds_directly(p: torch.Tensor, grad: torch.Tensor, decay: float) -> bool:
    """Whether finite multiples of a gradient can be added to a weight as they are."""
    plain = on_host(p) and not isinstance(p, QuantizedWeight) and p.is_contiguous()
    return plain and p.dtype == grad.dtype == torch.float32 and decay < 1.0


def add_scaled(
    weight: torch.Tensor, grad: torch.Tensor, factor: torch.Tensor, decay: float
) -> None:
    """``weight = weight * (1 - decay) + grad * factor`` for what :func:`adds_directly` is true of.

    Args:
        weight: A matrix; written.
        grad: Of its shape.
        factor: Of its rows or columns, or one number.
        decay: Learning rate times weight decay.
    """
    if decay:
        weight.mul_(1.0 - decay)
    if factor.numel() == 1:
        weight.add_(grad, alpha=float(factor))
    else:
        weight.addcmul_(grad, factor)


def in_turns(params: list[torch.Tensor], steps: Iterable[int]) -> Iterator[slice]:
    """Runs of weights that are in the same step and are stepped together; of one on a device."""
    most = TOGETHER if params and on_host(params[0]) else 0
    first, size = 0, 0
    rows = [(p.numel(), step) for p, step in zip(params, steps, strict=True)]
    for i, ((numel, step), after) in enumerate(itertools.zip_longest(rows, rows[1:])):
        size += numel
        if after is None or size + after[0] > most or step != after[1]:
            yield slice(first, i + 1)
            first, size = i + 1, 0
