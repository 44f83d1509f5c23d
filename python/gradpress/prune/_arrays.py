"""Weights as matrices: a row for each output, columns for its inputs."""

from __future__ import annotations

import math

import torch

from gradpress.ops._arrays import Array, check_array, dtype_name

FLOATS = ("float32", "float16", "bfloat16")


def as_matrix(op: str, name: str, x: Array) -> Array:
    """`x` as ``[rows, columns]``: its first dimension, and all others together.

    Raises:
        TypeError: it is no tensor or array, or its dtype is not one of :data:`FLOATS`.
        ValueError: it has no dimensions.
    """
    check_array(op, name, x)
    if dtype_name(x) not in FLOATS:
        raise TypeError(
            f"{op}: {name} must have dtype float32, float16 or bfloat16, got {dtype_name(x)}"
        )
    if x.ndim == 0:
        raise ValueError(f"{op}: {name} must have at least one dimension, got none")
    if isinstance(x, torch.Tensor):
        x = x.detach()
    if x.ndim == 1:
        return x.reshape(1, x.shape[0])
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def check_like(op: str, name: str, x: Array, shape: tuple[int, ...]) -> Array:
    """`x` when it has this shape.

    Raises:
        TypeError: it is no tensor or array, or holds no floating-point numbers.
        ValueError: its shape is another one.
    """
    check_array(op, name, x)
    if "float" not in dtype_name(x):
        raise TypeError(f"{op}: {name} must hold floating-point numbers, got {dtype_name(x)}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(x.shape)}")
    return x.detach() if isinstance(x, torch.Tensor) else x
