"""What all optimizers share that step some parameters through a low-rank projection."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gradpress.optim import _projector as projector
from gradpress.optim._auto_rank import (
    AutoRankOptimizer,
    at_lowest_rank,
    is_projected,
    matrices_of,
)
from gradpress.optim._base import Group, State, new_step
from gradpress.optim._ranks import AUTO, RankRule
from gradpress.optim._scaling import Scale
from gradpress.optim._sharded import Shard
from gradpress.optim._sharded_projected import check_shards, step_projected

#: Bytes of projected gradients in flight at a time.
WORKSPACE_BYTES = 64 << 20


class ProjectedOptimizer(AutoRankOptimizer):
    """Divides the parameters: matrices of groups with `rank` set are projected, the others not.

    Subclasses implement `_new_state` and `_step_matrices`; what is not projected takes the rule of
    :class:`AdamW8bit`. A warning says where the states of a weight are larger than that rule's
    would be.
    """

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        rank = group["rank"]
        if rank == AUTO and not self._FOLLOWS_ENERGY:
            raise ValueError(
                f"{type(self).__name__}: rank must be a number, got {rank!r}; gradients do not"
                " decide about its projections, so that they cannot decide about ranks"
            )
        check_options(
            group,
            rank=rank is None or rank == AUTO or (not isinstance(rank, str) and rank >= 1),
            update_proj_gap=group["update_proj_gap"] >= 1,
            **RankRule.valid(group),
        )

    def _check_gradients(self, params: Iterable[torch.Tensor]) -> None:
        super()._check_gradients(params)
        check_shards(self)
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
        projected = [p for p in params if is_projected(group, p)]
        chosen = {id(p) for p in projected}
        others = [p for p in params if id(p) not in chosen]
        if others:
            self._step_unprojected(group, others, scale)
        if projected:
            self._prepare(group, projected)
            if group["rank"] == AUTO:
                self._choose_ranks(group, projected, scale)
            self._step_matrices(group, projected, scale)

    def _step_shards(self, group: Group, shards: list[Shard], scale: Scale) -> None:
        projected = [shard for shard in shards if is_projected(group, shard.p)]
        others = [shard for shard in shards if not is_projected(group, shard.p)]
        if others:
            super()._step_shards(group, others, scale)
        for device in dict.fromkeys(shard.p.device for shard in projected):
            together = [shard for shard in projected if shard.p.device == device]
            step_projected(self, group, together, scale.on(device))

    def _prepare(self, group: Group, params: list[torch.Tensor]) -> None:
        """Makes the states that are missing, and counts the step."""
        self._make_states(group, params)
        for p in params:
            self.state[p]["step"] += 1

    def _make_states(self, group: Group, params: list[torch.Tensor]) -> None:
        ids = self._ids()
        # Over all groups: there is one for each rank, where ranks are the weights' own.
        matrices = [p for g in self.param_groups for p in matrices_of(g)]
        place = {id(p): i for i, p in enumerate(matrices)}
        for p in params:
            state = self.state[p]
            if not state:
                gap = group["update_proj_gap"]
                offset = place[id(p)] * gap // len(place) if group.get("stagger") else 0
                state["step"], state["tensor_id"] = new_step(), ids[p]
                if group["rank"] == AUTO:
                    state["rank_chosen"] = 0
                self._new_state(at_lowest_rank(group, p), p, state, offset)

    def _planned_state(self, group: Group, p: torch.Tensor) -> State:
        if not is_projected(group, p):
            return super()._planned_state(group, p)
        state: State = {"step": new_step(), "tensor_id": 0}
        self._new_state(self._at_highest_rank(group, p), p, state, 0)
        return state

    def _step_matrices(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        """Steps parameters of two or more dimensions, whose states exist."""
        raise NotImplementedError

    def refresh_counts(self) -> dict[str, int]:
        """How often each projector was found anew, by the parameter's name or ordinal."""
        rows = (
            self._report_row(name, p, self.state[p], group)
            for name, p, group in self._names()
            if "projector_rank" in self.state.get(p, {})
        )
        return {row.name: row.refreshes for row in rows}


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
