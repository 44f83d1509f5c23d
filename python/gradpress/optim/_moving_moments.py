"""Moments whose coordinates change from step to step.

They are worked on as float32 rows ``[rank, longer side]``, and rounded once a step where they are
codes. Nobody waits for the device.
"""

from __future__ import annotations

from typing import cast

import torch

from gradpress.ops import lowrank as kernels
from gradpress.optim._adam import CODES, AdamHyper, Batch, State, step_directions
from gradpress.optim._base import Group
from gradpress.optim._limiter import norms_along
from gradpress.optim._moments import SIGNED, Turn, load_moment, turn_moments
from gradpress.optim._power_iteration import rows_of
from gradpress.optim._products import transposed_product


def load_rows(state: State, shape: tuple[int, int], group: Group) -> State:
    """Copies of both moments, by their names, of a weight of a shape."""
    stored = kernels.projected_shape(*shape, state["projector_rank"])
    return {
        name: rows_of(load_moment(state, name, stored, group), shape).clone() for name in SIGNED
    }


def turned(
    moments: State, basis: torch.Tensor, old: torch.Tensor, steps: int, group: Group
) -> State:
    """The moments in the coordinates of another basis, by LDAdam's rule.

    Args:
        moments: In those of `old`.
        basis: ``[shorter side, rank]``.
        old: The one before it.
        steps: Gradients that the moments have seen.
        group: Decay rates.
    """
    # Bases that were rounded are longer than they should be, and no row of a product of orthonormal
    # ones is longer than 1: second moments would grow without end.
    change = transposed_product(*(t / norms_along(t, 0) for t in (basis, old)))
    change /= norms_along(change, 1).clamp(min=1.0)
    result = {name: values.clone() for name, values in moments.items()}
    shape = cast("tuple[int, int]", tuple(result["exp_avg"].shape))
    turn_moments(result, shape, Turn(change, None), steps, group)
    return result


def store_rows(state: State, moments: State, shape: tuple[int, int], hyper: AdamHyper) -> None:
    """Writes both moments, quantized where the state's are, unless the step is skipped.

    Codes are written by a step of Adam whose decay rates are zero: it keeps a gradient as the first
    moment, and its square as the second one.
    """
    unit = hyper._replace(lr=1.0, beta1=0.0, beta2=0.0, eps=1.0)
    for name, values in moments.items():
        if name in state:
            new = rows_of(values, shape)
            if hyper.found_inf is not None:
                new = torch.where(hyper.found_inf.reshape(()) == 0, new, state[name])
            state[name].copy_(new)
            continue
        gradient = rows_of(values.clone() if SIGNED[name] else values.sqrt(), shape)
        parts = {key: torch.zeros_like(state[key]) for key in CODES}
        parts |= {key: state[key] for key in CODES if key.rpartition("_")[0] == name}
        batch = Batch([gradient], [gradient], [{**parts, "step": state["step"]}])
        step_directions(batch, unit, torch.zeros(1, dtype=torch.int64, device=gradient.device))
