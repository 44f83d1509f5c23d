"""Optimizers that report on what they do, layer by layer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch

from gradpress.optim._report import LayerRow, OptimizerReport
from gradpress.optim._report_measures import with_bytes, with_saturation
from gradpress.optim._sharded import Shard, is_sharded
from gradpress.optim._sharded_state import local_state, planned_codes

Group = dict[str, Any]
State = dict[str, Any]


class ReportingOptimizer(torch.optim.Optimizer):
    """An optimizer with a report; subclasses say what their states are like."""

    def _names(self) -> Iterator[tuple[str, torch.Tensor, Group]]:
        """Every parameter with its name, or its ordinal where it has none."""
        ordinals = itertools.count()
        for group in self.param_groups:
            names = group.get("param_names", itertools.repeat(None))
            for p, name in zip(group["params"], names, strict=False):
                ordinal = next(ordinals)
                yield name if name is not None else f"{ordinal}", p, group

    def report(self, *, codes: bool = True) -> OptimizerReport:
        """What was done to every parameter, what it takes, and how full its codes are.

        Nothing of it is computed in steps.

        Args:
            codes: Look through all codes for those at the ends of their range, which takes about
                the time of a step and waits for the device; False leaves these shares out.

        Returns:
            A table with a row for each parameter that was stepped; it prints, shows in notebooks,
            plots, and converts to dicts and to pandas.

        Example:
            >>> import torch, gradpress
            >>> model = torch.nn.Linear(128, 128)
            >>> optimizer = gradpress.optim.AdamW8bit(model.named_parameters())
            >>> model(torch.ones(2, 128)).square().sum().backward()
            >>> optimizer.step()
            >>> [(row.name, row.steps, row.state_bytes) for row in optimizer.report().rows]
            [('weight', 1, 33284), ('bias', 1, 1028)]
        """
        rows, unstepped, seen = [], [], set[int]()
        for name, p, group in self._names():
            state = cast(State, self.state.get(p))
            if not state:
                unstepped.append(name)
                continue
            projected = "projector_rank" in state
            row = (self._report_row if projected else _plain_row)(name, p, state, group)
            row = with_bytes(row, p, state, seen)
            if codes:
                planned = functools.partial(self._planned_codes, group, p)
                if is_sharded(p):
                    shard = Shard.of(p, type(self).__name__)
                    state = local_state(shard, state, group)
                    planned = functools.partial(planned_codes, shard, state)
                row = with_saturation(row, p, state, group, planned)
            rows.append(row)
        return OptimizerReport(tuple(rows), tuple(unstepped))

    def _report_row(self, name: str, p: torch.Tensor, state: State, group: Group) -> LayerRow:
        """What the numbers in the state of a projected parameter say."""
        return LayerRow.of(name, p, state)

    def _planned_codes(self, group: Group, p: torch.Tensor) -> State:
        """The state of a parameter if its moments were codes of 8 bits, one to the byte."""
        options = {**group, "state_bits": 8, "min_8bit_size": 0}
        return self._planned_state(options, torch.empty(p.shape, dtype=p.dtype, device="meta"))

    def _planned_state(self, group: Group, p: torch.Tensor) -> State:
        """What `step` would make for a parameter; the tensors are on the meta device.

        Args:
            group: The options.
            p: A tensor of the parameter's shape and dtype on the meta device.
        """
        raise NotImplementedError


def _plain_row(name: str, p: torch.Tensor, state: State, group: Group) -> LayerRow:
    return LayerRow.of(name, p, state)
