"""LDAdam: Adam in a subspace that moves at every step, with feedback of what it leaves out.

Robert, Safaryan, Modoranu, Alistarh: "LDAdam: Adaptive Optimization from Low-Dimensional Gradient
Statistics" (2024, arXiv 2410.16103), Algorithm 1. Original implementation: IST-DASLab/LDAdam.
Differences: the feedback is a state tensor in few bits, where the original leaves it in the
parameters' gradients, for the next backward pass to add to (which keeps the gradients from being
freed, lets `model.zero_grad` destroy the feedback, and clips and scales it together with the
gradients); the first subspace comes from a randomized iteration; the orthonormal basis is found by
Cholesky QR, which keeps the earlier directions where the gradient has nothing to say, and the whole
earlier basis where the gradient is zero or not finite; moments are float32 or integer codes
whatever the gradient's dtype; the basis may stay for several steps.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from gradpress.ops import lowrank as kernels
from gradpress.optim import _feedback as feedback
from gradpress.optim import _projector as projector
from gradpress.optim._adam import AdamHyper, Batch, step_directions
from gradpress.optim._base import Group, State
from gradpress.optim._limiter import total_norm
from gradpress.optim._moving_moments import load_rows, store_rows, turned
from gradpress.optim._power_iteration import next_directions, project_rows, rows_of
from gradpress.optim._projected import check_options
from gradpress.optim._report import ProjectorRow
from gradpress.optim._scaling import Scale
from gradpress.optim._subspace import SubspaceOptimizer


class LDAdamW(SubspaceOptimizer):
    r"""AdamW in a subspace that follows the gradient, and feedback of what the subspace leaves out.

    For a weight of a group with `rank` set, with gradient G (m x n, m <= n; transposed otherwise)
    and the feedback E, after c steps, with :math:`A = G + E` and Adam's bias-corrected moments
    :math:`\hat m = M / (1 - \beta_1^c), \hat v = V / (1 - \beta_2^c)`:

    .. math::
        B &= \rho\,P \hat m + (1 - \rho) A, \quad P' = \mathrm{qr}(B B^\top P), \quad
            R = P'^\top A, \quad C = P'^\top P \\
        M' &= C M, \quad V' = (1 - \beta_2^c)
            \big| C^{\circ 2} (\hat v - \hat m^{\circ 2}) + (C \hat m)^{\circ 2} \big| \\
        E &\leftarrow A - P' R + \frac{\beta_1}{1 - \beta_1} (P M - P' M') \\
        W &\leftarrow (1 - \eta\lambda) W - \alpha\eta\, P'\, \mathrm{Adam}(R; M', V')

    so that :math:`P M + (1 - \beta_1) E` is what it would be had nothing been left out. The first
    P holds the leading singular directions of the gradient. All other parameters take the rule of
    :class:`AdamW8bit`. Weights quantized by :func:`gradpress.nn.quantize_` are updated in place
    with stochastic rounding.

    The feedback has the weight's size: with d = max(m, n) and k = min(m, n), a weight's state is
    2dr + kr elements for moments and basis, and mn for the feedback: 4, 2, about 1 or 0.5 bytes
    each for an `error_bits` of 32, 16, 8 or 4. In return nothing of the gradient has to stay: with
    :func:`gradpress.optim.fused_backward` the feedback takes the gradient's place. A step takes two
    float32 copies of one weight for a while.

    Args:
        params: Parameters or groups, as :func:`gradpress.optim.param_groups` makes them. Every
            option below may stand in a group.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, times the learning rate, before the step.
        rank: Directions kept (the paper's experiments: 16 for fine-tuning); None does not project.
            Clamped to the weight's shorter side. Tensors of order above 2 are taken as (first
            dimension, all others); those below 2 are not projected.
        rho: Weight of the earlier gradients in the matrix whose directions are followed. With
            feedback it should be above ``(3 * beta1 - 1) / (3 - beta1)``, as beta1 itself always
            is: below, an error in a direction grows by turning the subspace (a warning says so).
        update_proj_gap: Steps for which a subspace stays; the paper's 1 moves it at every step.
        scale: Factor on the back-projected update; not in the paper.
        proj_type: ``"std"``: the projector stands on the side of the shorter dimension.
        projector_bits: None for float32, 8 or 4 bits for the projector's entries. What rounding
            does to it at every step is in the feedback.
        projector_group_size: Entries of an integer projector that share a scale.
        stagger: Spread the moves of the layers over the interval.
        error_feedback: Keep what the subspace leaves out.
        error_bits: Of each element of the feedback: 32; 16 for bfloat16; 8 or 4 for integers. The
            last three are rounded stochastically.
        error_group_size: Elements of an integer feedback that share a scale.
        state_bits: 32 for float32 moments, 8 or 4.
        **options: Those of :class:`AdamW8bit`.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> from gradpress.optim.ldadam import LDAdamW
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> groups = gradpress.optim.param_groups(model, rank=8, verbose=False)
        >>> optimizer = LDAdamW(groups, lr=1e-2)
        >>> for _ in range(3):
        ...     model(torch.randn(4, 64)).square().sum().backward()
        ...     optimizer.step()
        >>> optimizer.refresh_counts()
        {'0.weight': 3}
    """

    _KEEP_DTYPE: ClassVar[frozenset[str]] = SubspaceOptimizer._KEEP_DTYPE | {
        *feedback.KEEP,
        "projector_refreshes",
        "projector_energy",
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        rho: float = 0.908,
        update_proj_gap: int = 1,
        scale: float = 1.0,
        proj_type: str = "std",
        projector_bits: int | None = None,
        projector_group_size: int = 256,
        stagger: bool = False,
        error_feedback: bool = True,
        error_bits: int = 8,
        error_group_size: int = 256,
        state_bits: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=rank,
            rho=rho,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            projector_bits=projector_bits,
            projector_group_size=projector_group_size,
            stagger=stagger,
            error_feedback=error_feedback,
            error_bits=error_bits,
            error_group_size=error_group_size,
            state_bits=state_bits,
            **options,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_options(
            group,
            rho=0.0 <= group["rho"] < 1.0,
            error_bits=group["error_bits"] in feedback.BITS,
            error_group_size=group["error_group_size"] >= 1,
        )
        least = _least_rho(group["betas"][0])
        if group["error_feedback"] and group["rank"] is not None and group["rho"] <= least:
            warnings.warn(
                f"LDAdamW: rho {group['rho']} is not above {least:.3f}, from which on the error"
                f" feedback is stable with a beta1 of {group['betas'][0]}",
                stacklevel=8,
            )

    def _new_state(self, group: Group, p: torch.Tensor, state: State, offset: int) -> None:
        super()._new_state(group, p, state, offset)
        # Tensors: whether a later step has moved the basis, only the device knows.
        state["projector_refreshes"] = torch.zeros((), dtype=torch.int64, device=p.device)
        state["projector_energy"] = torch.zeros((), dtype=torch.float32, device=p.device)
        if group["error_feedback"]:
            feedback.new_error(state, p, group)

    def _report_row(self, name: str, p: torch.Tensor, state: State, group: Group) -> ProjectorRow:
        numbers = {key: state[key].item() for key in ("projector_refreshes", "projector_energy")}
        return ProjectorRow.of(name, p, {**state, **numbers})

    # Steps

    def _step_matrices(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        hyper = AdamHyper.of(group, scale)
        for p in params:
            self._step_matrix(group, p, hyper)

    def _step_matrix(self, group: Group, p: torch.Tensor, hyper: AdamHyper) -> None:
        state, shape = self.state[p], projector.matrix_shape(p)
        gradient = feedback.add_gradient(p, state, group, hyper)
        hyper = hyper._replace(maximize=False, grad_scale=1.0)
        old = projector.load_basis(state, shape, group).clone()
        before = load_rows(state, shape, group)
        moved = self._move_basis(group, p, gradient, old, before["exp_avg"], hyper)
        basis = projector.load_basis(state, shape, group)
        moments = before
        if moved is not None:
            after = turned(before, basis, old, _done(state), group)
            moments = {name: torch.where(moved, after[name], before[name]) for name in before}
        low_rank = project_rows(gradient, basis)
        if moved is not None:
            _keep_energy(state, moved, low_rank, gradient)
        if group["error_feedback"]:
            used = low_rank.nan_to_num(0.0, 0.0, 0.0)
            if moved is not None:
                share = torch.where(moved, hyper.beta1 / (1.0 - hyper.beta1), 0.0)
                _add_back_rows(gradient, before["exp_avg"] * share, old)
                used += moments["exp_avg"] * share
            _add_back_rows(gradient, -used, basis)
            feedback.store_error(state, gradient, group, hyper.found_inf)
        batch = Batch([low_rank], [low_rank], [{**moments, "step": state["step"]}])
        step_directions(batch, hyper, self._counter(p.device))
        store_rows(state, moments, shape, hyper)
        self._add_back(group, [(p, state, shape, rows_of(low_rank, shape))], hyper, [basis])

    # Subspaces

    def _move_basis(
        self,
        group: Group,
        p: torch.Tensor,
        gradient: torch.Tensor,
        basis: torch.Tensor,
        exp_avg: torch.Tensor,
        hyper: AdamHyper,
    ) -> torch.Tensor | None:
        """Writes the basis of this step, where it is due.

        Returns:
            Whether the moments have to follow, on the device; None where they need not.
        """
        state, done = self.state[p], _done(self.state[p])
        if not state["projector_ready"]:
            # A first basis waits for the device anyway; one of a step that is skipped comes later.
            if hyper.found_inf is None or not hyper.found_inf.item():
                self._refresh_together(group, [(p, gradient)])
            if not (state["projector_ready"] and done):
                return None
            return torch.ones((), dtype=torch.bool, device=p.device)
        if not projector.is_due(state, done):
            return None
        mean = exp_avg / (1.0 - hyper.beta1 ** max(done, 1))
        directions, found = next_directions(gradient, basis, mean, group["rho"])
        # A zero gradient says nothing: what is known of the others is in the basis already.
        found = found & (total_norm(gradient) > 0)
        if hyper.found_inf is not None:
            found = found & (hyper.found_inf.reshape(()) == 0)
        _write_basis(state, directions.T.contiguous(), found, group)
        state["projector_refreshes"] += found
        return found

    def _record(self, group: Group, state: State, outcome: kernels.Refresh) -> None:
        state["projector_refreshes"] += 1
        state["projector_energy"].fill_(outcome.energy)
        state["projector_ready"] = 1


def _least_rho(beta1: float) -> float:
    """The limit below which an error in the feedback grows.

    Of a gradient in one direction let the basis deviate by a small angle t, and the feedback hold
    e times the gradient's norm beside it. A step makes t' = rho t + (1 - rho) e and
    e' = e - (1 + c) t' + c t with c = beta1 / (1 - beta1). This map's determinant is
    rho - c (1 - rho), its trace rho more; both of its eigenvalues are less than 1 in magnitude
    where 2 c (1 - rho) < 1 + 3 rho.
    """
    return (3.0 * beta1 - 1.0) / (3.0 - beta1)


def _done(state: State) -> int:
    """Steps before this one: gradients that the moments have seen."""
    return int(state["step"].item()) - 1


def _write_basis(state: State, basis: torch.Tensor, found: torch.Tensor, group: Group) -> None:
    """Replaces the basis where `found`, without waiting for the device."""
    if group["projector_bits"] is None:
        state["projector"].copy_(torch.where(found, basis, state["projector"]))
        return
    feedback.replace_codes(
        [state[f"projector_{part}"] for part in ("codes", "scale", "zero_point")],
        basis,
        bits=group["projector_bits"],
        group_size=group["projector_group_size"],
        stochastic=False,
        seed=group["seed"],
        state=state,
        found_inf=found.logical_not().to(torch.float32).reshape(1),
    )


def _keep_energy(
    state: State, moved: torch.Tensor, low_rank: torch.Tensor, gradient: torch.Tensor
) -> None:
    """Notes the share of the gradient, with its feedback, that the new basis captures."""
    energy = (total_norm(low_rank) / total_norm(gradient)).square().clamp(max=1.0)
    state["projector_energy"].copy_(torch.where(moved, energy, state["projector_energy"]))


def _add_back_rows(matrix: torch.Tensor, rows: torch.Tensor, basis: torch.Tensor) -> None:
    """``matrix += back(rows)``, in place; what would not be finite stays."""
    shape = (matrix.shape[0], matrix.shape[1])
    kernels.project_back_add(
        [matrix], [rows_of(rows, shape)], [basis], scale=1.0, tensor_ids=[0], steps=[0]
    )
