"""Q-GaLore: AdamW in quantized low-rank subspaces, on quantized weights.

Zhang, Jaiswal, Yin, Liu, Zhao, Tian, Wang: "Q-GaLore: Quantized GaLore with INT4 Projection and
Layer-Adaptive Low-Rank Gradients" (2024, arXiv 2407.08296), after Zhao et al.: "GaLore" (2024,
arXiv 2403.03507). Original implementation: VITA-Group/Q-GaLore. Differences: projectors take half
a byte per entry; all arithmetic is in float32 with one rounding at the end; the subspace comes
from a randomized, warm-started iteration with canonical signs; refreshes are staggered over the
layers; every parameter is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from gradpress.ops import lowrank as kernels
from gradpress.optim import _projector as projector
from gradpress.optim._base import Group, State
from gradpress.optim._factored import FactoredOptimizer
from gradpress.optim._projected import check_options


class QGaLoreAdamW(FactoredOptimizer):
    r"""AdamW in a low-rank subspace of each weight's gradient, with integer weights and states.

    For a weight of a group with `rank` set, with gradient G (m x n), d = min(m, n):

    .. math::
        R = G P \;(m \ge n) \quad\text{or}\quad R = P^\top G, \qquad
        W \leftarrow \mathrm{round}\big((1 - \eta\lambda) W + \alpha\,
            \mathrm{back}(\mathrm{AdamW}_\eta(R))\big)

    P holds the d x r leading singular directions of a recent gradient in 4 bits, the moments of R
    8 bits each. P is found anew every `update_proj_gap` steps; where the leading direction has
    become stable the interval doubles, layer by layer. All other parameters take the rule of
    :class:`AdamW8bit`. Weights quantized by :func:`gradpress.nn.quantize_` are updated in place
    with stochastic rounding, without a floating-point copy.

    Args:
        params: Parameters or groups, as :func:`gradpress.optim.param_groups` makes them. Every
            option below may stand in a group.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, times the learning rate.
        rank: Directions kept; None does not project. Clamped to the weight's shorter side.
            Tensors of order above 2 are taken as (first dimension, all others); those below 2 are
            not projected.
        update_proj_gap: Steps between refreshes, to begin with.
        scale: Factor on the back-projected update.
        proj_type: ``"std"``: the projector stands on the side of the shorter dimension.
        projector_bits: 4 or 8 bits for the projector's entries; None keeps float32.
        projector_group_size: Entries of the projector that share a scale.
        cos_threshold: Mean cosine of the leading directions of consecutive refreshes from which a
            subspace counts as stable.
        gamma_proj: Factor by which a stable subspace's interval grows.
        queue_size: Cosines in that mean.
        stagger: Spread the refreshes of the layers over the interval.
        materialize_gradients: False computes projected gradients in the backward pass, straight
            from activations: no gradient of a weight's size is ever formed, `p.grad` stays None.
            Weights of groups with `rank` set have to be quantized then. See
            :meth:`clip_grad_norm_` for clipping, and :func:`fused_backward` for stepping in the
            backward pass.
        accumulation_steps: Backward passes that make up a step, where gradients are not formed: a
            new basis is found from all of them together.
        **options: Those of :class:`AdamW8bit`.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> model = gradpress.nn.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 64)))
        >>> groups = gradpress.optim.param_groups(model, rank=8, verbose=False)
        >>> optimizer = gradpress.optim.QGaLoreAdamW(groups, lr=1e-2)
        >>> model(torch.randn(4, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.refresh_counts()
        {'0.weight': 1}
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        projector_bits: int | None = 4,
        projector_group_size: int = 256,
        cos_threshold: float = 0.4,
        gamma_proj: float = 2.0,
        queue_size: int = 5,
        stagger: bool = True,
        materialize_gradients: bool = True,
        accumulation_steps: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            projector_bits=projector_bits,
            projector_group_size=projector_group_size,
            cos_threshold=cos_threshold,
            gamma_proj=gamma_proj,
            queue_size=queue_size,
            stagger=stagger,
            materialize_gradients=materialize_gradients,
            accumulation_steps=accumulation_steps,
            **options,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_options(
            group, gamma_proj=group["gamma_proj"] >= 1, queue_size=group["queue_size"] >= 1
        )

    def _record(self, group: Group, state: State, outcome: kernels.Refresh) -> None:
        projector.record(state, outcome, group)
