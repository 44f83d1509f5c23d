"""What a compressor tells the engine: which layers, which statistics, and what it makes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from gradpress.engine._layers import Layer
from gradpress.nn._select import Targets


class InputStatistic(Protocol):
    """What is collected of a layer's inputs, reduced as they come."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""

    def update(self, inputs: torch.Tensor, sequences: int | None = None) -> None:
        """Takes in ``[..., columns]`` of so many sequences."""


class GradientStatistic(Protocol):
    """What is collected of a layer's gradients, sample by sample, reduced as they come."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""

    def update_from_activations(self, inputs: torch.Tensor, grad_outputs: torch.Tensor) -> None:
        """Takes in ``[samples, ..., columns]`` and ``[samples, ..., rows]``."""


@dataclass(frozen=True)
class Observed:
    """A layer, and what was collected of it.

    Attributes:
        layer: The layer; its weight is still what it was.
        inputs: The statistics that :meth:`Recipe.input_statistics` asked for, by its names. Layers
            that were given the same inputs hold the same objects.
        gradient: What :meth:`Recipe.gradient_statistic` asked for, or None.
        calls: How often the layer was called: 0 for an expert that no token was sent to.
        tokens: Tokens of a calibration sequence, on average, without padding.
    """

    layer: Layer
    inputs: Mapping[str, Any] = field(default_factory=dict)
    gradient: Any = None
    calls: int = 0
    tokens: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What becomes of one layer.

    Attributes:
        name: The layer's name.
        weight: The new weight as a matrix ``[rows, columns]``, in the old one's dtype.
        mask: bool in its shape, True where an entry is the old one's, bit for bit, and False where
            it is zero; None where the new weight cannot be told in this way.
        sparsity: The share of zeros.
        error: Of the layer's output, relative to it: the root of the ratio of squared norms, as far
            as the statistics tell; NaN where they do not.
        note: What a reader has to know of this layer.
    """

    name: str
    weight: torch.Tensor
    mask: torch.Tensor | None = None
    sparsity: float = 0.0
    error: float = float("nan")
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Settings of a compressor; a frozen dataclass.

    Args:
        modules: Which layers: ``"all-linear"`` (all but the output head and shared weights), or one
            name or several: parts of qualified names, or regular expressions for whole ones.
            Compiled expressions are searched for.
    """

    modules: Targets = "all-linear"

    @property
    def title(self) -> str:
        """What reports call it."""
        return type(self).__name__

    @property
    def whole_model(self) -> bool:
        """Whether all layers are compressed together, by statistics of the unchanged model."""
        return False

    @property
    def needs_calibration(self) -> bool:
        """Whether inputs or gradients are needed at all."""
        return True

    @property
    def needs_sensitivity(self) -> bool:
        """Whether :meth:`prepare` needs to know how much the loss depends on each layer."""
        return False

    def prepare(self, layers: Sequence[Layer], sensitivity: Mapping[str, float]) -> Recipe:
        """The recipe with what depends on all layers filled in; raises where it does not fit.

        Args:
            layers: All that it is meant for.
            sensitivity: For each the mean over samples and weights of ``|weight * gradient|``,
                where :attr:`needs_sensitivity` asks for it.
        """
        return self

    def input_statistics(self, layer: Layer) -> dict[str, InputStatistic]:
        """New statistics of a layer's inputs, by names of the recipe's own."""
        return {}

    def gradient_statistic(self, layer: Layer) -> GradientStatistic | None:
        """A new statistic of a layer's gradients, or None."""
        return None

    def gradient_bytes(self, layer: Layer) -> int:
        """What :meth:`gradient_statistic` holds, without making it; 0 for None."""
        return 0

    @abstractmethod
    def compress(self, observed: Sequence[Observed]) -> Iterable[Outcome]:
        """What becomes of a block's layers, one after the other."""
