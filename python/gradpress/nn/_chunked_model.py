"""Models of transformers that compute their loss without all the logits at once."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from gradpress._handle import Handle
from gradpress.nn._deferred_logits import DeferredLogits


class ChunkedLoss(Handle):
    """What :func:`chunk_loss_` switched on; `remove` switches it off.

    Also a context manager that does so at its end.
    """

    def __init__(self, model: nn.Module, chunk_tokens: int | None) -> None:
        self._chunk_tokens = chunk_tokens
        self._position = list(inspect.signature(model.forward).parameters).index("labels")
        self._replaced: dict[int, Any] = {}
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """The model computes all logits again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        if labels is None and len(args) > self._position:
            labels = args[self._position]
        if labels is None:
            return
        head = _head_of(model)
        self._replaced[id(model)] = head, head.__dict__.get("forward")

        def deferred(hidden: torch.Tensor) -> DeferredLogits:
            return DeferredLogits(hidden, head, self._chunk_tokens)

        head.forward = deferred  # type: ignore[method-assign, assignment]

    def _end(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        head, forward = self._replaced.pop(id(model), (None, None))
        if head is None:
            return output
        if forward is None:
            del head.forward
        else:
            head.forward = forward
        return _without_logits(output)


def _without_logits(output: Any) -> Any:
    if isinstance(output, dict):
        kept = {k: v for k, v in output.items() if not isinstance(v, DeferredLogits)}
        return type(output)(**kept)
    if isinstance(output, tuple):
        return tuple(v for v in output if not isinstance(v, DeferredLogits))
    return output


def chunk_loss_(model: nn.Module, *, chunk_tokens: int | None = None) -> ChunkedLoss:
    """Makes a causal language model compute its loss without all the logits at once, in place.

    Where the model is called with ``labels``, its own forward runs as ever, shift of labels,
    ``num_items_in_batch``, factors and soft caps on logits, and further losses included; only its
    output layer computes nothing, and `torch.nn.functional.cross_entropy` becomes
    :func:`gradpress.nn.chunked_cross_entropy`. The output then has the loss and ``logits=None``.
    Without labels nothing is changed, so that generation goes on as before.

    Args:
        model: Of transformers, or with `get_output_embeddings()` and `labels` in its forward
            likewise. The output layer must be a plain `torch.nn.Linear`; its weight may be
            quantized, shared with the embedding, or frozen. Under `fully_shard` it must be sharded
            with the model, not by itself.
        chunk_tokens: Tokens at a time; see :func:`gradpress.nn.chunked_cross_entropy`.

    Returns:
        A handle with `remove()`.

    Raises:
        TypeError: `model` is none of these.
        ValueError: `chunk_tokens` is less than 1.

    Example:
        >>> import gradpress
        >>> handle = gradpress.nn.chunk_loss_(model)  # doctest: +SKIP
        >>> model(input_ids=tokens, labels=tokens).loss.backward()  # doctest: +SKIP
    """
    _head_of(model)
    if "labels" not in inspect.signature(model.forward).parameters:
        raise TypeError(
            f"chunk_loss_: model must take labels, {type(model).__name__}.forward does not"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_loss_: chunk_tokens must be at least 1, got {chunk_tokens}")
    return ChunkedLoss(model, chunk_tokens)


def _head_of(model: nn.Module) -> nn.Linear:
    get = getattr(model, "get_output_embeddings", None)
    if get is None:
        raise TypeError(
            "chunk_loss_: model must have get_output_embeddings(), as those of transformers do;"
            f" got {type(model).__name__}"
        )
    head = get()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            "chunk_loss_: the model's output layer must be a torch.nn.Linear, got"
            f" {type(head).__name__}"
        )
    return head
