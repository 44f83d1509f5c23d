"""Gradient-guided training and compression of PyTorch models.

Train large networks in little memory (:mod:`gradpress.optim`, :mod:`gradpress.nn`), and make
tensors small (:mod:`gradpress.quant`, :mod:`gradpress.lowrank`, :mod:`gradpress.prune`), by kernels
written in Rust that work in place on the caller's tensors, on the CPU and on CUDA devices.
"""

# Tensors cross the border through PyTorch's own exchange table, so it has to be there first.
import torch as _torch  # noqa: F401

from gradpress import engine, environment, io, lowrank, memory, nn, ops, optim, prune, quant
from gradpress.engine import compress
from gradpress.ops.runtime import core_version as _core_version
from gradpress.ops.runtime import warmup

__version__ = _core_version()
__all__ = [
    "__version__",
    "compress",
    "engine",
    "environment",
    "io",
    "lowrank",
    "memory",
    "nn",
    "ops",
    "optim",
    "prune",
    "quant",
    "warmup",
]
