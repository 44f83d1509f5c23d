"""What a model handles in place of logits that are not computed yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from gradpress.nn._chunked_loss import chunked_cross_entropy

#: The class below has a method `float`, as tensors do.
Number: TypeAlias = float


class DeferredLogits:
    """What stands for a head's logits until a loss is computed of them.

    It takes what models do with logits on the way: shapes that leave the vocabulary alone, other
    dtypes, factors and the tanh of a soft cap, and `torch.nn.functional.cross_entropy`.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        head: nn.Linear,
        chunk_tokens: int | None,
        inner: Number = 1.0,
        outer: Number | None = None,
    ) -> None:
        self._hidden, self._head, self._chunk_tokens = hidden, head, chunk_tokens
        #: The logits are ``outer * tanh(inner * products)``; without tanh where outer is None.
        self._inner, self._outer = inner, outer

    def _with(self, **changes: Any) -> DeferredLogits:
        own = {"hidden": self._hidden, "inner": self._inner, "outer": self._outer, **changes}
        return DeferredLogits(head=self._head, chunk_tokens=self._chunk_tokens, **own)

    # What a tensor tells

    @property
    def shape(self) -> torch.Size:
        """That of the logits."""
        return torch.Size((*self._hidden.shape[:-1], self._head.weight.shape[0]))

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape, or one of its numbers."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """How many dimensions the logits have."""
        return self._hidden.dim()

    @property
    def device(self) -> torch.device:
        """Where the logits would be."""
        return self._hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """The hidden states'; the loss is computed in float32 at least."""
        return self._hidden.dtype

    # What leaves the values alone

    def float(self) -> DeferredLogits:
        """Itself: the loss is computed in float32 at least."""
        return self

    def to(self, *args: Any, **options: Any) -> DeferredLogits:
        """Itself: where and in what it is computed is the head's matter."""
        return self

    def contiguous(self) -> DeferredLogits:
        """Itself."""
        return self

    def view(self, *shape: Any) -> DeferredLogits:
        """Another shape with the vocabulary as its last dimension."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if sizes[-1] not in (-1, self.shape[-1]) or len(sizes) < 2:
            self._refuse(f"view{tuple(sizes)}")
        return self._with(hidden=self._hidden.reshape(*sizes[:-1], self._hidden.shape[-1]))

    reshape = view

    def __getitem__(self, index: Any) -> DeferredLogits:
        """Some of the tokens."""
        parts = index if isinstance(index, tuple) else (index,)
        has_ellipsis = any(part is Ellipsis for part in parts)
        to_the_end = has_ellipsis or len(parts) >= self.dim()
        if to_the_end and not (
            parts[-1] is Ellipsis or (isinstance(parts[-1], slice) and parts[-1] == slice(None))
        ):
            self._refuse("an index into the vocabulary")
        return self._with(hidden=self._hidden[index])

    # What changes them

    def __mul__(self, factor: Any) -> DeferredLogits:
        """Scaled logits."""
        if isinstance(factor, torch.Tensor) and (factor.numel() != 1 or factor.requires_grad):
            self._refuse("a factor that is not a number")
        if self._outer is None:
            return self._with(inner=self._inner * float(factor))
        return self._with(outer=self._outer * float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> DeferredLogits:
        """Scaled logits."""
        return self.__mul__(1 / divisor)

    def tanh(self) -> DeferredLogits:
        """Capped logits."""
        if self._outer is not None:
            self._refuse("a second tanh")
        return self._with(outer=1.0)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """PyTorch's functions of logits: tanh and cross-entropy."""
        known: dict[Any, Callable[..., Any]] = {
            torch.tanh: cls.tanh,
            F.cross_entropy: cls._cross_entropy,
        }
        if func not in known or not args or not isinstance(args[0], cls):
            cls._refuse(getattr(func, "__name__", str(func)))
        return known[func](*args, **(kwargs or {}))

    def _cross_entropy(
        self,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        size_average: None = None,
        ignore_index: int = -100,
        reduce: None = None,
        reduction: str = "mean",
        label_smoothing: Number = 0.0,
    ) -> torch.Tensor:
        if weight is not None or size_average is not None or reduce is not None or self.dim() != 2:
            self._refuse("cross_entropy with weights of classes or more than two dimensions")
        cap, scale = self._outer, self._inner
        if cap is not None and cap <= 0:
            self._refuse("a negative factor on capped logits")
        return chunked_cross_entropy(
            self._hidden,
            self._head.weight,
            target,
            bias=self._head.bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            softcap=cap,
            # cap * tanh(scale * x) = cap * tanh((scale * cap) * x / cap)
            logit_scale=scale if cap is None else scale * cap,
            chunk_tokens=self._chunk_tokens,
        )

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise NotImplementedError(
            f"chunk_loss_: the model's forward does with its logits what only whole logits can do:"
            f" {what}; call remove() on the handle and train it as it is"
        )
