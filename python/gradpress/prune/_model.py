"""One choice among the weights of many matrices."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gradpress.ops import prune as kernels
from gradpress.ops._arrays import Array
from gradpress.prune._arrays import as_matrix
from gradpress.prune._pattern import read_pattern
from gradpress.prune._score import TOKENS, Factors, factors_of
from gradpress.prune._statistics import as_tensor


@dataclass(frozen=True)
class _Scored:
    """A matrix, and what its scores are made of."""

    matrix: torch.Tensor
    factors: Factors
    given: bool

    @property
    def args(self) -> tuple[Array, Array | None, Array | None]:
        """Weight, scale and gradients, as the kernels take them."""
        scale, grad = (
            None if x is None else as_tensor(x).to(self.matrix.device)
            for x in (self.factors.scale, self.factors.grad)
        )
        return self.matrix, scale, grad

    @property
    def options(self) -> dict[str, Any]:
        """The rest of it."""
        return {"alpha": self.factors.alpha, "half": self.factors.half, "given": self.given}


def mask_model(scores: Sequence[Array], *, sparsity: float) -> list[Array]:
    """Which weights of many matrices stay, compared all with all: True for the greater scores.

    Exactly ``int(total * sparsity)`` of all of them are dropped; of equal scores those of earlier
    matrices first, and in a matrix as :func:`mask` does.

    Args:
        scores: As for :func:`mask`, of any shapes; they may lie on different devices.
        sparsity: The share that is dropped, from 0 to 1.

    Returns:
        A mask for each, as :func:`mask` gives it.

    Example:
        >>> import torch, gradpress
        >>> scores = [torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0, 3.0], [1.0, 4.0]])]
        >>> gradpress.prune.mask_model(scores, sparsity=0.5)
        [tensor([[False,  True]]), tensor([[False,  True],
                [False,  True]])]
    """
    op = "mask_model"
    parts = [_Scored(as_tensor(as_matrix(op, "score", x)), Factors(), True) for x in scores]
    return _choose(op, parts, scores, sparsity)


def select_model(
    weights: Sequence[Array],
    *,
    input_sqs: Sequence[Array | None] | None = None,
    grad_norms: Sequence[Array | None] | None = None,
    alpha: float | None = None,
    norm: str = "l1",
    tokens: int = TOKENS,
    sparsity: float,
    reference: bool = False,
) -> list[Array]:
    """Scores and chooses among the weights of many matrices: the masks of their scores.

    The scores never exist in memory: each matrix is read three times for the threshold of all, and
    once or twice for its mask.

    Args:
        weights: As for :func:`gradpress.prune.select`, of any shapes and devices.
        input_sqs: `input_sq` of each, or None for one or all.
        grad_norms: `grad_norm` of each, or None for one or all.
        alpha: As for :func:`gradpress.prune.score_gblm`.
        norm: As there.
        tokens: As there.
        sparsity: The share of all weights that is dropped, from 0 to 1.
        reference: Scores as the authors' code.

    Returns:
        A mask for each; the same as ``mask_model`` of the scores.

    Raises:
        TypeError, ValueError: as :func:`gradpress.prune.select`; or the lists' lengths differ.

    Example:
        >>> import torch, gradpress
        >>> weights = [torch.tensor([[0.1, -5.0]]), torch.tensor([[2.0, 0.3]])]
        >>> gradpress.prune.select_model(weights, sparsity=0.5)
        [tensor([[False,  True]]), tensor([[ True, False]])]
    """
    op = "select_model"
    lists: list[Sequence[Array | None]] = []
    for name, items in (("input_sqs", input_sqs), ("grad_norms", grad_norms)):
        if items is not None and len(items) != len(weights):
            raise ValueError(
                f"{op}: {name} must have one entry for each of {len(weights)} weights,"
                f" got {len(items)}"
            )
        lists.append([None] * len(weights) if items is None else items)
    parts = []
    for weight, input_sq, grad_norm in zip(weights, *lists, strict=True):
        matrix, factors = factors_of(
            op, weight, input_sq, grad_norm, alpha, norm, tokens, reference
        )
        parts.append(_Scored(as_tensor(matrix), factors, False))
    return _choose(op, parts, weights, sparsity)


def _choose(op: str, parts: list[_Scored], like: Sequence[Array], sparsity: float) -> list[Array]:
    wanted = read_pattern(op, "unstructured", sparsity, 0)
    drop = wanted.count(sum(part.matrix.numel() for part in parts))
    state = _threshold(parts, drop) if drop else torch.zeros(3, dtype=torch.int64)
    masks: list[Array] = []
    found = []
    for part, x in zip(parts, like, strict=True):
        state = state.to(part.matrix.device)
        chosen = kernels.select_below(*part.args, state=state, **part.options)
        mask = as_tensor(chosen.mask).reshape(tuple(x.shape))
        masks.append(mask.numpy() if isinstance(x, np.ndarray) else mask)
        found.append(as_tensor(chosen.nan))
    if nan := sum(int(count) for count in found):
        warnings.warn(
            f"{op}: {nan} scores are not a number; these weights count as infinitely important",
            RuntimeWarning,
            stacklevel=3,
        )
    return masks


def _threshold(parts: list[_Scored], drop: int) -> torch.Tensor:
    """The key of the last score that is dropped, how many that equal it are, and of how many."""
    key, rank, equal = 0, drop - 1, 0
    for shift in kernels.SHIFTS:
        counts: dict[torch.device, torch.Tensor] = {}
        for part in parts:
            device = part.matrix.device
            if device not in counts:
                counts[device] = torch.zeros(kernels.DIGIT_VALUES, dtype=torch.int64, device=device)
            state = torch.tensor([key, 0, 0], device=device)
            kernels.score_histogram(
                *part.args, state=state, counts=counts[device], shift=shift, **part.options
            )
        total = np.sum([count.cpu().numpy() for count in counts.values()], axis=0)
        ends = np.cumsum(total)
        digit = int(np.searchsorted(ends, rank, side="right"))
        equal = int(total[digit])
        rank -= int(ends[digit]) - equal
        key |= digit << shift
    return torch.tensor([key, rank + 1, equal])
