"""Finding the Tucker form of a gradient: truncated HOSVD, then higher-order orthogonal iteration.

De Lathauwer, De Moor, Vandewalle: "A Multilinear Singular Value Decomposition" and "On the Best
Rank-1 and Rank-(R_1, ..., R_N) Approximation of Higher-Order Tensors", SIAM J. Matrix Anal. Appl.
21 (2000). The first sweep truncates every mode before it looks at the next one (Vannieuwenhoven,
Vandebril, Meerbergen: "A New Truncation Strategy for the Higher-Order Singular Value
Decomposition", SIAM J. Sci. Comput. 34, 2012). Its error is within a factor of the root of the
order of the best one, as that of the plain HOSVD, and only its first search sees all of the
gradient. It is what a later refresh does too: the iteration alone would see a new gradient through
the subspace of an old one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch

from gradpress.ops import lowrank as kernels
from gradpress.optim._gaussian import gaussian
from gradpress.optim._limiter import total_norm
from gradpress.optim._products import product, transposed_product
from gradpress.optim._tucker import Factors, multiply_all, multiply_first

#: Sweeps of orthogonal iteration after the HOSVD. One comes within 1e-3 of the energy of the
#: converged iteration where the gradient has a subspace. Of noise another one adds a percent at the
#: most, for half of the cost again, and the next gradient is another one anyway.
SWEEPS = 1
#: Of the searches on the longer side, which start from nothing.
POWER_ITERATIONS, OVERSAMPLE = 2, 8


class Search(NamedTuple):
    """How directions are looked for.

    Attributes:
        warm: Whether factors of an earlier refresh are at hand.
        seed: Key of the random numbers, with `tensor_id` and `step`.
        tensor_id: Which parameter.
        step: Steps that it has taken.
    """

    warm: bool
    seed: int
    tensor_id: int
    step: int

    def directions(
        self, unfolding: torch.Tensor, earlier: torch.Tensor, warm: bool
    ) -> torch.Tensor | None:
        """The leading left singular directions, those of the larger singular values first.

        Args:
            unfolding: ``[n, rest]``; float32, float16 or bfloat16.
            earlier: ``[n, rank]``: an earlier result, which a search on the shorter side starts
                from where `warm`.
            warm: Whether there is one.

        Returns:
            ``[n, rank]`` with orthonormal columns, whatever the rank of the unfolding. None where
            it is zero or not finite.
        """
        rows, columns = unfolding.shape
        if rows > columns:
            return self._of_longer_side(unfolding, earlier.shape[1])
        # Of a square matrix the kernel takes the columns as the shorter side.
        grad = unfolding.T if rows == columns else unfolding
        basis = earlier.clone()
        (outcome,) = kernels.refresh_basis(
            [grad.contiguous()],
            [basis],
            [basis[:, 0].clone()],
            warm=[warm],
            seed=self.seed,
            tensor_ids=[self.tensor_id],
            steps=[self.step],
        )
        return basis if outcome.status == kernels.REFRESHED else None

    def _of_longer_side(self, unfolding: torch.Tensor, rank: int) -> torch.Tensor | None:
        """From nothing: such an unfolding is a small one, with fewer columns than the mode's size.

        Where it has fewer directions than asked for, others at right angles to them fill up.
        """
        missing = max(0, rank - unfolding.shape[1])
        try:
            directions = self._left_vectors(unfolding, rank - missing)
        except ValueError:  # a product of finite numbers that is not finite
            return None
        if not missing:
            return directions
        shape, device = (unfolding.shape[0], missing), unfolding.device
        filling = gaussian(shape, seed=self.seed, tensor_id=self.tensor_id, draw=0, device=device)
        # Columns of different lengths stay the same ones whatever the last bits are.
        lengths = torch.linspace(2.0, 1.0, missing, device=device)
        for _ in range(2):
            filling = filling - product(directions, transposed_product(directions, filling))
            filling = self._left_vectors(filling * lengths, missing)
        return torch.cat((directions, filling), dim=1)

    def _left_vectors(self, matrix: torch.Tensor, rank: int) -> torch.Tensor:
        """Left singular vectors; the largest entry of each is positive."""
        u, _, _ = kernels.svd(
            matrix.contiguous(),
            rank=rank,
            n_iter=POWER_ITERATIONS,
            oversample=OVERSAMPLE,
            seed=self.seed,
        )
        u = cast(torch.Tensor, u)
        largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
        return u * torch.where(largest < 0, -1.0, 1.0)


def decompose(grad: torch.Tensor, earlier: Factors, search: Search) -> tuple[Factors, float] | None:
    """Finds the factors of a gradient, and the share of its squared norm that the core has.

    Waits for the device. Takes one copy of the gradient in its dtype, and one in float32, at a
    time.

    Args:
        grad: Contiguous; float32, float16 or bfloat16.
        earlier: A start where the search is warm; tells the ranks.
        search: How to look.

    Returns:
        None for a gradient that is zero or has NaN or infinite values.
    """
    largest = float(torch.linalg.vector_norm(grad, float("inf"), dtype=torch.float32))
    if not 0.0 < largest < float("inf"):
        return None
    found = list(earlier.matrices)
    for sweep in range(1 + SWEEPS):
        core = grad
        for k, factor in enumerate(found):
            others = core if sweep == 0 else _contract_later(core, found[k + 1 :])
            unfolding = others.reshape(others.shape[0], -1)
            directions = search.directions(unfolding, factor, search.warm or sweep > 0)
            if directions is None:
                return None
            found[k] = directions
            core = multiply_first(core, directions)
    captured = total_norm(core / largest) / total_norm(grad.to(torch.float32) / largest)
    return Factors(earlier.shape, tuple(found)), min(1.0, float(captured) ** 2)


def _contract_later(x: torch.Tensor, later: Sequence[torch.Tensor]) -> torch.Tensor:
    """A tensor whose first mode stays, those of `later` follow and are contracted."""
    if not later:
        return x
    x = multiply_all(x.movedim(0, -1), later)
    return x.movedim(-1 - len(later), 0)
