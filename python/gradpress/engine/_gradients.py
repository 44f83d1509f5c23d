"""Statistics of gradients, reduced when they arrive: no two layers' gradients exist together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gradpress.engine._batches import Batch, Calibration, Loss, copied, single_samples
from gradpress.engine._layers import Layer
from gradpress.engine._recipe import GradientStatistic
from gradpress.engine._samples import SampleGradient


class Sensitivity:
    """How much a loss depends on a layer: the mean over samples and weights of ``|w * g|``."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._sum = 0.0
        self._samples = 0

    @property
    def nbytes(self) -> int:
        """None: it is a number."""
        return 0

    def update_from_activations(self, inputs: torch.Tensor, grad_outputs: torch.Tensor) -> None:
        """Takes in ``[samples, ..., columns]`` and ``[samples, ..., rows]``."""
        weight = self._layer.matrix.float()
        for x, dy in zip(inputs, grad_outputs, strict=True):
            gradient = dy.flatten(0, -2).float().T @ x.flatten(0, -2).float()
            self._sum += float(gradient.mul_(weight).abs_().mean(dtype=torch.float64))
            self._samples += 1

    @property
    def value(self) -> float:
        """0 where no sample was seen."""
        return self._sum / max(self._samples, 1)


def collect_gradients(
    model: nn.Module,
    statistics: Mapping[str, tuple[Layer, GradientStatistic]],
    calibration: Calibration,
    loss: Loss,
    tick: Callable[[], None],
) -> None:
    """Runs the model forward and backward on every single sample.

    One sample at a time, since a loss is a mean over its batch: the gradient of a sample must not
    depend on the others beside it. Gradients of weights are never formed by autograd: a layer's
    statistic gets its inputs and the gradient of its outputs, and zeros where a sample did not
    come to it.

    Args:
        model: In evaluation mode already.
        statistics: By layers' names; updated.
        calibration: The batches.
        loss: Of model and batch.
        tick: Called after every sample.

    Raises:
        ValueError: `loss` returns no finite scalar that depends on the layers.
    """
    with _only_activations(model), _watching(statistics) as layers:
        for batch in calibration:
            for sample in single_samples(batch):
                _add_sample(model, sample, loss, layers)
                tick()


def _add_sample(
    model: nn.Module, sample: Batch, loss: Loss, layers: Sequence[SampleGradient]
) -> None:
    with torch.enable_grad():
        value = loss(model, copied(sample))
        changed = [layer for layer in layers if layer.changed()]
        if changed:
            # What these layers were given has been written into since: now they keep copies.
            for layer in layers:
                layer.begin(keep_copies=layer in changed)
            value = loss(model, copied(sample))
    called = any(layer.called for layer in layers)
    _check_loss(value, called)
    if called:
        value.backward()  # type: ignore[no-untyped-call]
    for layer in layers:
        layer.end()


def _check_loss(value: Any, called: bool) -> None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"compress: loss must return a scalar tensor, got {found}")
    if not bool(torch.isfinite(value)):
        raise ValueError(f"compress: loss must be finite on every sample, got {float(value)}")
    if called and not value.requires_grad:
        raise ValueError(
            "compress: loss must depend on the layers that are compressed, got one without a graph"
        )


@contextmanager
def _only_activations(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient; afterwards as before."""
    asked = [p for p in model.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)


@contextmanager
def _watching(
    statistics: Mapping[str, tuple[Layer, GradientStatistic]],
) -> Iterator[list[SampleGradient]]:
    layers = [SampleGradient(layer, statistic) for layer, statistic in statistics.values()]
    handles = []
    for one in layers:
        module = one.layer.module
        handles.append(module.register_forward_pre_hook(_ask_for_gradients, with_kwargs=True))
        handles.append(module.register_forward_hook(one.forward_hook, with_kwargs=True))
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _ask_for_gradients(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The first layer's inputs have no graph, and its outputs would have none either."""
    if not torch.is_grad_enabled():
        return None
    if args:
        if args[0].requires_grad:
            return None
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    name, x = next(iter(kwargs.items()))
    if x.requires_grad:
        return None
    return args, {**kwargs, name: x.detach().requires_grad_()}
