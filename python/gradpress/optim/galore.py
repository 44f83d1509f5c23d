"""GaLore: AdamW in low-rank subspaces of the gradients.

Zhao, Zhang, Chen, Wang, Anandkumar, Tian: "GaLore: Memory-Efficient LLM Training by Gradient
Low-Rank Projection" (2024, arXiv 2403.03507). Original implementation: jiaweizzhao/GaLore
(galore_torch). Differences: the epsilon of the paper and of PyTorch (1e-8, added after the bias
correction), and the weight decay before the step as in `torch.optim.AdamW`, unless `reference`
asks for the released code's; moments are float32 or integer codes whatever the gradient's dtype;
the subspace comes from a randomized iteration with canonical signs (where the original's moments
meet directions whose signs LAPACK chose anew); what a refresh does to the moments is an option.
Tensors of order above 2 are taken as matrices, or kept in Tucker form as the original means to: its
own constructor cannot make such a projector, would never refresh it, and brings the projected
gradient back in place of Adam's update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch.optim.optimizer import ParamsT

from gradpress.ops import lowrank as kernels
from gradpress.optim import _projector as projector
from gradpress.optim._adam import (
    AdamHyper,
    Batch,
    new_moments,
    released_form,
    step_directions,
)
from gradpress.optim._base import Group, State
from gradpress.optim._hooi import Search, decompose
from gradpress.optim._moments import Turn, reset_moments, turn_moments
from gradpress.optim._projected import check_options
from gradpress.optim._scaling import Scale
from gradpress.optim._sides import Sides, long_basis, moment_shape
from gradpress.optim._subspace import SubspaceOptimizer
from gradpress.optim._tucker import FACTORS, Factors, check_rank, core_shape, is_tensor, new_factors

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
MOMENTS = ("keep", "rotate", "reset")
TENSOR_PROJECTIONS = ("matrix", "tucker")


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
        rank: Directions kept; None does not project. Clamped to the weight's shorter side, or to
            a mode's size. With ``tensor_projection="tucker"`` also a tuple of one int for each
            mode, or a fraction between 0 and 1: core and factors together then have about that
            share of the tensor's elements, with ranks in proportion to the sizes. Tensors of order
            below 2 are not projected.
        update_proj_gap: Steps between refreshes.
        scale: Factor on the back-projected update.
        proj_type: ``"std"``: the projector stands on the side of the shorter dimension;
            ``"reverse_std"``: on that of the longer one, for smaller moments and a larger
            projector; ``"left"`` and ``"right"``; ``"full"``: on both, with moments of rank x rank.
            Of no meaning to tensors in Tucker form.
        tensor_projection: ``"matrix"``: tensors of order above 2 are taken as (first dimension, all
            others); ``"tucker"``: they have a projector for each mode, and moments of the shape of
            the core. A step then takes float32 temporaries of r_1 / n_1 of the parameter's size,
            two at a time.
        projector_bits: None for float32, 8 or 4 bits for the projector's entries; None with
            ``tensor_projection="tucker"``.
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

    _KEEP_DTYPE: ClassVar[frozenset[str]] = SubspaceOptimizer._KEEP_DTYPE | frozenset(FACTORS)

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
        tensor_projection: str = "matrix",
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
            tensor_projection=tensor_projection,
            projector_bits=projector_bits,
            projector_group_size=projector_group_size,
            stagger=stagger,
            moments=moments,
            reference=reference,
            state_bits=state_bits,
            **options,
        )

    def _check_group(self, group: Group) -> None:
        check_options(
            group,
            proj_type=group["proj_type"] in PROJ_TYPES,
            tensor_projection=group["tensor_projection"] in TENSOR_PROJECTIONS,
            moments=group["moments"] in MOMENTS,
        )
        # The base knows the projection that all have in common, and one rank.
        common = {**group, "proj_type": "std"}
        if group["tensor_projection"] == "tucker":
            check_rank(group)
            check_options(group, projector_bits=group["projector_bits"] is None)
            common["rank"] = None if group["rank"] is None else 1
        elif isinstance(group["rank"], Sequence) and not isinstance(group["rank"], str):
            check_options(group, rank=False)
        super()._check_group(common)

    def _new_state(self, group: Group, p: torch.Tensor, state: State, offset: int) -> None:
        if is_tensor(group, p):
            new_factors(state, p, group, offset)
        else:
            projector.new_projector(state, projector.matrix_shape(p), p.device, group, offset)
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
                old[p] = (state["projector_refreshes"], self._bases(group, p).clone())
        matrices = [row for row in due if not is_tensor(group, row[0])]
        if matrices:
            super()._refresh_together(group, matrices)
        for p, grad in due:
            if is_tensor(group, p):
                self._refresh_tensor(group, p, grad)
        for p, (refreshes, bases) in old.items():
            if self.state[p]["projector_refreshes"] > refreshes:
                self._move_moments(group, p, bases)

    def _refresh_tensor(self, group: Group, p: torch.Tensor, grad: torch.Tensor) -> None:
        state = self.state[p]
        warm, step = bool(state["projector_ready"]), int(state["step"].item()) - 1
        search = Search(warm, group["seed"], state["tensor_id"], step)
        found = decompose(grad.view(p.shape), Factors.of(state, p), search)
        if found is not None:
            factors, energy = found
            factors.store(state)
            projector.count(state, kernels.Refresh(kernels.REFRESHED, math.nan, energy))

    def _bases(self, group: Group, p: torch.Tensor) -> Sides | Factors:
        if is_tensor(group, p):
            return Factors.of(self.state[p], p)
        return Sides.of(self.state[p], projector.matrix_shape(p), group)

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

    def _move_moments(self, group: Group, p: torch.Tensor, old: Any) -> None:
        """After a refresh: moments that stay belong to coordinates that are gone."""
        state = self.state[p]
        shape, done = _moment_shape(group, p, state), int(state["step"].item()) - 1
        if group["moments"] == "reset":
            reset_moments(state, shape, group)
            state["moments_start"] = done
            return
        turn = cast(Turn, self._bases(group, p).turn_from(old))
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
            names = projector.kept_bases(projector.matrix_shape(p), group["proj_type"])
            if is_tensor(group, p) or projector.LONG in names:
                self._step_by_bases(group, p, grad, hyper)
            else:
                common.append((p, grad))
        if common:
            chosen, theirs = (list(column) for column in zip(*common, strict=True))
            super()._step_projected(group, chosen, theirs, hyper)

    def _step_by_bases(
        self, group: Group, p: torch.Tensor, grad: torch.Tensor, hyper: AdamHyper
    ) -> None:
        state, bases = self.state[p], self._bases(group, p)
        update = bases.project(grad)
        batch = Batch([update], [update], self._adam_states(group, [p]))
        step_directions(batch, hyper, self._counter(p.device))
        outer, basis = bases.factors(update)
        self._add_back(group, [(p, state, projector.matrix_shape(p), outer)], hyper, [basis])


def _moment_shape(group: Group, p: torch.Tensor, state: State) -> tuple[int, int]:
    if is_tensor(group, p):
        # What takes a moment's shape takes one of any length.
        return cast("tuple[int, int]", core_shape(p, state))
    return moment_shape(projector.matrix_shape(p), state["projector_rank"], group["proj_type"])
