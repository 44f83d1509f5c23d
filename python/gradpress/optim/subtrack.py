"""SubTrack++: low-rank AdamW in a subspace that turns towards the gradients a little at a time.

Rajabi, Nonta, Rambhatla: "SubTrack++: Gradient Subspace Tracking for Scalable LLM Training"
(NeurIPS 2025, arXiv 2502.01586). Original implementation: criticalml-uw/SubTrack. Done as the paper
says, where the original does not: the subspace of a matrix with at least as many rows as columns
turns (the original multiplies that tangent by a matrix of rank x rank that is nearly zero); moments
are turned in the step in which the subspace turns, from the basis before it (there one step too
early, and always from the basis of the first step), and the bias of the second moment is taken from
the number of steps (there it is multiplied by one minus the decay rate at every turn). Differences
by choice: the angle is by default that of the least loss on the geodesic; the first subspace comes
from a randomized iteration; a basis that drifts is made orthonormal again; and those of
:class:`Fira`, of which the rest of the step is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import ParamsT

from gradpress.ops.lowrank import REFRESHED, Refresh, projected_shape
from gradpress.optim import _projector as projector
from gradpress.optim._adam import AdamHyper
from gradpress.optim._base import Group, State
from gradpress.optim._geodesic import descend, orthonormalized
from gradpress.optim._limiter import norms_along
from gradpress.optim._moments import Turn, reset_moments, turn_moments
from gradpress.optim._products import transposed_product
from gradpress.optim._projected import check_options
from gradpress.optim._scaling import Scale
from gradpress.optim._subspace import Row, SubspaceOptimizer
from gradpress.optim.fira import Fira

MOMENTS = ("rotate", "keep", "reset")
#: Steps between the seeds of two beginnings of the moments.
_STRIDE, _SEEDS = 0x9E3779B97F4A7C15, 1 << 64


class Bases(NamedTuple):
    """Those of a subspace before and after a turn, each ``[shorter side, rank]`` in float32."""

    old: torch.Tensor
    new: torch.Tensor

    def turn(self, *, on_rows: bool) -> Turn:
        """How coordinates change; rows of a projected gradient are coordinates, or columns."""
        change = transposed_product(self.new, self.old)
        # No row of a product of orthonormal bases is longer than 1. One of a basis that has lost
        # its directions to rounding may be, and would make the moments grow.
        change /= norms_along(change, 1).clamp(min=1.0)
        return Turn(change, None) if on_rows else Turn(None, change)


class SubTrack(Fira):
    r"""Fira's AdamW in a subspace that follows the gradients along geodesics of the Grassmannian.

    For a weight of a group with `rank` set, with gradient G (m x n, m <= n; rows and columns change
    places otherwise), the subspace is spanned by the orthonormal columns of S: at first the leading
    singular directions of the gradient. Every `update_proj_gap` steps from there it takes one step
    of steepest descent, by rank one, of what it leaves of the gradient:

    .. math::
        A = S^\top G, \quad -2 (G - S A) A^\top \approx \hat u \hat\sigma \hat v^\top, \quad
        S \leftarrow S + \big(S \hat v (\cos\theta - 1) - \hat u \sin\theta\big) \hat v^\top

    with the angle :math:`\theta = \eta\hat\sigma` for a `subspace_lr` of :math:`\eta`, which is the
    paper's formula, and otherwise the angle at which the loss is least,

    .. math::
        \theta = \tfrac12 \mathrm{atan2}\big(\hat\sigma,
            \lVert G^\top S\hat v \rVert^2 - \lVert G^\top \hat u \rVert^2\big).

    In that step the moments are turned by :math:`C = S'^\top S` with LDAdam's rule. What comes then
    in every step is that of :class:`Fira`: Adam in the subspace, and the rest of the gradient with
    its norms scaled alike. All other parameters take the rule of :class:`AdamW8bit`. Weights
    quantized by :func:`gradpress.nn.quantize_` are updated in place with stochastic rounding.

    The state is that of :class:`Fira`; a turn takes no copy of the gradient. A gradient that is
    zero, or NaN or infinite somewhere, turns nothing. After a turn no entry of S'S - I (transposed
    first factor) is larger than 1e-5. Integer projectors are made orthonormal before a turn; of a
    turn that is smaller than half a step of their grid nothing stays, which for a given
    `subspace_lr` may be every turn.

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
        update_proj_gap: Steps between turns.
        scale: Factor on the update.
        subspace_lr: None for the angle of the least loss, which does not depend on the gradient's
            scale. Of a number (the original's scripts: 10; its text: 10000) the angle grows with
            the square of the gradient's norm, without a limit: an angle beyond the least loss makes
            it larger again, and one of more than a full turn is an arbitrary one. 0 keeps the first
            subspace. The scale of a `GradScaler` does not count.
        recovery: Add the rest of the gradient; False is Adam in the subspace alone.
        moments: What a turn does to them: ``"rotate"`` takes them to the new coordinates (Robert et
            al.: "LDAdam", 2024, arXiv 2410.16103); ``"keep"`` leaves them; ``"reset"`` starts anew,
            bias correction included.
        **options: Those of :class:`Fira`. Its `reference` is the form in which the original adds
            the rest of the gradient, and needs `recovery`.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> from gradpress.optim.subtrack import SubTrack
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> groups = gradpress.optim.param_groups(model, rank=8, verbose=False)
        >>> optimizer = SubTrack(groups, lr=1e-2, update_proj_gap=2)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(4, 64)).square().sum().backward()
        ...     optimizer.step()
        >>> optimizer.refresh_counts()
        {'0.weight': 2}
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
        subspace_lr: float | None = None,
        recovery: bool = True,
        moments: str = "rotate",
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
            subspace_lr=subspace_lr,
            recovery=recovery,
            moments=moments,
            **options,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        rate = group["subspace_lr"]
        check_options(
            group,
            subspace_lr=rate is None or 0.0 <= rate < math.inf,
            moments=group["moments"] in MOMENTS,
            reference=group["recovery"] or not group["reference"],
        )

    def _new_state(self, group: Group, p: torch.Tensor, state: State, offset: int) -> None:
        super()._new_state(group, p, state, offset)
        state["moments_start"] = 0

    # Turns

    def _refresh(
        self, group: Group, params: list[torch.Tensor], grads: list[torch.Tensor], scale: Scale
    ) -> None:
        """Finds the first subspaces, and turns those whose turn it is."""
        first, due = [], []
        for p, grad in zip(params, grads, strict=True):
            state = self.state[p]
            if not state["projector_ready"]:
                first.append((p, grad))
            elif projector.is_due(state, int(state["step"].item()) - 1):
                due.append((p, grad))
        super()._refresh(group, [p for p, _ in first], [grad for _, grad in first], scale)
        if group["subspace_lr"] == 0.0 or not due:
            return
        # A turn waits for the device anyway; one of a step that is skipped comes later.
        if scale.found_inf is not None and scale.found_inf.item():
            return
        for p, grad in due:
            bases = self._turn(group, p, grad, float(scale.factor))
            if bases is not None:
                self._move_moments(group, p, bases)

    def _turn(
        self, group: Group, p: torch.Tensor, grad: torch.Tensor, factor: float
    ) -> Bases | None:
        """Turns a subspace towards a gradient that is `factor` times too large."""
        state = self.state[p]
        stored = projector.load_basis(state, projector.matrix_shape(p), group)
        basis = orthonormalized(stored)
        if basis is None:
            return self._find_anew(group, p, grad, stored)
        rate = group["subspace_lr"]
        move = descend(grad, basis, None if rate is None else rate / factor**2)
        if move is None:
            return None
        self._keep_basis(group, p, grad, move.basis)
        self._record(group, state, Refresh(REFRESHED, math.nan, move.energy))
        return Bases(basis, move.basis)

    def _find_anew(
        self, group: Group, p: torch.Tensor, grad: torch.Tensor, old: torch.Tensor
    ) -> Bases | None:
        """Finds a subspace from nothing, one of whose directions was lost to rounding."""
        state, old = self.state[p], old.clone()
        count, state["projector_ready"] = state["projector_refreshes"], 0
        self._refresh_together(group, [(p, grad)])
        state["projector_ready"] = 1
        if state["projector_refreshes"] == count:
            return None
        return Bases(old, projector.load_basis(state, projector.matrix_shape(p), group))

    def _move_moments(self, group: Group, p: torch.Tensor, bases: Bases) -> None:
        """Takes moments to the coordinates of the turned basis, or forgets them."""
        state, shape = self.state[p], projector.matrix_shape(p)
        low_rank = projected_shape(*shape, state["projector_rank"])
        done = int(state["step"].item()) - 1
        if group["moments"] == "reset":
            reset_moments(state, low_rank, group)
            state["moments_start"] = done
        elif group["moments"] == "rotate":
            turn = bases.turn(on_rows=shape[0] < shape[1])
            turn_moments(state, low_rank, turn, done - state["moments_start"], group)

    # Steps

    def _adam_states(self, group: Group, params: list[torch.Tensor]) -> list[State]:
        return [_since_start(state) for state in super()._adam_states(group, params)]

    def _step_projected(
        self,
        group: Group,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        hyper: AdamHyper,
    ) -> None:
        if group["recovery"]:
            super()._step_projected(group, params, grads, hyper)
        else:
            SubspaceOptimizer._step_projected(self, group, params, grads, hyper)

    def _step_row(self, group: Group, row: Row, grad: torch.Tensor, hyper: AdamHyper) -> None:
        p, state, shape, low_rank = row
        if start := state["moments_start"]:
            # The count that Adam begins anew is a key of the weight's rounding, too.
            group = {**group, "seed": (group["seed"] + start * _STRIDE) % _SEEDS}
        super()._step_row(group, (p, _since_start(state), shape, low_rank), grad, hyper)


def _since_start(state: State) -> State:
    """A state as Adam takes it: `step` counts what the moments have seen."""
    start = state["moments_start"]
    return {**state, "step": state["step"] - start} if start else state
