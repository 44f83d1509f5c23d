"""What all optimizers share that step some parameters through a low-rank projection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch

from gradpress.optim import _projector as projector
from gradpress.optim._base import Group, State, new_step
from gradpress.optim._report import ProjectorReport, ProjectorRow
from gradpress.optim._scaling import Scale
from gradpress.optim.adamw8bit import AdamW8bit

#: Bytes of projected gradients in flight at a time.
WORKSPACE_BYTES = 64 << 20


class ProjectedOptimizer(AdamW8bit):
    """Divides the parameters: matrices of groups with `rank` set are projected, the others not.

    Subclasses implement `_new_state` and `_step_matrices`; what is not projected takes the rule of
    :class:`AdamW8bit`.
    """

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_options(
            group,
            rank=group["rank"] is None or group["rank"] >= 1,
            update_proj_gap=group["update_proj_gap"] >= 1,
        )

    def _check_gradients(self, params: Iterable[torch.Tensor]) -> None:
        super()._check_gradients(params)
        groups = [g for g in self.param_groups if g["rank"] is not None]
        if groups and all(p.dim() < 2 for g in groups for p in g["params"]):
            raise ValueError(
                f"{type(self).__name__}: params must hold a tensor of two dimensions where rank is"
                " set, got one-dimensional tensors only; DeepSpeed ZeRO and FSDP1 flatten"
                " parameters, which leaves nothing to project"
            )

    def _step_group(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        for p in params:
            self.state[p]  # empty ones come in this order, as a loaded state's do
        projected = [p for p in params if group["rank"] is not None and p.dim() >= 2 and p.numel()]
        chosen = {id(p) for p in projected}
        others = [p for p in params if id(p) not in chosen]
        if others:
            self._step_unprojected(group, others, scale)
        if projected:
            self._prepare(group, projected)
            self._step_matrices(group, projected, scale)

    def _prepare(self, group: Group, params: list[torch.Tensor]) -> None:
        """Makes the states that are missing, and counts the step."""
        ids = self._ids()
        total = sum(p.dim() >= 2 for p in group["params"])
        place = {id(p): i for i, p in enumerate(q for q in group["params"] if q.dim() >= 2)}
        for p in params:
            state = self.state[p]
            if not state:
                gap = group["update_proj_gap"]
                offset = place[id(p)] * gap // total if group.get("stagger") else 0
                state["step"], state["tensor_id"] = new_step(), ids[p]
                self._new_state(group, p, state, offset)
            state["step"] += 1

    def _planned_state(self, group: Group, p: torch.Tensor) -> State:
        if group["rank"] is None or p.dim() < 2 or not p.numel():
            return super()._planned_state(group, p)
        state: State = {"step": new_step(), "tensor_id": 0}
        self._new_state(group, p, state, 0)
        return state

    def _new_state(self, group: Group, p: torch.Tensor, state: State, offset: int) -> None:
        """Fills the state of a matrix that is stepped for the first time.

        Args:
            group: The options.
            p: The parameter.
            state: Has `step` and `tensor_id`.
            offset: Steps by which the refreshes are early, where they are staggered.
        """
        raise NotImplementedError

    def _step_matrices(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        """Steps parameters of two or more dimensions, whose states exist."""
        raise NotImplementedError

    def refresh_counts(self) -> dict[str, int]:
        """How often each projector was found anew, by the parameter's name or ordinal."""
        return {row.name: row.refreshes for row in self.report().rows}

    def report(self) -> ProjectorReport:
        """Rank, interval, refreshes and captured energy of every projected weight."""
        rows = []
        for name, p, group in self._names():
            state = cast("dict[str, Any]", self.state.get(p, {}))
            if "projector_rank" in state:
                rows.append(self._report_row(name, p, state, group))
        return ProjectorReport(tuple(rows))

    def _report_row(self, name: str, p: torch.Tensor, state: State, group: Group) -> ProjectorRow:
        return ProjectorRow.of(name, p, state)


def check_options(group: Group, **valid: bool) -> None:
    """Refuses a group, naming the first of its options that is not valid.

    Raises:
        ValueError: an option is out of its range.
    """
    for name, ok in valid.items():
        if not ok:
            raise ValueError(f"Invalid {name} value: {group[name]!r}")


def in_portions(params: list[torch.Tensor], ranks: list[int]) -> Iterable[tuple[int, int]]:
    """Ranges of parameters whose projected gradients fit the workspace together."""
    start, size = 0, 0
    for i, (p, rank) in enumerate(zip(params, ranks, strict=True)):
        size += 4 * rank * max(projector.matrix_shape(p))
        if size >= WORKSPACE_BYTES or i == len(params) - 1:
            yield start, i + 1
            start, size = i + 1, 0
