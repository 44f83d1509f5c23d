"""diffGrad: Adam whose step shrinks where the gradient hardly changes.

Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri: "diffGrad: An Optimization Method for
Convolutional Neural Networks" (IEEE TNNLS 31(11), 2020, arXiv 1909.11015). Original
implementation: shivram1987/diffGrad. Differences: the earlier gradient is a copy, where the
original's first version keeps the gradient tensor itself, which the next backward pass overwrites;
eps stands beside the corrected root as in the paper, with the original's place as an option;
moments take 8 bits and the earlier gradient 16 by default.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from gradpress.optim._adam import CODES, FLOATS, AdamHyper, State, new_moments
from gradpress.optim._base import Group
from gradpress.optim._elementwise import ElementwiseOptimizer, Row, step_adam, step_of
from gradpress.optim._scaling import Scale

VARIANTS = ("abs", "signed", "wide")


class DiffGrad(ElementwiseOptimizer):
    r"""Adam with a friction: each element's step is scaled by how much its gradient changed.

    .. math::
        \xi_t &= \frac{1}{1 + e^{-|g_{t-1} - g_t|}}, \qquad g_0 = 0 \\
        p_t &= p_{t-1} - \eta\, \xi_t\, \frac{m_t / (1-\beta_1^t)}
            {\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    The factor is one half where the gradient stays the same and approaches one where it changes
    much. Moments, arithmetic and rounding are those of :class:`AdamW8bit`; the state
    ``previous_grad`` holds the earlier gradient. An element whose gradient is NaN or infinite keeps
    its parameter and its state, and is counted (:attr:`nonfinite_gradients`).

    Args:
        params: Tensors, named tensors, or dicts of parameter groups. Any option below but the
            flags may stand in a group.
        lr: Learning rate; a number or a tensor of one element.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Coupled decay (L2): times the parameter it is part of the gradient, also in
            the difference.
        variant: The factor: ``"abs"`` as above; ``"signed"``, the paper's DFC1, without the
            magnitude, :math:`1 / (1 + e^{-(g_{t-1} - g_t)})`, from 0 to 1; ``"wide"``, its DFC2,
            :math:`9 / (1 + e^{-|g_{t-1} - g_t| / 2}) - 4`, from 0.5 to 5.
        reference: Adds eps where the original implementation does, to the root of the second
            moment before it is corrected for its bias.
        previous_grad_bits: 16 (bfloat16) or 32 for the earlier gradient; None takes 32 where the
            moments are float32, and 16 elsewhere.
        **options: `maximize`, `foreach`, `fused`, `capturable`, `differentiable`, `block_size`,
            `min_8bit_size`, `state_bits`, `stochastic_rounding`, `weight_rounding` and `seed`, as
            in :class:`AdamW8bit`; ``state_bits=32`` is the paper's precision.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Linear(128, 128)
        >>> optimizer = gradpress.optim.DiffGrad(model.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 128)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["previous_grad"].dtype
        torch.bfloat16
    """

    _KEEP_DTYPE: ClassVar[frozenset[str]] = frozenset((*CODES, *FLOATS, "previous_grad"))
    _STEPS_SHARDS: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        variant: str = "abs",
        reference: bool = False,
        previous_grad_bits: int | None = None,
        **options: Any,
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "variant": variant,
            "reference": reference,
            "previous_grad_bits": previous_grad_bits,
        }
        super().__init__(params, own, **options)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        valid = {"variant": VARIANTS, "previous_grad_bits": (None, 16, 32)}
        for name, values in valid.items():
            if group[name] not in values:
                raise ValueError(f"Invalid {name} value: {group[name]!r}")

    def _new_state(self, group: Group, p: torch.Tensor, state: State) -> None:
        new_moments(state, p.shape, p.device, group)
        bits = group["previous_grad_bits"] or (32 if FLOATS[0] in state else 16)
        dtype = torch.float32 if bits == 32 else torch.bfloat16
        state["previous_grad"] = torch.zeros(p.shape, dtype=dtype, device=p.device)

    def _changes(self, group: Group, rows: list[Row], scale: Scale) -> None:
        if group["weight_decay"]:
            for row in rows:
                row.update.add_(row.weight, alpha=group["weight_decay"])
        hyper = AdamHyper.of(group, scale)
        counter = self._counter(rows[0].p.device)
        if not group["reference"]:
            self._step_together(group, rows, hyper, counter)
            return
        for step in sorted({step_of(row.state) for row in rows}):
            together = [row for row in rows if step_of(row.state) == step]
            eps = hyper.eps / math.sqrt(1 - hyper.beta2**step)
            self._step_together(group, together, hyper._replace(eps=eps), counter)

    def _step_together(
        self, group: Group, rows: list[Row], hyper: AdamHyper, counter: torch.Tensor
    ) -> None:
        updates, states = [row.update for row in rows], [row.state for row in rows]
        step_adam(updates, states, hyper, counter, friction=group["variant"])
