"""What the benchmarks work on: models, gradients, and counting what an optimizer holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gradpress.train.sizes import SIZES

#: Standard deviation of the noise in a gradient, whose low-rank part has about 0.2.
NOISE = 0.1


def llama(size: str) -> torch.nn.Module:
    """A LLaMA of one of the library's sizes, with random float32 weights."""
    import transformers

    shape = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_hidden_layers=shape.layers,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def parameter_shapes(size: str) -> list[tuple[int, ...]]:
    """The shapes of that model's parameters, without making it."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in llama(size).parameters()]


def spectrum_matrix(
    rows: int, columns: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random matrix with the singular values ``i ** -0.7``, and these (on the CPU)."""
    short = min(rows, columns)
    values = torch.arange(1, short + 1, dtype=torch.float64) ** -0.7
    left, right = (
        torch.linalg.qr(torch.randn(n, short, device=device))[0] for n in (rows, columns)
    )
    return (left * values.float().to(device)) @ right.T, values


class Gradients:
    """Gradients of a model: matrices of low rank plus noise that is new in every step.

    The low-rank part stays, so that a warm-started subspace meets what it meets in training: the
    next gradient is similar, not equal.

    Attributes:
        values: One tensor for each shape, overwritten by :meth:`fill`.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        rank: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        kind: Any = {"device": device, "dtype": dtype}
        self.values = [torch.empty(tuple(shape), **kind) for shape in shapes]
        self._factors = []
        for shape in shapes:
            ranks = min(rank, *shape)
            decay = (torch.arange(1, ranks + 1) ** -0.7 / ranks**0.5).to(**kind)
            factors = [torch.randn(n, ranks, **kind) for n in shape] if len(shape) == 2 else None
            self._factors.append((factors[0] * decay, factors[1].T) if factors else None)

    def fill(self) -> None:
        """Draws the next step's gradients."""
        for value, factors in zip(self.values, self._factors, strict=True):
            value.normal_(std=NOISE)
            if factors is not None:
                value.addmm_(*factors)


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The plain tensors inside a state: in containers, in projector objects, in wrappers."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            yield from (inner for name in names for inner in tensors_in(getattr(value, name)))
        else:
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


def nbytes(values: object) -> int:
    """Bytes of all tensors inside, shared memory counted once."""
    unique = {t.data_ptr(): t.nbytes for t in tensors_in(values) if t.nbytes}
    return sum(unique.values())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's states, of projectors that are no tensors, too."""
    return nbytes(list(optimizer.state.values()))
