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
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch.optim.optimizer import ParamsT

from gradpress.ops import lowrank as kernels
from gradpress.optim import _projector as projector
from gradpress.optim._adam import AdamHyper, Batch, released_form, step_directions
from gradpress.optim._base import Group, State
from gradpress.optim._limiter import (
    TINY,
    limit_together,
    long_side,
    norms_along,
    square_sums,
    told_norms,
    total_norm,
)
from gradpress.optim._products import transposed_product
from gradpress.optim._projected import check_options
from gradpress.optim._subspace import Row, SubspaceOptimizer
from gradpress.optim._weights import add_scaled, add_update, adds_directly, in_turns, on_host


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
    Takes a float32 copy of one update at a time, but for float32 weights on the CPU whose residual
    is more than a hundredth of the gradient.

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
        states = self._adam_states(group, params)
        runs: Iterable[slice] = [slice(None)]
        if on_host(params[0]):
            runs = in_turns(params, (int(state["step"].item()) for state in states))
        for run in runs:
            rows = self._project(group, params[run], grads[run])
            direct = []
            for row, grad, state in zip(rows, grads[run], states[run], strict=True):
                if adds_directly(row[0], grad, hyper.lr * hyper.weight_decay):
                    direct.append(((row[0], state, row[2], row[3]), grad))
                else:
                    self._step_row(group, row, grad, hyper)
            if direct:
                chosen, theirs = zip(*direct, strict=True)
                self._step_together(group, list(chosen), list(theirs), hyper)

    def _step_row(self, group: Group, row: Row, grad: torch.Tensor, hyper: AdamHyper) -> None:
        self._step_together(group, [row], [grad], hyper)

    def _step_together(
        self, group: Group, rows: list[Row], grads: list[torch.Tensor], hyper: AdamHyper
    ) -> None:
        """Steps matrices that are in the same step."""
        form = _Form.of(group, hyper, int(rows[0][1]["step"].item()))
        projected = [low_rank.clone() for *_, low_rank in rows]
        factors = self._factors(rows, form, hyper)
        told: list[torch.Tensor | None] = [None] * len(rows)
        if on_host(grads[0]) and hyper.found_inf is None:
            pairs = zip(rows, projected, strict=True)
            taken = [_taken(group, row, part, form.share) for row, part in pairs]
            told = told_norms(grads, factors, taken, abs(form.rest))
        residuals = {
            i: self._residual(group, rows[i], grads[i], projected[i], form.share, factors[i])
            for i, norm in enumerate(told)
            if norm is None
        }
        norms = [total_norm(residuals[i]) if norm is None else norm for i, norm in enumerate(told)]
        states = [state for _, state, *_ in rows]
        limits = limit_together(norms, states, group["norm_growth"], hyper.found_inf)
        direct = []
        for i, (row, grad, limit) in enumerate(zip(rows, grads, limits, strict=True)):
            row[3].mul_(form.inside)
            if i in residuals:
                self._add_whole(group, row, residuals[i].mul_(limit * form.rest), form, hyper)
                continue
            factor = factors[i] * (limit * form.rest)
            row[3].addcmul_(projected[i], factor, value=-form.share)
            if adds_directly(row[0], grad, form.decay):
                direct.append((row, grad, factor))
            else:
                update = grad.to(torch.float32, copy=True).mul_(factor)
                self._add_whole(group, row, update, form, hyper)
        self._add_back({**group, "scale": 1.0}, [row for row, *_ in direct], hyper)
        for (p, *_), grad, factor in direct:
            add_scaled(p.detach().view(grad.shape), grad, factor, 0.0)

    def _add_whole(
        self, group: Group, row: Row, update: torch.Tensor, form: _Form, hyper: AdamHyper
    ) -> None:
        """Adds an update and what is in the subspace to a weight; `update` is overwritten."""
        p, state, _, low_rank = row
        self._add_projected(group, state, update, low_rank, 1.0)
        add_update(p, update, group, state, decay=form.decay, found_inf=hyper.found_inf)

    def _factors(self, rows: list[Row], form: _Form, hyper: AdamHyper) -> list[torch.Tensor]:
        """Turns projected gradients into Adam's directions, times `-size`.

        Returns:
            What every row or column of each gradient is multiplied by.
        """
        low_ranks = [low_rank for *_, low_rank in rows]
        before = [norms_along(row[3], long_side(row[2])) for row in rows]
        states = [state for _, state, *_ in rows]
        counter = self._counter(rows[0][0].device)
        step_directions(Batch(low_ranks, low_ranks, states), form.unit, counter)
        # Signs do not matter to a norm.
        after = [norms_along(row[3], long_side(row[2])) for row in rows]
        return [
            a / form.size / (b / hyper.grad_scale + TINY) / hyper.grad_scale
            for a, b in zip(after, before, strict=True)
        ]

    def _residual(
        self,
        group: Group,
        row: Row,
        grad: torch.Tensor,
        projected: torch.Tensor,
        share: float,
        factor: torch.Tensor,
    ) -> torch.Tensor:
        """A gradient without a share of what lies in the subspace, times factors."""
        residual = grad.to(torch.float32, copy=True)
        self._add_projected(group, row[1], residual, projected, -share)
        return residual.mul_(factor).nan_to_num_(0.0, 0.0, 0.0)

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


class _Form(NamedTuple):
    """The numbers of a step that tell the paper's form from the released code's.

    Attributes:
        unit: What steps the moments, for a learning rate of one.
        size: The bias correction that Adam's directions are times.
        share: Of the projected part of a gradient, that is taken off it.
        inside: What Adam's directions are multiplied by.
        rest: What limited residuals are multiplied by.
        decay: Learning rate times weight decay.
    """

    unit: AdamHyper
    size: float
    share: float
    inside: float
    rest: float
    decay: float

    @classmethod
    def of(cls, group: Group, hyper: AdamHyper, step: int) -> _Form:
        """The numbers of a group."""
        alpha, decay = group["scale"], hyper.lr * hyper.weight_decay
        unit = hyper._replace(lr=1.0, weight_decay=0.0, maximize=False)
        rate = (-1.0 if hyper.maximize else 1.0) * hyper.lr
        if not group["reference"]:
            return cls(unit, 1.0, 1.0, rate * alpha, -rate * alpha, decay)
        size = math.sqrt(1.0 - hyper.beta2**step) / (1.0 - hyper.beta1**step)
        rate *= 1.0 - decay
        return cls(released_form(unit, step), size, alpha, rate * alpha, -rate * size, decay)


def _taken(group: Group, row: Row, projected: torch.Tensor, share: float) -> torch.Tensor:
    """By what a share of the projected part, taken off, reduces the squares of a gradient's norms.

    ``|G|^2 - |G - share P R|^2 = 2 share |R|^2 - share^2 |P R|^2`` with ``R = P^T G``; columns of
    integer projectors are not orthonormal.
    """
    along = long_side(row[2])
    squares = square_sums(projected, along)
    if group["projector_bits"] is None:
        return squares * (share * (2.0 - share))
    basis = projector.load_basis(row[1], row[2], group)
    turned = torch.empty_like(projected)
    kernels.project([projected], [transposed_product(basis, basis)], [turned])
    back = turned.mul_(projected).sum(along, keepdim=True).to(torch.float64)
    return 2.0 * share * squares - share**2 * back
