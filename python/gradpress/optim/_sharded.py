"""Parameters that are divided over processes (DTensor), as FSDP2's `fully_shard` makes them.

Every process steps its own rows; what an optimizer keeps for them are DTensors, which
`torch.distributed.checkpoint` knows how to save. Scales of blocks and packed codes have an entry
for several elements, a `unit`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard, cast

import torch

from gradpress.nn._weight import QuantizedWeight

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

#: Keys of random numbers: tensors count up to here, shards above.
TENSORS = 20


def is_sharded(p: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, of whatever placements."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(p, module.DTensor)


def is_fully_sharded(model: torch.nn.Module) -> bool:
    """Whether `fully_shard` was applied to a module or to one inside it."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and any(isinstance(m, module.FSDPModule) for m in model.modules())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


@dataclass(frozen=True)
class Shard:
    """The rows of a parameter that a process has.

    Attributes:
        p: The parameter.
        tail: The shape of a row of it, or of what is kept for a row.
        dim: The dimension of the device mesh over which it is divided; None where every process
            has all of it.
        count: Over how many processes.
        index: Which of them this is.
    """

    p: DTensor
    tail: torch.Size
    dim: int | None = None
    count: int = 1
    index: int = 0

    @classmethod
    def of(cls, p: DTensor, optimizer: str) -> Shard:
        """The shard of this process.

        Args:
            p: A parameter.
            optimizer: The name of its optimizer's class.

        Raises:
            NotImplementedError: the parameter is divided in another way than along its first
                dimension, and over one dimension of the mesh.
        """
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor import Shard as Divided

        mesh, placements = p.device_mesh, p.placements
        divided = [i for i, kind in enumerate(placements) if type(kind) is not Replicate]
        if any(placements[i] != Divided(0) for i in divided) or len(divided) > 1:
            raise NotImplementedError(
                f"{optimizer}: sharded parameters must be divided along their first dimension over"
                f" one dimension of the device mesh, as fully_shard does; got {placements}"
            )
        if isinstance(p._local_tensor, QuantizedWeight):
            raise NotImplementedError(
                f"{optimizer}: sharded parameters must be floating-point, got integer codes;"
                " replicate them, as DistributedDataParallel does"
            )
        tail = p.shape[1:]
        if not divided:
            return cls(p, tail)
        dim = divided[0]
        return cls(p, tail, dim, mesh.size(dim), mesh.get_local_rank(dim))

    # Sizes

    @property
    def rows(self) -> int:
        """Rows of this process."""
        return self.p._local_tensor.shape[0] if self.p.dim() else 1

    @property
    def first_row(self) -> int:
        """Which row of the parameter the first one of this process is."""
        return min(self.index * self._most_rows, self._all_rows)

    @property
    def numel(self) -> int:
        """Elements of this process."""
        return self.rows * self.row_numel

    @property
    def full_numel(self) -> int:
        """Elements of the process that has most."""
        return self._most_rows * self.row_numel

    @property
    def row_numel(self) -> int:
        """Elements of a row."""
        return math.prod(self.tail)

    @property
    def _all_rows(self) -> int:
        return self.p.shape[0] if self.p.dim() else 1

    @property
    def _most_rows(self) -> int:
        return -(-self._all_rows // self.count)

    # Communication

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The values of every process, in the order of the shards: ``[count, *values.shape]``."""
        if self.dim is None:
            return values.unsqueeze(0)
        everyone = [torch.empty_like(values) for _ in range(self.count)]
        group = self.p.device_mesh.get_group(self.dim)
        torch.distributed.all_gather(everyone, values.contiguous(), group)
        return torch.stack(everyone)

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of the values of all processes, the same for every one of them; in place."""
        if self.dim is not None:
            torch.distributed.all_reduce(values, group=self.p.device_mesh.get_group(self.dim))
        return values

    def broadcast(self, values: torch.Tensor) -> None:
        """Makes values those of the first process."""
        if self.dim is None:
            return
        sent = values.to(self.p.device)
        group = self.p.device_mesh.get_group(self.dim)
        torch.distributed.broadcast(sent, group=group, group_src=0)
        if sent is not values:
            values.copy_(sent)

    def local_grad(self) -> torch.Tensor:
        """The gradient of this process's rows."""
        grad = cast(torch.Tensor, self.p.grad)
        if is_sharded(grad) and grad.placements != self.p.placements:
            grad = grad.redistribute(placements=self.p.placements)
        return local(grad)

    def key(self, tensor_id: int) -> int:
        """The key of this shard's random numbers; of the first shard, `tensor_id` itself."""
        return (tensor_id + (self.index << TENSORS)) % (1 << 32)

    # States

    def store(self, values: torch.Tensor, unit: int | None) -> torch.Tensor:
        """A DTensor of the states of all processes.

        A state of the parameter's shape is placed as the parameter is. One with an entry for each
        unit is a matrix ``[rows, units of a row]``, divided alike, where a row has a whole number
        of units: it is the same on any number of processes. Elsewhere it is a vector with as many
        entries for every process as the first one needs, of which the last ones may be unused: it
        belongs to shards of this size.

        Args:
            values: Of this process: of the parameter's local shape, or ``[ceil(numel / unit)]``.
            unit: Elements of the parameter that share an entry; None for the parameter's shape.
        """
        shape = self._stored_shape(unit)
        if unit is not None and self.crosses(unit):
            padded = values.new_zeros(shape[0] // self.count)
            padded[: values.numel()] = values
            values = padded
        elif unit is not None:
            values = values.view(self.rows, shape[1])
        return self._place(values, shape)

    def load(self, stored: torch.Tensor, unit: int | None, name: str) -> torch.Tensor:
        """What `store` was given; of the same memory.

        Args:
            stored: What it returned.
            unit: As for `store`.
            name: The state's.

        Raises:
            ValueError: the state is not divided as the parameter is.
        """
        shape = self._stored_shape(unit)
        if not is_sharded(stored) or stored.shape != shape:
            raise ValueError(
                f"state {name} of a sharded parameter of shape {list(self.p.shape)} must be a"
                f" DTensor of shape {list(shape)}, got {type(stored).__name__} of shape"
                f" {list(stored.shape)}; states load by torch.distributed.checkpoint, and on the"
                " same number of processes where a row is not a whole number of blocks"
            )
        values = stored._local_tensor
        return values if unit is None else values.view(-1)[: -(-self.numel // unit)]

    def crosses(self, unit: int) -> bool:
        """Whether units cross the borders of rows, so that entries depend on the shards."""
        return self.row_numel % unit != 0

    def _stored_shape(self, unit: int | None) -> torch.Size:
        if unit is None:
            return self.p.shape[:1] + self.tail
        if self.crosses(unit):
            return torch.Size([self.count * -(-self.full_numel // unit)])
        return torch.Size([self._all_rows, self.row_numel // unit])

    def _place(self, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            values,
            self.p.device_mesh,
            self.p.placements,
            run_check=False,
            shape=shape,
            stride=tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))),
        )
