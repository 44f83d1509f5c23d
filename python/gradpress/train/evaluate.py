"""Validation loss, counted honestly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gradpress.train.device import to_device
from gradpress.train.tokens import TokenArray, read_windows, validation_windows


@dataclass(frozen=True)
class Evaluation:
    """Loss over part of the validation text.

    Attributes:
        loss: Mean negative log-likelihood per predicted token, in nats.
        tokens: Tokens that were predicted.
        windows: Windows they stood in.
    """

    loss: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def token_losses(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every predicted token.

    Args:
        model: A causal language model of transformers.
        windows: int64 `[batch, length + 1]`.

    Returns:
        float32 `[batch · length]`, in nats.
    """
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    )


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    tokens: TokenArray,
    *,
    sequence_length: int,
    batch_size: int,
    batches: int,
    losses_of: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] = token_losses,
) -> Evaluation:
    """Mean loss per token over a fixed set of validation windows.

    The windows are spread evenly over the validation text and the same at every call. The sum
    over all tokens is divided by their number, so a last short batch weighs what it holds.

    Args:
        model: A causal language model on any device; its training mode is restored afterwards.
        tokens: Validation tokens.
        sequence_length: Tokens that a window predicts.
        batch_size: Windows per forward pass.
        batches: Forward passes at most; a short text has fewer windows.
        losses_of: From the model and windows to the losses of their tokens.

    Returns:
        The loss and what it was measured on.
    """
    starts = validation_windows(tokens, batches * batch_size, sequence_length)
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for first in range(0, len(starts), batch_size):
        windows = read_windows(tokens, starts[first : first + batch_size], sequence_length)
        losses = losses_of(model, to_device(windows, device))
        total += losses.double().sum()
        count += losses.numel()
    model.train(training)
    return Evaluation(float(total) / count, count, len(starts))
