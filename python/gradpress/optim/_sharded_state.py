"""The states of sharded parameters: which go by the rows, and this process's part of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from gradpress.optim._adam import state_block_size
from gradpress.optim._sharded import Shard, local

State = dict[str, Any]
Group = dict[str, Any]

#: State of parameters whose units cross the borders of shards: elements of the largest shard.
SHARD_NUMEL = "shard_numel"


def unit_of(name: str, group: Group) -> int | None:
    """How many elements of the parameter share an entry of a state; None for one each."""
    if name.endswith("_scale"):
        return state_block_size(group)
    return 2 if name.endswith("_codes") and group["state_bits"] == 4 else None


def moments_of(shard: Shard, state: State) -> Shard | None:
    """The shard of a parameter's moments; None where every process has all of them.

    A gradient whose rows are projected keeps its rows. One whose columns are is a sum over the
    rows of all processes.
    """
    rank = state.get("projector_rank")
    if rank is None:
        return shard
    return replace(shard, tail=torch.Size([rank])) if keeps_rows(shard.p) else None


def keeps_rows(p: torch.Tensor) -> bool:
    """Whether a parameter's gradient is projected row by row."""
    return p.shape[0] >= math.prod(p.shape[1:])


def local_state(shard: Shard, state: State, group: Group) -> State:
    """A state with what this process holds of every tensor.

    Raises:
        ValueError: a state is not divided as the parameter is, or was divided otherwise.
    """
    found: State = {}
    moments = moments_of(shard, state)
    for name, value in state.items():
        if name == SHARD_NUMEL:
            continue
        found[name] = value
        if moments is not None and _is_divided(name, value, state):
            unit = unit_of(name, group)
            found[name] = moments.load(value, unit, name)
            if unit is not None and moments.crosses(unit):
                _check_borders(moments, state.get(SHARD_NUMEL, moments.full_numel), unit)
    return found


def keep_state(shard: Shard, state: State, stepped: State, group: Group) -> None:
    """Takes what a step has made or replaced over into a parameter's state."""
    moments = moments_of(shard, stepped)
    for name, value in stepped.items():
        if moments is None or not _is_divided(name, value, stepped):
            state[name] = value
            continue
        unit = unit_of(name, group)
        if name not in state or local(state[name]).data_ptr() != value.data_ptr():
            state[name] = moments.store(value, unit)
        note_borders(moments, state, unit)


def note_borders(moments: Shard, state: State, unit: int | None) -> None:
    """Notes in a state where the borders of shards are, if entries depend on them."""
    if unit is not None and moments.crosses(unit):
        state[SHARD_NUMEL] = moments.full_numel


def _is_divided(name: str, value: object, state: State) -> bool:
    """Whether a state goes by the rows: moments do, projectors do not."""
    is_moment = "projector_rank" not in state or name.startswith("exp_avg")
    return is_moment and isinstance(value, torch.Tensor) and value.dim() > 0


def planned_codes(shard: Shard, state: State) -> State:
    """Tensors of the shapes of this process's moments, in a row, by the names of their codes."""
    moments, names = moments_of(shard, state), [n for n in state if n.endswith("_codes")]
    numel = moments.numel if moments else state["projector_rank"] * math.prod(shard.p.shape[1:])
    return {name: torch.empty(numel, device="meta") for name in names}


def _check_borders(shard: Shard, was: int, unit: int) -> None:
    now = shard.full_numel
    if was != now and (was % unit or now % unit):
        raise ValueError(
            f"the state of a sharded parameter of shape {list(shard.p.shape)} was saved in shards"
            f" of {was} elements, and is loaded in shards of {now}, whose borders blocks of"
            f" {unit} elements cross; load it on the same number of processes"
        )
