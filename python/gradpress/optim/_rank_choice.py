"""Ranks for the weights of a model that has gradients, as a table."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from gradpress.nn._select import Targets, select_linear
from gradpress.optim import _projector as projector
from gradpress.optim._base import plain_gradient
from gradpress.optim._projected import ProjectedOptimizer
from gradpress.optim._ranks import OPTIONS, RankRule, Spectrum, choose
from gradpress.optim.qgalore import QGaLoreAdamW

#: What :func:`choose_ranks` calls the options of groups.
ARGUMENTS = ("energy", "budget", "min_rank", "max_rank", "rank_multiple")
_UNITS = {"B": 1} | {
    prefix + infix + "B": base**power
    for power, prefix in enumerate("KMGT", 1)
    for infix, base in (("", 1000), ("i", 1024))
}

Named = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class RankRow:
    """One weight.

    Attributes:
        name: The parameter's name.
        shape: The parameter's shape.
        rank: Directions to keep.
        energy: Share of the gradient's squared norm that they capture.
        bytes: Of its states, the projector among them.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    energy: float
    bytes: int


@dataclass(frozen=True)
class RankChoice:
    """The ranks chosen for some weights; prints as a table."""

    rows: tuple[RankRow, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks by the parameters' names, as :func:`param_groups` takes them again."""
        return {row.name: row.rank for row in self.rows}

    @property
    def total_bytes(self) -> int:
        """Of all weights' states."""
        return sum(row.bytes for row in self.rows)

    def to_dict(self) -> list[dict[str, Any]]:
        """One dict for each row, fit for a DataFrame."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        """The table."""
        width = max([len(row.name) for row in self.rows], default=5)
        head = f"{'name':<{width}}  {'shape':>14}  rank  energy  {'bytes':>13}"
        lines = [
            f"{r.name:<{width}}  {'x'.join(map(str, r.shape)):>14}  {r.rank:>4}  {r.energy:>6.3f}"
            f"  {r.bytes:>13,}"
            for r in self.rows
        ]
        total = f"{'total':<{width}}  {'':>14}  {'':>4}  {'':>6}  {self.total_bytes:>13,}"
        return "\n".join([head, *lines, total])

    __repr__ = __str__


def choose_ranks(
    model: nn.Module | Named,
    *,
    energy: float | None = None,
    budget: int | str | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    rank_multiple: int = 1,
    target_modules: Targets = None,
    optimizer: type[ProjectedOptimizer] = QGaLoreAdamW,
    **options: Any,
) -> RankChoice:
    """Ranks for weights, from the gradients that they have now.

    The gradient of one backward pass, or one that several passes have added up, is taken apart by
    a randomized singular value decomposition; what the leading r directions hold of its squared
    norm is the energy that a projection of rank r captures. With `energy` each weight gets the
    smallest rank that captures as much. With `budget` the bytes go to where one captures most,
    summed over the weights' shares. With both, no weight gets more than the energy asks for. GaLore
    (arXiv 2403.03507) and what follows it give all weights one rank, though the gradients of some
    layers are spread over far more directions than those of others.

    Args:
        model: A module, or pairs of names and parameters of two or more dimensions.
        energy: Between 0 and 1; 0.9 where `budget` is not given either.
        budget: Bytes that the states of these weights may take, projectors among them: a number
            or a text as ``"64MB"`` (millions) or ``"64MiB"`` (of 2**20).
        min_rank: The lowest rank.
        max_rank: The highest rank; the largest below half of a weight's shorter side when None.
            Where the energy needs more, this is what the weight gets.
        rank_multiple: Ranks are multiples of it, where the limits leave one.
        target_modules: Which Linear weights of a module, as for :func:`param_groups`.
        optimizer: Whose states `budget` and the table are about.
        **options: Options of that optimizer which its states depend on, as `state_bits`,
            `projector_bits`, `proj_type` or `min_8bit_size`; `seed` for the decomposition.

    Returns:
        One row for each weight, in the order of the parameters.

    Raises:
        ValueError: a weight has no gradient, or one that is zero or not finite; an option is out
            of its range; the budget does not suffice for the lowest ranks.

    Example:
        >>> import torch, gradpress
        >>> from gradpress.optim._rank_choice import choose_ranks
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> model(torch.eye(64)[:3]).sum().backward()
        >>> choose_ranks(model, energy=0.99).ranks
        {'0.weight': 1}
    """
    size = None if budget is None else parse_bytes(budget)
    given = dict(zip(OPTIONS, (energy, size, min_rank, max_rank, rank_multiple), strict=True))
    for (option, ok), name in zip(RankRule.valid(given).items(), ARGUMENTS, strict=True):
        if not ok:
            raise ValueError(f"Invalid {name} value: {given[option]!r}")
    rule = RankRule.of(given)
    named = _named(model, target_modules)
    probe = _probe(optimizer, options)
    group = probe.param_groups[0]
    bytes_of = functools.cache(functools.partial(probe._state_bytes, group))
    spectra = [_spectrum(name, p, rule, group["seed"]) for name, p in named]
    ranks = choose(spectra, rule, bytes_of)
    return RankChoice(
        tuple(
            RankRow(name, tuple(p.shape), rank, s.captured(rank), bytes_of(s.shape, rank))
            for (name, p), s, rank in zip(named, spectra, ranks, strict=True)
        )
    )


def _probe(optimizer: type[ProjectedOptimizer], options: dict[str, Any]) -> ProjectedOptimizer:
    """An optimizer of next to nothing, which knows what states take."""
    try:
        probe = optimizer([nn.Parameter(torch.empty(1, 1, device="meta"))], rank=1, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"choose_ranks: optimizer must take the given options, {optimizer.__name__} says:"
            f" {error}"
        ) from error
    if not probe._FOLLOWS_ENERGY:
        raise ValueError(
            f"choose_ranks: optimizer must project as gradients say, got {optimizer.__name__}"
        )
    return probe


def parse_bytes(size: int | str) -> int:
    """A number of bytes, from itself or from a text as ``"64MB"``, ``"1.5 GiB"`` or ``"1000"``.

    Raises:
        ValueError: the text is none of these.
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", size)
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if match is None or (match[2] or "B").lower() not in units:
        raise ValueError(
            f"budget must be a number of bytes or a text as '64MB' or '64MiB', got {size!r}"
        )
    return int(float(match[1]) * units[(match[2] or "B").lower()])


def _named(model: nn.Module | Named, target_modules: Targets) -> list[tuple[str, torch.Tensor]]:
    """The weights that are meant, each once."""
    if not isinstance(model, nn.Module):
        return list(model)
    chosen = {id(module.weight) for module in select_linear(model, target_modules).values()}
    return [(n, p) for n, p in model.named_parameters() if id(p) in chosen and p.requires_grad]


def _spectrum(name: str, p: torch.Tensor, rule: RankRule, seed: int) -> Spectrum:
    if p.dim() < 2 or not p.numel():
        raise ValueError(
            f"choose_ranks: model must hold parameters of two or more dimensions, {name} has shape"
            f" {list(p.shape)}"
        )
    if p.grad is None:
        raise _no_gradient(name, "none")
    shape = projector.matrix_shape(p)
    spectrum = Spectrum(plain_gradient(p).view(shape), rule.candidates(shape), seed)
    if not spectrum.usable:
        raise _no_gradient(name, "one that is zero or not finite")
    return spectrum


def _no_gradient(name: str, what: str) -> ValueError:
    return ValueError(
        f"rank='auto' needs a gradient of every weight that is finite and not zero, {name} has"
        f" {what}: run a backward pass before, leave the weight out by target_modules, or give the"
        " optimizer a group with rank='auto', which it decides by the first gradient that comes"
    )
