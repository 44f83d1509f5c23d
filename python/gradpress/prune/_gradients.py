"""Norms of single samples' gradients, collected without keeping them."""

from __future__ import annotations

import torch


class GradientNorms:
    """``sum |g|`` or ``sum g^2`` over samples, for every weight of a layer.

    Args:
        rows: Outputs of the layer.
        columns: Inputs of the layer.
        norm: ``"l1"`` or ``"l2"``.
        device: Where the sums lie.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        norm: str = "l1",
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.norm = norm
        self.samples = 0
        self._sum = torch.zeros(rows, columns, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return self._sum.nbytes

    def update_from_activations(self, inputs: torch.Tensor, grad_outputs: torch.Tensor) -> None:
        """Adds samples: ``[samples, tokens, columns]`` and ``[samples, tokens, rows]``."""
        for x, dy in zip(inputs, grad_outputs, strict=True):
            gradient = dy.float().T @ x.float()
            self._sum += gradient.abs() if self.norm == "l1" else gradient.square()
            self.samples += 1

    @property
    def values(self) -> torch.Tensor:
        """The mean of magnitudes, or the root of the mean of squares."""
        mean = self._sum / max(self.samples, 1)
        return mean if self.norm == "l1" else mean.sqrt()

    def reference_values(self, scale: float = 100.0) -> torch.Tensor:
        """The sum of ``scale |g|``, or the root of the sum of ``(scale g)^2``."""
        return self._sum * scale if self.norm == "l1" else self._sum.sqrt() * scale
