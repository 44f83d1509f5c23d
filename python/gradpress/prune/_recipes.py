"""Pruning of whole models: what :func:`gradpress.compress` takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from gradpress.engine import GradientStatistic, InputStatistic, Layer, Observed, Outcome, Recipe
from gradpress.prune._allocation import (
    given_sparsities,
    in_whole_columns,
    sparsities_by_sensitivity,
)
from gradpress.prune._factor import inverse_factor
from gradpress.prune._gradients import GradientNorms
from gradpress.prune._model import select_model
from gradpress.prune._pattern import read_pattern
from gradpress.prune._score import select
from gradpress.prune._sparsegpt import sparsegpt
from gradpress.prune._statistics import Hessian, InputSquares

_UNREACHED = "no calibration input reached it; chosen by magnitude"
_NO_GRADIENT = "the loss does not depend on it; chosen by magnitude"


@dataclass(frozen=True, kw_only=True)
class PruningRecipe(Recipe):
    """What all recipes for pruning have in common.

    Attributes:
        sparsity: The share of each layer's weights that goes, from 0 to 1; or a mapping from
            layers' names, parts of them, or regular expressions for all of them, to such shares
            (layers without one stay dense). Left out: 0.5, or what an N:M pattern says.
        pattern: ``"unstructured"``, or ``"2:4"``, ``"4:8"``, any ``"N:M"``: N of M consecutive
            columns are kept.
        allocation: None: `sparsity` holds for every layer. ``"gradient"``: it holds for all weights
            together, and layers on which the loss depends less lose more: shares proportional to
            the inverse of the mean of ``|weight * gradient|``. Takes one more pass of gradients.
        spread: How far a layer's share may be from `sparsity` then.
        reference: As the authors' code: see the functional forms.
        modules: Which layers.
    """

    sparsity: float | Mapping[str, float] | None = None
    pattern: str = "unstructured"
    allocation: str | None = None
    spread: float = 0.1
    reference: bool = False

    def __post_init__(self) -> None:
        """Checks what does not depend on a model."""
        op = self.title
        if self.allocation not in (None, "gradient"):
            raise ValueError(
                f'{op}: allocation must be None or "gradient", got {self.allocation!r}'
            )
        if not 0 <= self.spread <= 1:
            raise ValueError(f"{op}: spread must be from 0 to 1, got {self.spread}")
        structured = self.pattern != "unstructured"
        by_layer = isinstance(self.sparsity, Mapping)
        if structured and (by_layer or self.allocation is not None):
            raise ValueError(
                f"{op}: pattern must be unstructured for sparsities that differ between layers,"
                f" got {self.pattern!r}"
            )
        if by_layer and self.allocation is not None:
            raise ValueError(f"{op}: sparsity must be one number for an allocation, got a mapping")
        if not by_layer:
            # The pattern's own columns fit; those of the model are looked at when they are known.
            share = 0.5 if self.sparsity is None and not structured else self.sparsity
            assert not isinstance(share, Mapping)
            read_pattern(op, self.pattern, share, 0)

    @property
    def needs_sensitivity(self) -> bool:
        """Where layers' sparsities come from gradients."""
        return self.allocation is not None

    def prepare(self, layers: Sequence[Layer], sensitivity: Mapping[str, float]) -> PruningRecipe:
        """With a share for every layer."""
        if self.pattern != "unstructured":
            for layer in layers:
                read_pattern(f"{self.title} of {layer.name}", self.pattern, None, layer.columns)
            return self
        share = 0.5 if self.sparsity is None else self.sparsity
        shares = given_sparsities(self.title, layers, share)
        if self.allocation is not None:
            assert not isinstance(share, Mapping)
            shares = sparsities_by_sensitivity(layers, sensitivity, share, self.spread)
            if self._in_rows:
                shares = in_whole_columns(layers, shares, share)
        return replace(self, sparsity=shares, allocation=None)

    @property
    def _in_rows(self) -> bool:
        """Whether every row loses the same number of weights."""
        return False

    def _share(self, name: str) -> float | None:
        """Of a layer, once all are known; None for a pattern that says it."""
        return self.sparsity[name] if isinstance(self.sparsity, Mapping) else self.sparsity


@dataclass(frozen=True, kw_only=True)
class _ScoreRecipe(PruningRecipe):
    """By scores: what stays is not changed."""

    group: str = "row"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group not in ("row", "matrix", "model"):
            raise ValueError(
                f'{self.title}: group must be "row", "matrix" or "model", got {self.group!r}'
            )
        if self.group == "model" and (
            self.pattern != "unstructured"
            or isinstance(self.sparsity, Mapping)
            or self.allocation is not None
        ):
            raise ValueError(
                f'{self.title}: group "model" needs an unstructured pattern and one sparsity,'
                f" got {self.pattern!r}, {self.sparsity!r} and allocation {self.allocation!r}"
            )

    @property
    def whole_model(self) -> bool:
        """Where weights of all layers are compared with each other."""
        return self.group == "model"

    @property
    def _in_rows(self) -> bool:
        return self.group == "row"

    def prepare(self, layers: Sequence[Layer], sensitivity: Mapping[str, float]) -> PruningRecipe:
        """With a share for every layer, unless all are chosen from together."""
        return self if self.whole_model else super().prepare(layers, sensitivity)

    def _factors(self, one: Observed) -> dict[str, Any]:
        """What :func:`gradpress.prune.select` takes besides the weight."""
        return {}

    def compress(self, observed: Sequence[Observed]) -> Iterator[Outcome]:
        """Zeroes what does not stay."""
        if self.whole_model:
            yield from self._from_all(observed)
            return
        for one in observed:
            factors, note = self._factors_or_magnitude(one)
            mask = select(
                one.layer.matrix,
                sparsity=self._share(one.layer.name),
                pattern=self.pattern,
                group=self.group,
                reference=self.reference,
                **factors,
            )
            yield masked(one, mask, note)

    def _factors_or_magnitude(self, one: Observed) -> tuple[dict[str, Any], str]:
        factors = self._factors(one)
        if "input_sq" in factors and not bool(factors["input_sq"].any()):
            return {}, _UNREACHED
        if factors.keys() == {"grad_norm", "norm"} and not bool(factors["grad_norm"].any()):
            return {}, _NO_GRADIENT
        return factors, ""

    def _from_all(self, observed: Sequence[Observed]) -> Iterator[Outcome]:
        share = 0.5 if self.sparsity is None else self.sparsity
        assert not isinstance(share, Mapping)
        found = [self._factors_or_magnitude(one) for one in observed]
        shared = dict(found[0][0]) if found else {}
        masks = select_model(
            [one.layer.matrix for one in observed],
            input_sqs=[factors.get("input_sq") for factors, _ in found],
            grad_norms=[factors.get("grad_norm") for factors, _ in found],
            sparsity=share,
            reference=self.reference,
            **{key: shared[key] for key in ("alpha", "norm", "tokens") if key in shared},
        )
        for one, mask, (_, note) in zip(observed, masks, found, strict=True):
            yield masked(one, mask, note)


def masked(one: Observed, mask: Any, note: str) -> Outcome:
    """A layer whose other weights are zero: positive zeros, which cost nothing when packed."""
    weight = one.layer.matrix
    pruned = torch.where(mask, weight, torch.zeros_like(weight))
    squares = one.inputs.get("input_sq")
    return Outcome(
        one.layer.name,
        pruned,
        mask,
        share_of_zeros(pruned),
        relative_error(weight, pruned, None if squares is None else squares.values),
        note,
    )


def share_of_zeros(weight: torch.Tensor) -> float:
    """0 of an empty one."""
    return 1.0 - int(weight.count_nonzero()) / max(weight.numel(), 1)


def relative_error(
    weight: torch.Tensor, pruned: torch.Tensor, input_sq: torch.Tensor | None
) -> float:
    """The root of the ratio of squared norms of what changed and what was, inputs uncorrelated."""
    change = (weight.float() - pruned.float()).square().sum(0, dtype=torch.float64)
    before = weight.float().square().sum(0, dtype=torch.float64)
    if input_sq is not None:
        change, before = change * input_sq, before * input_sq
    whole = float(before.sum())
    return math.sqrt(float(change.sum()) / whole) if whole > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class Magnitude(_ScoreRecipe):
    """The smallest weights go; no calibration.

    Args:
        group: ``"matrix"``: all weights of a layer are compared, ``"row"``: those of each output,
            ``"model"``: those of all layers.
        reference: As the code that others measure it by: of a matrix one weight more goes, and all
            that equal it.
        **options: Those of :class:`PruningRecipe`.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = gradpress.compress(model, gradpress.prune.Magnitude(pattern="1:4"))
        >>> report.sparsity
        0.75
    """

    group: str = "matrix"

    @property
    def needs_calibration(self) -> bool:
        """Only for the allocation."""
        return self.needs_sensitivity


class _InputSquaresMixin:
    """Wants the squares of inputs."""

    def input_statistics(self, layer: Layer) -> dict[str, InputStatistic]:
        """The squares of inputs."""
        return {"input_sq": InputSquares(layer.columns, device=layer.weight.device)}


@dataclass(frozen=True, kw_only=True)
class Wanda(_InputSquaresMixin, _ScoreRecipe):
    """The least ``|weight| * norm of its input`` go (Sun et al. 2023, arXiv 2306.11695).

    Args:
        group: ``"row"``: the weights of each output are compared, ``"matrix"``: those of a layer,
            ``"model"``: those of all layers, by the statistics of the unchanged model.
        **options: Those of :class:`PruningRecipe`.
    """

    def _factors(self, one: Observed) -> dict[str, Any]:
        return {"input_sq": one.inputs["input_sq"].values}


@dataclass(frozen=True, kw_only=True)
class Gradient(_ScoreRecipe):
    """The least ``|weight| * norm of its gradients`` go.

    A variant of GBLM-Pruner (Das et al. 2023, arXiv 2311.04902) without inputs; blocks are not run.

    Args:
        norm: Of the gradients over the samples: ``"l1"``, the mean of magnitudes, or ``"l2"``, the
            root of the mean of squares.
        group: As for :class:`Wanda`.
        **options: Those of :class:`PruningRecipe`.
    """

    norm: str = "l1"
    #: Of the gradients in the authors' code.
    _SCALE: ClassVar[float] = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("l1", "l2"):
            raise ValueError(f'{self.title}: norm must be "l1" or "l2", got {self.norm!r}')

    def gradient_statistic(self, layer: Layer) -> GradientStatistic | None:
        """The norms of single samples' gradients, by weight."""
        return GradientNorms(layer.rows, layer.columns, self.norm, device=layer.weight.device)

    def gradient_bytes(self, layer: Layer) -> int:
        """Four for each weight."""
        return 4 * layer.weight.numel()

    def _factors(self, one: Observed) -> dict[str, Any]:
        norms = one.gradient
        if self.reference:
            return {"grad_norm": norms.reference_values(self._SCALE), "norm": self.norm}
        return {"grad_norm": norms.values, "norm": self.norm}


@dataclass(frozen=True, kw_only=True)
class GBLM(_InputSquaresMixin, Gradient):
    """Inputs and gradients together: GBLM-Pruner (Das et al. 2023, arXiv 2311.04902).

    Args:
        norm: As for :class:`Gradient`.
        alpha: The gradients' weight, as :func:`gradpress.prune.score_gblm` takes it.
        group: As for :class:`Wanda`.
        reference: As the authors' code: norms are sums over the samples of 100 times the gradient,
            so that their weight grows with the number of samples.
        **options: Those of :class:`PruningRecipe`.
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and self.reference:
            raise ValueError(
                f"{self.title}: alpha must be left out with reference, got {self.alpha}"
            )
        if self.alpha is not None and not (self.alpha >= 0 and math.isfinite(self.alpha)):
            raise ValueError(f"{self.title}: alpha must be finite and at least 0, got {self.alpha}")

    def _factors(self, one: Observed) -> dict[str, Any]:
        found = super()._factors(one)
        found["input_sq"] = one.inputs["input_sq"].values
        found["tokens"] = max(1, round(one.tokens))
        if not self.reference:
            found["alpha"] = self.alpha
        return found


@dataclass(frozen=True, kw_only=True)
class SparseGPT(PruningRecipe):
    """Weights go, and those that stay make up for them (Frantar, Alistarh 2023, arXiv 2301.00774).

    Layers with the same inputs share one Hessian, which is factored once.

    Args:
        block_size: Columns of a block, 1 to 256.
        damp: What is added to the Hessian's diagonal, as a share of its mean.
        **options: Those of :class:`PruningRecipe`.
    """

    block_size: int = 128
    damp: float = 0.01

    def input_statistics(self, layer: Layer) -> dict[str, InputStatistic]:
        """The products of inputs."""
        return {"hessian": Hessian(layer.columns, device=layer.weight.device)}

    def compress(self, observed: Sequence[Observed]) -> Iterator[Outcome]:
        """Prunes and adjusts layer after layer."""
        known: tuple[int, torch.Tensor, torch.Tensor, str] | None = None
        for one in observed:
            weight = one.layer.matrix
            if known is None or known[0] != id(one.inputs["hessian"]):
                known = None  # before there is another one
                known = self._curvature(one)
            _, hessian, factor, note = known
            result = sparsegpt(
                weight,
                hessian,
                sparsity=self._share(one.layer.name),
                pattern=self.pattern,
                block_size=self.block_size,
                damp=self.damp,
                reference=self.reference,
                factor=factor,
            )
            pruned = result.weight
            assert isinstance(pruned, torch.Tensor)
            yield Outcome(
                one.layer.name,
                pruned,
                None,
                share_of_zeros(pruned),
                _output_error(weight, pruned, hessian),
                note,
            )

    def _curvature(self, one: Observed) -> tuple[int, torch.Tensor, torch.Tensor, str]:
        """A Hessian's identity, itself, its factor, and what has to be known of it."""
        statistic, note = one.inputs["hessian"], ""
        hessian = statistic.matrix
        if not bool(hessian.diagonal().any()):
            hessian, note = torch.eye(len(hessian), device=hessian.device), _UNREACHED
        return id(statistic), hessian, inverse_factor(hessian, self.damp, "auto"), note


def _output_error(weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor) -> float:
    """The root of ``tr(D H D^T) / tr(W H W^T)`` for the change D."""
    before = weight.float()
    change = before - pruned.float()
    whole = float((before @ hessian).mul_(before).sum(dtype=torch.float64))
    lost = float((change @ hessian).mul_(change).sum(dtype=torch.float64))
    return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else math.nan
