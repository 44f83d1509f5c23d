"""The gradient of one sample for one layer, from all calls of it."""

from __future__ import annotations

from typing import Any

import torch

from gradpress.engine._layers import Layer, version_of
from gradpress.engine._recipe import GradientStatistic


class _Call:
    """One call of a layer: its inputs, and then the gradient of its outputs."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs: torch.Tensor | None = inputs
        self.version = version_of(inputs)
        self.grad_outputs: torch.Tensor | None = None


class SampleGradient:
    """A layer, its statistic, and its calls in the sample that runs.

    The gradient of a sample is that of all calls together: the statistic takes them at once, as
    soon as the last one is known.
    """

    def __init__(self, layer: Layer, statistic: GradientStatistic) -> None:
        self.layer = layer
        self.called = False
        self._statistic = statistic
        self._keep_copies = False
        self._calls: list[_Call] = []
        self._missing = 0
        self._taken = False

    def begin(self, *, keep_copies: bool = False) -> None:
        """A sample runs, or the same one anew.

        Args:
            keep_copies: From now on hold copies of inputs, since they are written into.
        """
        self._keep_copies |= keep_copies
        self._calls = []
        self._missing = 0
        self._taken = self.called = False

    def changed(self) -> bool:
        """Whether inputs are no longer what the layer was given."""
        held = [(call.inputs, call.version) for call in self._calls]
        return any(x is not None and version_of(x) != version for x, version in held)

    def forward_hook(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> None:
        """After a call of the layer."""
        self.called = True
        if not output.requires_grad:
            return
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        call = _Call(x.clone() if self._keep_copies else x)
        self._calls.append(call)
        self._missing += 1

        def backward_hook(grad: torch.Tensor) -> None:
            call.grad_outputs = grad.detach()
            self._missing -= 1
            if not self._missing:
                self._take()

        output.register_hook(backward_hook)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """The sample is over; its loss may not depend on all calls, or on none."""
        if not self._taken:
            self._take()
        self.begin()

    @torch.no_grad()
    def _take(self) -> None:
        self._taken = True
        inputs, grads = [], []
        for call in self._calls:
            x, grad = call.inputs, call.grad_outputs
            call.inputs = call.grad_outputs = None
            if x is not None and grad is not None:
                inputs.append(_of_one_sample(self.layer.inputs(x)))
                grads.append(_of_one_sample(self.layer.grad_outputs(grad)))
        if not inputs:
            weight = self.layer.weight
            inputs = [weight.new_zeros(1, 1, self.layer.columns)]
            grads = [weight.new_zeros(1, 1, self.layer.rows)]
        once = len(inputs) == 1
        self._statistic.update_from_activations(
            inputs[0] if once else torch.cat(inputs, 1), grads[0] if once else torch.cat(grads, 1)
        )


def _of_one_sample(x: torch.Tensor) -> torch.Tensor:
    """``[1, rows, columns]``, however the layer was called."""
    return x.reshape(1, -1, x.shape[-1])
