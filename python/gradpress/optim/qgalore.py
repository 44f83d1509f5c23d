"""Q-GaLore: AdamW in quantized low-rank subspaces, on quantized weights.

Zhang, Jaiswal, Yin, Liu, Zhao, Tian, Wang: "Q-GaLore: Quantized GaLore with INT4 Projection and
Layer-Adaptive Low-Rank Gradients" (2024, arXiv 2407.08296), after Zhao et al.: "GaLore" (2024,
arXiv 2403.03507). Original implementation: VITA-Group/Q-GaLore. Differences: projectors take half
a byte per entry; all arithmetic is in float32 with one rounding at the end; the subspace comes
from a randomized, warm-started iteration with canonical signs; refreshes are staggered over the
layers; every parameter is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch.optim.optimizer import ParamsT

from gradpress.nn._weight import QuantizedWeight
from gradpress.ops import lowrank as kernels
from gradpress.optim import _projector as projector
from gradpress.optim._adam import AdamHyper, Batch, new_moments, step_directions
from gradpress.optim._base import Group, new_step, plain_gradient
from gradpress.optim._report import ProjectorReport, ProjectorRow
from gradpress.optim._scaling import Scale
from gradpress.optim.adamw8bit import AdamW8bit

#: Bytes of projected gradients in flight at a time.
WORKSPACE_BYTES = 64 << 20


class QGaLoreAdamW(AdamW8bit):
    r"""AdamW in a low-rank subspace of each weight's gradient, with integer weights and states.

    For a weight of a group with `rank` set, with gradient G (m x n), d = min(m, n):

    .. math::
        R = G P \;(m \ge n) \quad\text{or}\quad R = P^\top G, \qquad
        W \leftarrow \mathrm{round}\big((1 - \eta\lambda) W + \alpha\,
            \mathrm{back}(\mathrm{AdamW}_\eta(R))\big)

    P holds the d x r leading singular directions of a recent gradient in 4 bits, the moments of R
    8 bits each. P is found anew every `update_proj_gap` steps; where the leading direction has
    become stable the interval doubles, layer by layer. All other parameters take the rule of
    :class:`AdamW8bit`. Weights quantized by :func:`gradpress.nn.quantize_` are updated in place
    with stochastic rounding, without a floating-point copy.

    Args:
        params: Parameters or groups, as :func:`gradpress.optim.param_groups` makes them. Every
            option below may stand in a group.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, times the learning rate.
        rank: Directions kept; None does not project. Clamped to the weight's shorter side.
            Tensors of order above 2 are taken as (first dimension, all others); those below 2 are
            not projected.
        update_proj_gap: Steps between refreshes, to begin with.
        scale: Factor on the back-projected update.
        proj_type: ``"std"``: the projector stands on the side of the shorter dimension.
        projector_bits: 4 or 8 bits for the projector's entries; None keeps float32.
        projector_group_size: Entries of the projector that share a scale.
        cos_threshold: Mean cosine of the leading directions of consecutive refreshes from which a
            subspace counts as stable.
        gamma_proj: Factor by which a stable subspace's interval grows.
        queue_size: Cosines in that mean.
        stagger: Spread the refreshes of the layers over the interval.
        **options: Those of :class:`AdamW8bit`.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> model = gradpress.nn.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 64)))
        >>> groups = gradpress.optim.param_groups(model, rank=8, verbose=False)
        >>> optimizer = gradpress.optim.QGaLoreAdamW(groups, lr=1e-2)
        >>> model(torch.randn(4, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.refresh_counts()
        {'0.weight': 1}
    """

    _KEEP_DTYPE: ClassVar[frozenset[str]] = AdamW8bit._KEEP_DTYPE | frozenset(projector.KEEP)
    _ON_HOST: ClassVar[frozenset[str]] = frozenset(projector.ON_HOST)

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        projector_bits: int | None = 4,
        projector_group_size: int = 256,
        cos_threshold: float = 0.4,
        gamma_proj: float = 2.0,
        queue_size: int = 5,
        stagger: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            projector_bits=projector_bits,
            projector_group_size=projector_group_size,
            cos_threshold=cos_threshold,
            gamma_proj=gamma_proj,
            queue_size=queue_size,
            stagger=stagger,
            **options,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        valid = {
            "rank": group["rank"] is None or group["rank"] >= 1,
            "update_proj_gap": group["update_proj_gap"] >= 1,
            "proj_type": group["proj_type"] == "std",
            "projector_bits": group["projector_bits"] in (None, 4, 8),
            "projector_group_size": group["projector_group_size"] >= 1,
            "gamma_proj": group["gamma_proj"] >= 1,
            "queue_size": group["queue_size"] >= 1,
        }
        for name, ok in valid.items():
            if not ok:
                raise ValueError(f"Invalid {name} value: {group[name]!r}")

    def _check_gradients(self, params: Iterable[torch.Tensor]) -> None:
        super()._check_gradients(params)
        groups = [g for g in self.param_groups if g["rank"] is not None]
        if groups and all(p.dim() < 2 for g in groups for p in g["params"]):
            raise ValueError(
                f"{type(self).__name__}: params must hold a tensor of two dimensions where rank is"
                " set, got one-dimensional tensors only; DeepSpeed ZeRO and FSDP1 flatten"
                " parameters, which leaves nothing to project"
            )

    def _step_group(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        projected = [p for p in params if group["rank"] is not None and p.dim() >= 2 and p.numel()]
        chosen = {id(p) for p in projected}
        others = [p for p in params if id(p) not in chosen]
        if others:
            self._step_unprojected(group, others, scale)
        if not projected:
            return
        grads = [plain_gradient(p).view(projector.matrix_shape(p)) for p in projected]
        self._prepare(group, projected)
        self._refresh(group, projected, grads, scale)
        hyper = AdamHyper.of(group, scale)
        start, size = 0, 0
        for i, p in enumerate(projected):
            size += 4 * self.state[p]["projector_rank"] * max(projector.matrix_shape(p))
            if size >= WORKSPACE_BYTES or i == len(projected) - 1:
                self._step_projected(group, projected[start : i + 1], grads[start : i + 1], hyper)
                start, size = i + 1, 0

    def _prepare(self, group: Group, params: list[torch.Tensor]) -> None:
        """Makes the states that are missing, and counts the step."""
        ids = self._ids()
        total = sum(p.dim() >= 2 for p in group["params"])
        place = {id(p): i for i, p in enumerate(q for q in group["params"] if q.dim() >= 2)}
        for p in params:
            state = self.state[p]
            if not state:
                shape = projector.matrix_shape(p)
                gap = group["update_proj_gap"]
                offset = place[id(p)] * gap // total if group["stagger"] else 0
                state["step"], state["tensor_id"] = new_step(), ids[p]
                projector.new_projector(state, shape, p.device, group, offset)
                low_rank = kernels.projected_shape(*shape, state["projector_rank"])
                new_moments(state, low_rank, p.device, group)
            state["step"] += 1

    def _refresh(
        self, group: Group, params: list[torch.Tensor], grads: list[torch.Tensor], scale: Scale
    ) -> None:
        """Finds the projectors anew whose turn it is, some at a time to bound the memory."""
        due, size = [], 0
        for p, grad in zip(params, grads, strict=True):
            state = self.state[p]
            if projector.is_due(state, int(state["step"].item()) - 1):
                due.append((p, grad))
                size += 4 * state["projector_rank"] * min(projector.matrix_shape(p))
            if due and (size >= WORKSPACE_BYTES or p is params[-1]):
                # A refresh waits for the device anyway; one of a step that is skipped comes later.
                if scale.found_inf is not None and scale.found_inf.item():
                    return
                self._refresh_together(group, due)
                due, size = [], 0

    def _refresh_together(self, group: Group, due: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        states = [self.state[p] for p, _ in due]
        bases = [
            projector.load_basis(state, projector.matrix_shape(p), group)
            for state, (p, _) in zip(states, due, strict=True)
        ]
        outcomes = kernels.refresh_basis(
            [grad for _, grad in due],
            bases,
            [state["projector_vector"] for state in states],
            warm=[bool(state["projector_ready"]) for state in states],
            seed=group["seed"],
            tensor_ids=[state["tensor_id"] for state in states],
            steps=[int(state["step"].item()) - 1 for state in states],
        )
        for state, basis, outcome in zip(states, bases, outcomes, strict=True):
            if outcome.status == kernels.REFRESHED:
                projector.store_basis(state, basis, group)
            projector.record(state, outcome, group)

    def _step_projected(
        self,
        group: Group,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        hyper: AdamHyper,
    ) -> None:
        """Projects, steps the moments, and adds the back-projected update to the weights."""
        states = [self.state[p] for p in params]
        shapes = [projector.matrix_shape(p) for p in params]
        updates = [
            torch.empty(
                kernels.projected_shape(*shape, state["projector_rank"]),
                dtype=torch.float32,
                device=p.device,
            )
            for p, state, shape in zip(params, states, shapes, strict=True)
        ]
        kernels.project(grads, projector.bases_of(states, group), updates)
        step_directions(Batch(updates, updates, states), hyper, self._counter(params[0].device))
        rows = list(zip(params, states, shapes, updates, strict=True))
        dense = [row for row in rows if not isinstance(row[0], QuantizedWeight)]
        self._add_to_dense(group, dense, hyper)
        quantized = [row for row in rows if isinstance(row[0], QuantizedWeight)]
        for bits, size in sorted({_layout(row[0]) for row in quantized}):
            chosen = [row for row in quantized if _layout(row[0]) == (bits, size)]
            self._add_to_quantized(group, chosen, hyper, bits, size)

    def _add_to_dense(self, group: Group, rows: list[Any], hyper: AdamHyper) -> None:
        if not rows:
            return
        targets = [p if p.is_contiguous() else p.detach().contiguous() for p, *_ in rows]
        kernels.project_back_add(
            [t.detach().view(row[2]) for t, row in zip(targets, rows, strict=True)],
            [row[3] for row in rows],
            projector.bases_of([row[1] for row in rows], group),
            scale=group["scale"],
            decay=hyper.lr * hyper.weight_decay,
            stochastic_rounding=hyper.stochastic_rounding,
            seed=hyper.seed,
            tensor_ids=[s["tensor_id"] for _, s, *_ in rows],
            steps=[int(s["step"].item()) for _, s, *_ in rows],
            found_inf=hyper.found_inf,
        )
        for target, (p, *_) in zip(targets, rows, strict=True):
            if target is not p:
                p.copy_(target)

    def _add_to_quantized(
        self, group: Group, rows: list[Any], hyper: AdamHyper, bits: int, group_size: int
    ) -> None:
        kernels.project_back_requantize(
            [p.codes if bits == 4 else p.codes.view(shape) for p, _, shape, *_ in rows],
            [p.scale for p, *_ in rows],
            [p.zero_point for p, *_ in rows],
            [row[2] for row in rows],
            [row[3] for row in rows],
            projector.bases_of([row[1] for row in rows], group),
            bits=bits,
            group_size=group_size,
            scale=group["scale"],
            decay=hyper.lr * hyper.weight_decay,
            stochastic=group["weight_rounding"] == "stochastic",
            seed=hyper.seed,
            tensor_ids=[s["tensor_id"] for _, s, *_ in rows],
            steps=[int(s["step"].item()) for _, s, *_ in rows],
            found_inf=hyper.found_inf,
        )

    def refresh_counts(self) -> dict[str, int]:
        """How often each projector was found anew, by the parameter's name or ordinal."""
        return {row.name: row.refreshes for row in self.report().rows}

    def report(self) -> ProjectorReport:
        """Rank, interval, refreshes and captured energy of every projected weight."""
        rows = []
        for name, p, _ in self._names():
            state = cast("dict[str, Any]", self.state.get(p, {}))
            if "projector_rank" in state:
                rows.append(ProjectorRow.of(name, p, state))
        return ProjectorReport(tuple(rows))


def _layout(weight: torch.Tensor) -> tuple[int, int]:
    quantized = cast(QuantizedWeight, weight)
    return quantized.bits, quantized.group_size
