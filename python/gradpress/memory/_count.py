"""Counting what a model and its optimizer take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradpress.nn._weight import QuantizedWeight
from gradpress.optim._sharded import local

_MIB = 1 << 20


@dataclass(frozen=True)
class MemoryCount:
    """Bytes by category; prints as a table.

    Attributes:
        by_category: Bytes of ``weights`` (values or integer codes), ``weight_scales`` (scales and
            zero points), ``buffers``, ``gradients``, ``optimizer_states`` (moments and counters)
            and ``projectors``. Categories without bytes are left out.
    """

    by_category: dict[str, int]

    @property
    def total(self) -> int:
        """The sum of all categories."""
        return sum(self.by_category.values())

    def to_dict(self) -> dict[str, Any]:
        """``by_category`` and ``total``, fit for JSON."""
        return {"by_category": dict(self.by_category), "total": self.total}

    def __str__(self) -> str:
        """The table."""
        rows = [*self.by_category.items(), ("total", self.total)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{n:<{width}}  {b:>15,} B  {b / _MIB:>10.2f} MiB" for n, b in rows)

    __repr__ = __str__


def count(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> MemoryCount:
    """Counts the bytes that a model, its gradients and its optimizer hold.

    Storage that is shared is counted once. Of sharded tensors (DTensor) this process's part is.
    Activations and the allocator's own overhead are not counted.

    Args:
        model: Any module.
        optimizer: Any PyTorch optimizer; its states exist after the first step.
    """
    seen: set[tuple[int, int]] = set()
    totals: dict[str, int] = {}
    for category, tensor in tensors_of(model, optimizer):
        # By the storage itself: on the meta device all have the same address. Gradients of FSDP
        # are parts of one.
        tensor = local(tensor)
        part = (tensor.untyped_storage()._cdata, int(tensor.storage_offset()))
        if part not in seen:
            seen.add(part)
            totals[category] = totals.get(category, 0) + tensor.nbytes
    return MemoryCount({name: size for name, size in totals.items() if size})


def category_of_state(state_name: str) -> str:
    """Of a tensor of an optimizer's state."""
    return "projectors" if "projector" in state_name else "optimizer_states"


def tensors_of(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for p in model.parameters():
        if isinstance(p, QuantizedWeight):
            yield "weights", p.codes
            yield "weight_scales", p.scale
            yield "weight_scales", p.zero_point
        else:
            yield "weights", p
        if p.grad is not None:
            yield "gradients", p.grad
    for buffer in model.buffers():
        yield "buffers", buffer
    if optimizer is not None:
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    yield category_of_state(name), value
