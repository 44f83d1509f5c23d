"""Steps of sharded weights through a low-rank projection, with the projector on every process.

A refresh gathers the gradient of one weight at a time on every process. Between refreshes at most
a projected gradient crosses processes, of weights with fewer rows than columns; and numbers of
which norms of whole weights are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from gradpress.optim import _projector as projector
from gradpress.optim._adam import AdamHyper, Batch, released_form, step_directions
from gradpress.optim._limiter import TINY, limit_growth, norms_along
from gradpress.optim._scaling import Scale
from gradpress.optim._sharded import Shard, is_sharded
from gradpress.optim._sharded_matrix import ShardedMatrix, agree, divide_moments, full_gradient
from gradpress.optim._sharded_state import Group, keep_state
from gradpress.optim._weights import add_update

if TYPE_CHECKING:
    from gradpress.optim._projected import ProjectedOptimizer

#: Options that mean other things to a part of the rows.
_NEEDED = {"proj_type": "std", "tensor_projection": "matrix", "moments": "keep"}

Rule: TypeAlias = "Callable[[Any, Group, ShardedMatrix, AdamHyper], None]"


def check_shards(optimizer: torch.optim.Optimizer) -> None:
    """Refuses sharded parameters that are stepped in a way that needs whole ones.

    Raises:
        NotImplementedError: the optimizer's class or an option is not supported.
    """
    name, groups = type(optimizer).__name__, optimizer.param_groups
    sharded = [(p, group) for group in groups for p in group["params"] if is_sharded(p)]
    if sharded and _rule_of(optimizer) is None:
        raise NotImplementedError(
            f"{name}: sharded parameters (DTensor, as fully_shard makes them) are stepped by"
            f" {', '.join(sorted(_RULES))}, of the optimizers that project; replicate them, as"
            " DistributedDataParallel does"
        )
    for group in {id(group): group for p, group in sharded if p.dim() >= 2}.values():
        for option, value in _NEEDED.items():
            if group["rank"] is not None and group.get(option, value) != value:
                raise NotImplementedError(
                    f"{name}: sharded parameters are projected with {option}={value!r} only, got"
                    f" {group[option]!r}"
                )
        if group["rank"] == "auto":
            raise NotImplementedError(
                f"{name}: sharded parameters need a rank that is a number, got 'auto'"
            )


def step_projected(
    optimizer: ProjectedOptimizer, group: Group, shards: list[Shard], scale: Scale
) -> None:
    """Steps sharded weights of one group that are on one device.

    Args:
        optimizer: Has passed `check_shards`.
        group: The options.
        shards: Weights that have gradients.
        scale: Of the gradients, on the device.
    """
    new = [shard for shard in shards if not optimizer.state[shard.p]]
    optimizer._prepare(group, [shard.p for shard in shards])
    for shard in new:
        divide_moments(shard, optimizer.state[shard.p], group)
    rule = _rule_of(optimizer)
    assert rule is not None
    if rule is not _step_apollo:
        _refresh(optimizer, group, shards, scale)
    shard_of = {id(shard.p): shard for shard in shards}
    for params, hyper in optimizer._hypers(group, [shard.p for shard in shards], scale):
        for p in params:
            _step(optimizer, group, shard_of[id(p)], hyper, rule)
    torch.autograd.graph.increment_version([shard.p for shard in shards])


def _refresh(optimizer: Any, group: Group, shards: Iterable[Shard], scale: Scale) -> None:
    """Finds the projectors anew whose turn it is, one after the other to bound the memory."""
    for shard in shards:
        state = optimizer.state[shard.p]
        if projector.is_due(state, int(state["step"].item()) - 1):
            # A refresh waits for the device anyway; one of a step that is skipped comes later.
            if scale.found_inf is not None and scale.found_inf.item():
                return
            optimizer._refresh_together(group, [(shard.p, full_gradient(shard))])
            agree(shard, state)


def _step(optimizer: Any, group: Group, shard: Shard, hyper: AdamHyper, rule: Rule) -> None:
    state = optimizer.state[shard.p]
    if rule is _step_apollo:
        short = min(projector.matrix_shape(shard.p))
        basis = optimizer._projection(group, state, short, shard.p.device)
    else:
        basis = projector.load_basis(state, projector.matrix_shape(shard.p), group)
    matrix = ShardedMatrix.of(shard, state, basis, group)
    rule(optimizer, group, matrix, hyper)
    kept = {**matrix.state, "tensor_id": state["tensor_id"]}
    keep_state(shard, state, kept, group)


def _step_galore(optimizer: Any, group: Group, matrix: ShardedMatrix, hyper: AdamHyper) -> None:
    """GaLore's and Q-GaLore's step: Adam in the subspace, brought back."""
    update = matrix.project()
    _adam(optimizer, matrix, update, hyper)
    if matrix.weight.numel():
        low_rank, basis = matrix.factors(update)
        row = (matrix.weight, matrix.state, tuple(matrix.grad.shape), low_rank)
        optimizer._add_back(group, [row], hyper, [basis])


def _step_fira(optimizer: Any, group: Group, matrix: ShardedMatrix, hyper: AdamHyper) -> None:
    """Fira's step; see :class:`gradpress.optim.Fira`."""
    alpha, step = group["scale"], int(matrix.state["step"].item())
    keep, size, share = 1.0, 1.0, 1.0
    unit = hyper._replace(lr=1.0, weight_decay=0.0, maximize=False)
    if group["reference"]:
        size = math.sqrt(1.0 - hyper.beta2**step) / (1.0 - hyper.beta1**step)
        unit, share = released_form(unit, step), alpha
        keep = 1.0 - hyper.lr * hyper.weight_decay
    low_rank = matrix.project()
    residual = matrix.grad.to(torch.float32, copy=True)
    matrix.add_back(residual, low_rank, -share)
    before = norms_along(low_rank, matrix.along) / hyper.grad_scale
    _adam(optimizer, matrix, low_rank, unit)
    factors = norms_along(low_rank, matrix.along) / size / (before + TINY)
    residual.mul_(factors / hyper.grad_scale).nan_to_num_(0.0, 0.0, 0.0)
    limit = _limit(group, matrix, matrix.total_norm(residual), hyper)
    rate = (-1.0 if hyper.maximize else 1.0) * hyper.lr * keep
    residual.mul_(limit * (-rate * (size if group["reference"] else alpha)))
    matrix.add_back(residual, low_rank, rate * alpha)
    _add(group, matrix, residual, hyper)


def _step_apollo(optimizer: Any, group: Group, matrix: ShardedMatrix, hyper: AdamHyper) -> None:
    """APOLLO's step; see :class:`gradpress.optim.Apollo`."""
    step = int(matrix.state["step"].item())
    size = math.sqrt(1.0 - hyper.beta2**step) / (1.0 - hyper.beta1**step)
    sketch = matrix.project()
    before = norms_along(sketch, matrix.along) / hyper.grad_scale
    _adam(optimizer, matrix, sketch, released_form(hyper._replace(lr=1.0, weight_decay=0.0), step))
    after = norms_along(sketch, matrix.along) / size
    if group["scale_type"] == "tensor":
        divided = matrix.keeps_rows
        after, before = (matrix.total_norm(norms, divided=divided) for norms in (after, before))
    update = matrix.grad.to(torch.float32) * (after / (before + TINY) / hyper.grad_scale)
    update.nan_to_num_(0.0, 0.0, 0.0)
    root, decay = math.sqrt(group["scale"]), hyper.lr * hyper.weight_decay
    front = root if group["scale_front"] else 1.0
    limit = _limit(group, matrix, matrix.total_norm(update) * front, hyper)
    rate = hyper.lr * size * root * (1.0 - decay)
    update.mul_(limit * (rate if hyper.maximize else -rate))
    _add(group, matrix, update, hyper)


#: By the names of this package's classes: others could do more than these rules.
_RULES: dict[str, Rule] = {
    "GaLoreAdamW": _step_galore,
    "QGaLoreAdamW": _step_galore,
    "Fira": _step_fira,
    "Apollo": _step_apollo,
    "ApolloMini": _step_apollo,
}


def _rule_of(optimizer: object) -> Rule | None:
    own = type(optimizer).__module__.startswith("gradpress.optim.")
    return _RULES.get(type(optimizer).__name__) if own else None


def _adam(optimizer: Any, matrix: ShardedMatrix, grad: torch.Tensor, hyper: AdamHyper) -> None:
    """Turns a projected gradient into Adam's update, minus the learning rate, in place."""
    counter = optimizer._counter(matrix.grad.device)
    step_directions(Batch([grad], [grad], [matrix.state]), hyper, counter)


def _limit(
    group: Group, matrix: ShardedMatrix, norm: torch.Tensor, hyper: AdamHyper
) -> torch.Tensor:
    previous = matrix.state["update_norm"]
    return limit_growth(norm, previous, group["norm_growth"], hyper.found_inf)


def _add(group: Group, matrix: ShardedMatrix, update: torch.Tensor, hyper: AdamHyper) -> None:
    if update.numel():
        add_update(
            matrix.weight,
            update,
            group,
            matrix.state,
            decay=hyper.lr * hyper.weight_decay,
            found_inf=hyper.found_inf,
        )
