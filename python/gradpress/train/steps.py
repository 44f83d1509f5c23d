"""Steps whose loss is still on the device, and their records once the host has read it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gradpress.train.device import Clock, Mark, peak_bytes
from gradpress.train.errors import DivergedError
from gradpress.train.process import resident_bytes

# On a device that works on its own: a read makes it wait for the host, so there is one for many
# short steps. Long ones are read one by one, where that costs nothing to speak of.
_MOST_UNREAD = 10
_LONGEST_UNREAD_SECONDS = 1.0


@dataclass(frozen=True)
class Step:
    """One step as the host issued it.

    Attributes:
        fields: What its record tells beside the measurements: `step`, `lr` and the like.
        loss_and_norm: float64 `[2]` on the device: the loss and the gradient's norm.
        issued: When the host began with it, by `time.perf_counter`.
        marks: Of the run's clock: its start, the update's start and end, its end.
    """

    fields: dict[str, Any]
    loss_and_norm: torch.Tensor
    issued: float
    marks: tuple[Mark, Mark, Mark, Mark]


class UnreadSteps:
    """The steps since the last read, all of which are read at once.

    Whoever saves or evaluates weights reads before: what a step made of a loss that is not finite
    is never kept.

    Args:
        device: Where the steps run; on the CPU each of them is to be read by itself.
        clock: What made their marks.
        tokens_per_step: Tokens that one of them predicts.
    """

    def __init__(self, device: torch.device, clock: Clock, tokens_per_step: int) -> None:
        self._device = device
        self._clock = clock
        self._tokens_per_step = tokens_per_step
        self._steps: list[Step] = []
        self.most = 1 if device.type == "cpu" else _MOST_UNREAD

    def add(self, step: Step) -> None:
        """Takes up a step that was issued."""
        self._steps.append(step)

    @property
    def are_due(self) -> bool:
        """Whether they are to be read now, whatever else is going on."""
        if not self._steps:
            return False
        waited = time.perf_counter() - self._steps[0].issued
        return len(self._steps) >= self.most or waited >= _LONGEST_UNREAD_SECONDS

    def read(self) -> Iterator[dict[str, Any]]:
        """Waits for the device and forgets the steps.

        Yields:
            The record of each for `metrics.jsonl`, in their order. Tokens per second are those of
            all these steps together, from the first one's start to the read.

        Raises:
            DivergedError: A loss or gradient is not finite; the steps before were yielded.
        """
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        values = torch.stack([step.loss_and_norm for step in steps]).tolist()
        seconds = time.perf_counter() - steps[0].issued
        shared = {"memory_bytes": resident_bytes()}
        peak = peak_bytes(self._device)
        if peak is not None:
            shared["cuda_peak_bytes"] = peak
        for step, (loss, norm) in zip(steps, values, strict=True):
            check_finite(step.fields["step"], loss, norm)
            start, update, updated, end = step.marks
            yield {
                **step.fields,
                "loss": loss,
                "gradient_norm": norm,
                "tokens_per_second": len(steps) * self._tokens_per_step / seconds,
                "step_seconds": self._clock.seconds(start, end),
                "optimizer_seconds": self._clock.seconds(update, updated),
                **shared,
            }


def check_finite(step: int, loss: float, norm: float) -> None:
    """Refuses a loss or a norm of the gradient that is no finite number.

    Raises:
        DivergedError: One is not finite.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise DivergedError(
            f"step {step}: loss {loss}, gradient norm {norm}; "
            "lower --lr or --lr-rest, or set --clip 1"
        )
