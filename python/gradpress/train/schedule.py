"""Learning-rate schedule: linear warm-up, then a cosine down to a floor."""

from __future__ import annotations

import math


def lr_multiplier(step: int, *, steps: int, warmup: float = 0.1, min_ratio: float = 0.1) -> float:
    """Factor on the peak learning rate at one optimizer step.

    `i/W` for `i < W`, then `f + (1-f)·½(1 + cos(π(i-W)/(S-W)))` with `W = int(warmup·S)`: the
    schedule of GaLore (Zhao et al. 2024, arXiv:2403.03507) and of the papers that compare with
    it. The very first step of a run with a warm-up has the factor 0.

    Args:
        step: Steps completed before this one, `i`; the first step is 0.
        steps: Steps of the whole run, `S`.
        warmup: Share of the steps that warm up, in [0, 1].
        min_ratio: Floor of the cosine as a share of the peak, `f`.

    Returns:
        The factor, in [0, 1].
    """
    warmup_steps = int(warmup * steps)
    if step < warmup_steps:
        return step / warmup_steps
    if steps == warmup_steps:
        return 1.0
    progress = min(1.0, (step - warmup_steps) / (steps - warmup_steps))
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
