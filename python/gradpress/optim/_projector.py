"""The projector of one matrix, as tensors and numbers in the optimizer's state."""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from gradpress.ops import quant as kernels
from gradpress.ops.lowrank import REFRESHED, PackedBases, Refresh

State = dict[str, Any]
Group = dict[str, Any]

#: The names of a basis on the side of the shorter dimension, and of one on the longer side.
SHORT, LONG = "projector", "projector_long"

#: State tensors that keep their dtype when a checkpoint is loaded.
KEEP: tuple[str, ...] = (
    *(name + part for name in (SHORT, LONG) for part in ("", "_codes", "_scale", "_zero_point")),
    "projector_vector",
    "projector_cosines",
)

#: Of these the ones that decide about later refreshes, on the host.
ON_HOST: tuple[str, ...] = ("projector_cosines",)


def matrix_shape(p: torch.Tensor) -> tuple[int, int]:
    """A parameter as a matrix: tensors of higher order keep the first dimension as rows."""
    return p.shape[0], math.prod(p.shape[1:])


def new_projector(
    state: State, shape: tuple[int, int], device: torch.device, group: Group, offset: int
) -> None:
    """Adds a projector that holds unit vectors until its first refresh."""
    short = min(shape)
    rank = min(group["rank"], short)
    state["projector_rank"] = rank
    state["projector_ready"] = 0
    state["projector_interval"] = group["update_proj_gap"]
    state["projector_offset"] = offset
    state["projector_refreshes"] = 0
    state["projector_energy"] = 0.0
    if "queue_size" in group:
        state["projector_cosine_count"] = 0
        state["projector_cosines"] = torch.zeros(group["queue_size"], dtype=torch.float32)
    state["projector_vector"] = torch.zeros(short, dtype=torch.float32, device=device)
    for name, length in kept_bases(shape, group["proj_type"]).items():
        store_basis(state, torch.eye(length, rank, device=device), group, name)


def kept_bases(shape: tuple[int, int], proj_type: str) -> dict[str, int]:
    """The names of the bases that a type of projection keeps, with their numbers of rows.

    ``projector`` stands on the side of the shorter dimension and ``projector_long`` on the other;
    of a square matrix the columns count as the shorter one.
    """
    short_side, long_side = ("right", "left") if shape[0] >= shape[1] else ("left", "right")
    bases = {}
    if proj_type in ("std", "full", short_side):
        bases[SHORT] = min(shape)
    if proj_type in ("reverse_std", "full", long_side):
        bases[LONG] = max(shape)
    return bases


def load_basis(
    state: State, shape: tuple[int, int], group: Group, name: str = SHORT
) -> torch.Tensor:
    """A basis as float32 ``[rows, rank]``."""
    if group["projector_bits"] is None:
        return cast(torch.Tensor, state[name])
    basis = kernels.dequantize_blockwise(
        state[f"{name}_codes"],
        state[f"{name}_scale"],
        state[f"{name}_zero_point"],
        shape=(kept_bases(shape, group["proj_type"])[name], state["projector_rank"]),
        bits=group["projector_bits"],
        group_size=group["projector_group_size"],
    )
    return cast(torch.Tensor, basis)


def bases_of(states: list[State], group: Group) -> list[torch.Tensor] | PackedBases:
    """The bases as the kernels take them: integer codes stay codes."""
    if group["projector_bits"] is None:
        return [state["projector"] for state in states]
    codes, scales, zero_points = (
        [state[f"projector_{name}"] for state in states]
        for name in ("codes", "scale", "zero_point")
    )
    bits, group_size = group["projector_bits"], group["projector_group_size"]
    return PackedBases(codes, scales, zero_points, bits, group_size)


def store_basis(state: State, basis: torch.Tensor, group: Group, name: str = SHORT) -> None:
    """Stores a basis, rounded to nearest when the projector has integer codes."""
    if group["projector_bits"] is None:
        state[name] = basis
        return
    parts = kernels.quantize_blockwise(
        basis,
        bits=group["projector_bits"],
        group_size=group["projector_group_size"],
        rounding="nearest",
    )
    state[f"{name}_codes"] = parts.codes
    state[f"{name}_scale"] = parts.scale
    state[f"{name}_zero_point"] = parts.zero_point


def is_due(state: State, completed_steps: int) -> bool:
    """Whether the projector is refreshed in this step (section 1.1.4 of Q-GaLore's code)."""
    if not state["projector_ready"]:
        return True
    since = completed_steps + int(state["projector_offset"])
    return since % int(state["projector_interval"]) == 0


def count(state: State, outcome: Refresh) -> None:
    """Counts a refresh that found something."""
    state["projector_refreshes"] += 1
    state["projector_energy"] = outcome.energy
    state["projector_ready"] = 1


def record(state: State, outcome: Refresh, group: Group) -> None:
    """Counts a refresh, and lengthens the interval of a subspace that has become stable.

    When the cosines of the last `queue_size` leading directions with their predecessors are on
    average at least `cos_threshold`, the interval grows by the factor `gamma_proj`. The queue is
    kept, so that every later refresh of a stable subspace lengthens it again.
    """
    if outcome.status != REFRESHED:
        return
    first = not state["projector_ready"]
    count(state, outcome)
    if first:
        return
    cosines = state["projector_cosines"]
    size, filled = cosines.numel(), state["projector_cosine_count"]
    if filled == size:
        cosines[:-1] = cosines[1:].clone()
    else:
        filled += 1
    cosines[filled - 1] = outcome.cosine
    state["projector_cosine_count"] = filled
    if filled == size and float(cosines.mean()) >= group["cos_threshold"]:
        state["projector_interval"] = int(group["gamma_proj"] * state["projector_interval"])
