"""Adam moments in 4, 8 or 32 bits, and the calls that step a list of tensors with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from gradpress.ops import dynamic
from gradpress.ops import optim as kernels
from gradpress.optim._scaling import Scale

State = dict[str, Any]

CODES = ("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale")
FLOATS = ("exp_avg", "exp_avg_sq")


class AdamHyper(NamedTuple):
    """The numbers of one Adam step that a whole list of tensors shares.

    With `on_device` the kernels read the steps, and `rate` unless it is None, where the tensors
    are; where there is a `rate`, `lr` is not a number.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    grad_scale: float | torch.Tensor
    found_inf: torch.Tensor | None
    stochastic_rounding: bool
    seed: int
    state_bits: int
    block_size: int
    on_device: bool = False
    rate: torch.Tensor | None = None

    @classmethod
    def of(cls, group: dict[str, Any], scale: Scale) -> AdamHyper:
        """The numbers of a parameter group."""
        beta1, beta2 = group["betas"]
        return cls(
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            grad_scale=scale.factor,
            found_inf=scale.found_inf,
            stochastic_rounding=group["stochastic_rounding"],
            seed=group["seed"],
            state_bits=group["state_bits"],
            block_size=state_block_size(group),
        )

    @classmethod
    def on(cls, device: torch.device, group: dict[str, Any], scale: Scale) -> AdamHyper:
        """The numbers of a group that is `capturable`, of which the host reads none on a device."""
        lr = group["lr"]
        if not isinstance(lr, torch.Tensor) or lr.device.type == "cpu" != device.type:
            return cls.of(group, scale)._replace(on_device=True)
        rate = lr.detach().to(device, torch.float32, non_blocking=True)
        return cls.of({**group, "lr": math.nan}, scale)._replace(on_device=True, rate=rate)


def released_form(hyper: AdamHyper, step: int) -> AdamHyper:
    """The numbers with which the kernels compute what the code of GaLore, APOLLO and Fira does.

    Epsilon is added to the root of the second moment before its bias is corrected, and the decay
    comes after the step: ``p = (p - a * m / (sqrt(v) + eps)) * (1 - lr * weight_decay)`` with
    ``a = lr * sqrt(1 - beta2**step) / (1 - beta1**step)``.
    """
    keep = 1.0 - hyper.lr * hyper.weight_decay or 1e-30
    return hyper._replace(
        eps=hyper.eps / math.sqrt(1.0 - hyper.beta2**step),
        lr=hyper.lr * keep,
        weight_decay=hyper.weight_decay / keep,
    )


def state_block_size(group: dict[str, Any]) -> int:
    """Elements of a moment that share a scale."""
    size = group["block_size"]
    return int(size) if size is not None else dynamic.BLOCK_SIZES.get(group["state_bits"], 256)


def new_moments(
    state: State, shape: Sequence[int], device: torch.device, group: dict[str, Any]
) -> None:
    """Adds zero moments to a state: codes, or float32 for 32 bits and small tensors."""
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        new_moment(state, name, shape, device, group, signed=signed)


def new_moment(
    state: State,
    name: str,
    shape: Sequence[int],
    device: torch.device,
    group: dict[str, Any],
    *,
    signed: bool,
) -> None:
    """Adds one zero moment: `name` in float32, or ``{name}_codes`` and ``{name}_scale``."""
    bits, numel = group["state_bits"], math.prod(shape)
    if bits == 32 or numel < group["min_8bit_size"]:
        state[name] = torch.zeros(tuple(shape), dtype=torch.float32, device=device)
        return
    blocks = -(-numel // state_block_size(group))
    stored = dynamic.stored_shape(tuple(shape), bits)
    zero = dynamic.zero_byte(signed=signed, bits=bits)
    state[f"{name}_codes"] = torch.full(stored, zero, dtype=torch.uint8, device=device)
    state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=device)


class Batch(NamedTuple):
    """Tensors that are stepped in one call, in parallel lists.

    Attributes:
        targets: Parameters, or float32 gradients that become updates.
        grads: The parameters' gradients; the targets themselves when those are gradients.
        states: The optimizer's state of each.
    """

    targets: list[torch.Tensor]
    grads: list[torch.Tensor]
    states: list[State]


def step_parameters(batch: Batch, hyper: AdamHyper, nonfinite: torch.Tensor) -> None:
    """Steps parameters in place: AdamW of Loshchilov and Hutter, arithmetic in float32."""
    for names, chosen in _by_precision(batch):
        call = kernels.adamw_blockwise_step if names is CODES else kernels.adamw_step
        call(
            chosen.targets,
            chosen.grads,
            *([s[name] for s in chosen.states] for name in names),
            **_shared(names, chosen, hyper, nonfinite),
            tensor_ids=[s["tensor_id"] for s in chosen.states],
            weight_decay=hyper.weight_decay,
            stochastic_rounding=hyper.stochastic_rounding,
            seed=hyper.seed,
        )


def step_directions(
    batch: Batch, hyper: AdamHyper, nonfinite: torch.Tensor, friction: str | None = None
) -> None:
    """Turns gradients (float32 `targets`) into Adam's update, minus the learning rate, in place.

    With a `friction` the update is diffGrad's, and the states hold a ``previous_grad``.
    """
    for names, chosen in _by_precision(batch):
        call = kernels.adamw_blockwise_direction if names is CODES else kernels.adamw_direction
        previous = None if friction is None else [s["previous_grad"] for s in chosen.states]
        call(
            chosen.targets,
            *([s[name] for s in chosen.states] for name in names),
            **_shared(names, chosen, hyper, nonfinite),
            previous_grads=previous,
            friction=friction,
        )


def _by_precision(batch: Batch) -> list[tuple[tuple[str, ...], Batch]]:
    """The tensors whose moments are codes, and those whose moments are floats."""
    result: list[tuple[tuple[str, ...], Batch]] = []
    for names in (CODES, FLOATS):
        rows = [row for row in zip(*batch, strict=True) if names[0] in row[2]]
        if rows:
            result.append((names, Batch(*(list(column) for column in zip(*rows, strict=True)))))
    return result


def _shared(
    names: tuple[str, ...], batch: Batch, hyper: AdamHyper, nonfinite: torch.Tensor
) -> dict[str, Any]:
    shared = {
        "steps": [s["step"] if hyper.on_device else int(s["step"].item()) for s in batch.states],
        "nonfinite": nonfinite,
        "lr": hyper.lr if hyper.rate is None else hyper.rate,
        "beta1": hyper.beta1,
        "beta2": hyper.beta2,
        "eps": hyper.eps,
        "maximize": hyper.maximize,
        "grad_scale": hyper.grad_scale,
        "found_inf": hyper.found_inf,
    }
    if names is FLOATS:
        return shared
    return {**shared, "bits": hyper.state_bits, "block_size": hyper.block_size}
