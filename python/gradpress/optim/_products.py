"""Products of matrices by the projection kernels: the same bits for all numbers of threads."""

from __future__ import annotations

import torch

from gradpress.ops import lowrank as kernels

#: Columns that the right factor has at least; the kernels sum over fewer rows at a time.
MIN_WIDTH = 256


def transposed_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a.T @ b`` in float32, whatever the shapes.

    The kernels sum over the shorter side of `b`, here its rows: runs of them, one after the other.

    Args:
        a: ``[k, p]``, float32.
        b: ``[k, q]``; float32, float16 or bfloat16.
    """
    (rows, p), q = a.shape, b.shape[1]
    width = max(q, p + 1, MIN_WIDTH)
    run = max(p, min(width - 1, rows))
    missing = -rows % run
    if missing or width > q:
        a = torch.nn.functional.pad(a, (0, 0, 0, missing))
        b = torch.nn.functional.pad(b, (0, width - q, 0, missing))
    lefts, rights = (list(torch.split(t.contiguous(), run)) for t in (a, b))
    parts = [torch.empty(p, width, dtype=torch.float32, device=a.device) for _ in lefts]
    kernels.project(rights, lefts, parts)
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total[:, :q].contiguous()


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in float32; `a` float32."""
    return transposed_product(a.T.contiguous(), b)
