"""Optimizers of a run, all with the same two groups of parameters."""

from __future__ import annotations

from typing import Any

import torch

from gradpress.train.config import TrainConfig


def split_parameters(
    model: torch.nn.Module,
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Divides the parameters as Q-GaLore does, whatever the optimizer.

    Args:
        model: A transformer with modules named `...attn...` and `...mlp...`.

    Returns:
        The weights of Linear modules in attention and MLP, and all other parameters.
    """
    chosen = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ("attn" in name or "mlp" in name)
    }
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if id(parameter) in chosen]
    return matrices, [parameter for parameter in parameters if id(parameter) not in chosen]


def quantize_weights(model: torch.nn.Module, config: TrainConfig) -> None:
    """Turns the attention and MLP matrices into INT8, where the run asks for it."""
    if config.weight_bits is not None:
        from gradpress import nn

        nn.quantize_(
            model,
            bits=config.weight_bits,
            group_size=config.weight_group_size,
            target_modules=["attn", "mlp"],
        )


def build_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The run's optimizer over all parameters.

    Group 0 holds the attention and MLP matrices at `config.lr`, group 1 the rest at
    `config.lr_rest`.

    Args:
        model: The model, quantized already where that is asked for.
        config: The run.

    Returns:
        The optimizer; `set_learning_rates` sets its rates before every step.
    """
    matrices, rest = split_parameters(model)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": config.lr},
        {"params": rest, "lr": config.lr_rest},
    ]
    common: dict[str, Any] = {
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **common)

    from gradpress import optim

    if config.optimizer == "adamw8bit":
        return optim.AdamW8bit(
            groups, weight_rounding=config.weight_rounding, seed=config.seed, **common
        )
    groups[0].update(
        rank=config.rank,
        update_proj_gap=config.update_proj_gap,
        scale=config.scale,
        projector_bits=config.projector_bits,
        cos_threshold=config.cos_threshold,
        gamma_proj=config.gamma_proj,
        queue_size=config.queue_size,
        stagger=config.stagger,
        weight_rounding=config.weight_rounding,
        materialize_gradients=config.memory != "least",
        accumulation_steps=config.accumulate,
    )
    return optim.QGaLoreAdamW(groups, state_bits=config.state_bits, seed=config.seed, **common)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, config: TrainConfig, multiplier: float
) -> None:
    """Sets both groups' learning rates to their peaks times `multiplier`."""
    for group, peak in zip(optimizer.param_groups, (config.lr, config.lr_rest), strict=True):
        group["lr"] = peak * multiplier


def refresh_count(optimizer: torch.optim.Optimizer) -> int:
    """Projector refreshes so far, over all matrices; 0 for an optimizer without projectors."""
    counts = getattr(optimizer, "refresh_counts", None)
    return 0 if counts is None else sum(counts().values())
