"""Gradients that are never formed: projected straight from what a backward pass has at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from gradpress.nn._receivers import forget_receiver, receive_gradients
from gradpress.nn._weight import QuantizedWeight
from gradpress.ops import lowrank as kernels
from gradpress.optim import _projector as projector
from gradpress.optim._adam import AdamHyper
from gradpress.optim._auto_rank import is_projected
from gradpress.optim._base import Group, State, plain_gradient
from gradpress.optim._projected import check_options
from gradpress.optim._ranks import AUTO
from gradpress.optim._scaling import Scale
from gradpress.optim._search import SubspaceSearch
from gradpress.optim._subspace import Row, SubspaceOptimizer

#: As in `torch.nn.utils.clip_grad_norm_`.
_NORM_EPSILON = 1e-6


class Collected:
    """What the backward passes of a step have left of a weight's gradient.

    Attributes:
        projected: float32, of the shape of :func:`gradpress.ops.lowrank.projected_shape`; the sum
            over the passes.
        passes: How many there were.
        search: For a new basis, where one is due that takes several passes to find.
    """

    def __init__(self, projected: torch.Tensor, search: SubspaceSearch | None) -> None:
        self.projected = projected
        self.passes = 0
        self.search = search


class FactoredOptimizer(SubspaceOptimizer):
    r"""A subspace optimizer that can do without its weights' gradients.

    A layer's weight gradient is :math:`G = D^\top X` with the gradient D of the outputs and the
    inputs X. With ``materialize_gradients=False`` the backward pass of a layer with a quantized
    weight hands both factors to the optimizer, which computes

    .. math::
        R = D^\top (X P) \;(m \ge n) \quad\text{or}\quad R = (D P)^\top X

    and adds it to a float32 accumulator of R's size. `p.grad` stays None. With the basis P that G
    would be projected with, R is what it would be, to rounding. This takes :math:`T r (m + n)`
    multiplications for T tokens and rank r in place of :math:`T m n + m n r`: fewer where
    :math:`r < m n / (m + n)`.

    A basis that is due is found anew in the step's first backward pass, by the same iteration, in
    which every product with G is made in two. Where a step has several passes
    (`accumulation_steps`), the first half of them add up the images :math:`Y = G S` of the old
    basis and eight random directions, the others :math:`Z = G^\top Y`; the leading directions of Z
    are the basis from the next step on. No pass alone decides then, and what is noise in one half
    of the step is independent of that in the other.

    Args:
        params: Parameters or groups. Every option may stand in a group.
        *arguments: Those of :class:`SubspaceOptimizer`.
        materialize_gradients: False computes projected gradients in the backward pass. Weights of
            groups with `rank` set have to be quantized by :func:`gradpress.nn.quantize_` then, and
            used by `torch.nn.functional.linear`.
        accumulation_steps: Backward passes that make up a step, where gradients are not formed.
        **options: Those of the subclass.

    Raises:
        ValueError: an option is out of its range.
        TypeError: a weight is not quantized.
    """

    def __init__(
        self,
        params: ParamsT,
        *arguments: Any,
        materialize_gradients: bool = True,
        accumulation_steps: int = 1,
        **options: Any,
    ) -> None:
        # Before parameters are added.
        self._collected: dict[torch.Tensor, Collected] = {}
        self._factored: dict[torch.Tensor, Group] = {}
        super().__init__(
            params,
            *arguments,
            materialize_gradients=materialize_gradients,
            accumulation_steps=accumulation_steps,
            **options,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_options(group, accumulation_steps=group["accumulation_steps"] >= 1)
        if group["materialize_gradients"] or group["rank"] is None:
            return
        name = type(self).__name__
        if group["rank"] == AUTO:
            raise ValueError(
                f"{name}: rank must be a number where materialize_gradients is False, got"
                f" {AUTO!r}; ranks are chosen by whole gradients"
            )
        matrices = [p for p in group["params"] if is_projected(group, p)]
        for p in matrices:
            if not isinstance(p, QuantizedWeight) or p.dim() != 2:
                raise TypeError(
                    f"{name}: materialize_gradients must be True for weights that are not"
                    f" quantized matrices, got a {type(p).__name__} of shape {list(p.shape)};"
                    " quantize the model with gradpress.nn.quantize_ first"
                )

    def add_param_group(self, param_group: Group) -> None:
        """Adds parameters with options of their own; options left out take the defaults."""
        super().add_param_group(param_group)
        self._receive_from(self.param_groups[-1])

    def __setstate__(self, state: State) -> None:
        """Restores a pickled, copied or loaded optimizer, and takes up its weights' gradients."""
        for p in self.__dict__.get("_factored", {}):
            forget_receiver(p)
        self.__dict__["_collected"] = {}
        self.__dict__["_factored"] = {}
        super().__setstate__(state)
        for group in self.param_groups:
            self._receive_from(group)

    def _receive_from(self, group: Group) -> None:
        for p in group["params"]:
            if not group["materialize_gradients"] and is_projected(group, p):
                self._factored[p] = group
                receive_gradients(p, self._receive)

    # During a backward pass

    @torch.no_grad()
    def _receive(self, p: torch.Tensor, grad_output: torch.Tensor, x: torch.Tensor) -> None:
        """Projects the gradient of one use of a weight, of which only the factors exist."""
        if not x.shape[0]:
            return
        group = self._factored[p]
        factors = _in_one_dtype(grad_output, x)
        collected = self._collected.get(p)
        if collected is None:
            self._settle()
            self._make_states(group, [p])
            search = self._begin_search(group, p, factors)
            projected = _projected_like(p, self.state[p])
            collected = self._collected[p] = Collected(projected.zero_(), search)
        state = self.state[p]
        projected = torch.empty_like(collected.projected)
        bases = projector.bases_of([state], group)
        kernels.project_factors([factors[0]], [factors[1]], bases, [projected])
        collected.projected += projected
        if collected.search is not None:
            collected.search.add(*factors)
        collected.passes += 1

    def _begin_search(
        self, group: Group, p: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]
    ) -> SubspaceSearch | None:
        """Finds the basis anew where it is due, or begins with that."""
        state = self.state[p]
        completed = int(state["step"].item())
        if not projector.is_due(state, completed):
            return None
        several = group["accumulation_steps"] > 1
        if not several or not state["projector_ready"]:
            self._refresh_by_factors(group, p, factors)
        if not several:
            return None
        shape = projector.matrix_shape(p)
        return SubspaceSearch(
            projector.load_basis(state, shape, group),
            shape,
            passes=group["accumulation_steps"],
            seed=group["seed"],
            tensor_id=state["tensor_id"],
            step=completed,
        )

    def _refresh_by_factors(
        self, group: Group, p: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        state = self.state[p]
        basis, warm = self._starting_basis(group, p)
        (outcome,) = kernels.refresh_basis_factors(
            [factors[0]],
            [factors[1]],
            [basis],
            [state["projector_vector"]],
            warm=[warm],
            seed=group["seed"],
            tensor_ids=[state["tensor_id"]],
            steps=[int(state["step"].item())],
        )
        if outcome.status == kernels.REFRESHED:
            projector.store_basis(state, basis, group)
            self._record(group, state, outcome)

    # Steps

    def _has_gradient(self, p: torch.Tensor) -> bool:
        return super()._has_gradient(p) or p in self._collected

    def _told_by_scaler(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        found_inf, grad_scale = super()._told_by_scaler()
        if found_inf is None or not self._collected:
            return found_inf, grad_scale
        if grad_scale is None:
            raise RuntimeError(
                f"{type(self).__name__}: GradScaler.unscale_ does not reach gradients that are"
                " never formed; leave it out, and clip by fused_backward(max_grad_norm=...)"
            )
        # What the scaler has not looked through.
        finite = [c.projected.isfinite().all() for c in self._collected.values()]
        wrong = ~torch.stack([flag.to(found_inf.device) for flag in finite]).all()
        return torch.maximum(found_inf, wrong.to(found_inf.dtype).view_as(found_inf)), grad_scale

    def _step_matrices(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        formed = [p for p in params if p not in self._collected]
        if formed:
            super()._step_matrices(group, formed, scale)
        factored = [p for p in params if p in self._collected]
        for chosen, hyper in self._hypers(group, factored, scale) if factored else ():
            self._step_collected(group, chosen, hyper)

    def _step_collected(self, group: Group, params: list[torch.Tensor], hyper: AdamHyper) -> None:
        rows: list[Row] = []
        for p in params:
            state, shape = self.state[p], projector.matrix_shape(p)
            projected = self._collected[p].projected
            if p.grad is not None:
                # Of uses of the weight that formed their gradient.
                ((*_, more),) = self._project(group, [p], [plain_gradient(p).view(shape)])
                projected += more
            rows.append((p, state, shape, projected))
        searches = [
            (p, search) for p in params if (search := self._collected[p].search) is not None
        ]
        self._step_rows(group, rows, hyper)
        for p, search in searches:
            self._end_search(group, p, search)
        for p in params:
            del self._collected[p]

    def _end_search(self, group: Group, p: torch.Tensor, search: SubspaceSearch) -> None:
        """Keeps the basis that several passes have found, for the steps to come."""
        basis = search.result()
        if basis is None:
            return
        state = self.state[p]
        before, now = state["projector_vector"], basis[:, 0].contiguous()
        outcome = kernels.Refresh(kernels.REFRESHED, float(before @ now), search.energy)
        state["projector_vector"].copy_(now)
        projector.store_basis(state, basis, group)
        self._record(group, state, outcome)

    # Norms

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scales gradients, and projected ones that were never formed, to a norm of `max_norm`.

        Of the latter only the projection is known, and only it is stepped: the norm is that of
        what the step uses, at most that of the whole gradients. Call it between the last backward
        pass and `step`, in place of `torch.nn.utils.clip_grad_norm_`.

        Args:
            max_norm: Largest norm of all parameters' gradients together.

        Returns:
            The norm before, float32 of one element on the first gradient's device.
        """
        parts = [
            part for group in self.param_groups for p in group["params"] for part in self._parts(p)
        ]
        if not parts:
            return torch.zeros(())
        device = parts[0].device
        norms = [torch.linalg.vector_norm(t, dtype=torch.float32).to(device) for t in parts]
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        factor = (max_norm / (norm + _NORM_EPSILON)).clamp(max=1.0)
        for part in parts:
            part.mul_(factor.to(part.device))
        return norm

    def _parts(self, p: torch.Tensor) -> list[torch.Tensor]:
        """What there is of a parameter's gradient."""
        parts = [p.grad.detach()] if p.grad is not None else []
        return [*parts, self._collected[p].projected] if p in self._collected else parts

    def _gradient_square(self, p: torch.Tensor) -> torch.Tensor:
        norms = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in self._parts(p)]
        square: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms)).square()
        return square

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, those of unfinished steps included."""
        self._collected.clear()
        super().zero_grad(set_to_none)


def _in_one_dtype(grad_output: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors as the kernels take them."""
    dtype = grad_output.dtype
    if grad_output.dtype != x.dtype or dtype == torch.float64:
        dtype = torch.float32
    return grad_output.detach().to(dtype).contiguous(), x.detach().to(dtype).contiguous()


def _projected_like(p: torch.Tensor, state: State) -> torch.Tensor:
    shape = kernels.projected_shape(*projector.matrix_shape(p), state["projector_rank"])
    return torch.empty(shape, dtype=torch.float32, device=p.device)
