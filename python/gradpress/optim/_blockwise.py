"""What optimizers share whose moments are codes with a scale for each block."""

from __future__ import annotations

import torch

from gradpress.optim._base import Group, LowBitOptimizer
from gradpress.optim._capture import refuse_in_capture


class BlockwiseOptimizer(LowBitOptimizer):
    """Checks the options of block-wise moments and of rounding, and counts skipped elements."""

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if group["state_bits"] not in (4, 8, 32):
            raise ValueError(f"Invalid state_bits value: {group['state_bits']}")
        size = group["block_size"]
        if size is not None and (size < 1 or (group["state_bits"] == 4 and size % 2)):
            raise ValueError(f"Invalid block_size value: {size}")
        if group["weight_rounding"] not in ("stochastic", "nearest"):
            raise ValueError(f"Invalid weight_rounding value: {group['weight_rounding']!r}")
        if not 0 <= group["seed"] < 1 << 64:
            raise ValueError(f"Invalid seed value: {group['seed']}")

    @property
    def nonfinite_gradients(self) -> int:
        """How many gradient elements were NaN or infinite, and left alone, since construction."""
        return sum(int(count.item()) for count in self._counters().values())

    def _counters(self) -> dict[torch.device, torch.Tensor]:
        counters: dict[torch.device, torch.Tensor] = self.__dict__.setdefault("_nonfinite", {})
        return counters

    def _counter(self, device: torch.device) -> torch.Tensor:
        counters = self._counters()
        if device not in counters:
            refuse_in_capture(
                f"{type(self).__name__}: the count of nonfinite_gradients on {device}"
            )
            counters[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return counters[device]
