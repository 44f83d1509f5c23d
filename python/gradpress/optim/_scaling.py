"""Gradient scaling whose numbers stay on the device, and steps that the device skipped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from gradpress.ops.runtime import is_emulated


class Scale(NamedTuple):
    """What `torch.amp.GradScaler` tells about the gradients of a step.

    Attributes:
        number: Gradients are divided by it.
        tensor: And by this float32 of one element on their device, which nobody waits for.
        found_inf: Where this float32 of one element on their device is not zero, nothing is
            written.
    """

    number: float = 1.0
    tensor: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None

    def on(self, device: torch.device) -> Scale:
        """The same for tensors of another device."""
        tensor, found_inf = (
            None if t is None else t.to(device, torch.float32, non_blocking=True)
            for t in (self.tensor, self.found_inf)
        )
        return Scale(self.number, tensor, found_inf)

    @property
    def factor(self) -> float | torch.Tensor:
        """What the kernels divide by."""
        return self.number if self.tensor is None else self.tensor


def stays_on_device(number: torch.Tensor | None) -> bool:
    """Whether reading what the scaler has set would make the host wait for a device."""
    return number is not None and (number.is_cuda or is_emulated())


class OpenStep:
    """A step of which the host does not know yet whether the device skipped it.

    Its counters stand as if it had been done. `settle` corrects them, as late as the next step
    begins: by then the device has come past this one, and nobody waits.

    Args:
        found_inf: The scaler's flag, on a device.
        counters: The `step` of every parameter that was counted.
    """

    def __init__(self, found_inf: torch.Tensor, counters: Iterable[torch.Tensor]) -> None:
        self._counters = list(counters)
        self._event: torch.cuda.Event | None = None
        self._flag = found_inf.detach().clone()
        if found_inf.is_cuda:
            flag = torch.empty(found_inf.shape, dtype=found_inf.dtype, pin_memory=True)
            self._flag = flag.copy_(found_inf.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(found_inf.device))

    def settle(self) -> None:
        """Takes the counters back where the step was skipped."""
        if self._event is not None:
            self._event.synchronize()
        if float(self._flag):
            for counter in self._counters:
                counter -= 1
