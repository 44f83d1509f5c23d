"""Attention of tensors without values, by the kind of kernel that those with values would get."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention`, which on the meta device always makes all the scores.

    PyTorch is asked what it would take on the CPU. Where it takes a fused kernel, that keeps the
    result and a float32 for each query, as those for CUDA do.
    """
    choice = torch._fused_sdp_choice(
        _stand_in(query),
        _stand_in(key),
        _stand_in(value),
        None if attn_mask is None else _stand_in(attn_mask),
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    if choice != SDPBackend.FLASH_ATTENTION.value:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return cast(torch.Tensor, results[0])


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape with values, which takes one row or one element.

    Fused kernels want elements of a row to lie side by side.
    """
    length = tensor.shape[-1] if tensor.stride(-1) == 1 else 1
    row = torch.empty(length, dtype=tensor.dtype, device="cpu")
    return row.expand(tensor.shape).requires_grad_(tensor.requires_grad)
