"""What a step of Q-GaLore has to do to an integer weight, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from gradpress.nn import QuantizedWeight
from gradpress.ops import dynamic, quant

#: Of the change that was asked for: stochastic rounding keeps the mean.
SLOPE_TOLERANCE = 0.03
#: Grid steps by which a value may miss: one, by rounding, and what float32 leaves.
STEPS_TOLERANCE = 1.02


@dataclass(frozen=True)
class Expected:
    """A weight before a step, and what the step makes of it before rounding.

    Attributes:
        weight: The parameter.
        before: Its values.
        after: The values wanted.
    """

    weight: QuantizedWeight
    before: torch.Tensor
    after: torch.Tensor

    def verdict(self) -> tuple[str, bool]:
        """Whether the step, now done, did it: in words, and the answer."""
        got = self.weight.dequantize(torch.float32).double()
        wanted, changed = self.after - self.before, got - self.before
        slope = float((wanted * changed).sum() / wanted.square().sum())
        grid = self.weight.scale.double().repeat_interleave(self.weight.group_size)
        off = (got - self.after).flatten().abs() / grid[: got.numel()]
        most = float(off.max())
        right = abs(slope - 1) <= SLOPE_TOLERANCE and most <= STEPS_TOLERANCE
        shape = " x ".join(map(str, self.weight.shape))
        return f"{shape}: {slope:.4f} of the change, {most:.3f} grid steps off at most", right


def expect(
    weight: QuantizedWeight, state: dict[str, Any], group: dict[str, Any]
) -> Expected | None:
    """What the next step, an ordinary one, is to make of a weight.

    Args:
        weight: With its gradient.
        state: Of the optimizer; not changed.
        group: Its options.

    Returns:
        None where the moments are no codes of 8 bits.
    """
    if group["state_bits"] != 8 or "exp_avg_codes" not in state:
        return None
    rows, columns = weight.shape
    basis = _basis(state, group, (min(rows, columns), state["projector_rank"]))
    assert weight.grad is not None
    gradient = weight.grad.double()
    m, v = (
        _tensor(
            dynamic.dequantize_dynamic(
                state[f"{name}_codes"], state[f"{name}_scale"], signed=signed
            )
        )
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False))
    )
    tall = rows >= columns
    projected = gradient @ basis if tall else basis.T @ gradient
    beta1, beta2 = group["betas"]
    m = beta1 * m + (1 - beta1) * projected
    v = beta2 * v + (1 - beta2) * projected.square()
    step = int(state["step"].item()) + 1
    rate = group["lr"] / (1 - beta1**step)
    update = -rate * m / ((v.sqrt() / math.sqrt(1 - beta2**step)) + group["eps"])
    back = update @ basis.T if tall else basis @ update
    before = weight.dequantize(torch.float32).double()
    keep = 1 - group["lr"] * group["weight_decay"]
    return Expected(weight, before, keep * before + group["scale"] * back)


def _basis(state: dict[str, Any], group: dict[str, Any], shape: tuple[int, int]) -> torch.Tensor:
    values = quant.dequantize_blockwise(
        state["projector_codes"],
        state["projector_scale"],
        state["projector_zero_point"],
        shape=shape,
        bits=group["projector_bits"],
        group_size=group["projector_group_size"],
    )
    return _tensor(values)


def _tensor(values: object) -> torch.Tensor:
    assert isinstance(values, torch.Tensor)
    return values.double()
