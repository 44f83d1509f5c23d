"""Masks that wait until the gradients of the unchanged model are no longer needed."""

from __future__ import annotations

import numpy as np
import torch

from gradpress.engine._layers import Layer
from gradpress.engine._recipe import Outcome


class Pending:
    """One bit for each weight: whether it stays."""

    def __init__(self) -> None:
        self._held: list[tuple[Layer, np.ndarray]] = []

    def add(self, layer: Layer, outcome: Outcome) -> None:
        """Keeps a mask for later.

        Raises:
            ValueError: the recipe changes weights in another way.
        """
        if outcome.mask is None:
            raise ValueError(
                "compress: gradient_memory must be left out for a recipe that changes the weights"
                f" that stay, got {outcome.name} without a mask"
            )
        self._held.append((layer, np.packbits(outcome.mask.cpu().numpy())))

    def apply(self) -> None:
        """Zeroes what does not stay."""
        for layer, bits in self._held:
            matrix = layer.matrix
            flat = torch.from_numpy(np.unpackbits(bits, count=matrix.numel()))
            mask = flat.view(matrix.shape).to(matrix.device, torch.bool)
            layer.write(torch.where(mask, matrix, torch.zeros_like(matrix)))
        self._held.clear()
