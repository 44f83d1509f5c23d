"""Finding a basis anew in the passes of one accumulated step, without the gradient."""

from __future__ import annotations

from typing import cast

import torch

from gradpress.ops import lowrank as kernels
from gradpress.optim._gaussian import gaussian

#: Directions beyond the rank that are carried along, and random vectors that norms are measured
#: with, as in the search by whole gradients.
OVERSAMPLE, PROBES = 8, 4


class SubspaceSearch:
    """One step of subspace iteration from an earlier basis, over several passes.

    The gradient is a sum of products :math:`D_k^T X_k`, one for each pass. The first half of the
    passes add up its images of the earlier basis and some random directions, the others what the
    transposed gradient makes of these images.

    Args:
        basis: float32 ``[min(m, n), rank]``: the earlier basis.
        shape: ``(m, n)`` of the gradient.
        passes: How many there will be; more are taken for the second half.
        seed: Key of the random directions, with `tensor_id` and `step`.
        tensor_id: Which tensor.
        step: Which step.
    """

    def __init__(
        self,
        basis: torch.Tensor,
        shape: tuple[int, int],
        *,
        passes: int,
        seed: int,
        tensor_id: int,
        step: int,
    ) -> None:
        self._upright, self._seed = shape[0] >= shape[1], seed
        self._half, self._seen = max(passes // 2, 1), 0
        short, self._rank = basis.shape
        self._width = min(self._rank + OVERSAMPLE, short)
        noise = gaussian(
            (short, self._width - self._rank + PROBES),
            seed=seed,
            tensor_id=tensor_id,
            draw=step,
            device=basis.device,
        )
        fresh, signs = noise[:, :-PROBES], torch.where(noise[:, -PROBES:] < 0, -1.0, 1.0)
        self._coefficients = basis.T @ signs
        self._start = torch.cat((basis, fresh / short**0.5, signs), dim=1)
        self._images: torch.Tensor | None = None
        self._result: torch.Tensor | None = None

    def add(self, grad_output: torch.Tensor, x: torch.Tensor) -> None:
        """Takes up the factors of a pass.

        Args:
            grad_output: ``[tokens, m]``.
            x: ``[tokens, n]``.
        """
        long, short = (grad_output, x) if self._upright else (x, grad_output)
        long, short = long.float(), short.float()
        if self._images is None or self._seen < self._half:
            images = long.T @ (short @ self._start)
            self._images = images if self._images is None else self._images.add_(images)
        else:
            result = short.T @ (long @ self._images[:, : self._width])
            self._result = result if self._result is None else self._result.add_(result)
        self._seen += 1
        if self._seen == self._half:
            self._energy = self._measure(self._images)
            # Squared, their size might leave the range of float32.
            self._images /= self._images.abs().max().clamp(min=torch.finfo(torch.float32).tiny)

    def _measure(self, images: torch.Tensor) -> torch.Tensor:
        """The share of the squared norm of the first half's gradient that the basis captures.

        By four random vectors on both sides of the ratio (Hutchinson 1990).
        """
        captured = images[:, : self._rank] @ self._coefficients
        norms = [torch.linalg.vector_norm(t) for t in (captured, images[:, self._width :])]
        share: torch.Tensor = (norms[0] / norms[1]).square().clamp(max=1.0)
        return share

    @property
    def energy(self) -> float:
        """The share of the gradient's squared norm that the earlier basis captured."""
        return float(self._energy)

    def result(self) -> torch.Tensor | None:
        """The new basis, float32 ``[min(m, n), rank]``, the leading direction first.

        Returns:
            None where there was no gradient, or one that is not finite.
        """
        result = self._result
        if result is None or not bool(result.isfinite().all()) or not bool(result.any()):
            return None
        *_, rows = kernels.svd(
            (result / result.abs().max()).T.contiguous(),
            rank=self._rank,
            n_iter=1,
            oversample=OVERSAMPLE,
            seed=self._seed,
        )
        basis = cast(torch.Tensor, rows).T
        largest = basis.abs().argmax(dim=0, keepdim=True)
        return (basis * basis.gather(0, largest).sign()).contiguous()
