"""Lets q-galore-torch 1.0 run beside today's bitsandbytes, on the CPU. For measuring only.

q-galore-torch was written for bitsandbytes before 0.44 and for CUDA: it waits for the GPU after
every parameter, reads options that are gone, and passes positional arguments to functions and to a
constructor whose parameters have changed since. Nothing of bitsandbytes itself is changed here;
what is replaced comes back at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch

#: What the constructor of before meant by the arguments that now fall on other parameters: its
#: `percentile_clipping=100` and `block_wise=True` arrive as `max_unorm` and `skip_zeros`.
_CONFIG = {"percentile_clipping": 100, "block_wise": True, "max_unorm": 0.0, "skip_zeros": False}
#: Arguments before the place where `beta3` and `alpha` came in: from the name to `beta2`.
_BEFORE_BETA3 = {"optimizer_update_8bit_blockwise": 7, "optimizer_update_32bit": 10}


class _Functional:
    """`bitsandbytes.functional` for callers that do not know `beta3` and `alpha`."""

    def __init__(self, functional: ModuleType) -> None:
        self._functional = functional

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._functional, name)
        place = _BEFORE_BETA3.get(name)
        if place is None:
            return function

        def call(*arguments: Any, **options: Any) -> Any:
            return function(*arguments[:place], 0.0, 0.0, *arguments[place:], **options)

        return call


def _no_wait(*_: object) -> None:
    """A plain function: a mock object would cost time inside the measured step."""


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Lets optimizers that wait for a GPU after every parameter run on a CPU."""
    with mock.patch.object(torch.cuda, "synchronize", _no_wait):
        yield


@contextlib.contextmanager
def q_galore_on_cpu() -> Iterator[ModuleType]:
    """Makes the optimizer of q-galore-torch work while the context is open.

    Yields:
        The module `q_galore_torch`.

    Raises:
        ImportError: q-galore-torch or bitsandbytes is not installed.
    """
    import q_galore_torch
    from q_galore_torch import q_galore_adamw8bit as module

    optimizer = module.AdamW8bit
    get_config = optimizer.get_config

    def with_old_options(self: Any, *arguments: Any) -> dict[str, Any]:
        return {**get_config(self, *arguments), **_CONFIG}

    with contextlib.ExitStack() as stack:
        stack.enter_context(without_waiting())
        stack.enter_context(mock.patch.object(module, "F", _Functional(module.F)))
        stack.enter_context(mock.patch.object(optimizer, "get_config", with_old_options))
        yield q_galore_torch


def integer_parameter(values: torch.Tensor, group_size: int) -> torch.nn.Parameter:
    """A weight in the form in which q-galore-torch trains INT8: codes with attributes.

    Its gradient goes to `float_grad`.

    Args:
        values: The weight; a multiple of `group_size` elements.
        group_size: Elements that share a scale and a zero point.
    """
    groups = values.reshape(-1, group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scales = (high - low).clamp(min=1e-5) / 255
    zeros = (-torch.round(low / scales)).clamp_(0, 255)
    codes = (torch.round(groups / scales) + zeros).clamp_(0, 255).to(torch.uint8)
    parameter: Any = torch.nn.Parameter(codes.view_as(values), requires_grad=False)
    parameter.group_size, parameter.stochastic_round = group_size, True
    parameter.scales, parameter.zeros = scales, zeros
    return parameter
