"""Gradients of single samples, gathered into one number for each weight without being kept."""

from __future__ import annotations

import math

import torch

from gradpress.ops import prune as kernels
from gradpress.ops._arrays import Array, check_array, dtype_name
from gradpress.prune._statistics import as_tensor, full_precision

#: Bytes of a gradient's rows that exist at a time: about a processor's cache, or a device's.
_TILE_BYTES = {"cpu": 1 << 22, "cuda": 1 << 25}
#: Fewer rows at a time than these are a slower product.
_TILE_ROWS = 256
#: Tokens that are widened at once.
_TOKENS = 512


class GradientNorms:
    """A weight's gradients over the samples: ``grad_norm`` of :func:`gradpress.prune.score_gblm`.

    For every weight the mean over the samples of ``|gradient|``, or the root of the mean of its
    square; gradients of single samples, never of their sum, in which they cancel out. Of a whole
    gradient only some rows exist at a time when it comes from activations, and nothing but the sum
    itself has the weight's size. Sums are float32. A gradient that is not finite, or whose square
    is not, is left out and counted.

    Args:
        rows: Outputs of the layer.
        columns: Inputs of the layer.
        norm: ``"l1"`` or ``"l2"``.
        device: Where the sums lie.

    Example:
        >>> import torch, gradpress
        >>> norms = gradpress.prune.GradientNorms(1, 2)
        >>> norms.update(torch.tensor([[1.0, -2.0]]))
        >>> norms.update(torch.tensor([[-1.0, 4.0]]))
        >>> norms.values
        tensor([[1., 3.]])
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        norm: str = "l1",
        device: torch.device | str | None = None,
    ) -> None:
        for name, size in (("rows", rows), ("columns", columns)):
            if size < 0:
                raise ValueError(f"GradientNorms: {name} must be at least 0, got {size}")
        if norm not in ("l1", "l2"):
            raise ValueError(f'GradientNorms: norm must be "l1" or "l2", got {norm!r}')
        self.rows, self.columns, self.norm = rows, columns, norm
        self.samples = 0
        self._sum: torch.Tensor = torch.zeros(rows, columns, device=device)
        self._nonfinite = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return self._sum.nbytes

    @property
    def nonfinite(self) -> int:
        """How many elements of gradients were left out; waits for the device."""
        return int(self._nonfinite)

    @property
    def values(self) -> torch.Tensor:
        """float32 ``[rows, columns]``; zeros where nothing was seen."""
        mean = self._sum / max(self.samples, 1)
        return mean if self.norm == "l1" else mean.sqrt_()

    def reference_values(self, scale: float = 100.0) -> torch.Tensor:
        """As the authors' code, for ``score_gblm(..., reference=True)``: no mean, but the norm.

        ``sum(|scale * gradient|)`` or ``sqrt(sum((scale * gradient)^2))``.
        """
        return (self._sum if self.norm == "l1" else self._sum.sqrt()) * abs(scale)

    def update(self, gradient: Array, *, scale: float = 1.0) -> None:
        """Adds one sample's whole gradient.

        Args:
            gradient: float32, float16 or bfloat16 ``[rows, columns]``, or with further dimensions
                that together are the columns.
            scale: Factor of the gradient: undoes what the loss was multiplied with.

        Raises:
            TypeError: it is no tensor or array of these dtypes.
            ValueError: its shape is another one.
        """
        op = "GradientNorms.update"
        part = self._checked(op, "gradient", gradient)
        shape = (self.rows, self.columns)
        if part.ndim == 0 or (part.shape[0], math.prod(part.shape[1:])) != shape:
            raise ValueError(
                f"{op}: gradient must have shape {list(shape)}, got {list(part.shape)}"
            )
        self._accumulate(self._sum, part.reshape(shape).to(self._sum.device), scale)
        self.samples += 1

    def update_from_activations(
        self, inputs: Array, grad_outputs: Array, *, scale: float = 1.0
    ) -> None:
        """Adds every sample's gradient, which its inputs and its outputs' gradients make.

        Of a layer ``outputs = inputs @ weight.T`` that is ``grad_outputs[n].T @ inputs[n]``; the
        gradients are those of the sum of the samples' losses.

        Args:
            inputs: float32, float16 or bfloat16 ``[samples, tokens, columns]``, with any number of
                dimensions of tokens; with two dimensions one sample.
            grad_outputs: The same with `rows` in place of the columns.
            scale: Factor of every gradient: the number of samples where the loss is their mean.

        Raises:
            TypeError: an argument is no tensor or array of these dtypes.
            ValueError: a shape does not fit.
        """
        op = "GradientNorms.update_from_activations"
        left = self._flat(op, "inputs", inputs, self.columns)
        right = self._flat(op, "grad_outputs", grad_outputs, self.rows)
        if left.shape[:2] != right.shape[:2]:
            raise ValueError(
                f"{op}: grad_outputs must have the samples and tokens of inputs,"
                f" {list(left.shape[:2])}, got {list(right.shape[:2])}"
            )
        with full_precision():
            for sample, grad in zip(left, right, strict=True):
                self._add_sample(sample.to(self._sum.device), grad.to(self._sum.device), scale)
        self.samples += len(left)

    def merge(self, other: GradientNorms) -> None:
        """Takes in what another one has seen, as if its samples had come here.

        Raises:
            ValueError: it is of another norm or size.
        """
        mine, theirs = ((x.norm, x.rows, x.columns) for x in (self, other))
        if mine != theirs:
            raise ValueError(
                f"GradientNorms.merge: other must have norm, rows and columns {mine}, got {theirs}"
            )
        self._sum += other._sum.to(self._sum.device)
        self._nonfinite += other._nonfinite.to(self._nonfinite.device)
        self.samples += other.samples

    @staticmethod
    def _checked(op: str, name: str, x: Array) -> torch.Tensor:
        check_array(op, name, x)
        if dtype_name(x) not in ("float32", "float16", "bfloat16"):
            raise TypeError(
                f"{op}: {name} must have dtype float32, float16 or bfloat16, got {dtype_name(x)}"
            )
        return as_tensor(x)

    def _flat(self, op: str, name: str, x: Array, width: int) -> torch.Tensor:
        """``[samples, tokens, width]``."""
        tensor = self._checked(op, name, x)
        if tensor.ndim < 2 or tensor.shape[-1] != width:
            raise ValueError(
                f"{op}: {name} must be [samples, tokens, {width}], got shape {list(tensor.shape)}"
            )
        if tensor.ndim == 2:
            return tensor[None]
        return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:-1]), width)

    def _accumulate(self, total: torch.Tensor, part: torch.Tensor, scale: float) -> None:
        kernels.accumulate_gradients(
            total, part, self.norm == "l2", scale, nonfinite=self._nonfinite
        )

    def _add_sample(self, inputs: torch.Tensor, grad: torch.Tensor, scale: float) -> None:
        if not self._sum.numel():
            return
        tile = max(_TILE_BYTES[self._kind()] // (4 * self.columns), _TILE_ROWS)
        # Not kept: every layer of a model may hold such sums.
        buffer = self._sum.new_empty(min(tile, self.rows), self.columns)
        for first in range(0, self.rows, tile):
            total = self._sum[first : first + tile]
            part = buffer[: len(total)]
            _product_(grad[:, first : first + tile], inputs, part)
            self._accumulate(total, part, scale)

    def _kind(self) -> str:
        return "cpu" if self._sum.device.type == "cpu" else "cuda"


def _product_(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """``out = left.T @ right`` with sums of float32."""
    if left.dtype == right.dtype == torch.float32:
        torch.mm(left.T, right, out=out)
    elif left.dtype == right.dtype and left.is_cuda:
        # Products of 16-bit factors are exact in float32.
        torch.mm(left.T, right, out_dtype=torch.float32, out=out)
    else:
        # Widened in parts: PyTorch's products of transposed 16-bit matrices are slow on the CPU,
        # and a widened sample could be as large as the weight.
        out.zero_()
        for first in range(0, len(left), _TOKENS):
            rows = left[first : first + _TOKENS].float().T
            out.addmm_(rows, right[first : first + _TOKENS].float())
