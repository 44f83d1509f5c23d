"""Ranks that an optimizer chooses itself, from the first gradients."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Collection, Iterable
from typing import Any, ClassVar, cast

import torch
from torch.optim.optimizer import ParamsT

from gradpress.optim import _projector as projector
from gradpress.optim._base import Group, State, plain_gradient
from gradpress.optim._ranks import AUTO, BytesOf, RankRule, Shape, Spectrum, choose, even_ranks
from gradpress.optim._scaling import Scale
from gradpress.optim.adamw8bit import AdamW8bit

#: Elements from which on a weight's states matter: a quarter of a MiB of them in 8 bits.
LARGE = 1 << 17
#: What makes a group that of 8-bit Adam.
PLAIN = {"state_bits": 8, "block_size": None, "min_8bit_size": 0}


class AutoRankOptimizer(AdamW8bit):
    """The choice of ranks, and what states of a rank take.

    A group with ``rank="auto"`` gets its ranks in the first step in which a weight's gradient is
    finite and not zero, by the energy that they capture (:func:`gradpress.optim.choose_ranks`);
    they stand in the state (``projector_rank``) and survive a resume, while the group stays
    ``"auto"``. Until then a weight has a state of the lowest rank, which is made anew when its rank
    is chosen. A budget is for all projected weights of the group; those without a usable gradient
    when others have one (all but one where `fused_backward` steps them one by one) keep what equal
    ranks would take. `memory.plan` takes such groups at the highest rank, or with a budget at the
    highest equal ranks that fit it. In such groups moments are codes where the weight, not its
    moments, has `min_8bit_size` elements. A state of other ranks loads by `load_state_dict` and by
    `torch.distributed.checkpoint.state_dict`; `torch.distributed.checkpoint.load`, which fills
    tensors that are there already, says that sizes differ: give it plain ranks.

    Args:
        params: Parameters or groups. Every option may stand in a group.
        *arguments: Those of :class:`AdamW8bit`.
        rank_energy: For ``rank="auto"``: share of the gradient's squared norm that a rank is to
            capture; 0.9 where `rank_budget` is None too.
        rank_budget: Bytes of states and projectors over the group's projected weights.
        rank_min: The lowest rank.
        rank_max: The highest rank; the largest below half of the shorter side when None.
        rank_multiple: Ranks are multiples of it.
        **options: Those of :class:`AdamW8bit`, and of the subclass.

    Raises:
        ValueError: an option is out of its range, or the budget does not suffice for the lowest
            ranks.
    """

    _NOT_CAPTURABLE: ClassVar[str | None] = (
        "the host decides by its count of steps when a projection is found anew"
    )
    #: Whether projections follow the gradient's energy, so that it can decide about the rank.
    _FOLLOWS_ENERGY: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        *arguments: Any,
        rank_energy: float | None = None,
        rank_budget: int | None = None,
        rank_min: int = 1,
        rank_max: int | None = None,
        rank_multiple: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            *arguments,
            rank_energy=rank_energy,
            rank_budget=rank_budget,
            rank_min=rank_min,
            rank_max=rank_max,
            rank_multiple=rank_multiple,
            **options,
        )
        matrices = [(p, group) for group in self.param_groups for p in matrices_of(group)]
        for group in self.param_groups:
            if group["rank"] == AUTO and group["rank_budget"] is not None:
                self._even_ranks(group)
        self._warn_of_large_states([p for p, group in matrices if group["rank"] != AUTO])

    def _new_state(self, group: Group, p: torch.Tensor, state: State, offset: int) -> None:
        """Fills the state of a matrix that is stepped for the first time.

        Args:
            group: The options.
            p: The parameter.
            state: Has `step` and `tensor_id`.
            offset: Steps by which the refreshes are early, where they are staggered.
        """
        raise NotImplementedError

    def _planned_codes(self, group: Group, p: torch.Tensor) -> State:
        if group["rank"] == AUTO and "projector_rank" in self.state.get(p, {}):
            shape = projector.matrix_shape(p)
            group = at_rank(group, shape, self.state[p]["projector_rank"])
        return super()._planned_codes(group, p)

    def _choose_ranks(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        """Chooses the ranks of matrices that have none yet and a usable gradient."""
        undecided = [p for p in params if not self.state[p].get("rank_chosen", 1)]
        # The choice waits for the device anyway; that of a step that is skipped comes later.
        if not undecided or (scale.found_inf is not None and scale.found_inf.item()):
            return
        rule, spectra = RankRule.of(group), {}
        for p in undecided:
            shape = projector.matrix_shape(p)
            grad = plain_gradient(p).view(shape)
            spectrum = Spectrum(grad, rule.candidates(shape), group["seed"])
            if spectrum.usable:
                spectra[p] = spectrum
        if not spectra:
            return
        bytes_of = self._bytes_of(group)
        if rule.budget is not None:
            kept = self._reserved(group, spectra, bytes_of)
            rule = rule._replace(budget=rule.budget - kept)
        for p, rank in zip(spectra, choose([*spectra.values()], rule, bytes_of), strict=True):
            self._remake_state(at_rank(group, projector.matrix_shape(p), rank), p)
        self._warn_of_large_states(spectra)

    def _remake_state(self, group: Group, p: torch.Tensor) -> None:
        """Another rank, before anything was projected."""
        state = self.state[p]
        offset = state.get("projector_offset", 0)
        kept = {name: state[name] for name in ("step", "tensor_id")}
        state.clear()
        state.update(kept, rank_chosen=1)
        self._new_state(group, p, state, offset)

    def _reserved(self, group: Group, choosing: Collection[torch.Tensor], bytes_of: BytesOf) -> int:
        """Bytes of the budget that are not for the matrices that are being chosen for."""
        even, chosen = self._even_ranks(group), {id(p) for p in choosing}
        total = 0
        for p in matrices_of(group):
            if id(p) not in chosen:
                shape = projector.matrix_shape(p)
                state = cast(State, self.state.get(p, {}))
                has_rank = "projector_rank" in state and state.get("rank_chosen", 1)
                total += bytes_of(shape, state["projector_rank"] if has_rank else even[shape])
        return total

    def _even_ranks(self, group: Group) -> dict[Shape, int]:
        shapes = [projector.matrix_shape(p) for p in matrices_of(group)]
        return even_ranks(shapes, RankRule.of(group), self._bytes_of(group)) if shapes else {}

    def _bytes_of(self, group: Group) -> BytesOf:
        return functools.cache(functools.partial(self._state_bytes, group))

    def _state_bytes(self, group: Group, shape: Shape, rank: int) -> int:
        """What the states of a matrix take, exactly."""
        like = torch.empty(shape, device="meta")
        return _bytes_in(self._planned_state(at_rank(group, shape, rank), like))

    def _at_highest_rank(self, group: Group, p: torch.Tensor) -> Group:
        """The group with what is planned for a matrix."""
        if group["rank"] != AUTO:
            return group
        rule, shape = RankRule.of(group), projector.matrix_shape(p)
        even = rule.budget is not None
        rank = self._even_ranks(group)[shape] if even else rule.candidates(shape)[-1]
        return at_rank(group, shape, rank)

    def _warn_of_large_states(self, params: Iterable[torch.Tensor]) -> None:
        """Says which of some matrices have states that a projection has not made smaller."""
        chosen, found = {id(p) for p in params}, []
        sizes: dict[Any, tuple[int, int]] = {}
        for name, p, group in self._names():
            if id(p) not in chosen or p.numel() < LARGE:
                continue
            rank, options = group["rank"], group
            if rank == AUTO:
                rank = self.state[p]["projector_rank"]
                options = at_rank(group, projector.matrix_shape(p), rank)
            key = (id(group), p.shape, str(rank))
            if key not in sizes:
                like = torch.empty(p.shape, device="meta")
                sizes[key] = (
                    _bytes_in(self._planned_state(options, like)),
                    _bytes_in(AdamW8bit._planned_state(self, {**group, **PLAIN}, like)),
                )
            if sizes[key][0] > sizes[key][1]:
                found.append((sizes[key], name, tuple(p.shape), rank))
        if found:
            (size, plain), name, shape, rank = max(found, key=lambda row: row[0][0] - row[0][1])
            warnings.warn(
                f"{type(self).__name__}: the states of {name} {shape} take {size:,} bytes at rank"
                f" {rank}, more than the {plain:,} of 8-bit Adam without a projection; so do those"
                f" of {len(found)} weights in all. A lower rank, or fewer bits for moments and"
                " projectors, would make them smaller",
                stacklevel=4,
            )


def is_projected(group: Group, p: torch.Tensor) -> bool:
    """Whether a parameter of a group is stepped through a projection."""
    return group["rank"] is not None and p.dim() >= 2 and p.numel() > 0


def matrices_of(group: Group) -> list[torch.Tensor]:
    """The parameters of a group that are projected."""
    known = (p for p in group["params"] if not torch.nn.parameter.is_lazy(p))
    return [p for p in known if is_projected(group, p)]


def at_rank(group: Group, shape: Shape, rank: int) -> Group:
    """The options by which the state of a matrix of a rank is made.

    The names of a state's tensors must not depend on a rank that is chosen later: checkpoints are
    loaded by them. So moments are codes by the size of the matrix, where ranks are chosen.
    """
    if group["rank"] != AUTO:
        return {**group, "rank": rank}
    small = math.prod(shape) < group["min_8bit_size"]
    return {**group, "rank": rank, "min_8bit_size": math.inf if small else 0}


def at_lowest_rank(group: Group, p: torch.Tensor) -> Group:
    """The options by which the state of a matrix is made before its rank is chosen."""
    if group["rank"] != AUTO:
        return group
    shape = projector.matrix_shape(p)
    return at_rank(group, shape, RankRule.of(group).candidates(shape)[0])


def _bytes_in(state: State) -> int:
    return sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))
