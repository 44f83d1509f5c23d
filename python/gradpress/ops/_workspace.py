"""Memory for intermediate results on devices, which the native core does not allocate itself."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gradpress.ops._arrays import Array
from gradpress.ops.runtime import is_emulated


def workspace(x: Array, size: Callable[[], int]) -> torch.Tensor | None:
    """A workspace on the device of `x`, or None where the op takes none.

    Args:
        x: One of the op's tensors.
        size: Tells how many bytes the op takes; asked on devices only.
    """
    device = x.device if isinstance(x, torch.Tensor) else torch.device("cpu")
    if device.type == "cpu" and not is_emulated():
        return None
    count = size()
    return torch.empty(count, dtype=torch.uint8, device=device) if count else None
