"""What a section is told: the device, the sizes, and how much time there is."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Context:
    """What a section is told.

    Attributes:
        device: Where it works; the CPU in a dry run.
        quick: Small sizes, few rounds.
        deadline: On the clock of `time.monotonic`: when the section will be ended.
        folder: For logs.
    """

    device: torch.device
    quick: bool
    deadline: float
    folder: Path

    @property
    def on_card(self) -> bool:
        """Whether this is no dry run."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the section is ended."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        """Waits for the card."""
        if self.on_card:
            torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        """Memory that nobody holds; without a card enough for the small sizes of a dry run."""
        if not self.on_card:
            return 1 << 30
        self.release()
        return torch.cuda.mem_get_info(self.device)[0]

    def release(self) -> None:
        """Gives memory back that nothing refers to any more."""
        gc.collect()
        if self.on_card:
            torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        """Begins to watch for the most memory held."""
        if self.on_card:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """The most memory that tensors held since `reset_peak`; 0 without a card."""
        return torch.cuda.max_memory_allocated(self.device) if self.on_card else 0
