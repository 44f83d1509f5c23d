"""Measuring what training takes, while it runs."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn

from gradpress.memory._accountant import Accountant
from gradpress.memory._breakdown import Breakdown
from gradpress.memory._creations import Creation, Creations
from gradpress.memory._cuda import CudaPeaks
from gradpress.memory._labels import Labels, logits_of


class Watch(Breakdown):
    """What :func:`watch` measures; readable while it runs and afterwards.

    Attributes:
        peak: The most bytes that were live at a time.
        peak_by_category: What was live at that time: ``weights``, ``weight_scales``, ``buffers``,
            ``projectors``, ``optimizer_states``, ``gradients``, ``accumulators`` (other tensors
            that the optimizer holds), ``activations`` (what else there was when a backward pass
            began), ``logits`` of a language model of transformers, and ``temporaries``:
            everything else, such as what checkpoints compute again.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        min_bytes: int = 1024,
    ) -> None:
        self._creations = Creations(min_bytes)
        logits = logits_of(model) if model is not None else None
        self._accountant = Accountant(creations=self._creations, logits=logits)
        self._labels = Labels(self._accountant, model, optimizer)
        self._cuda = CudaPeaks()
        self._state = "new"

    def __enter__(self) -> Watch:
        """Begins.

        Raises:
            RuntimeError: it was begun before.
        """
        if self._state != "new":
            raise RuntimeError("memory.watch: a watch measures once; make another one")
        self._state = "running"
        self._labels.attach()
        self._cuda.start()
        self._accountant.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends, also after an error."""
        self._accountant.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        self._labels.update()
        self._labels.detach()
        self._cuda.stop()
        self._state = "over"

    @property
    def peak(self) -> int:
        """The most bytes that were live at a time."""
        return self._accountant.peak

    @property
    def peak_by_category(self) -> dict[str, int]:
        """What was live at that time; categories without bytes are left out."""
        self._update()
        return self._accountant.peak_by_category

    @property
    def current(self) -> int:
        """Bytes that are live now."""
        return self._accountant.current

    @property
    def current_by_category(self) -> dict[str, int]:
        """What is live now."""
        self._update()
        return self._accountant.current_by_category

    @property
    def peak_by_device(self) -> dict[str, int]:
        """The most bytes that were live at a time on each device; the times may differ."""
        return dict(self._accountant.peak_by_device)

    @property
    def cuda_peak(self) -> dict[str, int]:
        """Of each CUDA device what `torch.cuda.max_memory_allocated` says, from the start on."""
        return self._cuda.peaks()

    @property
    def largest(self) -> Creation | None:
        """The largest storage that was made; None where none reached `min_bytes`."""
        return next(iter(self.created()), None)

    @property
    def largest_floating(self) -> Creation | None:
        """The largest one with floating-point values."""
        return next((c for c in self.created() if c.is_floating_point), None)

    def created(self, min_bytes: int | None = None) -> list[Creation]:
        """Storages that were made, the largest first; equal ones count together.

        Args:
            min_bytes: Smaller ones are left out; the watch's own bound by default.

        Raises:
            ValueError: `min_bytes` is below that bound, so that not all were kept.
        """
        bound = self._creations.min_bytes
        if min_bytes is not None and min_bytes < bound:
            raise ValueError(
                f"Watch.created: min_bytes must be at least the watch's own, {bound},"
                f" got {min_bytes}"
            )
        return self._creations.of_at_least(bound if min_bytes is None else min_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The results, fit for JSON."""
        largest, floating = self.largest, self.largest_floating
        return {
            "peak": self.peak,
            "peak_by_category": self.peak_by_category,
            "peak_by_device": self.peak_by_device,
            "current": self.current,
            "current_by_category": self.current_by_category,
            "cuda_peak": self.cuda_peak,
            "largest": None if largest is None else largest.to_dict(),
            "largest_floating": None if floating is None else floating.to_dict(),
        }

    def _update(self) -> None:
        if self._state == "running":
            self._labels.update()

    def _remarks(self) -> list[str]:
        lines = [f"live now: {self.current:,} B"]
        for name, creation in (
            ("largest tensor made", self.largest),
            ("largest floating-point", self.largest_floating),
        ):
            if creation is not None:
                lines.append(f"{name}: {creation}")
        lines += [
            f"{device} allocator's peak: {size:,} B" for device, size in self.cuda_peak.items()
        ]
        return lines


def watch(
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    min_bytes: int = 1024,
) -> Watch:
    """Measures the memory of tensors while a block of code runs.

    Every storage that a PyTorch operator makes in the block is counted once, from its creation to
    the moment it is freed, on the CPU and on other devices: activations that autograd keeps,
    gradients, what optimizers make, and what the kernels of this package are given to write into.
    Views and in-place operators make nothing new; tensor subclasses count as the tensors inside
    them. What exists before counts where `model` and `optimizer` are given: parameters, buffers,
    gradients and states.

    Not counted are memory that operators take and give back inside themselves (native code, cuBLAS
    workspaces), the allocator's fragmentation, and what other threads make beside autograd's own.
    On CUDA, `Watch.cuda_peak` has the allocator's view in addition; its peak is reset at the start.

    An operator takes 30 to 60 µs more on a CPU core; the first one of a process loads
    `torch._dynamo`, which takes seconds. Watches may stand in one another: each counts by itself.
    Functions that `torch.compile` has compiled run as if they were not.

    Args:
        model: Its tensors are the baseline, and gradients of its parameters are told apart.
        optimizer: Its states are told apart.
        min_bytes: Storages from this size on are listed by `Watch.created`, with the operator and
            the line that made them.

    Returns:
        A context manager with the results, that may be used once.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Linear(256, 256, bias=False)
        >>> with gradpress.memory.watch(model) as watched:
        ...     model(torch.ones(4, 256)).sum().backward()
        >>> watched.peak_by_category["weights"], watched.peak_by_category["gradients"]
        (262144, 262144)
        >>> watched.largest.operator, watched.largest.shape
        ('aten.mm.default', (256, 256))
    """
    return Watch(model, optimizer, min_bytes=min_bytes)
