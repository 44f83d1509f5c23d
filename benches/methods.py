"""The optimizers that the training benchmarks compare, all over the same two groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import gradpress
from gradpress.train.optimizer import split_parameters

#: Steps between refreshes, where a method has them: several in a run of a few hundred steps.
GAP = 50

Parameters = list[torch.nn.Parameter]
Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """One optimizer with its settings.

    Attributes:
        name: In tables and figures.
        make: From the groups to the optimizer.
        rates: Peak learning rates of the matrices that are tried.
        low_rank: Options of the matrices' group besides the rank; None does not project.
        weight_bits: Of the matrices, or None.
        normalized: Whether the matrices become weight-normalized first.
    """

    name: str
    make: Make
    rates: tuple[float, ...]
    low_rank: dict[str, Any] | None = None
    weight_bits: int | None = None
    normalized: bool = False

    def prepare(self, model: torch.nn.Module, rank: int) -> torch.optim.Optimizer:
        """Changes a model as the method needs it, and makes its optimizer with two groups.

        Rates are set before every step.
        """
        chosen = ["attn", "mlp"]
        if self.weight_bits is not None:
            gradpress.nn.quantize_(model, bits=self.weight_bits, target_modules=chosen)
        if self.normalized:
            gradpress.nn.weight_normalize_(model, target_modules=chosen)
            groups = gradpress.optim.gradnormlorp_groups(model, rank, verbose=False)
            matrices, rest = ([p for _, p in group["params"]] for group in groups)
        else:
            matrices, rest = split_parameters(model)
        return self.make(self._groups(matrices, rest, rank))

    def _groups(self, matrices: Parameters, rest: Parameters, rank: int) -> list[dict[str, Any]]:
        first: dict[str, Any] = {"params": matrices}
        if self.low_rank is not None:
            first |= {"rank": rank, **self.low_rank}
        return [first, {"params": rest}]


def _ours(name: str, **options: Any) -> Make:
    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        chosen: Any = getattr(gradpress.optim, name)
        optimizer: torch.optim.Optimizer = chosen(
            groups, **{"lr": 1e-3, "weight_decay": 0.0, **options}
        )
        return optimizer

    return make


def _torch(name: str) -> Make:
    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        chosen: Any = getattr(torch.optim, name)
        optimizer: torch.optim.Optimizer = chosen(groups, weight_decay=0.0)
        return optimizer

    return make


_ADAM = (3e-4, 1e-3, 3e-3)
_SCALED = (3e-3, 1e-2, 3e-2)
_QUARTER: dict[str, Any] = {"scale": 0.25, "update_proj_gap": GAP}
_WHOLE: dict[str, Any] = {"scale": 1.0, "update_proj_gap": GAP}
_ADAFACTOR = {"beta1": 0.9, "relative_step": False, "scale_parameter": False}

METHODS = [
    Method("torch AdamW", _torch("AdamW"), _ADAM),
    Method("AdamW8bit", _ours("AdamW8bit"), _ADAM),
    Method("AdamW4bit", _ours("AdamW4bit"), _ADAM),
    Method("GaLoreAdamW", _ours("GaLoreAdamW"), _SCALED, _QUARTER),
    Method("GaLoreAdamW, rotating", _ours("GaLoreAdamW", moments="rotate"), _SCALED, _QUARTER),
    Method("QGaLoreAdamW, INT8 weights", _ours("QGaLoreAdamW"), _SCALED, _QUARTER, 8),
    Method("Apollo", _ours("Apollo"), _SCALED, _WHOLE),
    Method("ApolloMini", _ours("ApolloMini"), _SCALED, {"update_proj_gap": GAP}),
    Method("Fira", _ours("Fira"), _SCALED, _QUARTER),
    Method("SubTrack", _ours("SubTrack"), _SCALED, _QUARTER),
    Method("LDAdamW", _ours("LDAdamW"), _ADAM, {}),
    Method("GradNormLoRP", _ours("GradNormLoRP"), _SCALED, _QUARTER, normalized=True),
    Method("GaLoreAdafactor", _ours("GaLoreAdafactor", **_ADAFACTOR), _SCALED, _QUARTER),
    Method("DiffGrad", _ours("DiffGrad"), _ADAM),
    Method("AdamP", _ours("AdamP"), _ADAM),
]


def set_rates(optimizer: torch.optim.Optimizer, rates: tuple[float, float]) -> None:
    """Sets the learning rates of both groups."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
