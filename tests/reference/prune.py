"""Pruning, transcribed from the papers' equations: float64 scores, sorted selections."""

import numpy as np
import torch


def array(x):
    """A float64 copy of a tensor or an array."""
    x = x.detach().double().numpy() if isinstance(x, torch.Tensor) else x
    return np.array(x, dtype=np.float64)


def score(weight, input_sq=None, grad_norm=None, alpha=1.0):
    """``|w| (sqrt(a) + alpha |g|)`` in float64, with what is missing left out."""
    size = np.abs(array(weight))
    factor = np.zeros_like(size) if input_sq is not None or grad_norm is not None else 1.0
    if input_sq is not None:
        factor = factor + np.sqrt(array(input_sq))
    if grad_norm is not None:
        factor = factor + alpha * np.abs(array(grad_norm))
    return size * factor


def drop_first(values, count):
    """True but for the first `count` of a stable ascending sort; what is no number sorts last."""
    values = np.where(np.isnan(values), np.inf, values)
    kept = np.ones(values.size, dtype=bool)
    kept[np.argsort(values.ravel(), kind="stable")[:count]] = False
    return kept.reshape(values.shape)


def mask(score, sparsity=None, size=0, keep=0, group="row"):
    """The selection of a matrix, one comparison group after the other."""
    rows, columns = score.shape
    if size:
        parts = [
            drop_first(score[i, j : j + size], size - keep)
            for i in range(rows)
            for j in range(0, columns, size)
        ]
        return np.concatenate(parts).reshape(rows, columns) if parts else score > np.inf
    if group == "matrix":
        return drop_first(score, int(rows * columns * sparsity))
    kept = [drop_first(row, int(columns * sparsity)) for row in score]
    return np.stack(kept) if kept else np.ones(score.shape, dtype=bool)


def inverse_factor(hessian, damp):
    """The damped Hessian and the upper factor of its inverse, by way of the inverse itself."""
    hessian = array(hessian)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    hessian += damp * np.diag(hessian).mean() * np.eye(len(hessian))
    return hessian, np.linalg.cholesky(np.linalg.inv(hessian)).T


def sparsegpt(weight, hessian, sparsity=None, size=0, keep=0, block=128, damp=0.01, through=False):
    """SparseGPT column by column: the weights, the mask, half the sum of squared errors.

    `through` drops what does not exceed the sorted score at the count, as the authors' code.
    """
    weight, hessian = array(weight), array(hessian)
    weight[:, np.diag(hessian) == 0] = 0
    _, upper = inverse_factor(hessian, damp)
    rows, columns = weight.shape
    kept = np.ones((rows, columns), dtype=bool)
    loss = 0.0
    for first in range(0, columns, block):
        last = min(first + block, columns)
        scale = np.diag(upper)[first:last]
        if not size:
            scores = np.square(weight[:, first:last] / scale)
            count = int(scores.size * sparsity)
            if through:
                ordered = np.sort(scores.ravel())
                kept[:, first:last] = scores > ordered[min(count, scores.size - 1)]
            else:
                kept[:, first:last] = drop_first(scores, count)
        for i in range(first, last):
            if size and i % size == 0:
                scores = np.square(weight[:, i : i + size] / np.diag(upper)[i : i + size])
                kept[:, i : i + size] = mask(scores, size=size, keep=keep)
            target = np.where(kept[:, i], weight[:, i], 0.0)
            error = (weight[:, i] - target) / upper[i, i]
            loss += np.square(error).sum() / 2
            # Lazily or at once, inside a block or beyond it: the same sums.
            weight[:, i + 1 :] -= np.outer(error, upper[i, i + 1 :])
            weight[:, i] = target
    return weight, kept, loss
