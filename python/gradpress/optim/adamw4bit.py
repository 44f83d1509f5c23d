"""AdamW with moments of 4 bits.

Li, Chen, Zhu: "Memory Efficient Optimizers with 4-bit States" (NeurIPS 2023, arXiv 2309.01507).
Original implementation: thu-ml/low-bit-optimizers. Differences: second moments take a scale for
each block too, where the paper scales matrices by their rows and columns, and are not factored;
bfloat16 parameters are rounded stochastically.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from gradpress.optim.adamw8bit import AdamW8bit


class AdamW4bit(AdamW8bit):
    r"""AdamW whose two moments take half a byte each.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2 \\
        p_t &= (1 - \eta\lambda)\, p_{t-1}
            - \eta\, \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    First moments are stored in a signed dynamic map, second moments in sixteenths of the largest
    one without a zero, so that no denominator vanishes; 128 elements share a float32 scale. All
    else is as in :class:`AdamW8bit`, whose ``state_bits=4`` this is: checkpoints go both ways.

    Args:
        params: As for :class:`AdamW8bit`.
        lr: Learning rate; a number or a tensor of one element.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, times the learning rate.
        state_bits: 4; 8 or 32 in groups that need more.
        **options: Those of :class:`AdamW8bit`.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Linear(128, 128, bias=False)
        >>> optimizer = gradpress.optim.AdamW4bit(model.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 128)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg_codes"].nbytes / 128**2
        0.5
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, state_bits=state_bits, **options)
