"""Ranks of projections, chosen by how much of each gradient its leading directions hold."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from gradpress.ops import lowrank as kernels

#: The options of a parameter group that ranks are chosen by, in the order of :class:`RankRule`.
OPTIONS = ("rank_energy", "rank_budget", "rank_min", "rank_max", "rank_multiple")
#: As a `rank`: chosen from gradients.
AUTO = "auto"
#: The share of a gradient's squared norm that is asked for where nothing else is.
DEFAULT_ENERGY = 0.9
#: By this much a share may miss the one that is asked for: what float32 arithmetic loses.
TOLERANCE = 1e-6
#: Singular values below this share of the largest are rounding errors.
NOISE = 1e-6
#: Singular values that are found at first; twice as many whenever they do not suffice.
FIRST_WIDTH = 64
#: Numbers that are summed in one go, and that are widened to float64 at a time.
RUN, PORTION = 1024, 1 << 20

Shape = tuple[int, int]
Floats = npt.NDArray[np.float64]
#: The bytes of the states of a matrix, by its shape and rank.
BytesOf = Callable[[Shape, int], int]


class RankRule(NamedTuple):
    """What is asked of ranks.

    Attributes:
        energy: The share of each gradient's squared norm to be captured; None where only `budget`
            counts.
        budget: Bytes of states and projectors of all matrices together, or None.
        smallest: No rank is below.
        largest: No rank is above; None for the largest one below half of the shorter side.
        multiple: Ranks are multiples of it where that leaves a choice.
    """

    energy: float | None = DEFAULT_ENERGY
    budget: int | None = None
    smallest: int = 1
    largest: int | None = None
    multiple: int = 1

    @classmethod
    def of(cls, group: dict[str, Any]) -> RankRule:
        """That of a parameter group."""
        rule = cls(*(group[name] for name in OPTIONS))
        free = rule.energy is None and rule.budget is None
        return rule._replace(energy=DEFAULT_ENERGY) if free else rule

    @staticmethod
    def valid(group: dict[str, Any]) -> dict[str, bool]:
        """Which of a group's options are in their ranges."""
        energy, budget, smallest, largest, multiple = (group[name] for name in OPTIONS)
        return {
            "rank_energy": energy is None or 0 < energy <= 1,
            "rank_budget": budget is None or budget >= 1,
            "rank_min": smallest >= 1,
            "rank_max": largest is None or largest >= smallest,
            "rank_multiple": multiple >= 1,
        }

    def candidates(self, shape: Shape) -> range:
        """The ranks that a matrix may have, in increasing order; there is at least one."""
        short = min(shape)
        top = max(1, (short - 1) // 2) if self.largest is None else min(short, self.largest)
        top = max(top, min(short, self.smallest))
        bottom = -(-self.smallest // self.multiple) * self.multiple
        ranks = range(bottom, top + 1, self.multiple)
        return ranks if ranks else range(top, top + 1)


class Spectrum:
    """How much of a gradient each rank captures, found as far as it is asked for.

    Args:
        grad: ``[m, n]``; float32, float16 or bfloat16, contiguous.
        ranks: Those that may be chosen.
        seed: Key of the random directions.

    Attributes:
        usable: Whether the gradient is finite and not zero; otherwise there is nothing to ask.
    """

    def __init__(self, grad: torch.Tensor, ranks: range, seed: int) -> None:
        self.shape: Shape = (grad.shape[0], grad.shape[1])
        self.ranks = ranks
        self._grad, self._seed = grad, seed
        self._square = squared_norm(grad)
        self.usable = bool(0 < self._square < float("inf"))
        self._captured: Floats = np.zeros(0)

    @property
    def known(self) -> range:
        """The first of the ranks, as many as have been looked at."""
        return self.ranks[: int(np.searchsorted(self.ranks, len(self._captured), side="right"))]

    def captured(self, rank: int) -> float:
        """The share of the squared norm in the leading directions of a known rank."""
        return float(self._captured[rank - 1])

    def grow(self) -> None:
        """Looks at twice as many directions."""
        width = max(FIRST_WIDTH, self.ranks[0], 2 * len(self._captured))
        width = min(width, self.ranks[-1])
        _, values, _ = kernels.svd(
            self._grad, rank=width, n_iter=2, oversample=max(32, width // 2), seed=self._seed
        )
        sigma = cast(torch.Tensor, values).cpu().numpy().astype(np.float64)
        sigma[sigma < NOISE * sigma[0]] = 0.0
        self._captured = np.minimum(np.cumsum(sigma**2) / self._square, 1.0)

    def reaches(self, rank: int, energy: float | None) -> bool:
        """Whether a known rank captures as much as is asked for."""
        return energy is not None and self.captured(rank) >= energy * (1.0 - TOLERANCE)


def squared_norm(x: torch.Tensor) -> float:
    """The sum of squares in float64, in an order that does not depend on threads."""
    sums = []
    for values in torch.split(x.reshape(-1), PORTION):
        if values.numel() % RUN:
            values = torch.nn.functional.pad(values, (0, -values.numel() % RUN))
        sums.append(values.view(-1, RUN).to(torch.float64).square_().sum(dim=1).cpu())
    return float(torch.cat(sums).numpy().sum())


def choose(spectra: Sequence[Spectrum], rule: RankRule, bytes_of: BytesOf) -> list[int]:
    """The ranks of matrices with usable gradients.

    With an energy alone each gets the smallest rank that captures it, or the largest one that
    there is. A budget goes to where a byte captures most, summed over the matrices' shares of
    their own squared norms, until the energy is captured or the bytes are spent.

    Raises:
        ValueError: the budget does not suffice for the smallest ranks.
    """
    for spectrum in spectra:
        spectrum.grow()
    while True:
        if rule.budget is None:
            ranks = [_smallest(s, rule.energy) for s in spectra]
        else:
            ranks = allocate([_curve(s, rule, bytes_of) for s in spectra], rule.budget)
        short = [
            spectrum
            for spectrum, rank in zip(spectra, ranks, strict=True)
            if rank == spectrum.known[-1] < spectrum.ranks[-1]
            and not spectrum.reaches(rank, rule.energy)
        ]
        if not short:
            return ranks
        for spectrum in short:
            spectrum.grow()


def _smallest(spectrum: Spectrum, energy: float | None) -> int:
    enough = (rank for rank in spectrum.known if spectrum.reaches(rank, energy))
    return next(enough, spectrum.known[-1])


class Curve(NamedTuple):
    """What the ranks of one matrix cost, and what they capture."""

    ranks: Sequence[int]
    sizes: Sequence[int]
    shares: Sequence[float]

    def hull(self) -> list[int]:
        """The ranks, by position, between which captured shares per byte only fall.

        The first is the cheapest one; each of the others costs more and captures more. Sizes do not
        grow evenly: blocks share scales, and small tensors are kept in float32.
        """
        order = sorted(range(len(self.ranks)), key=lambda i: (self.sizes[i], -self.shares[i], i))
        hull: list[int] = []
        for i in order:
            if hull and self.shares[i] <= self.shares[hull[-1]]:
                continue
            while len(hull) > 1 and self.slope(hull[-2], hull[-1]) < self.slope(hull[-1], i):
                hull.pop()
            hull.append(i)
        return hull

    def slope(self, i: int, j: int) -> float:
        """What a byte more captures from one position to another."""
        gain, cost = self.shares[j] - self.shares[i], self.sizes[j] - self.sizes[i]
        if gain <= 0:
            return 0.0
        return gain / cost if cost > 0 else float("inf")


def _curve(spectrum: Spectrum, rule: RankRule, bytes_of: BytesOf) -> Curve:
    last = _smallest(spectrum, rule.energy)
    ranks = [rank for rank in spectrum.known if rank <= last]
    sizes = [bytes_of(spectrum.shape, rank) for rank in ranks]
    return Curve(ranks, sizes, [spectrum.captured(rank) for rank in ranks])


def allocate(curves: Sequence[Curve], budget: int) -> list[int]:
    """Spends bytes on ranks, the next ones always where a byte captures most.

    This is the greedy algorithm for the multiple-choice knapsack problem of Sinha and Zoltners
    (Operations Research 27, 1979): along the hulls it solves the relaxation, so that the first
    step that does not fit captures at least what the result lacks. What is left then goes to ranks
    between the corners of the hulls. Of equal steps that of the earlier matrix goes first.

    Raises:
        ValueError: the cheapest ranks cost more than the budget.
    """
    hulls = [curve.hull() for curve in curves]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(c.sizes[i] for c, i in zip(curves, chosen, strict=True))
    if left < 0:
        raise _too_small(budget, budget - left)
    queue = [
        (-c.slope(*h[:2]), k, 1)
        for k, (c, h) in enumerate(zip(curves, hulls, strict=True))
        if len(h) > 1
    ]
    heapq.heapify(queue)
    while queue:
        _, k, place = heapq.heappop(queue)
        curve, hull = curves[k], hulls[k]
        cost = curve.sizes[hull[place]] - curve.sizes[chosen[k]]
        if cost > left:
            continue  # nor does anything after it on this hull
        left -= cost
        chosen[k] = hull[place]
        if place + 1 < len(hull):
            step = curve.slope(hull[place], hull[place + 1])
            heapq.heappush(queue, (-step, k, place + 1))
    _spend_rest(curves, chosen, left)
    return [curve.ranks[i] for curve, i in zip(curves, chosen, strict=True)]


def _spend_rest(curves: Sequence[Curve], chosen: list[int], left: int) -> None:
    """Takes ranks between two corners of a hull, while any fits what is left."""
    while True:
        steps = [
            (-curve.slope(chosen[k], i), k, i)
            for k, curve in enumerate(curves)
            for i in range(len(curve.ranks))
            if curve.sizes[i] - curve.sizes[chosen[k]] <= left and curve.slope(chosen[k], i) > 0
        ]
        if not steps:
            return
        _, k, i = min(steps)
        left -= curves[k].sizes[i] - curves[k].sizes[chosen[k]]
        chosen[k] = i


def even_ranks(shapes: Sequence[Shape], rule: RankRule, bytes_of: BytesOf) -> dict[Shape, int]:
    """The same rank for all matrices as far as they have it, as large as the budget allows.

    Raises:
        ValueError: the budget does not suffice for the smallest ranks.
    """
    budget = cast(int, rule.budget)
    candidates = {shape: rule.candidates(shape) for shape in shapes}

    def at(level: int) -> dict[Shape, int]:
        return {
            shape: ranks[max(0, bisect.bisect_right(ranks, level) - 1)]
            for shape, ranks in candidates.items()
        }

    def size(ranks: dict[Shape, int]) -> int:
        return sum(bytes_of(shape, ranks[shape]) for shape in shapes)

    low, high, best = 0, max(ranks[-1] for ranks in candidates.values()), at(0)
    if size(best) > budget:
        cheapest = {
            shape: min(ranks, key=lambda rank: bytes_of(shape, rank))
            for shape, ranks in candidates.items()
        }
        if size(cheapest) > budget:
            raise _too_small(budget, size(cheapest))
        return cheapest
    while low < high:
        middle = (low + high + 1) // 2
        if size(at(middle)) <= budget:
            low, best = middle, at(middle)
        else:
            high = middle - 1
    return best


def _too_small(budget: int, needed: int) -> ValueError:
    return ValueError(
        f"budget (rank_budget of a group) must be at least {needed:,} bytes, which the lowest ranks"
        f" take, got {budget:,}"
    )
