"""Steps of sharded parameters, by plain tensors of this process's rows that stand in for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from gradpress.optim._sharded import Shard
from gradpress.optim._sharded_state import Group, State, keep_state, local_state


class StandIns(NamedTuple):
    """Plain tensors in place of sharded parameters, while these are stepped.

    Attributes:
        shards: By the tensors that stand in for them.
        ids: The keys of their random numbers.
    """

    shards: dict[torch.Tensor, Shard]
    ids: dict[torch.Tensor, int]


def step_sharded(
    states: dict[torch.Tensor, State],
    group: Group,
    shards: list[Shard],
    ids: dict[torch.Tensor, int],
    step: Callable[[Group, StandIns], None],
) -> None:
    """Steps the rows of this process.

    Args:
        states: An optimizer's states.
        group: The options.
        shards: Parameters that have gradients.
        ids: The keys of the parameters.
        step: Steps the tensors that stand in for them. Whether moments become codes is decided by
            the sizes of the parameters, not of their shards.
    """
    least = group["min_8bit_size"]
    for large in (True, False):
        chosen = [shard for shard in shards if (shard.p.numel() >= least) == large]
        if not chosen:
            continue
        options = {**group, "min_8bit_size": 0 if large else sys.maxsize}
        stand_ins = StandIns({}, {})
        try:
            for shard in chosen:
                tensor = _stand_in(shard)
                state = local_state(shard, states[shard.p], group)
                key = shard.key(ids[shard.p])
                if state:
                    state["tensor_id"] = key
                states[tensor] = state
                stand_ins.shards[tensor], stand_ins.ids[tensor] = shard, key
            step(options, stand_ins)
            for tensor, shard in stand_ins.shards.items():
                keep_state(shard, states[shard.p], states[tensor], group)
                states[shard.p]["tensor_id"] = ids[shard.p]
            torch.autograd.graph.increment_version([shard.p for shard in chosen])
        finally:
            for tensor in stand_ins.shards:
                del states[tensor]


def _stand_in(shard: Shard) -> torch.Tensor:
    """A tensor of this process's rows, with their gradient."""
    tensor, grad = shard.p._local_tensor.detach(), shard.local_grad()
    if grad.dtype != tensor.dtype:
        tensor.grad_dtype = grad.dtype
    tensor.grad = grad
    return tensor
