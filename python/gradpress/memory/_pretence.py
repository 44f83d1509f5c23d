"""Tensors on the meta device in the guise of tensors elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from gradpress.memory._attention import attention

#: With getters that are asked one by one, which are no part of PyTorch's types.
_TENSOR: Any = torch.Tensor

#: What is asked often and has the same answer on all devices.
_QUESTIONS = (torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.size, torch.Tensor.is_contiguous)


class Pretence(TorchFunctionMode):
    """Tensors on the meta device say that they are on another one, and are made in its place.

    Args:
        device: The other one.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._answers = {
            _TENSOR.device.__get__: device,
            _TENSOR.is_meta.__get__: False,
            _TENSOR.is_cpu.__get__: device.type == "cpu",
            _TENSOR.is_cuda.__get__: device.type == "cuda",
        }

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs a function of PyTorch."""
        if func in self._answers:
            return self._answers[func] if _TENSOR.is_meta.__get__(args[0]) else func(*args)
        if func in _QUESTIONS or func.__name__ == "__get__":
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        if types and torch._C._is_torch_function_enabled():
            own = [kind for kind in types if kind.__module__.startswith("gradpress.")]
            if own:
                # The package's own kinds of tensors, whose code shall see what others see.
                with self:
                    return own[0].__torch_function__(func, types, args, kwargs)  # type: ignore[attr-defined]
        if func is F.scaled_dot_product_attention and _TENSOR.is_meta.__get__(args[0]):
            return attention(*args, **kwargs)
        if func is torch.Tensor.cpu and self._device.type == "cpu":
            return args[0]
        if self._device.type != "cpu":
            kwargs.pop("pin_memory", None)  # that memory is on the host, which is not asked for any
        if func in (torch.Tensor.backward, torch.autograd.backward):
            renamed = {"gradient": "grad_tensors"}
            return self._backward(*args, **{renamed.get(k, k): v for k, v in kwargs.items()})
        moves = func is torch.Tensor.to and _TENSOR.is_meta.__get__(args[0])
        if kwargs.get("device") is not None and (moves or self._device.type != "cpu"):
            kwargs = {**kwargs, "device": self._meant(kwargs["device"])}
        if moves:
            args = tuple(self._meant(a) if isinstance(a, str | torch.device) else a for a in args)
        return func(*args, **kwargs)

    def _backward(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """`torch.autograd.backward` with this mode active in it, which it is not by itself."""
        roots = _as_tuple(tensors)
        given = _as_tuple(grad_tensors) or (None,) * len(roots)
        grads = tuple(
            torch.ones_like(root) if grad is None and root.requires_grad else grad
            for root, grad in zip(roots, given, strict=True)
        )
        keep = create_graph if retain_graph is None else retain_graph
        with self:
            torch.autograd.Variable._execution_engine.run_backward(
                roots,
                grads,
                keep,
                create_graph,
                _as_tuple(inputs),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def _meant(self, device: Any) -> Any:
        given = torch.device(device)
        return torch.device("meta") if given.type == self._device.type else given


def _as_tuple(tensors: Any) -> tuple[Any, ...]:
    if tensors is None:
        return ()
    return (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
