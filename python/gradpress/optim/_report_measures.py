"""Bytes of parameters and their states, and shares of codes at the ends of their range."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from gradpress.nn._weight import QuantizedWeight
from gradpress.optim._adam import state_block_size
from gradpress.optim._report import LayerRow
from gradpress.optim._sharded import local

State = dict[str, Any]

#: Moments that may be codes of a dynamic map, and whether the map has signs.
SIGNED = {"exp_avg": True, "exp_avg_sq": False, "momentum_buffer": True}

#: The smallest positive code of the maps without signs, by bits.
SMALLEST_POSITIVE = {8: 1, 4: 0}


def with_bytes(row: LayerRow, p: torch.Tensor, state: State, seen: set[int]) -> LayerRow:
    """A row with how its parameter is stored, and the bytes.

    Args:
        row: Says what the numbers of the state do.
        p: The parameter.
        state: Its state.
        seen: Storages that other rows have counted; those of this one are added.
    """
    weight = list(p.parts.values()) if isinstance(p, QuantizedWeight) else [p]
    tensors = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
    projectors = {name: t for name, t in tensors.items() if "projector" in name}
    return replace(
        row,
        kind=_kind(p),
        state_bytes=_bytes((t for name, t in tensors.items() if name not in projectors), seen),
        projector_bytes=_bytes(projectors.values(), seen),
        weight_bytes=_bytes(weight, seen),
    )


def with_saturation(
    row: LayerRow,
    p: torch.Tensor,
    state: State,
    group: dict[str, Any],
    moments: Callable[[], Mapping[str, torch.Tensor]],
) -> LayerRow:
    """A row with the shares of codes at the ends of their range; waits for the device.

    Args:
        row: Is completed.
        p: The parameter.
        state: Its state.
        group: Its options.
        moments: Makes tensors of the moments' shapes, ``exp_avg_codes`` and so on.
    """
    return replace(
        row,
        weight_saturation=_weight_saturation(p),
        moment_saturation=_moment_saturation(state, group, moments),
    )


def _kind(p: torch.Tensor) -> str:
    if isinstance(p, QuantizedWeight):
        return f"int{p.bits}"
    return str(p.dtype).removeprefix("torch.")


def _bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Bytes of tensors whose storage was not counted before."""
    total = 0
    for tensor in map(local, tensors):
        storage = tensor.untyped_storage()._cdata
        if storage not in seen:
            seen.add(storage)
            total += tensor.nbytes
    return total


def _weight_saturation(p: torch.Tensor) -> float | None:
    if not isinstance(p, QuantizedWeight) or not p.numel():
        return None
    codes = unpacked(p.codes, p.numel(), p.bits)
    return int(_at_ends(codes, 0, p.bits).sum()) / p.numel()


def _moment_saturation(
    state: State, group: dict[str, Any], moments: Callable[[], Mapping[str, torch.Tensor]]
) -> float | None:
    found = [name for name in SIGNED if f"{name}_codes" in state]
    if not found:
        return None
    bits, ends, count = group["state_bits"], 0, 0
    # The last byte of packed codes holds two or one: only the moment's shape tells.
    shapes = moments() if bits == 4 else state
    for name in found:
        stored, numel = state[f"{name}_codes"], shapes[f"{name}_codes"].numel()
        codes = unpacked(stored, numel, bits)
        low = 0 if SIGNED[name] else SMALLEST_POSITIVE[bits]
        scale = state[f"{name}_scale"]
        ends += _where_scaled(_at_ends(codes, low, bits), scale, state_block_size(group))
        count += numel
    return ends / count if count else None


def _where_scaled(hits: torch.Tensor, scale: torch.Tensor, block_size: int) -> int:
    """How many hits are in blocks whose scale is not zero."""
    missing = scale.numel() * block_size - hits.numel()
    blocks = torch.nn.functional.pad(hits, (0, missing)).view(-1, block_size).sum(1)
    return int(blocks[scale != 0].sum())


def _at_ends(codes: torch.Tensor, low: int, bits: int) -> torch.Tensor:
    return (codes == low) | (codes == (1 << bits) - 1)


def unpacked(codes: torch.Tensor, numel: int, bits: int) -> torch.Tensor:
    """Codes in a row, one to the byte."""
    flat = codes.reshape(-1)
    if bits == 8:
        return flat
    return torch.stack((flat & 15, flat >> 4), dim=1).view(-1)[:numel]
