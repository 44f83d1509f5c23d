"""Steps that a CUDA graph records: counted on the device, and read by nobody else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def is_capturing() -> bool:
    """Whether a CUDA graph records what the current stream is given."""
    started = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


def refuse_in_capture(what: str) -> None:
    """Refuses to make, while a graph is recorded, what every replay would make anew.

    Args:
        what: Of which optimizer, and what of it.

    Raises:
        RuntimeError: a graph is being recorded.
    """
    if is_capturing():
        raise RuntimeError(
            f"{what} must exist before step() is captured in a CUDA graph, or every replay would"
            " begin with it anew; call step() once, with gradients, before the capture"
        )


def count_on_device(
    states: Sequence[dict[str, Any]],
    device: torch.device,
    found_inf: torch.Tensor | None,
    optimizer: str,
) -> None:
    """Counts a step in every state, unless the device finds that it is skipped.

    Args:
        states: Their ``step`` comes to the device where it is not there yet.
        device: Of the parameters.
        found_inf: float32 of one element on the device; not zero where the step is skipped.
        optimizer: The name of its class.
    """
    for state in states:
        if state["step"].device != device:
            refuse_in_capture(f"{optimizer}: counters on {device}")
            state["step"] = state["step"].to(device, torch.float32)
    counters = [state["step"] for state in states]
    if found_inf is None:
        torch._foreach_add_(counters, 1.0)
    else:
        taken = (found_inf == 0).to(torch.float32).reshape(())
        torch._foreach_add_(counters, [taken] * len(counters))


def count_on_host(states: Sequence[dict[str, Any]]) -> None:
    """Counts a step in every state; a ``step`` that is on a device comes to the host."""
    for state in states:
        state["step"] = state["step"].cpu()
        state["step"] += 1
