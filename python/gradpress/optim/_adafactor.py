"""Adafactor's rule: factored second moments, clipped updates, relative step sizes.

Shazeer, Stern: "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (2018, arXiv
1804.04235). Sums run in an order that does not depend on the number of threads, and products and
sums are rounded one by one: PyTorch's fused forms round the ends of a thread's share differently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch

from gradpress.nn._weight import QuantizedWeight
from gradpress.ops import optim as kernels
from gradpress.optim._adam import State, new_moment, state_block_size
from gradpress.optim._base import Group
from gradpress.optim._limiter import RUN
from gradpress.optim._moments import Turn, load_moment, store_moment
from gradpress.optim._products import product
from gradpress.optim._tucker import ModeTurns

#: Second moments of the rows and of the columns of a matrix.
FACTORS = ("exp_avg_sq_row", "exp_avg_sq_col")
#: The largest magnitude whose square is a float32.
LARGEST = math.sqrt(torch.finfo(torch.float32).max)
#: Keeps quotients of second moments finite where `eps` is zero.
SMALLEST = torch.finfo(torch.float32).tiny
#: Elements of a matrix whose squares are summed over columns in one go.
COLUMN_RUN = {"cpu": 1 << 18, "cuda": 1 << 24}


class Gradient(NamedTuple):
    """What turns into an update.

    Attributes:
        values: float32, contiguous; written.
        grad_scale: What the values are divided by first.
        found_inf: float32 of one element: where it is not zero the state stays as it is.
    """

    values: torch.Tensor
    grad_scale: float | torch.Tensor
    found_inf: torch.Tensor | None


# Rates


def relative_rate(step: int, *, warmup_init: bool) -> float:
    """The relative step size of the `step`-th step, counted from 1: section 7 of the paper."""
    return min(1e-6 * step if warmup_init else 1e-2, 1.0 / math.sqrt(step))


def learning_rate(p: torch.Tensor, group: Group, step: int) -> float | torch.Tensor:
    """The rate of a step; on the device where it depends on the parameter's size.

    Args:
        p: The parameter.
        group: The options.
        step: Counted from 1.
    """
    rate = float(group["lr"])
    if group["relative_step"]:
        rate *= relative_rate(step, warmup_init=group["warmup_init"])
    if not group["scale_parameter"] or not p.numel():
        return rate
    return root_mean_square(float_values(p)).clamp(min=group["eps"][1]).mul(rate)


def float_values(p: torch.Tensor) -> torch.Tensor:
    """A parameter's values in float32, contiguous; not to be written."""
    dense = p.detach()
    if isinstance(dense, QuantizedWeight):
        dense = dense.dequantize(torch.float32)
    return dense.to(torch.float32).contiguous()


# Sums


def row_norms(x: torch.Tensor) -> torch.Tensor:
    """Norms along the last dimension."""
    while x.shape[-1] > RUN:
        whole = x.shape[-1] // RUN * RUN
        runs = [_norms(torch.unflatten(x[..., :whole], -1, (-1, RUN)))]
        if whole < x.shape[-1]:
            runs.append(_norms(x[..., whole:]).unsqueeze(-1))
        x = torch.cat(runs, dim=-1)
    return _norms(x)


def _norms(x: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, torch.linalg.vector_norm(x, dim=-1))


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Of all elements of a contiguous tensor, without dimensions."""
    return row_norms(x.view(-1)) / math.sqrt(x.numel())


def column_square_sums(x: torch.Tensor) -> torch.Tensor:
    """Sums of squares over the rows: ``[b, m, n]`` to ``[b, n]``.

    A sum for each of some rows at a time, then one half of them onto the other.
    """
    batch, rows, columns = x.shape
    most = COLUMN_RUN.get(x.device.type, COLUMN_RUN["cuda"])
    run = min(rows, max(1, most // (batch * columns)))
    sums = torch.zeros(batch, run, columns, dtype=x.dtype, device=x.device)
    squares = torch.empty_like(sums)
    for part in torch.split(x, run, dim=1):
        some = part.shape[1]
        sums[:, :some] += torch.mul(part, part, out=squares[:, :some])
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        rest = sums[:, 2 * half :]
        sums = sums[:, :half] + sums[:, half : 2 * half]
        sums[:, : rest.shape[1]] += rest
    return sums[:, 0]


# Moments


def new_moments(state: State, shape: Sequence[int], device: torch.device, group: Group) -> None:
    """Adds zero moments: factored second ones from two dimensions on, the first one if asked.

    Of tensors of order above 2 the last two dimensions are the matrix's.
    """
    shape = tuple(shape)
    sizes = {"exp_avg_sq": shape}
    if len(shape) >= 2:
        sizes = dict(zip(FACTORS, (shape[:-1], shape[:-2] + shape[-1:]), strict=True))
    for name, size in sizes.items():
        state[name] = torch.zeros(size, dtype=torch.float32, device=device)
    if group["beta1"] is not None:
        new_moment(state, "exp_avg", shape, device, group, signed=True)


def moment_shape(state: State) -> tuple[int, ...]:
    """The shape of a gradient whose second moments are factored."""
    rows, columns = (state[name].shape for name in FACTORS)
    return (*rows, columns[-1])


def reset_moments(state: State, group: Group) -> None:
    """Forgets all gradients of a matrix, or of a tensor."""
    for name in FACTORS:
        state[name].zero_()
    if _has_first_moment(state):
        zeros = torch.zeros(moment_shape(state), device=state[FACTORS[0]].device)
        store_moment(state, "exp_avg", zeros, group)


def turn_moments(state: State, turn: Turn | ModeTurns, group: Group) -> None:
    """Estimates what the moments were, had the gradients been projected by another basis.

    The first moment is linear. The second moment of a new direction is the mean of the old ones',
    weighted by the squares of the cosines, as if the old coordinates were uncorrelated; the weight
    that the old subspace leaves over goes to all its directions alike, so that directions unseen
    before do not look as if they had no gradient.

    Args:
        state: Holds the moments; written.
        turn: From the old coordinates to the new ones.
        group: How the first moment is stored.
    """
    if _has_first_moment(state):
        turned = turn.apply(_first_moment(state, moment_shape(state), group))
        store_moment(state, "exp_avg", turned.contiguous(), group)
    modes: list[torch.Tensor | None]
    if isinstance(turn, ModeTurns):
        modes = [matrix.T for matrix in turn.matrices]
    else:
        modes = [turn.left, turn.right]
    for name, turned_modes in zip(FACTORS, (modes[:-1], modes[:-2] + modes[-1:]), strict=True):
        for dim, cosines in enumerate(turned_modes):
            if cosines is not None:
                state[name].copy_(_mixed(state[name], dim, cosines.square()))


def _mixed(moment: torch.Tensor, dim: int, squares: torch.Tensor) -> torch.Tensor:
    """Second moments along one dimension in new coordinates; `squares` is ``[new, old]``."""
    missing = (1.0 - row_norms(squares.sqrt()).square()).clamp(min=0.0)
    weights = squares + missing.unsqueeze(1) / squares.shape[1]
    old = moment.movedim(dim, 0)
    new = product(weights, old.reshape(old.shape[0], -1))
    return new.view(-1, *old.shape[1:]).movedim(0, dim)


def _has_first_moment(state: State) -> bool:
    return "exp_avg" in state or "exp_avg_codes" in state


def _first_moment(state: State, shape: tuple[int, ...], group: Group) -> torch.Tensor:
    # It takes any number of dimensions.
    return load_moment(state, "exp_avg", cast("tuple[int, int]", shape), group)


# Steps


def to_update(
    gradient: Gradient,
    state: State,
    group: Group,
    *,
    rate: float | torch.Tensor,
    seen: int,
    nonfinite: torch.Tensor,
) -> None:
    """Steps the moments, and turns a gradient into what is added to the parameter, in place.

    Elements that are NaN or infinite, or whose squares are, count as absent: the means are those
    of the others, the first moment stays, the update is zero.

    Args:
        gradient: Becomes the update.
        state: Holds the moments; written.
        group: The options.
        rate: The learning rate.
        seen: How many gradients the second moments have seen, this one included.
        nonfinite: int64 of one element, increased by the number of absent elements.
    """
    x = gradient.values
    factor = gradient.grad_scale
    if isinstance(factor, torch.Tensor):
        x.div_(factor.reshape(()))
    elif factor != 1.0:
        x.div_(factor)
    if group["maximize"]:
        x.neg_()
    norms = row_norms(x.view(-1, *x.shape[-2:]) if x.dim() >= 2 else x.view(-1))
    keep = _kept(gradient, norms, nonfinite)
    if keep is not None:
        x.masked_fill_(~keep, 0.0)
    decay = 1.0 - seen ** group["decay_rate"]
    if x.dim() >= 2:
        mean = _divide_by_factors(x, keep, norms, state, decay, group["eps"][0])
    else:
        mean = _divide_by_root(x, keep, state, decay, group["eps"][0])
    size = rate / (mean / group["clip_threshold"]).clamp(min=1.0)
    if group["beta1"] is None:
        x.mul_(-size)
    else:
        _add_momentum(gradient, keep, state, group, size)


def _kept(gradient: Gradient, norms: torch.Tensor, nonfinite: torch.Tensor) -> torch.Tensor | None:
    """Which elements count; None where the host knows that all of them do."""
    x, found_inf = gradient.values, gradient.found_inf
    # No element is larger than its row's norm. Reading that makes nobody wait on the CPU.
    on_cpu = x.device.type == "cpu"
    if on_cpu and found_inf is None and (not x.numel() or float(norms.max()) < LARGEST):
        return None
    keep = x.abs() < LARGEST
    skipped = ~keep
    if found_inf is not None:
        counts = found_inf.reshape(()) == 0
        skipped, keep = skipped & counts, keep & counts
    nonfinite += skipped.sum()
    return keep


def _divide_by_factors(
    x: torch.Tensor,
    keep: torch.Tensor | None,
    norms: torch.Tensor,
    state: State,
    decay: float,
    eps: float,
) -> torch.Tensor:
    """Divides matrices by the roots of the products of their rows' and columns' moments.

    Returns:
        The root of the mean square of what comes out.
    """
    matrices = x.view(-1, *x.shape[-2:])
    rows, columns = (state[name].view(matrices.shape[0], -1) for name in FACTORS)
    if keep is not None:
        norms = row_norms(matrices)
    sums = (norms.square(), column_square_sums(matrices))
    counts: tuple[Any, Any] = (x.shape[-1], x.shape[-2])
    if keep is not None:
        kept = keep.view(matrices.shape)
        counts = (kept.sum(-1), kept.sum(-2))
    for moment, total, count in zip((rows, columns), sums, counts, strict=True):
        _average(moment, total / count + eps, decay, checked=keep is not None)
    mean = row_norms(rows.sqrt()).square() / rows.shape[1]
    relative = rows / mean.clamp(min=SMALLEST).unsqueeze(1)
    by_row = relative.clamp_(min=SMALLEST).rsqrt_().unsqueeze(2)
    by_column = columns.clamp(min=SMALLEST).rsqrt_().unsqueeze(1)
    # Some rows at a time, which stay in a cache for all that is done to them.
    run = max(1, COLUMN_RUN.get(x.device.type, COLUMN_RUN["cuda"]) // max(matrices.shape[2], 1))
    parts = (torch.split(t, run, dim=1) for t in (matrices, by_row))
    squares = []
    for part, factors in zip(*parts, strict=True):
        part.mul_(factors).mul_(by_column)
        if keep is not None:
            part.nan_to_num_(0.0, 0.0, 0.0)
        squares.append(row_norms(part))
    return row_norms(torch.cat(squares, dim=1).view(-1)) / math.sqrt(max(x.numel(), 1))


def _divide_by_root(
    x: torch.Tensor, keep: torch.Tensor | None, state: State, decay: float, eps: float
) -> torch.Tensor:
    """Divides elements by the roots of their own moments; returns as `_divide_by_factors`."""
    squares = x.square().add_(eps)
    if keep is not None:
        squares = torch.where(keep, squares, math.nan)
    _average(state["exp_avg_sq"], squares, decay, checked=keep is not None)
    x.mul_(state["exp_avg_sq"].clamp(min=SMALLEST).rsqrt_())
    if keep is not None:
        x.nan_to_num_(0.0, 0.0, 0.0)
    return root_mean_square(x)


def _average(moment: torch.Tensor, new: torch.Tensor, decay: float, *, checked: bool) -> None:
    """Steps second moments; `checked` keeps those that would not be finite."""
    mixed = (moment * decay).add_(new.mul_(1.0 - decay))
    moment.copy_(torch.where(mixed.isfinite(), mixed, moment) if checked else mixed)


def _add_momentum(
    gradient: Gradient,
    keep: torch.Tensor | None,
    state: State,
    group: Group,
    size: torch.Tensor,
) -> None:
    """Averages the updates, and puts the average in place of this one."""
    x, beta1 = gradient.values, group["beta1"]
    if not _has_first_moment(state):
        new_moment(state, "exp_avg", x.shape, x.device, group, signed=True)
    if "exp_avg" in state and keep is None:
        new = state["exp_avg"].mul_(beta1).add_(x.mul_(size * (1.0 - beta1)))
        torch.neg(new, out=x)
        return
    old = _first_moment(state, tuple(x.shape), group)
    new = (old * beta1).add_(x.mul_(size * (1.0 - beta1)))
    torch.neg(new, out=x)
    if keep is not None:
        new = torch.where(keep, new, old)
        x.masked_fill_(~keep, 0.0)
    _store_first_moment(state, new, group, gradient.found_inf)


def _store_first_moment(
    state: State, values: torch.Tensor, group: Group, found_inf: torch.Tensor | None
) -> None:
    """Writes the first moment, without a wait for the device; `values` may be overwritten."""
    if "exp_avg" in state:
        state["exp_avg"].copy_(values)
        return
    # Adam with beta1 = 0 stores its gradient as first moment.
    unused: State = {}
    new_moment(unused, "moment", values.shape, values.device, group, signed=False)
    kernels.adamw_blockwise_direction(
        [values],
        [state["exp_avg_codes"]],
        [state["exp_avg_scale"]],
        [unused["moment_codes"]],
        [unused["moment_scale"]],
        steps=[1],
        nonfinite=torch.zeros(1, dtype=torch.int64, device=values.device),
        lr=0.0,
        beta1=0.0,
        beta2=0.0,
        eps=1.0,
        found_inf=found_inf,
        bits=group["state_bits"],
        block_size=state_block_size(group),
    )
