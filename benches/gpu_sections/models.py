"""The parameters of LLaMAs, without a forward pass and without transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradpress.train.sizes import SIZES


class _Attention(nn.Module):
    def __init__(self, hidden: int, kind: dict[str, Any]) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=False, **kind))


class _Swiglu(nn.Module):
    def __init__(self, hidden: int, intermediate: int, kind: dict[str, Any]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, **kind)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, **kind)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, **kind)


class _Block(nn.Module):
    def __init__(self, hidden: int, intermediate: int, kind: dict[str, Any]) -> None:
        super().__init__()
        self.self_attn = _Attention(hidden, kind)
        self.mlp = _Swiglu(hidden, intermediate, kind)
        self.input_layernorm = nn.RMSNorm(hidden, **kind)
        self.post_attention_layernorm = nn.RMSNorm(hidden, **kind)


class _Body(nn.Module):
    def __init__(self, size: str, layers: int | None, kind: dict[str, Any]) -> None:
        super().__init__()
        shape = SIZES[size]
        hidden, intermediate = shape.hidden_size, shape.intermediate_size
        count = shape.layers if layers is None else layers
        self.embed_tokens = nn.Embedding(shape.vocab_size, hidden, **kind)
        self.layers = nn.ModuleList(_Block(hidden, intermediate, kind) for _ in range(count))
        self.norm = nn.RMSNorm(hidden, **kind)


class Llama(nn.Module):
    """The parameters of a LLaMA, under the names and in the order of transformers.

    Args:
        size: One of the library's sizes.
        device: Where the parameters are made, with random values.
        dtype: Of the parameters.
        layers: Blocks; those of the size when left out.
    """

    def __init__(
        self,
        size: str,
        device: torch.device | str,
        dtype: torch.dtype,
        layers: int | None = None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.model = _Body(size, layers, kind)
        hidden, vocabulary = SIZES[size].hidden_size, SIZES[size].vocab_size
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False, **kind)


def parameter_shapes(size: str) -> list[tuple[int, ...]]:
    """The shapes of a LLaMA's parameters."""
    return [tuple(p.shape) for p in Llama(size, "meta", torch.float32).parameters()]
