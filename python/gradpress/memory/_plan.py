"""Predicting what training takes, before anything exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import nn

from gradpress.memory._breakdown import Breakdown
from gradpress.memory._build import OptimizerLike, subject
from gradpress.memory._count import MemoryCount, count
from gradpress.memory._creations import Creation, Creations
from gradpress.memory._held import plan_held
from gradpress.memory._labels import Labels, logits_of
from gradpress.memory._losses import LossFunction, own_loss, token_loss
from gradpress.memory._simulation import simulated
from gradpress.memory._values import SimulatedAccountant

#: The first step makes the states, the second one has them from its start.
_STEPS = 2


@dataclass(frozen=True, repr=False)
class MemoryPlan(Breakdown):
    """What training will take; prints as a table, in notebooks too.

    Attributes:
        parts: Bytes by category when most is live; see `peak_by_category`.
        held: What :func:`gradpress.memory.count` will find after a step, gradients included.
        device: Type of the device that was planned for.
        host_peak: Where that is ``"cuda"``: bytes on the host in addition, as of optimizer states
            that :func:`gradpress.optim.offload_states` keeps there; small tensors are left out.
        largest: The largest storage that a step makes.
        largest_floating: The largest one with floating-point values.
    """

    parts: dict[str, int]
    held: MemoryCount
    device: str
    host_peak: int
    largest: Creation | None
    largest_floating: Creation | None

    @property
    def peak(self) -> int:
        """The most bytes that will be live at a time."""
        return sum(self.parts.values())

    @property
    def peak_by_category(self) -> dict[str, int]:
        """What will be live at that time; the categories are those of :class:`Watch`."""
        return dict(self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything, fit for JSON."""
        return {
            "peak": self.peak,
            "peak_by_category": self.peak_by_category,
            "held": self.held.to_dict(),
            "device": self.device,
            "host_peak": self.host_peak,
            "largest": None if self.largest is None else self.largest.to_dict(),
            "largest_floating": (
                None if self.largest_floating is None else self.largest_floating.to_dict()
            ),
        }

    def _remarks(self) -> list[str]:
        lines = [f"held after a step, with gradients: {self.held.total:,} B"]
        if self.host_peak:
            lines.append(f"on the host in addition: {self.host_peak:,} B")
        for name, creation in (
            ("largest tensor made", self.largest),
            ("largest floating-point", self.largest_floating),
        ):
            if creation is not None:
                lines.append(f"{name}: {creation}")
        return lines


@overload
def plan(
    model: Any,
    optimizer: OptimizerLike | None = None,
    *,
    batch: None = None,
    dtype: torch.dtype | None = None,
) -> MemoryCount: ...
@overload
def plan(
    model: Any,
    optimizer: OptimizerLike | None = None,
    *,
    batch: int,
    sequence: int,
    accumulation_steps: int = 1,
    checkpointing: bool = False,
    loss_chunk: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    loss: LossFunction | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> MemoryPlan: ...
def plan(
    model: Any,
    optimizer: OptimizerLike | None = None,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    accumulation_steps: int = 1,
    checkpointing: bool = False,
    loss_chunk: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    loss: LossFunction | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> MemoryCount | MemoryPlan:
    """Predicts the memory of training, before anything exists.

    Nothing is allocated: the model may be on the meta device, and then be larger than memory.

    Without `batch`, what `count` will find between a backward pass and the next.

    With `batch` and `sequence`, the peak of training too, activations included: two steps are run
    on the meta device, where tensors have shapes only, and every storage is counted as
    :func:`watch` counts it: weights, gradients, what autograd keeps for the backward pass, and
    every intermediate result of the optimizer. Model and optimizer are copied for this and stay
    untouched. What needs values finds zeros: every projector is refreshed in the first step.

    Not counted are the allocator's fragmentation, what operators take and give back inside
    themselves (cuBLAS workspaces, native code on the CPU), the CUDA context, and input data. For
    CUDA, attention is taken to keep what fused kernels keep.

    Args:
        model: Any module, on any device. Or a description, which is built on the meta device: the
            name of a built-in size such as ``"7B"``, a :class:`gradpress.train.TrainConfig`, or a
            configuration of transformers.
        optimizer: Of `model`'s parameters; a class, which is given all parameters; or a callable
            that makes one of the model that it is given, and may change that model first, as by
            :func:`gradpress.nn.quantize_`. None with a `TrainConfig` takes its own. Without
            `batch` it must be one of :mod:`gradpress.optim`.
        batch: Sequences in a forward pass.
        sequence: Tokens in each of them.
        accumulation_steps: Forward and backward passes before each step of the optimizer.
        checkpointing: Switch on :func:`gradpress.nn.checkpoint_blocks_`.
        loss_chunk: Switch on :func:`gradpress.nn.chunk_loss_`, with so many tokens at a time.
        logits_dtype: What logits are converted to before the cross-entropy.
        loss: Computes the loss of the model and of int64 token ids ``[batch, sequence + 1]``, in
            place of the cross-entropy of the model's logits.
        device: Where training will run, ``"cpu"`` or ``"cuda"``: decides about workspaces, about
            the sizes of parts, and about PyTorch's choices of algorithms. By default where the
            model is; ``"cuda"`` for what is on the meta device.
        dtype: Of a described model's weights.

    Returns:
        :class:`MemoryCount` without `batch`, else :class:`MemoryPlan`.

    Raises:
        TypeError: `model` or `optimizer` is none of these.
        ValueError: an option is out of its range or missing.
        RuntimeError: a step of the model or the optimizer needs values.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 100))
        >>> planned = gradpress.memory.plan(model, gradpress.optim.AdamW8bit, batch=4, sequence=32)
        >>> planned.peak_by_category["weights"]
        51600
    """
    if batch is None:
        if isinstance(model, nn.Module) and isinstance(optimizer, torch.optim.Optimizer):
            return plan_held(model, optimizer)
        return plan_held(*subject(model, optimizer, dtype)[:2])
    numbers = {"batch": batch, "sequence": sequence, "accumulation_steps": accumulation_steps}
    for name, number in numbers.items():
        if number is None or number < 1:
            raise ValueError(f"memory.plan: {name} must be at least 1, got {number}")
    assert sequence is not None
    target = _target(model, device)
    built, stepped, offloaded = subject(model, optimizer, dtype)
    if checkpointing:
        from gradpress.nn import checkpoint_blocks_

        checkpoint_blocks_(built)
    if loss_chunk is not None:
        if loss is not None:
            raise ValueError("memory.plan: loss_chunk must be None where a loss is given")
        from gradpress.nn import chunk_loss_

        chunk_loss_(built, chunk_tokens=loss_chunk)
        loss = own_loss
    passes = _Passes(loss or token_loss(logits_dtype), batch, sequence, accumulation_steps)
    return _simulate(built, stepped, offloaded, passes, target)


@dataclass(frozen=True)
class _Passes:
    loss: LossFunction
    batch: int
    sequence: int
    accumulation_steps: int


def _simulate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    offloaded: list[torch.Tensor],
    passes: _Passes,
    device: torch.device,
) -> MemoryPlan:
    creations = Creations(0)
    logits = logits_of(model, passes.batch * passes.sequence)
    accountant = SimulatedAccountant(device, creations, logits)
    for tensor in offloaded:
        accountant.host.adopt(tensor, "optimizer_states")
    labels = Labels(accountant, model, optimizer)
    shape = passes.batch, passes.sequence + 1
    labels.attach()
    try:
        with simulated(device, accountant), accountant:
            for _ in range(_STEPS):
                for _ in range(passes.accumulation_steps):
                    tokens = torch.empty(shape, dtype=torch.int64, device="meta")
                    (passes.loss(model, tokens) / passes.accumulation_steps).backward()  # type: ignore[no-untyped-call]
                    del tokens
                optimizer.step()
                held = count(model, optimizer)
                labels.update()
                optimizer.zero_grad(set_to_none=True)
    except NotImplementedError as error:
        raise RuntimeError(
            "memory.plan: a training step must not need values, which tensors on the meta device do"
            f" not have: {error}"
        ) from error
    finally:
        labels.detach()
    made = creations.of_at_least(0)
    floating = (creation for creation in made if creation.is_floating_point)
    return MemoryPlan(
        accountant.peak_by_category,
        held,
        device.type,
        accountant.host.peak,
        next(iter(made), None),
        next(floating, None),
    )


def _target(model: Any, device: str | torch.device | None) -> torch.device:
    if device is None:
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        device = "cuda" if first is None or first.is_meta else first.device.type
    target = torch.device(device)
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f'memory.plan: device must be "cpu" or "cuda", got {str(target)!r}')
    return torch.device(target.type)
