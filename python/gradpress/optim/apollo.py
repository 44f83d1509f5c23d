"""APOLLO and APOLLO-Mini: learning rates of channels or tensors, from random projections.

Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang, Lee: "APOLLO: SGD-like Memory, AdamW-level
Performance" (2024, arXiv 2412.05270), with the norm-growth limiter of Chen et al.: "Fira" (2024,
arXiv 2410.01623). Original implementation: zhuhanqing/APOLLO (apollo_torch). Differences: the
projection is never stored, and is the same on all devices; the limiter ignores updates that are
zero; moments are float32 or integer codes whatever the gradient's dtype; defaults that PyTorch's
AdamW has too are PyTorch's (the original's: ``eps=1e-6, weight_decay=0.0``).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from gradpress.ops import lowrank as kernels
from gradpress.optim import _projector as projector
from gradpress.optim._adam import AdamHyper, Batch, new_moments, released_form, step_directions
from gradpress.optim._base import Group, State, plain_gradient
from gradpress.optim._gaussian import gaussian
from gradpress.optim._limiter import (
    TINY,
    limit_together,
    long_side,
    norms_along,
    scaled,
    told_norms,
    total_norm,
)
from gradpress.optim._projected import ProjectedOptimizer, check_options
from gradpress.optim._report import ProjectorRow
from gradpress.optim._scaling import Scale
from gradpress.optim._weights import add_scaled, add_update, adds_directly, in_turns, on_host
from gradpress.optim.adamw8bit import AdamW8bit


class Apollo(ProjectedOptimizer):
    r"""SGD whose learning rate is scaled, channel by channel, as Adam would on a random sketch.

    For a weight of a group with `rank` set, with gradient G (m x n, m <= n; transposed otherwise)
    and a random r x m matrix P with independent entries of variance 1/r:

    .. math::
        R = P G, \quad \tilde R = \frac{M(R)}{\sqrt{V(R)} + \epsilon}, \quad
        s_j = \frac{\lVert\tilde R_{:,j}\rVert}{\lVert R_{:,j}\rVert + 10^{-8}}, \\
        \tilde U = \mathrm{limit}(G\,\mathrm{diag}(s)), \qquad
        W \leftarrow \Big(W - \eta\,\frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}
            \sqrt{\alpha}\,\tilde U\Big)(1 - \eta\lambda)

    where `limit` lets the update's norm grow by a factor of at most `norm_growth` a step. P is
    drawn anew every `update_proj_gap` steps, and is no part of the state. All other parameters
    take the rule of :class:`AdamW8bit`. Weights quantized by :func:`gradpress.nn.quantize_` are
    updated in place with stochastic rounding (the paper's Q-APOLLO). Takes a float32 copy of one
    update at a time, but for float32 weights on the CPU.

    Args:
        params: Parameters or groups, as :func:`gradpress.optim.param_groups` makes them. Every
            option below may stand in a group.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment, before its bias is corrected.
        weight_decay: Decoupled decay, times the learning rate; of projected weights after the
            step.
        rank: Rows of the sketch; None does not project. Clamped to the weight's shorter side.
            Tensors of order above 2 are taken as (first dimension, all others); those below 2 are
            not projected.
        update_proj_gap: Steps for which a projection stays.
        scale: The square of a factor on the update (the paper's alpha).
        scale_type: ``"channel"``: a factor for each row or column of the longer side;
            ``"tensor"``: one for the whole weight.
        scale_front: Apply `scale` before the limiter.
        norm_growth: The limiter's gamma; None does not limit.
        state_bits: 32 for float32 moments, 8 or 4.
        **options: Those of :class:`AdamW8bit`.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> groups = gradpress.optim.param_groups(model, rank=16, verbose=False)
        >>> optimizer = gradpress.optim.Apollo(groups, lr=1e-2)
        >>> model(torch.randn(4, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.refresh_counts()
        {'0.weight': 1}
    """

    _KEEP_DTYPE: ClassVar[frozenset[str]] = AdamW8bit._KEEP_DTYPE | {"update_norm"}

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
        scale: float = 1.0,
        scale_type: str = "channel",
        scale_front: bool = False,
        norm_growth: float | None = 1.01,
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
            scale_type=scale_type,
            scale_front=scale_front,
            norm_growth=norm_growth,
            state_bits=state_bits,
            **options,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_options(
            group,
            scale=group["scale"] >= 0,
            scale_type=group["scale_type"] in ("channel", "tensor"),
            norm_growth=group["norm_growth"] is None or group["norm_growth"] >= 1,
        )

    def _new_state(self, group: Group, p: torch.Tensor, state: State, offset: int) -> None:
        shape = projector.matrix_shape(p)
        state["projector_rank"] = min(group["rank"], *shape)
        low_rank = kernels.projected_shape(*shape, state["projector_rank"])
        new_moments(state, low_rank, p.device, group)
        state["update_norm"] = torch.zeros((), dtype=torch.float32, device=p.device)

    def _step_matrices(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        hyper = AdamHyper.of(group, scale)
        steps = (int(self.state[p]["step"].item()) for p in params)
        for run in in_turns(params, steps):
            self._step_together(group, params[run], hyper)

    def _step_together(self, group: Group, params: list[torch.Tensor], hyper: AdamHyper) -> None:
        """Steps matrices that are in the same step."""
        states, decay = [self.state[p] for p in params], hyper.lr * hyper.weight_decay
        grads = [plain_gradient(p).view(projector.matrix_shape(p)) for p in params]
        step = int(states[0]["step"].item())
        size = math.sqrt(1.0 - hyper.beta2**step) / (1.0 - hyper.beta1**step)
        factors = self._factors(group, states, grads, hyper, size)
        root = math.sqrt(group["scale"])
        rate = (1.0 if hyper.maximize else -1.0) * hyper.lr * size * root * (1.0 - decay)
        front = root if group["scale_front"] else 1.0
        told: list[torch.Tensor | None] = [None] * len(params)
        if on_host(grads[0]) and hyper.found_inf is None:
            told = told_norms(grads, factors, None, abs(rate))
        updates = {i: scaled(grads[i], factors[i]) for i, norm in enumerate(told) if norm is None}
        norms = [total_norm(updates[i]) if norm is None else norm for i, norm in enumerate(told)]
        limits = limit_together(
            [front * norm for norm in norms], states, group["norm_growth"], hyper.found_inf
        )
        for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
            change = limits[i] * rate
            if i not in updates and adds_directly(p, grad, decay):
                add_scaled(p.detach().view(grad.shape), grad, factors[i] * change, decay)
                continue
            whole = i in updates
            update = updates[i].mul_(change) if whole else scaled(grad, factors[i] * change)
            add_update(p, update, group, states[i], decay=decay, found_inf=hyper.found_inf)

    def _factors(
        self,
        group: Group,
        states: list[State],
        grads: list[torch.Tensor],
        hyper: AdamHyper,
        size: float,
    ) -> list[torch.Tensor]:
        """Steps the sketches' moments.

        Returns:
            What every row or column of each gradient is multiplied by, but for the step `size`.
        """
        sketches = self._sketches(group, states, grads)
        alongs = [long_side(grad.shape) for grad in grads]
        before = [norms_along(*pair) for pair in zip(sketches, alongs, strict=True)]
        # Adam's direction times -size: signs do not matter to a norm.
        unit = hyper._replace(lr=1.0, weight_decay=0.0)
        unit = released_form(unit, int(states[0]["step"].item()))
        step_directions(Batch(sketches, sketches, states), unit, self._counter(grads[0].device))
        after = [norms_along(*pair) for pair in zip(sketches, alongs, strict=True)]
        if group["scale_type"] == "tensor":
            before, after = ([total_norm(x) for x in norms] for norms in (before, after))
        return [
            a / size / (b / hyper.grad_scale + TINY) / hyper.grad_scale
            for a, b in zip(after, before, strict=True)
        ]

    def _sketches(
        self, group: Group, states: list[State], grads: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The gradients times the random matrices of this step."""
        device = grads[0].device
        bases, sketches = [], []
        for state, grad in zip(states, grads, strict=True):
            rows, columns = grad.shape
            bases.append(self._projection(group, state, min(rows, columns), device))
            shape = kernels.projected_shape(rows, columns, state["projector_rank"])
            sketches.append(torch.empty(shape, dtype=torch.float32, device=device))
        kernels.project(grads, bases, sketches)
        return sketches

    def _projection(
        self, group: Group, state: State, length: int, device: torch.device
    ) -> torch.Tensor:
        """The random matrix of this step, transposed: ``[length, rank]``."""
        rank = state["projector_rank"]
        draw = _draws(state, group) - 1
        basis = gaussian(
            (length, rank),
            seed=group["seed"],
            tensor_id=state["tensor_id"],
            draw=draw,
            device=device,
        )
        return basis.mul_(rank**-0.5)

    def _report_row(self, name: str, p: torch.Tensor, state: State, group: Group) -> ProjectorRow:
        return ProjectorRow(
            name=name,
            shape=tuple(p.shape),
            rank=state["projector_rank"],
            steps=int(state["step"].item()),
            refreshes=_draws(state, group),
            interval=group["update_proj_gap"],
            energy=math.nan,
        )


class ApolloMini(Apollo):
    """APOLLO with a sketch of one row, and one learning rate for each weight.

    Its state is two numbers for each row or column of a weight's longer side. See
    :class:`Apollo`, which this is with other defaults: ``rank=1, scale=128.0,
    scale_type="tensor"``. The paper recommends ``scale_front=True`` for small models.

    Args:
        params: Parameters or groups, as :func:`gradpress.optim.param_groups` makes them.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment, before its bias is corrected.
        weight_decay: Decoupled decay, times the learning rate.
        rank: Rows of the sketch; None does not project. By default every tensor of two dimensions
            or more is projected.
        scale: The square of a factor on the update.
        scale_type: ``"tensor"`` or ``"channel"``.
        **options: Those of :class:`Apollo`.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> optimizer = gradpress.optim.ApolloMini(model.parameters(), lr=1e-2)
        >>> model(torch.randn(4, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model[0].weight]["exp_avg"].shape
        torch.Size([64, 1])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | None = 1,
        scale: float = 128.0,
        scale_type: str = "tensor",
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=rank,
            scale=scale,
            scale_type=scale_type,
            **options,
        )


def _draws(state: State, group: Group) -> int:
    """How many projections there were, with that of the last step."""
    return int(-(-state["step"].item() // group["update_proj_gap"]))
