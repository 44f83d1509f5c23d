"""Peaks of PyTorch's CUDA allocator."""

from __future__ import annotations

from typing import ClassVar

import torch


class CudaPeaks:
    """What `torch.cuda.max_memory_allocated` says of each device between `start` and `stop`.

    The allocator has one peak only, which every start resets: those that run already note it.
    """

    _running: ClassVar[list[CudaPeaks]] = []

    def __init__(self) -> None:
        self._noted: dict[str, int] = {}

    def start(self) -> None:
        """Forgets the peak so far."""
        for other in self._running:
            other._note()
        if _in_use():
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
        self._running.append(self)

    def stop(self) -> None:
        """Keeps the peak."""
        self._note()
        self._running.remove(self)

    def peaks(self) -> dict[str, int]:
        """Bytes by device; empty where CUDA is not in use."""
        if self in self._running:
            self._note()
        return dict(self._noted)

    def _note(self) -> None:
        if not _in_use():
            return
        for index in range(torch.cuda.device_count()):
            name, peak = f"cuda:{index}", torch.cuda.max_memory_allocated(index)
            self._noted[name] = max(self._noted.get(name, 0), peak)


def _in_use() -> bool:
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_available()
