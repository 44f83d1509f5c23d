"""How many zeros the weights of a model have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gradpress._tables import Table, TableReport, shape_text
from gradpress.ops._arrays import dtype_name
from gradpress.prune._parameters import prunable

_COLUMNS = ("name", "shape", "dtype", "weights", "zeros", "sparsity", "pattern")
#: Sizes of groups that are looked at, with the most elements that may stay in one.
_GROUPS = {4: 2, 8: 4}


@dataclass(frozen=True)
class ParameterSparsity:
    """One weight.

    Attributes:
        name: Its qualified name, as if it were not parametrized.
        shape: Its shape.
        dtype: Its dtype by name.
        numel: Its elements.
        zeros: How many of them are zero.
        sparsity: Their share; 0 where there are no elements.
        pattern: ``"N:4"`` with N at most 2 where no aligned group of four columns has more than N
            elements that are not zero, else ``"N:8"`` with N at most 4; otherwise empty. Columns
            are those of the weight as a matrix with a row for each output.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    zeros: int
    sparsity: float
    pattern: str


@dataclass(frozen=True, repr=False)
class SparsityReport(TableReport):
    """The zeros of a model; prints as a table.

    Attributes:
        rows: One :class:`ParameterSparsity` for each weight.
    """

    rows: tuple[ParameterSparsity, ...]

    @property
    def numel(self) -> int:
        """All elements together."""
        return sum(row.numel for row in self.rows)

    @property
    def zeros(self) -> int:
        """All zeros together."""
        return sum(row.zeros for row in self.rows)

    @property
    def sparsity(self) -> float:
        """The share of zeros among all elements; 0 where there are none."""
        return self.zeros / max(self.numel, 1)

    def _table(self) -> Table:
        rows = [
            [
                row.name,
                shape_text(row.shape),
                row.dtype,
                f"{row.numel:,}",
                f"{row.zeros:,}",
                f"{row.sparsity:.2%}",
                row.pattern or "-",
            ]
            for row in self.rows
        ]
        totals = ["total", "", "", f"{self.numel:,}", f"{self.zeros:,}", f"{self.sparsity:.2%}", ""]
        return Table(list(_COLUMNS), rows, totals)


def sparsity(model: nn.Module) -> SparsityReport:
    """Counts the zeros of a model's weights, negative zeros among them.

    Weights are the floating-point parameters of two or more dimensions that no embedding has: those
    of linear layers and convolutions, not biases and norms. Of a parametrized weight the values
    that the module computes with count, of a quantized one the dequantized values; one that several
    modules share counts once.

    Zeros alone make neither the model in memory nor its products smaller;
    :func:`gradpress.io.save` leaves them out of files.

    Args:
        model: Any module, on any device; it is not changed.

    Raises:
        TypeError: `model` is no module.
        ValueError: a weight is on the meta device.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Linear(8, 4)
        >>> weight = model.weight.detach()
        >>> _ = weight.masked_fill_(~gradpress.prune.select(weight, pattern="2:4"), 0)
        >>> gradpress.prune.sparsity(model)
        name    shape    dtype  weights  zeros  sparsity  pattern
        ---------------------------------------------------------
        weight    4x8  float32       32     16    50.00%      2:4
        ---------------------------------------------------------
        total                        32     16    50.00%
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparsity: model must be a torch.nn.Module, got {type(model).__name__}")
    weights = {place.name: place for place in prunable(model)}
    for name, place in weights.items():
        if place.parameter.is_meta:
            raise ValueError(f"sparsity: {name} is on the meta device and has no values")
    return SparsityReport(tuple(_row(name, place.value) for name, place in weights.items()))


def _row(name: str, weight: torch.Tensor) -> ParameterSparsity:
    kept = weight != 0
    numel = weight.numel()
    zeros = numel - int(kept.sum())
    shape = tuple(weight.shape)
    pattern = _pattern(kept) if zeros else ""
    return ParameterSparsity(
        name, shape, dtype_name(weight), numel, zeros, zeros / max(numel, 1), pattern
    )


def _pattern(kept: torch.Tensor) -> str:
    matrix = kept.reshape(kept.shape[0], -1)
    for size, most in _GROUPS.items():
        if matrix.shape[1] % size == 0:
            count = int(matrix.reshape(-1, size).sum(1).max())
            if 1 <= count <= most:
                return f"{count}:{size}"
    return ""
