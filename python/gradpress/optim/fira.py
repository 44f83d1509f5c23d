"""Fira: low-rank AdamW, and what the subspace leaves out scaled to match.

Chen, Feng, Li, Lai, Yue, Yuan, Wang: "Fira: Can We Achieve Full-rank Training of LLMs Under
Low-rank Constraint?" (2024, arXiv 2410.01623). Original implementation: xichen-fy/Fira
(fira_torch). Differences: the update is the paper's unless `reference` asks for the released
code's; the weight decay comes before the step; the subspace comes from a randomized iteration with
canonical signs; the limiter ignores residuals that are zero; moments are float32 or integer codes
whatever the gradient's dtype; defaults that PyTorch's AdamW has too are PyTorch's (the original's:
``eps=1e-6, weight_decay=0.0``).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from gradpress.ops import lowrank as kernels
from gradpress.optim import _projector as projector
from gradpress.optim._adam import AdamHyper, Batch, released_form, step_directions
from gradpress.optim._base import Group, State
from gradpress.optim._limiter import TINY, limit_growth, norms_along, total_norm
from gradpress.optim._projected import check_options
from gradpress.optim._subspace import Row, SubspaceOptimizer
from gradpress.optim._weights import add_update


class Fira(SubspaceOptimizer):
    r"""GaLore's AdamW, plus the rest of the gradient with its norms scaled as Adam scaled them.

    For a weight of a group with `rank` set, with gradient G (m x n, m <= n; rows and columns
    change places otherwise):

    .. math::
        R = P^\top G, \quad N = \mathrm{Adam}(R), \quad
        \phi_j = \frac{\lVert N_{:,j}\rVert}{\lVert R_{:,j}\rVert + 10^{-8}}, \\
        S = \mathrm{limit}\big((G - P R)\,\mathrm{diag}(\phi)\big), \qquad
        W \leftarrow (1 - \eta\lambda) W - \eta\alpha (P N + S)

    where `limit` lets the norm of S grow by a factor of at most `norm_growth` a step. P holds the
    leading singular directions of the gradient at the last refresh, as for
    :class:`GaLoreAdamW`. All other parameters take the rule of :class:`AdamW8bit`. Weights
    quantized by :func:`gradpress.nn.quantize_` are updated in place with stochastic rounding.
    Takes a float32 copy of one update at a time.

    Args:
        params: Parameters or groups, as :func:`gradpress.optim.param_groups` makes them. Every
            option below may stand in a group.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, times the learning rate, before the step.
        rank: Directions kept; None does not project. Clamped to the weight's shorter side.
            Tensors of order above 2 are taken as (first dimension, all others); those below 2 are
            not projected.
        update_proj_gap: Steps between refreshes.
        scale: Factor on the update (the paper's alpha).
        proj_type: ``"std"``: the projector stands on the side of the shorter dimension.
        projector_bits: None for float32, 8 or 4 bits for the projector's entries.
        projector_group_size: Entries of an integer projector that share a scale.
        stagger: Spread the refreshes of the layers over the interval.
        norm_growth: The limiter's gamma; None does not limit.
        reference: The released code's form for projected weights: `scale` multiplies P N, and the
            part P R that is taken off the gradient, but not the residual; epsilon is added, and
            norms are taken, before the bias correction; the decay comes after the step.
        state_bits: 32 for float32 moments, 8 or 4.
        **options: Those of :class:`AdamW8bit`.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> groups = gradpress.optim.param_groups(model, rank=8, verbose=False)
        >>> optimizer = gradpress.optim.Fira(groups, lr=1e-2)
        >>> model(torch.randn(4, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.refresh_counts()
        {'0.weight': 1}
    """

    _KEEP_DTYPE: ClassVar[frozenset[str]] = SubspaceOptimizer._KEEP_DTYPE | {"update_norm"}

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
        projector_bits: int | None = None,
        projector_group_size: int = 256,
        stagger: bool = False,
        norm_growth: float | None = 1.01,
        reference: bool = False,
        state_bits: int = 32,
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
            stagger=stagger,
            norm_growth=norm_growth,
            reference=reference,
            state_bits=state_bits,
            **options,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_options(group, norm_growth=group["norm_growth"] is None or group["norm_growth"] >= 1)

    def _new_state(self, group: Group, p: torch.Tensor, state: State, offset: int) -> None:
        super()._new_state(group, p, state, offset)
        state["update_norm"] = torch.zeros((), dtype=torch.float32, device=p.device)

    def _step_projected(
        self,
        group: Group,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        hyper: AdamHyper,
    ) -> None:
        rows = self._project(group, params, grads)
        for row, grad in zip(rows, grads, strict=True):
            self._step_row(group, row, grad, hyper)

    def _step_row(self, group: Group, row: Row, grad: torch.Tensor, hyper: AdamHyper) -> None:
        p, state, shape, low_rank = row
        alpha, step = group["scale"], int(state["step"].item())
        keep, size, unit = 1.0, 1.0, hyper._replace(lr=1.0, weight_decay=0.0, maximize=False)
        share = 1.0  # of the projected part, that is taken off the gradient
        if group["reference"]:
            size = math.sqrt(1.0 - hyper.beta2**step) / (1.0 - hyper.beta1**step)
            unit, share = released_form(unit, step), alpha
            keep = 1.0 - hyper.lr * hyper.weight_decay
        residual = grad.to(torch.float32, copy=True)
        self._add_projected(group, state, residual, low_rank, -share)
        along = 1 if shape[0] >= shape[1] else 0
        before = norms_along(low_rank, along) / hyper.grad_scale
        # Adam's direction times -size: signs do not matter to a norm.
        step_directions(Batch([low_rank], [low_rank], [state]), unit, self._counter(p.device))
        factors = norms_along(low_rank, along) / size / (before + TINY)
        residual.mul_(factors / hyper.grad_scale).nan_to_num_(0.0, 0.0, 0.0)
        limit = limit_growth(
            total_norm(residual), state["update_norm"], group["norm_growth"], hyper.found_inf
        )
        sign = -1.0 if hyper.maximize else 1.0
        rate = sign * hyper.lr * keep
        residual.mul_(limit * (-rate * (size if group["reference"] else alpha)))
        self._add_projected(group, state, residual, low_rank, rate * alpha)
        add_update(
            p,
            residual,
            group,
            state,
            decay=hyper.lr * hyper.weight_decay,
            found_inf=hyper.found_inf,
        )

    def _add_projected(
        self,
        group: Group,
        state: State,
        matrix: torch.Tensor,
        low_rank: torch.Tensor,
        factor: float,
    ) -> None:
        """``matrix += factor * back(low_rank)``."""
        kernels.project_back_add(
            [matrix],
            [low_rank],
            projector.bases_of([state], group),
            scale=factor,
            tensor_ids=[state["tensor_id"]],
            steps=[int(state["step"].item())],
        )
