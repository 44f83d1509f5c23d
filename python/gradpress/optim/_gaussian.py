"""Random matrices that are drawn anew whenever they are needed, and never stored."""

from __future__ import annotations

import math

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIXERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def gaussian(
    shape: tuple[int, int], *, seed: int, tensor_id: int, draw: int, device: torch.device
) -> torch.Tensor:
    """Independent normal numbers of variance 1, a function of the key and the position alone.

    Counter-based: SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
    generators", OOPSLA 2014) of a position gives two uniform numbers, and Box and Muller's
    transformation two normal ones. It is computed on the device, in float64, and rounded to 8
    significant bits: what libraries of elementary functions differ by is rounded away.

    Args:
        shape: Of the result.
        seed: Key of all random numbers.
        tensor_id: Which tensor.
        draw: Which time.
        device: Of the result.
    """
    count = math.prod(shape)
    half = -(-count // 2)
    key = seed & _MASK
    for part in (tensor_id, draw):
        key = _mix_number((key + _GOLDEN * (part + 1)) & _MASK)
    counter = torch.arange(1, half + 1, dtype=torch.int64, device=device)
    bits = _mix(counter.mul_(_signed(_GOLDEN)).add_(_signed(key)))
    # In (0, 1) and [0, 1): the logarithm needs a positive number.
    first = (_shifted(bits, 32).to(torch.float64) + 0.5).mul_(2.0**-32)
    second = (bits & 0xFFFFFFFF).to(torch.float64).mul_(2.0**-32)
    radius = first.log_().mul_(-2.0).sqrt_()
    angle = second.mul_(2 * math.pi)
    pair = torch.stack((angle.cos().mul_(radius), angle.sin().mul_(radius)))
    return pair.to(torch.bfloat16).to(torch.float32).view(-1)[:count].view(shape)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """A shift to the right that brings in zeros."""
    return (x >> by) & (_MASK >> by)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function, in place."""
    for by, mixer in zip(_SHIFTS, (*_MIXERS, None), strict=True):
        x ^= _shifted(x, by)
        if mixer is not None:
            x *= _signed(mixer)
    return x


def _mix_number(x: int) -> int:
    for by, mixer in zip(_SHIFTS, (*_MIXERS, None), strict=True):
        x ^= x >> by
        if mixer is not None:
            x = x * mixer & _MASK
    return x
