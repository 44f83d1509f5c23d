"""Optimizers that keep a basis of leading singular directions for each matrix."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch

from gradpress.nn._weight import QuantizedWeight
from gradpress.ops import lowrank as kernels
from gradpress.optim import _projector as projector
from gradpress.optim._adam import AdamHyper, Batch, new_moments, step_directions
from gradpress.optim._base import Group, State, plain_gradient
from gradpress.optim._projected import (
    WORKSPACE_BYTES,
    ProjectedOptimizer,
    check_options,
    in_portions,
)
from gradpress.optim._scaling import Scale
from gradpress.optim.adamw8bit import AdamW8bit

#: A parameter, its state, its shape as a matrix, and a projected gradient or update of it.
Row = tuple[torch.Tensor, State, tuple[int, int], torch.Tensor]


class SubspaceOptimizer(ProjectedOptimizer):
    """Finds bases anew at intervals, and steps moments in the subspaces that they span."""

    _KEEP_DTYPE: ClassVar[frozenset[str]] = AdamW8bit._KEEP_DTYPE | frozenset(projector.KEEP)
    _ON_HOST: ClassVar[frozenset[str]] = frozenset(projector.ON_HOST)
    _FOLLOWS_ENERGY: ClassVar[bool] = True

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_options(
            group,
            proj_type=group["proj_type"] == "std",
            projector_bits=group["projector_bits"] in (None, 4, 8),
            projector_group_size=group["projector_group_size"] >= 1,
        )

    def _new_state(self, group: Group, p: torch.Tensor, state: State, offset: int) -> None:
        shape = projector.matrix_shape(p)
        projector.new_projector(state, shape, p.device, group, offset)
        low_rank = kernels.projected_shape(*shape, state["projector_rank"])
        new_moments(state, low_rank, p.device, group)

    def _step_matrices(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        grads = [plain_gradient(p).view(projector.matrix_shape(p)) for p in params]
        self._refresh(group, params, grads, scale)
        gradient_of = {id(p): grad for p, grad in zip(params, grads, strict=True)}
        for chosen, hyper in self._hypers(group, params, scale):
            ranks = [self.state[p]["projector_rank"] for p in chosen]
            for first, last in in_portions(chosen, ranks):
                portion = chosen[first:last]
                self._step_projected(group, portion, [gradient_of[id(p)] for p in portion], hyper)

    # Refreshes

    def _refresh(
        self, group: Group, params: list[torch.Tensor], grads: list[torch.Tensor], scale: Scale
    ) -> None:
        """Finds the projectors anew whose turn it is, some at a time to bound the memory."""
        due, size = [], 0
        for p, grad in zip(params, grads, strict=True):
            state = self.state[p]
            if projector.is_due(state, int(state["step"].item()) - 1):
                due.append((p, grad))
                size += 4 * state["projector_rank"] * min(projector.matrix_shape(p))
            if due and (size >= WORKSPACE_BYTES or p is params[-1]):
                # A refresh waits for the device anyway; one of a step that is skipped comes later.
                if scale.found_inf is not None and scale.found_inf.item():
                    return
                self._refresh_together(group, due)
                due, size = [], 0

    def _refresh_together(self, group: Group, due: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        states = [self.state[p] for p, _ in due]
        starts = [self._starting_basis(group, p) for p, _ in due]
        bases = [basis for basis, _ in starts]
        outcomes = kernels.refresh_basis(
            [grad for _, grad in due],
            bases,
            [state["projector_vector"] for state in states],
            warm=[warm for _, warm in starts],
            seed=group["seed"],
            tensor_ids=[state["tensor_id"] for state in states],
            steps=[int(state["step"].item()) - 1 for state in states],
        )
        for (p, grad), basis, outcome in zip(due, bases, outcomes, strict=True):
            if outcome.status == kernels.REFRESHED:
                self._keep_basis(group, p, grad, basis)
                self._record(group, self.state[p], outcome)

    def _starting_basis(self, group: Group, p: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """What a refresh writes into, and whether it holds an earlier basis."""
        state = self.state[p]
        basis = projector.load_basis(state, projector.matrix_shape(p), group)
        return basis, bool(state["projector_ready"])

    def _keep_basis(
        self, group: Group, p: torch.Tensor, grad: torch.Tensor, basis: torch.Tensor
    ) -> None:
        """Stores what a refresh has found."""
        projector.store_basis(self.state[p], basis, group)

    def _record(self, group: Group, state: State, outcome: kernels.Refresh) -> None:
        """Counts a refresh that found something."""
        projector.count(state, outcome)

    # Steps

    def _step_projected(
        self,
        group: Group,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        hyper: AdamHyper,
    ) -> None:
        """Projects, steps the moments, and adds the back-projected update to the weights."""
        self._step_rows(group, self._project(group, params, grads), hyper)

    def _step_rows(self, group: Group, rows: list[Row], hyper: AdamHyper) -> None:
        """Steps the moments with projected gradients, and adds the updates to the weights."""
        params, updates = [row[0] for row in rows], [row[3] for row in rows]
        states = self._adam_states(group, params)
        step_directions(Batch(updates, updates, states), hyper, self._counter(params[0].device))
        self._add_back(group, rows, hyper)

    def _adam_states(self, group: Group, params: list[torch.Tensor]) -> list[State]:
        """The states as Adam takes them: `step` counts what the moments have seen."""
        return [self.state[p] for p in params]

    def _project(
        self, group: Group, params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> list[Row]:
        states = [self.state[p] for p in params]
        shapes = [projector.matrix_shape(p) for p in params]
        projected = [
            torch.empty(
                kernels.projected_shape(*shape, state["projector_rank"]),
                dtype=torch.float32,
                device=p.device,
            )
            for p, state, shape in zip(params, states, shapes, strict=True)
        ]
        kernels.project(grads, projector.bases_of(states, group), projected)
        return list(zip(params, states, shapes, projected, strict=True))

    def _add_back(
        self,
        group: Group,
        rows: list[Row],
        hyper: AdamHyper,
        bases: list[torch.Tensor] | None = None,
    ) -> None:
        """Decays the weights and adds the updates, back-projected, with one rounding.

        Args:
            group: The options.
            rows: Weights and their updates.
            hyper: The numbers of the step.
            bases: Of the only row, in place of that of its state.
        """
        dense = [row for row in rows if not isinstance(row[0], QuantizedWeight)]
        self._add_to_dense(group, dense, hyper, bases)
        quantized = [row for row in rows if isinstance(row[0], QuantizedWeight)]
        for bits, size in sorted({_layout(row[0]) for row in quantized}):
            chosen = [row for row in quantized if _layout(row[0]) == (bits, size)]
            self._add_to_quantized(group, chosen, hyper, bases, bits, size)

    def _add_to_dense(
        self, group: Group, rows: list[Row], hyper: AdamHyper, bases: list[torch.Tensor] | None
    ) -> None:
        if not rows:
            return
        targets = [p if p.is_contiguous() else p.detach().contiguous() for p, *_ in rows]
        kernels.project_back_add(
            [t.detach().view(row[2]) for t, row in zip(targets, rows, strict=True)],
            [row[3] for row in rows],
            bases or projector.bases_of([row[1] for row in rows], group),
            scale=group["scale"],
            decay=hyper.lr * hyper.weight_decay,
            stochastic_rounding=hyper.stochastic_rounding,
            seed=hyper.seed,
            tensor_ids=[s["tensor_id"] for _, s, *_ in rows],
            steps=[int(s["step"].item()) for _, s, *_ in rows],
            found_inf=hyper.found_inf,
        )
        for target, (p, *_) in zip(targets, rows, strict=True):
            if target is not p:
                p.copy_(target)

    def _add_to_quantized(
        self,
        group: Group,
        rows: list[Any],
        hyper: AdamHyper,
        bases: list[torch.Tensor] | None,
        bits: int,
        group_size: int,
    ) -> None:
        kernels.project_back_requantize(
            [p.codes if bits == 4 else p.codes.view(shape) for p, _, shape, *_ in rows],
            [p.scale for p, *_ in rows],
            [p.zero_point for p, *_ in rows],
            [row[2] for row in rows],
            [row[3] for row in rows],
            bases or projector.bases_of([row[1] for row in rows], group),
            bits=bits,
            group_size=group_size,
            scale=group["scale"],
            decay=hyper.lr * hyper.weight_decay,
            stochastic=group["weight_rounding"] == "stochastic",
            seed=hyper.seed,
            tensor_ids=[s["tensor_id"] for _, s, *_ in rows],
            steps=[int(s["step"].item()) for _, s, *_ in rows],
            found_inf=hyper.found_inf,
        )


def _layout(weight: torch.Tensor) -> tuple[int, int]:
    quantized = cast(QuantizedWeight, weight)
    return quantized.bits, quantized.group_size
