"""The base of optimizers whose own mathematics is PyTorch's, between our moments and our rounding.

A step takes the parameters in runs that bound the memory: gradients become float32 once, the
subclass turns them into changes, and the changes are rounded into the parameters once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.optim.optimizer import ParamsT

from gradpress.nn._weight import QuantizedWeight
from gradpress.ops import quant
from gradpress.optim._adam import AdamHyper, Batch, State, step_directions
from gradpress.optim._base import Group, new_step
from gradpress.optim._blockwise import BlockwiseOptimizer
from gradpress.optim._scaling import Scale
from gradpress.optim._sharded import Shard
from gradpress.optim._weights import requantize_with_update

#: Bytes of float32 gradients in flight at a time: what stays in a cache, or what fills a device.
RUN_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}


class Row:
    """One parameter in the course of a step.

    Attributes:
        p: The parameter.
        state: Its state.
        update: float32, contiguous, of the parameter's shape: at first the gradient, in the end
            what is added to the parameter.
        keep: Where the step counts: elements whose gradient is finite, in a step that is not
            skipped. None where the host knows that all of them are.
        shard: Of which the parameter is this process's part; None for a whole one.
    """

    def __init__(
        self,
        p: torch.Tensor,
        state: State,
        group: Group,
        scale: Scale,
        shard: Shard | None = None,
    ) -> None:
        self.p, self.state, self.shard = p, state, shard
        self.update = torch.empty(p.shape, dtype=torch.float32, device=p.device)
        self.update.copy_(cast(torch.Tensor, p.grad).detach())
        if isinstance(scale.factor, torch.Tensor) or scale.factor != 1.0:
            self.update.div_(scale.factor)
        if group["maximize"]:
            self.update.neg_()
        self.keep = _kept(self.update, scale)
        self._weight: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The parameter's values, float32 and contiguous; not to be written."""
        if self._weight is None:
            dense = self.p.detach()
            if isinstance(dense, QuantizedWeight):
                dense = dense.dequantize(torch.float32)
            self._weight = dense.to(torch.float32).contiguous()
        return self._weight

    @property
    def numel(self) -> int:
        """Elements of the parameter, on all processes together."""
        return self.p.numel() if self.shard is None else self.shard.p.numel()

    def everywhere(self, *sums: torch.Tensor) -> torch.Tensor:
        """Numbers of this process's part and of all others: a row for each process."""
        values = torch.stack(sums)
        return values.unsqueeze(0) if self.shard is None else self.shard.gather(values)

    def kept(self, new: torch.Tensor, old: torch.Tensor | float) -> torch.Tensor:
        """`new` where the step counts, `old` elsewhere."""
        return new if self.keep is None else torch.where(self.keep, new, old)


def _kept(grad: torch.Tensor, scale: Scale) -> torch.Tensor | None:
    """See `Row.keep`."""
    # A finite sum has finite terms only. Reading it makes nobody wait on the CPU.
    on_cpu = grad.device.type == "cpu"
    if on_cpu and scale.found_inf is None and bool(grad.sum().isfinite()):
        return None
    keep = grad.isfinite()
    return keep if scale.found_inf is None else keep & (scale.found_inf == 0)


class ElementwiseOptimizer(BlockwiseOptimizer):
    """An optimizer that turns float32 gradients into changes of the parameters.

    Subclasses implement `_new_state` and `_changes`. The options here are those of
    :class:`gradpress.optim.AdamW8bit`.
    """

    def __init__(
        self,
        params: ParamsT,
        own_defaults: dict[str, Any],
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        block_size: int | None = None,
        min_8bit_size: int = 4096,
        state_bits: int = 8,
        stochastic_rounding: bool = True,
        weight_rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults = {
            **own_defaults,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
            "block_size": block_size,
            "min_8bit_size": min_8bit_size,
            "state_bits": state_bits,
            "stochastic_rounding": stochastic_rounding,
            "weight_rounding": weight_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _planned_state(self, group: Group, p: torch.Tensor) -> State:
        state: State = {"step": new_step()}
        self._new_state(group, p, state)
        return state

    def _new_state(self, group: Group, p: torch.Tensor, state: State) -> None:
        """Adds a parameter's moments to its state."""
        raise NotImplementedError

    def _changes(self, group: Group, rows: list[Row], scale: Scale) -> None:
        """Steps the moments, and turns every gradient in `Row.update` into a change.

        What the change is where `Row.keep` is false does not matter.
        """
        raise NotImplementedError

    def _step_group(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        # Of no dimension, so that they leave every tensor its shape.
        tensor, found_inf = (
            None if t is None else t.reshape(()) for t in (scale.tensor, scale.found_inf)
        )
        scale = Scale(scale.number, tensor, found_inf)
        ids = self._ids()
        for p in params:
            state = self.state[p]
            if not state:
                state["step"], state["tensor_id"] = new_step(), ids[p]
                self._new_state(group, p, state)
            state["step"] += 1
        shards = {p: self._shard_of(p) for p in params}
        # Of the same sizes on all processes, so that they wait for each other in the same order.
        sizes = [p.numel() if s is None else s.full_numel for p, s in shards.items()]
        for run in _runs(params, sizes):
            rows = [Row(p, self.state[p], group, scale, shards[p]) for p in run]
            self._changes(group, rows, scale)
            for row in rows:
                _add(row, group, scale)


def step_adam(
    grads: list[torch.Tensor],
    states: list[State],
    hyper: AdamHyper,
    nonfinite: torch.Tensor,
    friction: str | None = None,
) -> None:
    """Turns gradients of rows into Adam's update without decay, times minus the learning rate.

    With a `friction` the update is diffGrad's, and the states hold a ``previous_grad``.
    """
    # The rows hold what remains after scale and sign.
    hyper = hyper._replace(maximize=False, grad_scale=1.0)
    step_directions(Batch(grads, grads, states), hyper, nonfinite, friction)


def step_of(state: State) -> int:
    """How often a parameter was stepped, this time included."""
    return int(state["step"].item())


def _runs(params: list[torch.Tensor], sizes: list[int]) -> Iterator[list[torch.Tensor]]:
    """The parameters in order, some at a time to bound the memory."""
    run: list[torch.Tensor] = []
    size, most = 0, RUN_BYTES.get(params[0].device.type, RUN_BYTES["cuda"])
    for p, numel in zip(params, sizes, strict=True):
        if run and size + 4 * numel > most:
            yield run
            run, size = [], 0
        run.append(p)
        size += 4 * numel
    if run:
        yield run


def _add(row: Row, group: Group, scale: Scale) -> None:
    """Adds the change to the parameter, and rounds once."""
    p, change = row.p, row.kept(row.update, 0.0)
    numbers = {"seed": group["seed"], "tensor_id": row.state["tensor_id"]}
    if isinstance(p, QuantizedWeight):
        requantize_with_update(
            p,
            change,
            decay=0.0,
            rounding=group["weight_rounding"],
            step=step_of(row.state),
            found_inf=scale.found_inf,
            **numbers,
        )
    elif p.dtype == torch.bfloat16 and group["stochastic_rounding"]:
        value = change.add_(row.weight)
        rounded = quant.round_bf16_stochastic(value, step=step_of(row.state), **numbers)
        p.copy_(cast(torch.Tensor, rounded))
    elif p.dtype in (torch.bfloat16, torch.float16):
        p.copy_(change.add_(row.weight))
    else:
        p.add_(change)
