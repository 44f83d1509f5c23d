"""The optimizers that step the parameters of a LLaMA in low-rank subspaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

import gradpress
from benches.gpu_sections.findings import Findings
from benches.harness import peer
from benches.workloads import nbytes, state_bytes

LR, SCALE = 1e-3, 0.25

OURS = "gradpress QGaLoreAdamW, INT8 weights"
OURS_DENSE = "gradpress QGaLoreAdamW, bfloat16 weights"
GALORE = "galore_torch GaLoreAdamW, bfloat16 weights"
GALORE_8BIT = "galore_torch GaLoreAdamW8bit, bfloat16 weights"
FUSED = "torch AdamW(fused=True), bfloat16 weights"

Make = Callable[[nn.Module, int, int], torch.optim.Optimizer]


@dataclass
class Contender:
    """An optimizer on a model of its own.

    Attributes:
        name: Unique in the comparison.
        model: Holds the parameters.
        optimizer: Steps them.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def assign(self, gradients: Sequence[torch.Tensor]) -> None:
        """Hands every parameter its gradient; one peer replaces them in its steps."""
        for p, grad in zip(self.model.parameters(), gradients, strict=True):
            p.grad = grad

    def bytes_held(self) -> tuple[int, int]:
        """Bytes of the weights, and of the states."""
        return nbytes(list(self.model.parameters())), state_bytes(self.optimizer)

    def finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(dense(p).isfinite().all()) for p in self.model.parameters())


def dense(p: torch.Tensor) -> torch.Tensor:
    """The values of a parameter."""
    return p.dequantize() if isinstance(p, gradpress.nn.QuantizedWeight) else p.detach()


def makers(findings: Findings) -> dict[str, Make]:
    """What makes an optimizer from a model, a rank and the steps between refreshes, by name."""
    found: dict[str, Make] = {OURS: partial(_ours, integers=True), OURS_DENSE: _ours}
    if (galore := peer("galore_torch")) is None:
        findings.note("Left out: galore-torch, which is not installed, or lacks bitsandbytes.")
    else:
        options = {"weight_decay": 1e-2, "no_deprecation_warning": True}
        found[GALORE] = partial(_galore, galore.GaLoreAdamW, options)
        found[GALORE_8BIT] = partial(_galore, galore.GaLoreAdamW8bit, {"weight_decay": 1e-2})
    found[FUSED] = _fused
    return found


def _ours(model: nn.Module, rank: int, gap: int, integers: bool = False) -> torch.optim.Optimizer:
    if integers:
        gradpress.nn.quantize_(model)
    # No cosine reaches 2: the interval stays. All refreshes fall on the same step, as the peers'.
    groups = gradpress.optim.param_groups(
        model, rank, gap, SCALE, verbose=False, stagger=False, cos_threshold=2.0
    )
    return gradpress.optim.QGaLoreAdamW(groups, lr=LR)


def _galore(
    make: Callable[..., Any], options: dict[str, Any], model: nn.Module, rank: int, gap: int
) -> torch.optim.Optimizer:
    named = dict(model.named_parameters())
    chosen = gradpress.optim.param_groups(model, 1, verbose=False)
    projected, rest = ([named[name] for name, _ in group["params"]] for group in chosen)
    keys = {"rank": rank, "update_proj_gap": gap, "scale": SCALE, "proj_type": "std"}
    groups = [{"params": projected, **keys}, {"params": rest}]
    optimizer: torch.optim.Optimizer = make(groups, lr=LR, **options)
    arguments: Any = getattr(optimizer, "args", None)
    if arguments is not None:
        # It passes by position what today's bitsandbytes takes for these two.
        arguments.max_unorm, arguments.skip_zeros = 0.0, False
    return optimizer


def _fused(model: nn.Module, rank: int, gap: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


@contextmanager
def instant_subspaces() -> Iterator[None]:
    """Makes `torch.linalg.svd` give unit vectors, at once.

    With them the peers' ordinary steps take as long as with the right ones, and the minutes are
    saved that all their subspaces take.
    """

    def unit_vectors(matrix: torch.Tensor, full_matrices: bool = True) -> tuple[torch.Tensor, ...]:
        rows, columns = matrix.shape
        short = min(rows, columns)
        kind: Any = {"dtype": matrix.dtype, "device": matrix.device}
        u, vh = torch.eye(rows, short, **kind), torch.eye(short, columns, **kind)
        return u, torch.ones(short, **kind), vh

    with mock.patch.object(torch.linalg, "svd", unit_vectors):
        yield
