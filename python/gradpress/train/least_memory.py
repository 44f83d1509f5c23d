"""Training with no gradient of a weight's size, no logits of a batch, and few activations."""

from __future__ import annotations

import math

import torch

from gradpress import nn, optim
from gradpress.train.config import TrainConfig


class LeastMemory:
    """A model that steps in its backward pass, set up in place.

    Projected gradients are computed from activations and used at once, activations of a block are
    computed again, and logits exist for some tokens at a time.

    Args:
        model: A causal language model of transformers with quantized weights.
        optimizer: Made with ``materialize_gradients=False``.
        config: The run.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
    ) -> None:
        nn.checkpoint_blocks_(model)
        self._fused = optim.fused_backward(
            model,
            optimizer,
            accumulation_steps=config.accumulate,
            # No limit: the norm is measured then too.
            max_grad_norm=config.clip if config.clip > 0 else math.inf,
        )

    @property
    def grad_norm(self) -> torch.Tensor:
        """The norm of the last step's gradients, of projected ones that of the projection."""
        norm = self._fused.grad_norm
        return torch.zeros(()) if norm is None else norm

    @grad_norm.setter
    def grad_norm(self, norm: float) -> None:
        """What the next step is clipped by, in a run that is taken up again."""
        self._fused.grad_norm = torch.tensor(norm)


def chunked_token_losses(
    model: torch.nn.Module, windows: torch.Tensor, reduction: str = "none"
) -> torch.Tensor:
    """:func:`gradpress.train.evaluate.token_losses`, with the logits of some tokens at a time.

    Args:
        model: A causal language model of transformers.
        windows: int64 `[batch, length + 1]`.
        reduction: ``"none"`` or ``"mean"``.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    hidden = model.base_model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state  # type: ignore[operator]
    return nn.chunked_cross_entropy(
        hidden.flatten(0, 1), head.weight, windows[:, 1:].flatten(), reduction=reduction
    )
