"""GradNormLoRP: AdamW in subspaces of both sides of the gradients of weight-normalized layers.

Huang, Shen, Zhu, Rudinac, Kanoulas: "Gradient Weight-normalized Low-rank Projection for Efficient
LLM Training" (AAAI 2025, arXiv 2412.19616). The weights are those of
:mod:`gradpress.nn.weight_norm`. Differences from the released code
(Jhhuangkay/Gradient-Weight-normalized-Low-rank-Projection-for-Efficient-LLM-Training), which
normalizes inside of the optimizer: here the model does, so that magnitudes learn, no second copy
of a weight is kept, biases are biases (there zero ones become NaN), tensors of every order are
stepped, and every trainable parameter is trained. The projection is the paper's, on both sides
(there GaLore's, on one). Adapters of rank 8 are not projected to rank 8 (there they are). The
epsilon is PyTorch's 1e-8 (there 1e-6), and the weight decay PyTorch's 1e-2 (there 0).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from gradpress.nn.weight_norm import WeightNormalizedLinear
from gradpress.optim._base import Group
from gradpress.optim.galore import GaLoreAdamW

_logger = logging.getLogger("gradpress")


class GradNormLoRP(GaLoreAdamW):
    r"""AdamW on what two bases leave of each gradient.

    For a matrix of a group with `rank` set, with gradient D (m x n):

    .. math::
        R = U^\top D V, \qquad
        p \leftarrow (1 - \eta\lambda)\, p + \mathrm{scale}\; U\, \mathrm{AdamW}_\eta(R)\, V^\top

    U and V hold the r leading singular vectors of the gradient at the last refresh; refreshes come
    in the first step whose gradient is not zero (an adapter's J has none before I moves), and in
    every one before which a multiple of `update_proj_gap` steps was done. The moments are r x r.
    All other parameters take the rule of :class:`AdamW8bit`: magnitudes, biases, norms and
    embeddings.

    The model is prepared by :func:`gradpress.nn.add_weight_normalized_adapters_` for fine-tuning or
    by :func:`gradpress.nn.weight_normalize_` for pre-training, and :func:`gradnormlorp_groups`
    makes the groups. The paper's runs: pre-training with ``lr=0.01, scale=0.25`` and a rank of a
    quarter to a half of the width; fine-tuning with adapters of rank 8, ``lr=3e-5, rank=4,
    scale=4.0, update_proj_gap=500``; without weight decay. ``state_bits=8`` is its 8-bit form.

    Elements of a state: ``(m + n) r + 2 r^2`` for a projected matrix, twice its own for others. In
    adapters the bases are the larger part; ``projector_bits=8`` or 4 makes them small.

    Args:
        params: Parameters or groups. Every option below may stand in a group.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, times the learning rate, before the step. On magnitudes it
            decays the layer's weight; on directions it does not change what the layer computes.
        rank: Directions kept on each side; None does not project. Clamped to the weight's shorter
            side.
        update_proj_gap: Steps between refreshes.
        scale: Factor on the back-projected update.
        proj_type: ``"full"``: on both sides, as in the paper; ``"std"``: on that of the shorter
            dimension, as in the released code; or another of :class:`GaLoreAdamW`'s.
        **options: Those of :class:`GaLoreAdamW`.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch
        >>> from gradpress.nn.weight_norm import add_weight_normalized_adapters_
        >>> from gradpress.optim.gradnormlorp import GradNormLoRP, gradnormlorp_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> model = add_weight_normalized_adapters_(model, rank=8)
        >>> groups = gradnormlorp_groups(model, rank=4, verbose=False)
        >>> optimizer = GradNormLoRP(groups, lr=1e-3)
        >>> model(torch.randn(4, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model[0].lora_B]["exp_avg"].shape
        torch.Size([4, 4])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | None = None,
        update_proj_gap: int = 250,
        scale: float = 0.25,
        proj_type: str = "full",
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
            **options,
        )


def gradnormlorp_groups(
    model: nn.Module,
    rank: int,
    update_proj_gap: int | None = None,
    scale: float | None = None,
    verbose: bool = True,
    **options: Any,
) -> list[Group]:
    """Two parameter groups: matrices of weight-normalized layers, and everything else.

    Projected are adapters, or directions that are trained themselves; in the second group stand
    magnitudes, biases, what is no weight-normalized layer's, and matrices whose shorter side is not
    longer than `rank`. Frozen parameters are left out. What was chosen is logged (logger
    ``"gradpress"``, level INFO), and printed when `verbose`.

    Args:
        model: Prepared by :func:`gradpress.nn.add_weight_normalized_adapters_` or
            :func:`gradpress.nn.weight_normalize_`.
        rank: Directions kept on each side of a matrix; for adapters, less than their own rank.
        update_proj_gap: Steps between refreshes; the optimizer's default when None.
        scale: Factor on the back-projected update; the optimizer's default when None.
        verbose: Print one line about the choice.
        **options: Further options of the projected group.

    Returns:
        ``[projected, rest]``; a group without parameters is left out. Parameters are named.

    Raises:
        ValueError: `model` has no weight-normalized layer with anything to train.

    Warns:
        UserWarning: the rank leaves some of the matrices without a projection.
    """
    matrices = {
        id(p)
        for layer in model.modules()
        if isinstance(layer, WeightNormalizedLinear)
        for p in (layer.direction, layer.lora_A, layer.lora_B)
        if p is not None and p.requires_grad
    }
    if not matrices:
        raise ValueError(
            "gradnormlorp_groups: model has no trainable WeightNormalizedLinear; prepare it with"
            " gradpress.nn.add_weight_normalized_adapters_ or gradpress.nn.weight_normalize_"
        )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    small = [name for name, p in named if id(p) in matrices and min(p.shape) <= rank]
    projected = [(name, p) for name, p in named if id(p) in matrices and min(p.shape) > rank]
    rest = [(name, p) for name, p in named if id(p) not in matrices or min(p.shape) <= rank]
    text = (
        f"projected to rank {rank}: {len(projected)} matrices; not projected: {len(rest)} tensors"
    )
    _logger.info(text)
    if verbose:
        print(text)
    _warn_of_no_use(rank, small, len(matrices))
    low_rank = {"update_proj_gap": update_proj_gap, "scale": scale}
    given = {name: value for name, value in low_rank.items() if value is not None}
    groups: list[Group] = []
    if projected:
        groups.append({"params": projected, "rank": rank, **given, **options})
    if rest:
        groups.append({"params": rest, "rank": None})
    return groups


def _warn_of_no_use(rank: int, small: Sequence[str], total: int) -> None:
    if small:
        warnings.warn(
            f"gradnormlorp_groups: rank {rank} is not below the shorter side of {len(small)} of"
            f" {total} matrices ({small[0]} first); they are stepped as a whole, since projecting"
            " them would save nothing",
            stacklevel=3,
        )
