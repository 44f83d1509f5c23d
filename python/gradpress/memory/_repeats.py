"""Products with quantized weights, which a simulation looks into once for each size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gradpress.memory._accountant import Accountant
from gradpress.memory._tensors import tensors_in
from gradpress.ops import linear

#: Make one tensor, and others for themselves on the way.
_PRODUCTS = ("linear_blockwise", "linear_blockwise_input_grad")


@contextlib.contextmanager
def remembered(accountant: Accountant) -> Iterator[None]:
    """Makes products on the meta device part by part only where their like was not made before.

    A layer of a large model takes hundreds of operators, and has as many layers like it.

    Args:
        accountant: Counts what products allocate.
    """
    with contextlib.ExitStack() as restored:
        for name in _PRODUCTS:
            function = getattr(linear, name)
            restored.callback(setattr, linear, name, function)
            setattr(linear, name, _remembering(function, accountant))
        yield


def _remembering(
    function: Callable[..., torch.Tensor], accountant: Accountant
) -> Callable[..., torch.Tensor]:
    rises: dict[Any, int] = {}

    def product(
        x: torch.Tensor, weight: linear.Codes, *bias: Any, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        given = {} if out is None else {"out": out}
        with torch._C.DisableTorchFunction():
            tensors = list(tensors_in((x,), weight, bias, (out,)))
            if not all(t.is_meta for t in tensors):
                key = None
            else:
                layout = weight.shape, weight.bits, weight.group_size
                key = (layout, tuple((t.shape, t.stride(), t.dtype) for t in tensors))
        if key is None:
            return function(x, weight, *bias, **given)
        if key not in rises:
            with accountant.rise() as found:
                result = function(x, weight, *bias, **given)
            rises[key] = found[0]
            return result
        accountant.repeat(rises[key])
        if out is not None:
            return out
        width = weight.shape[0 if function.__name__ == _PRODUCTS[0] else 1]
        return x.new_empty(*x.shape[:-1], width)

    return product
