"""AdamP and SGDP: momentum optimizers that do not grow the norms of scale-invariant weights.

Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha: "AdamP: Slowing Down the Slowdown for Momentum Optimizers on
Scale-invariant Weights" (ICLR 2021, arXiv 2006.08217). Original implementation: clovaai/AdamP
(`pip install adamp`). Differences: whether to project is decided on the device, without waiting
for it; SGDP projects what is added to the weight and leaves the momentum alone, as the paper's
algorithm 1 says, while the original without Nesterov's momentum projects its momentum buffer in
place; SGDP without momentum keeps no buffer; moments take 8 bits by default.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch.optim.optimizer import ParamsT

from gradpress.ops import dynamic
from gradpress.ops import optim as kernels
from gradpress.optim._adam import (
    CODES,
    FLOATS,
    AdamHyper,
    State,
    new_moment,
    new_moments,
    state_block_size,
)
from gradpress.optim._base import Group
from gradpress.optim._elementwise import ElementwiseOptimizer, Row, step_adam, step_of
from gradpress.optim._scaling import Scale

#: Keeps quotients of norms finite when eps is zero.
_TINY = 1e-30


class AdamP(ElementwiseOptimizer):
    r"""Adam that projects its update onto the tangent space of scale-invariant weights.

    .. math::
        u_t &= \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}, \qquad
        q_t = \begin{cases}
            u_t - \hat p\,\langle \hat p, u_t\rangle, \; \rho = \texttt{wd\_ratio}
                & |\cos(p_{t-1}, g_t)| < \delta / \sqrt{\dim p} \\
            u_t, \; \rho = 1 & \text{otherwise}
        \end{cases} \\
        p_t &= (1 - \eta\lambda\rho)\, p_{t-1} - \eta\, q_t, \qquad \hat p = p_{t-1} /
            (\lVert p_{t-1}\rVert + \epsilon)

    A tensor of two and more dimensions is tested row by row (first dimension, all others) and,
    where one of its rows fails, as a whole; if all rows pass, or the whole does, that is what is
    projected. Tensors of fewer dimensions never are. Moments, arithmetic and rounding are those of
    :class:`AdamW8bit`; the sums behind the cosines are PyTorch's. An element whose gradient is NaN
    or infinite keeps its parameter and moments, and is counted (:attr:`nonfinite_gradients`).

    Args:
        params: Tensors, named tensors, or dicts of parameter groups. Any option below but the
            flags may stand in a group.
        lr: Learning rate; a number or a tensor of one element.
        betas: Decay rates of the two moments.
        eps: Added to the denominators.
        weight_decay: Decoupled decay, times the learning rate.
        delta: How far from orthogonal gradient and weight may be for the weight to count as
            scale-invariant.
        wd_ratio: Factor on the weight decay of projected tensors.
        nesterov: Takes :math:`\beta_1 m_t + (1-\beta_1) g_t` in place of :math:`m_t`.
        **options: `maximize`, `foreach`, `fused`, `capturable`, `differentiable`, `block_size`,
            `min_8bit_size`, `state_bits`, `stochastic_rounding`, `weight_rounding` and `seed`, as
            in :class:`AdamW8bit`; ``state_bits=32`` is the paper's precision.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> optimizer = gradpress.optim.AdamP(model.parameters(), lr=1e-3, weight_decay=1e-2)
        >>> before = model[0].weight.detach().flatten(1).norm(dim=1)
        >>> model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> after = model[0].weight.detach().flatten(1).norm(dim=1)
        >>> bool(((after - before).abs() < 1e-2).all())
        True
    """

    _KEEP_DTYPE: ClassVar[frozenset[str]] = frozenset((*CODES, *FLOATS))
    _STEPS_SHARDS: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
        }
        super().__init__(params, own, **options)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        _check_projection(group)

    def _new_state(self, group: Group, p: torch.Tensor, state: State) -> None:
        new_moments(state, p.shape, p.device, group)

    def _changes(self, group: Group, rows: list[Row], scale: Scale) -> None:
        hyper = AdamHyper.of(group, scale)
        views = [_Projection.of(row, group) for row in rows]
        updates, states = [row.update for row in rows], [row.state for row in rows]
        alone = _without_momentum(updates, states, hyper) if group["nesterov"] else []
        step_adam(updates, states, hyper, self._counter(rows[0].p.device))
        for row, update in zip(rows, alone, strict=False):
            share = (1 - hyper.beta1) / (1 - hyper.beta1 ** step_of(row.state))
            row.update.mul_(hyper.beta1).add_(update, alpha=share)
        decay = hyper.lr * hyper.weight_decay
        for row, projection in zip(rows, views, strict=True):
            _project_and_decay(row, projection, decay, group["wd_ratio"])


def _without_momentum(
    grads: list[torch.Tensor], states: list[State], hyper: AdamHyper
) -> list[torch.Tensor]:
    """Adam's updates if the first moments were the gradients themselves; nothing is written."""
    updates = [grad.clone() for grad in grads]
    copies = [{k: v.clone() if torch.is_tensor(v) else v for k, v in s.items()} for s in states]
    uncounted = torch.zeros(1, dtype=torch.int64, device=grads[0].device)
    step_adam(updates, copies, hyper._replace(beta1=0.0), uncounted)
    return updates


class SGDP(ElementwiseOptimizer):
    r"""SGD with momentum that projects its update as :class:`AdamP` does.

    .. math::
        b_t &= \mu\, b_{t-1} + (1-\tau)\, g_t, \qquad u_t = b_t
            \;\text{ or }\; g_t + \mu\, b_t \text{ (Nesterov)} \\
        p_t &= \Big(1 - \frac{\eta\lambda\rho}{1-\mu}\Big)\, p_{t-1} - \eta\, q_t

    with :math:`q_t` and :math:`\rho` as in :class:`AdamP`. The dampening applies to the first step
    too, unlike in `torch.optim.SGD`; the division by :math:`1-\mu` makes up for what momentum does
    to a decay that is part of the gradient. The momentum is one moment, stored as the first one of
    :class:`AdamW8bit`; without momentum there is none.

    Args:
        params: Tensors, named tensors, or dicts of parameter groups. Any option below but the
            flags may stand in a group.
        lr: Learning rate; a number or a tensor of one element.
        momentum: Decay rate :math:`\mu` of the momentum; below 1 with weight decay.
        dampening: :math:`\tau`.
        weight_decay: Decoupled decay, times the learning rate, divided by :math:`1-\mu`.
        nesterov: Whether the momentum is Nesterov's.
        eps: Added to norms.
        delta: As in :class:`AdamP`.
        wd_ratio: As in :class:`AdamP`.
        **options: As in :class:`AdamP`.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Linear(128, 128)
        >>> optimizer = gradpress.optim.SGDP(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(2, 128)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["momentum_buffer_codes"].dtype
        torch.uint8
    """

    _KEEP_DTYPE: ClassVar[frozenset[str]] = frozenset(
        ("momentum_buffer", "momentum_buffer_codes", "momentum_buffer_scale")
    )
    _STEPS_SHARDS: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        **options: Any,
    ) -> None:
        own = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
        }
        super().__init__(params, own, **options)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        _check_projection(group)
        if not group["momentum"] >= 0.0:
            raise ValueError(f"Invalid momentum value: {group['momentum']}")
        if group["weight_decay"] and not group["momentum"] < 1.0:
            raise ValueError(
                f"Invalid momentum value: {group['momentum']}; weight_decay is divided by"
                " 1 - momentum, which must be positive"
            )

    def _new_state(self, group: Group, p: torch.Tensor, state: State) -> None:
        if group["momentum"]:
            new_moment(state, "momentum_buffer", p.shape, p.device, group, signed=True)

    def _changes(self, group: Group, rows: list[Row], scale: Scale) -> None:
        counter = self._counter(rows[0].p.device)
        lr, momentum = float(group["lr"]), group["momentum"]
        decay = lr * group["weight_decay"] / (1 - momentum) if group["weight_decay"] else 0.0
        for row in rows:
            if row.keep is not None:
                skipped = ~row.update.isfinite()
                if scale.found_inf is not None:
                    skipped &= scale.found_inf == 0
                counter += skipped.sum()
                row.update = row.kept(row.update, 0.0)
            projection = _Projection.of(row, group)
            if momentum:
                if not any(name.startswith("momentum_buffer") for name in row.state):
                    self._new_state(group, row.p, row.state)
                _add_momentum(row, group, scale)
            else:
                row.update.mul_(1.0 if group["nesterov"] else 1 - group["dampening"])
            row.update.mul_(-lr)
            _project_and_decay(row, projection, decay, group["wd_ratio"])


def _add_momentum(row: Row, group: Group, scale: Scale) -> None:
    """Steps the momentum, and turns the gradient into it, or into Nesterov's."""
    old = _load_momentum(row, group)
    # Where all of it changes, it may change in place.
    new = old.mul_(group["momentum"]) if row.keep is None else old * group["momentum"]
    new = row.kept(new.add_(row.update, alpha=1 - group["dampening"]), old)
    if group["nesterov"]:
        row.update.add_(new, alpha=group["momentum"])
    else:
        row.update.copy_(new)
    _store_momentum(row, new, group, scale)


def _load_momentum(row: Row, group: Group) -> torch.Tensor:
    state = row.state
    if "momentum_buffer" in state:
        buffer: torch.Tensor = state["momentum_buffer"]
        return buffer
    values: Any = dynamic.dequantize_dynamic(
        state["momentum_buffer_codes"],
        state["momentum_buffer_scale"],
        bits=group["state_bits"],
        block_size=state_block_size(group),
        shape=tuple(row.p.shape),
    )
    return values  # type: ignore[no-any-return]


def _store_momentum(row: Row, values: torch.Tensor, group: Group, scale: Scale) -> None:
    """Stores the momentum; `values` may be overwritten."""
    state = row.state
    if "momentum_buffer" in state:
        state["momentum_buffer"].copy_(values)
        return
    # Adam with beta1 = 0 stores its gradient as first moment, on the device, without a wait.
    unused: State = {}
    new_moment(unused, "moment", row.p.shape, row.p.device, group, signed=False)
    kernels.adamw_blockwise_direction(
        [values],
        [state["momentum_buffer_codes"]],
        [state["momentum_buffer_scale"]],
        [unused["moment_codes"]],
        [unused["moment_scale"]],
        steps=[1],
        nonfinite=torch.zeros(1, dtype=torch.int64, device=values.device),
        lr=0.0,
        beta1=0.0,
        beta2=0.0,
        eps=1.0,
        found_inf=scale.found_inf,
        bits=group["state_bits"],
        block_size=state_block_size(group),
    )


def _check_projection(group: Group) -> None:
    for name in ("delta", "wd_ratio"):
        if not group[name] >= 0.0:
            raise ValueError(f"Invalid {name} value: {group[name]}")


class _Projection(NamedTuple):
    """What is projected, decided on the device.

    Attributes:
        row_norms: Norms of the weight's rows, with eps.
        norm: Of the whole weight, with eps.
        rows: Whether every row counts as scale-invariant.
        whole: Whether the weight as a whole does.
    """

    row_norms: torch.Tensor
    norm: torch.Tensor
    rows: torch.Tensor
    whole: torch.Tensor

    @classmethod
    def of(cls, row: Row, group: Group) -> _Projection | None:
        """Of a gradient; None for a tensor that is never projected."""
        if row.p.dim() < 2 or not row.numel:
            return None
        grad, weight = (t.flatten(1) for t in (row.kept(row.update, 0.0), row.weight))
        eps = group["eps"]
        products = (grad * weight).sum(1)
        grad_norms, row_norms = (torch.linalg.vector_norm(t, dim=1) for t in (grad, weight))
        cosines = _cosine(products, grad_norms, row_norms, eps)
        parts = row.everywhere(
            products.sum(),
            *(torch.linalg.vector_norm(t) for t in (grad_norms, row_norms)),
            cosines.amax() if cosines.numel() else products.sum(),
        ).unbind(1)
        grad_norm, norm = (torch.linalg.vector_norm(part) for part in parts[1:3])
        return cls(
            row_norms + eps,
            norm + eps,
            parts[3].amax() < group["delta"] / math.sqrt(grad.shape[1]),
            _cosine(parts[0].sum(), grad_norm, norm, eps) < group["delta"] / math.sqrt(row.numel),
        )

    def shares(self, row: Row) -> torch.Tensor:
        """How much of the weight's rows the projection takes off the update's rows."""
        products = (row.update.flatten(1) * row.weight.flatten(1)).sum(1)
        by_row, by_norm = (n.clamp_min(_TINY) for n in (self.row_norms, self.norm))
        whole = row.everywhere(products.sum()).sum() / by_norm / by_norm
        return torch.where(
            self.rows, products / by_row / by_row, torch.where(self.whole, whole, 0.0)
        )


def _cosine(
    product: torch.Tensor, norm: torch.Tensor, other_norm: torch.Tensor, eps: float
) -> torch.Tensor:
    """The cosine's magnitude; zero where a norm is."""
    least = max(eps, _TINY)
    return (product / norm.clamp_min(least) / other_norm.clamp_min(least)).abs()


def _project_and_decay(
    row: Row, projection: _Projection | None, decay: float, wd_ratio: float
) -> None:
    """Projects the update where that is due, and subtracts `decay` times the weight."""
    if projection is None:
        if decay:
            row.update.add_(row.weight, alpha=-decay)
        return
    shares = projection.shares(row)
    if decay:
        projected = projection.rows | projection.whole
        shares = shares + torch.where(projected, decay * wd_ratio, decay)
    row.update.flatten(1).addcmul_(row.weight.flatten(1), shares.unsqueeze(1), value=-1)
