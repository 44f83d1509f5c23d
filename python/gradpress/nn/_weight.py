"""A weight that is stored as integers and looks like a floating-point parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from gradpress.nn import _traced
from gradpress.ops import quant as kernels
from gradpress.ops._arrays import dtype_name

_PARTS = ("codes", "scale", "zero_point")
aten = torch.ops.aten

#: PyTorch's functions that quantized weights do by themselves; filled by their modules.
FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}


class QuantizedWeight(torch.Tensor):
    """Integer codes with a scale for each group, in the guise of a floating-point tensor.

    It has the shape and dtype of the weight it stands for, takes part in autograd
    (``requires_grad``, a dense ``.grad``), in ``state_dict``, in moves between dtypes, and in
    ``deepcopy`` and ``torch.save``; its values are dequantized where an operation needs them.
    Optimizers of :mod:`gradpress.optim` update the codes in place. Other in-place arithmetic is
    refused, because rounding to the grid would swallow small changes.

    Attributes:
        codes: uint8 in the weight's shape, or packed uint8 ``[ceil(numel / 2)]`` for 4 bits.
        scale: float32, one per group.
        zero_point: uint8, one per group.
        bits: 8 or 4.
        group_size: Consecutive elements that share a scale.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    bits: int
    group_size: int

    @staticmethod
    def __new__(
        cls: type[QuantizedWeight],
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        *,
        shape: Sequence[int],
        dtype: torch.dtype,
        bits: int,
        group_size: int,
        requires_grad: bool = False,
    ) -> QuantizedWeight:
        """Wraps codes that exist already; :meth:`from_float` makes them."""
        weight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=codes.device, requires_grad=requires_grad
        )
        weight.codes, weight.scale, weight.zero_point = codes, scale, zero_point
        weight.bits, weight.group_size = bits, group_size
        return weight

    @classmethod
    def from_float(
        cls,
        values: torch.Tensor,
        *,
        bits: int = 8,
        group_size: int = 256,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> QuantizedWeight:
        """Quantizes a floating-point tensor.

        Args:
            values: Any floating-point dtype and shape, finite.
            bits: 8 or 4.
            group_size: Consecutive elements that share a scale.
            rounding: ``"nearest"`` or ``"stochastic"``.
            seed: Key of stochastic rounding.

        Raises:
            ValueError: `values` holds NaN or infinite values, or an option is out of its range.
        """
        dense = values.detach()
        if dense.dtype == torch.float64:
            dense = dense.float()
        parts = kernels.quantize_blockwise(
            dense, bits=bits, group_size=group_size, rounding=rounding, seed=seed
        )
        if parts.nonfinite:
            raise ValueError(
                f"QuantizedWeight: values must be finite, got {parts.nonfinite} NaN or infinite"
            )
        return cls(
            cast(torch.Tensor, parts.codes),
            cast(torch.Tensor, parts.scale),
            cast(torch.Tensor, parts.zero_point),
            shape=values.shape,
            dtype=values.dtype,
            bits=bits,
            group_size=group_size,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values as a dense tensor of the weight's dtype, or of `dtype`."""
        dtype = dtype or self.dtype
        if _traced.is_traced(self.codes):
            return _traced.dequantize(self, dtype)
        direct = dtype in (torch.float32, torch.float16, torch.bfloat16)
        values = kernels.dequantize_blockwise(
            self.codes,
            self.scale,
            self.zero_point,
            shape=tuple(self.shape),
            dtype=str(dtype).removeprefix("torch.") if direct else "float32",
            bits=self.bits,
            group_size=self.group_size,
        )
        return cast(torch.Tensor, values).to(dtype)

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that hold the weight, by name."""
        return {name: getattr(self, name) for name in _PARTS}

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        return sum(part.nbytes for part in self.parts.values())

    def _with_parts(
        self, parts: Sequence[torch.Tensor], dtype: torch.dtype | None = None
    ) -> QuantizedWeight:
        return QuantizedWeight(
            *parts,
            shape=self.shape,
            dtype=dtype or self.dtype,
            bits=self.bits,
            group_size=self.group_size,
        )

    def _same_layout(self, other: object) -> bool:
        return (
            isinstance(other, QuantizedWeight)
            and self.shape == other.shape
            and (self.bits, self.group_size) == (other.bits, other.group_size)
        )

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """The inner tensors and what else it takes to build the weight again."""
        meta = {"dtype": self.dtype, "bits": self.bits, "group_size": self.group_size}
        return list(_PARTS), meta

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], meta: dict[str, Any], outer_size: Any, _stride: Any
    ) -> QuantizedWeight:
        """The inverse of `__tensor_flatten__`."""
        return cls(*(inner[name] for name in _PARTS), shape=outer_size, **meta)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """One line: what it holds and how large it is."""
        return (
            f"QuantizedWeight(shape={list(self.shape)}, dtype={dtype_name(self)},"
            f" bits={self.bits}, group_size={self.group_size}, requires_grad={self.requires_grad})"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Gives the functions of `FUNCTIONS` their own forward and backward."""
        kwargs = kwargs or {}
        own = FUNCTIONS.get(func)
        if own is not None:
            return own(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the few operations that keep the codes; all others see dense values."""
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        if func._schema.is_mutable and _is_written(func._schema, args, kwargs):
            raise NotImplementedError(
                f"{func}: in-place arithmetic on a QuantizedWeight would lose small changes to"
                " rounding; step it with an optimizer of gradpress.optim, or call"
                " gradpress.nn.dequantize_(model) first"
            )
        args, kwargs = tree_map_only(QuantizedWeight, QuantizedWeight.dequantize, (args, kwargs))
        return func(*args, **kwargs)


def _is_written(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a quantized weight stands where an operation writes, alone or in a list."""
    given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
    written = [given.get(a.name) for a in schema.arguments if a.is_write]
    return any(isinstance(t, QuantizedWeight) for t in tree_leaves(written))


def _detach(weight: QuantizedWeight) -> QuantizedWeight:
    return weight._with_parts(list(weight.parts.values()))


def _clone(weight: QuantizedWeight, *, memory_format: Any = None) -> QuantizedWeight:
    return weight._with_parts([part.clone() for part in weight.parts.values()])


def _to_copy(
    weight: QuantizedWeight,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **_: Any,
) -> QuantizedWeight:
    moved = [
        part.to(device=device, non_blocking=non_blocking, copy=True)
        for part in weight.parts.values()
    ]
    return weight._with_parts(moved, dtype)


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if not isinstance(target, QuantizedWeight):
        return target.copy_(cast(QuantizedWeight, source).dequantize())
    if target.shape != source.shape:
        raise ValueError(
            f"copy_: source must have shape {list(target.shape)}, got {list(source.shape)}"
        )
    if not target._same_layout(source):
        dense = source.dequantize() if isinstance(source, QuantizedWeight) else source
        dense = dense.to(device=target.device, dtype=torch.float32)
        source = QuantizedWeight.from_float(dense, bits=target.bits, group_size=target.group_size)
    for name, part in target.parts.items():
        part.copy_(getattr(source, name), non_blocking=non_blocking)
    return target


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
}


torch.serialization.add_safe_globals([QuantizedWeight])
