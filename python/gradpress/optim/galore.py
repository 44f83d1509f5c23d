"""GaLore: AdamW in low-rank subspaces of the gradients.

Zhao, Zhang, Chen, Wang, Anandkumar, Tian: "GaLore: Memory-Efficient LLM Training by Gradient
Low-Rank Projection" (2024, arXiv 2403.03507). Original implementation: jiaweizzhao/GaLore
(galore_torch). Differences: the epsilon of the paper and of PyTorch (1e-8, added after the bias
correction), and the weight decay before the step as in `torch.optim.AdamW`, unless `reference`
asks for the released code's; moments are float32 or integer codes whatever the gradient's dtype;
the subspace comes from a randomized iteration with canonical signs (where the original's moments
meet directions whose signs LAPACK chose anew); what a refresh does to the moments is an option;
tensors of order above 2 are taken as matrices instead of being decomposed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from gradpress.optim import _projector as projector
from gradpress.optim._adam import (
    AdamHyper,
    Batch,
    new_moments,
    released_form,
    step_directions,
)
from gradpress.optim._base import Group, State
from gradpress.optim._moments import reset_moments, turn_moments
from gradpress.optim._projected import check_options
from gradpress.optim._scaling import Scale
from gradpress.optim._sides import Sides, long_basis, moment_shape
from gradpress.optim._subspace import SubspaceOptimizer

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
MOMENTS = ("keep", "rotate", "reset")


class GaLoreAdamW(SubspaceOptimizer):
    r"""AdamW in a low-rank subspace of each weight's gradient.

    For a weight of a group with `rank` set, with gradient G (m x n), d = min(m, n), and the type
    ``"std"``:

    .. math::
        R = G P \;(m \ge n) \quad\text{or}\quad R = P^\top G, \qquad
        W \leftarrow (1 - \eta\lambda) W + \alpha\,\mathrm{back}(\mathrm{AdamW}_\eta(R))

    P holds the r leading singular directions of the gradient at the last refresh; refreshes come
    in the first step and every `update_proj_gap` steps from there. All other parameters take the
    rule of :class:`AdamW8bit`. Weights quantized by :func:`gradpress.nn.quantize_` are updated in
    place with stochastic rounding.

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
        scale: Factor on the back-projected update.
        proj_type: ``"std"``: the projector stands on the side of the shorter dimension;
            ``"reverse_std"``: on that of the longer one, for smaller moments and a larger
            projector; ``"left"`` and ``"right"``; ``"full"``: on both, with moments of rank x rank.
        projector_bits: None for float32, 8 or 4 bits for the projector's entries.
        projector_group_size: Entries of an integer projector that share a scale.
        stagger: Spread the refreshes of the layers over the interval.
        moments: What a refresh does to them: ``"keep"`` leaves them in the coordinates of a
            subspace that is gone, as the paper does; ``"rotate"`` turns them into the new
            coordinates (Robert et al.: "LDAdam", 2024, arXiv 2410.16103); ``"reset"`` starts anew,
            bias correction included.
        reference: The released code's form: epsilon is added before the bias correction, and the
            decay comes after the step. With ``eps=1e-6, weight_decay=0.0`` these are its defaults.
        state_bits: 32 for float32 moments, 8 or 4.
        **options: Those of :class:`AdamW8bit`.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> groups = gradpress.optim.param_groups(model, rank=8, verbose=False)
        >>> optimizer = gradpress.optim.GaLoreAdamW(groups, lr=1e-2)
        >>> model(torch.randn(4, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model[0].weight]["exp_avg"].shape
        torch.Size([64, 8])
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
        projector_bits: int | None = None,
        projector_group_size: int = 256,
        stagger: bool = False,
        moments: str = "keep",
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
            moments=moments,
            reference=reference,
            state_bits=state_bits,
            **options,
        )

    def _check_group(self, group: Group) -> None:
        # The base knows the projection that all have in common.
        super()._check_group({**group, "proj_type": "std"})
        check_options(
            group, proj_type=group["proj_type"] in PROJ_TYPES, moments=group["moments"] in MOMENTS
        )

    def _new_state(self, group: Group, p: torch.Tensor, state: State, offset: int) -> None:
        shape = projector.matrix_shape(p)
        projector.new_projector(state, shape, p.device, group, offset)
        state["moments_start"] = 0
        new_moments(state, _moment_shape(group, p, state), p.device, group)

    def _hypers(
        self, group: Group, params: list[torch.Tensor], scale: Scale
    ) -> list[tuple[list[torch.Tensor], AdamHyper]]:
        hyper = AdamHyper.of(group, scale)
        if not group["reference"]:
            return [(params, hyper)]
        by_step: dict[int, list[torch.Tensor]] = {}
        for p, state in zip(params, self._adam_states(group, params), strict=True):
            by_step.setdefault(int(state["step"].item()), []).append(p)
        return [(chosen, released_form(hyper, step)) for step, chosen in by_step.items()]

    # Refreshes

    def _refresh_together(self, group: Group, due: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        old = {}
        for p, _ in due:
            state = self.state[p]
            if group["moments"] != "keep" and state["projector_ready"]:
                sides = Sides.of(state, projector.matrix_shape(p), group)
                old[p] = (state["projector_refreshes"], sides.clone())
        super()._refresh_together(group, due)
        for p, (refreshes, sides) in old.items():
            if self.state[p]["projector_refreshes"] > refreshes:
                self._move_moments(group, p, sides)

    def _starting_basis(self, group: Group, p: torch.Tensor) -> tuple[torch.Tensor, bool]:
        shape = projector.matrix_shape(p)
        if projector.SHORT in projector.kept_bases(shape, group["proj_type"]):
            return super()._starting_basis(group, p)
        rank = self.state[p]["projector_rank"]
        return torch.zeros(min(shape), rank, dtype=torch.float32, device=p.device), False

    def _keep_basis(
        self, group: Group, p: torch.Tensor, grad: torch.Tensor, basis: torch.Tensor
    ) -> None:
        names = projector.kept_bases(projector.matrix_shape(p), group["proj_type"])
        if projector.SHORT in names:
            super()._keep_basis(group, p, grad, basis)
        if projector.LONG in names:
            projector.store_basis(self.state[p], long_basis(grad, basis), group, projector.LONG)

    def _move_moments(self, group: Group, p: torch.Tensor, old: Sides) -> None:
        """After a refresh: moments that stay belong to coordinates that are gone."""
        state = self.state[p]
        shape, done = _moment_shape(group, p, state), int(state["step"].item()) - 1
        if group["moments"] == "reset":
            reset_moments(state, shape, group)
            state["moments_start"] = done
            return
        turn = Sides.of(state, projector.matrix_shape(p), group).turn_from(old)
        turn_moments(state, shape, turn, done - state["moments_start"], group)

    # Steps

    def _adam_states(self, group: Group, params: list[torch.Tensor]) -> list[State]:
        return [
            {**state, "step": state["step"] - state["moments_start"]}
            if state.get("moments_start")
            else state
            for state in super()._adam_states(group, params)
        ]

    def _step_projected(
        self,
        group: Group,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        hyper: AdamHyper,
    ) -> None:
        common = []
        for p, grad in zip(params, grads, strict=True):
            shape = projector.matrix_shape(p)
            if projector.LONG in projector.kept_bases(shape, group["proj_type"]):
                self._step_by_sides(group, p, grad, hyper)
            else:
                common.append((p, grad))
        if common:
            chosen, theirs = (list(column) for column in zip(*common, strict=True))
            super()._step_projected(group, chosen, theirs, hyper)

    def _step_by_sides(
        self, group: Group, p: torch.Tensor, grad: torch.Tensor, hyper: AdamHyper
    ) -> None:
        state = self.state[p]
        sides = Sides.of(state, projector.matrix_shape(p), group)
        update = sides.project(grad)
        batch = Batch([update], [update], self._adam_states(group, [p]))
        step_directions(batch, hyper, self._counter(p.device))
        outer, basis = sides.factors(update)
        self._add_back(group, [(p, state, sides.shape, outer)], hyper, [basis])


def _moment_shape(group: Group, p: torch.Tensor, state: State) -> tuple[int, int]:
    return moment_shape(projector.matrix_shape(p), state["projector_rank"], group["proj_type"])
