"""The kernels as operators ``torch.ops.gradpress.*``, for compiled programs.

A plain function of this package is a call into the native core, at which `torch.compile` and
`torch.export` break the graph. The operators hold the same kernels behind a schema that says what
is read and what is written, with shapes for tensors without values, so that they stand in a graph
as one node. They give the same bits as the plain functions, at about 4 µs more per call.

They differ from the plain functions where a graph asks for it:

- A name that ends in ``_`` says that arguments are written, which the schema marks one by one.
- Nothing waits for the device: counts and statuses come back as tensors.
- What may be absent from a result is an empty tensor: the zero points of symmetric codes.
- Integers in a schema have a sign: a seed from 2**63 on stands as ``seed - 2**64``.
- An operator finds its device by its tensors, so that lists must not be empty.

CPU and CUDA are implemented; on other devices PyTorch raises `NotImplementedError`. Only
``linear_blockwise`` can be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "gradpress"
DEVICES = ("CPU", "CUDA")

#: Keeps the registrations: they end with this object.
LIBRARY: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an operator.

    Args:
        schema: Name, arguments and results as PyTorch's dispatcher reads them.
        kernel: Called with tensors on a device that has kernels.
        fake: Called with tensors without values: makes results of the same shapes and dtypes.
    """
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in DEVICES:
        LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def nothing(*_: Any, **__: Any) -> None:
    """What an operator without results makes of tensors without values."""


def unsigned(seed: int) -> int:
    """The 64-bit seed behind an integer with a sign."""
    return seed % (1 << 64)
