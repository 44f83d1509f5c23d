"""Where a run computes: the choice of a device, and what the host does differently for it."""

from __future__ import annotations

import re
import time
from typing import TypeAlias, cast

import torch

from gradpress import nn, optim
from gradpress.environment import processor_name
from gradpress.train.errors import UserError

Mark: TypeAlias = "float | torch.cuda.Event"


def choose_device(name: str) -> torch.device:
    """The device behind the value of `--device`.

    `auto` takes CUDA where PyTorch sees a device and a small optimizer step succeeds on it.

    Args:
        name: `auto`, `cpu`, `cuda` (the current CUDA device) or `cuda:N`.

    Returns:
        The device; one of CUDA has its number.

    Raises:
        UserError: There is no device of that name, or the kernels refuse it.
    """
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return _best_device(count)
    parts = re.fullmatch(r"cuda(?::([0-9]+))?", name)
    if parts is None:
        raise UserError(f"--device {name}: takes auto, cpu, cuda or cuda:N")
    if count == 0:
        raise UserError(f"--device {name}: PyTorch sees no CUDA device; takes auto or cpu here")
    index = torch.cuda.current_device() if parts[1] is None else int(parts[1])
    if index >= count:
        known = ", ".join(f"cuda:{number}" for number in range(count))
        raise UserError(
            f"--device {name}: PyTorch sees {count} of them; takes auto, cpu, cuda, {known} here"
        )
    device = torch.device("cuda", index)
    refusal = kernel_refusal(device)
    if refusal is not None:
        raise UserError(f"--device {name}: gradpress's kernels cannot run there ({refusal})")
    return device


def _best_device(count: int) -> torch.device:
    if count == 0:
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    refusal = kernel_refusal(device)
    if refusal is None:
        return device
    print(f"{device} is left out: gradpress's kernels cannot run there ({refusal})", flush=True)
    return torch.device("cpu")


def kernel_refusal(device: torch.device) -> str | None:
    """Tries a step of Q-GaLore on an INT8 weight, which takes kernels of every family.

    Args:
        device: Any device.

    Returns:
        Why the step failed, in one line; None when it succeeded.
    """
    # Made without values, which would move PyTorch's random state on.
    layer = torch.nn.Linear(16, 16, bias=False, device="meta").to_empty(device=device)
    torch.nn.init.eye_(layer.weight)
    try:
        nn.quantize_(layer)
        groups = [{"params": [layer.weight], "rank": 4}]
        optimizer = optim.QGaLoreAdamW(groups, min_8bit_size=0)
        layer(torch.eye(16, device=device)).square().sum().backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a kernel's fault shows where the host waits
    except (RuntimeError, ValueError, TypeError) as error:
        return " ".join(str(error).split())
    return None


def describe(device: torch.device) -> str:
    """The device's name, and the name of the card or processor behind it."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({processor_name()})"


def to_device(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Brings a batch from the host to a device, which the host does not wait for."""
    if device.type == "cuda":
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


def reset_peak(device: torch.device) -> None:
    """Starts the count of `peak_bytes` anew, at what is allocated now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes of a CUDA device that PyTorch's tensors took at a time; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


class Clock:
    """Marks points of the work on a device, and tells the time between them afterwards.

    On CUDA a mark is an event in the device's queue: making one waits for nothing, and the time
    between two is what the device saw, not when the host issued the work.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        """Marks the end of the work that was issued so far."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Seconds between two marks; the device must have come past the later one."""
        if self._device.type != "cuda":
            return cast(float, end) - cast(float, start)
        first, last = cast(torch.cuda.Event, start), cast(torch.cuda.Event, end)
        return float(first.elapsed_time(last)) / 1e3
