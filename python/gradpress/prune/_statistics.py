"""What calibration inputs say about a layer, collected without keeping them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradpress.ops._arrays import Array, check_array, dtype_name

#: Rows of inputs that are widened at once.
_ROWS = 4096
#: Rows of the matrix that one product fills: only what lies right of the diagonal is computed, and
#: of the blocks on it both halves.
_BLOCK = 256
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 are products of float32: none on a CUDA device is rounded to TF32."""
    backend = torch.backends.cuda.matmul
    before = backend.allow_tf32
    backend.allow_tf32 = False
    try:
        yield
    finally:
        backend.allow_tf32 = before


def as_tensor(x: Array) -> torch.Tensor:
    """`x` as a tensor without a graph, in the same memory."""
    return (x if isinstance(x, torch.Tensor) else torch.from_numpy(x)).detach()


class _Running:
    """The sum over the tokens of a sequence, on average over the sequences seen."""

    def __init__(
        self, columns: int, shape: tuple[int, ...], dtype: str, device: torch.device | str | None
    ) -> None:
        op = type(self).__name__
        if columns < 0:
            raise ValueError(f"{op}: columns must be at least 0, got {columns}")
        if dtype not in _DTYPES:
            raise ValueError(f'{op}: dtype must be "float32" or "float64", got {dtype!r}')
        self.columns = columns
        self.sequences = 0
        self._sum: torch.Tensor = torch.zeros(shape, dtype=_DTYPES[dtype], device=device)

    def _rows(self, inputs: Array, sequences: int | None) -> tuple[torch.Tensor, int]:
        """The inputs as ``[tokens, columns]``, and how many sequences they are."""
        op = f"{type(self).__name__}.update"
        check_array(op, "inputs", inputs)
        if "float" not in dtype_name(inputs):
            raise TypeError(
                f"{op}: inputs must hold floating-point numbers, got {dtype_name(inputs)}"
            )
        if inputs.ndim == 0 or inputs.shape[-1] != self.columns:
            raise ValueError(
                f"{op}: inputs must have {self.columns} columns, got shape {list(inputs.shape)}"
            )
        if sequences is None:
            sequences = inputs.shape[0] if inputs.ndim > 2 else 1
        if sequences < 0:
            raise ValueError(f"{op}: sequences must be at least 0, got {sequences}")
        return as_tensor(inputs).reshape(math.prod(inputs.shape[:-1]), self.columns), sequences

    def _parts(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        for first in range(0, max(len(rows), 1), _ROWS):
            yield rows[first : first + _ROWS].to(self._sum.device, self._sum.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return self._sum.nbytes

    def merge(self, other: _Running) -> None:
        """Takes in what another one has seen, as if its inputs had come here.

        Raises:
            ValueError: it is of another kind or has other columns.
        """
        if type(other) is not type(self) or other.columns != self.columns:
            raise ValueError(
                f"{type(self).__name__}.merge: other must be of the same kind with {self.columns}"
                f" columns, got {type(other).__name__} with {other.columns}"
            )
        total = self.sequences + other.sequences
        if other.sequences:
            self._sum.mul_(self.sequences / total)
            self._sum.add_(other._sum.to(self._sum), alpha=other.sequences / total)
        self.sequences = total


class InputSquares(_Running):
    """The squares of a layer's inputs: ``input_sq`` of :func:`gradpress.prune.score_wanda`.

    For every column the sum over the tokens of a sequence, on average over the sequences.

    Args:
        columns: Inputs of the layer.
        device: Where the sums lie.
        dtype: ``"float32"`` or ``"float64"``, whatever the dtype of the inputs.

    Example:
        >>> import torch, gradpress
        >>> squares = gradpress.prune.InputSquares(2)
        >>> squares.update(torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]]))
        >>> squares.values
        tensor([5., 4.])
    """

    def __init__(
        self, columns: int, *, device: torch.device | str | None = None, dtype: str = "float32"
    ) -> None:
        super().__init__(columns, (columns,), dtype, device)

    def update(self, inputs: Array, sequences: int | None = None) -> None:
        """Adds inputs.

        Args:
            inputs: ``[sequences, tokens, columns]``, ``[tokens, columns]`` of one sequence, or
                whatever ends in the columns.
            sequences: How many sequences these are, where the shape does not say it.
        """
        rows, more = self._rows(inputs, sequences)
        total = self.sequences + more
        if not total:
            return
        self._sum.mul_(self.sequences / total)
        for part in self._parts(rows):
            self._sum.add_(part.square().sum(0), alpha=1 / total)
        self.sequences = total

    @property
    def values(self) -> torch.Tensor:
        """``[columns]``; zeros where nothing was seen."""
        return self._sum.clone()


class Hessian(_Running):
    """Second derivatives of a layer's squared error: ``2 X^T X``, on average over the sequences.

    A symmetric rank-k update: only what lies on and right of the diagonal is computed, in the
    statistic's precision whatever the dtype of the inputs.

    Args:
        columns: Inputs of the layer.
        device: Where the matrix lies.
        dtype: ``"float32"`` or ``"float64"``.
    """

    def __init__(
        self, columns: int, *, device: torch.device | str | None = None, dtype: str = "float32"
    ) -> None:
        super().__init__(columns, (columns, columns), dtype, device)

    def update(self, inputs: Array, sequences: int | None = None) -> None:
        """Adds inputs, as :meth:`InputSquares.update` takes them."""
        rows, more = self._rows(inputs, sequences)
        total = self.sequences + more
        if not total:
            return
        keep = self.sequences / total
        with full_precision():
            for part in self._parts(rows):
                self._add(part, keep, 2 / total)
                keep = 1.0
        self.sequences = total

    def _add(self, rows: torch.Tensor, keep: float, weight: float) -> None:
        for first in range(0, self.columns, _BLOCK):
            left = rows[:, first : first + _BLOCK]
            target = self._sum[first : first + _BLOCK, first:]
            target.addmm_(left.T, rows[:, first:], beta=keep, alpha=weight)

    @property
    def matrix(self) -> torch.Tensor:
        """``[columns, columns]``, symmetric; zeros where nothing was seen."""
        upper: torch.Tensor = self._sum.triu()
        upper += self._sum.triu(1).T
        return upper
