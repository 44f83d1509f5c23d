"""Cross-entropy of a large vocabulary whose logits never exist all at once."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch

from gradpress.nn._chunked_head import (
    ROW_BYTES,
    Gradients,
    Head,
    LossOptions,
    arithmetic_dtype,
    evaluate,
)
from gradpress.nn._weight import QuantizedWeight

REDUCTIONS = ("mean", "sum", "none")
#: Bytes of float32 logits at a time, and the least tokens that keep products efficient.
AUTO_BYTES, AUTO_TOKENS = 64 << 20, 128


class _Plan(NamedTuple):
    options: LossOptions
    reduction: str
    dtype: torch.dtype
    early: bool


class _Result(NamedTuple):
    losses: torch.Tensor
    gradients: Gradients | None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are ready when the loss is, but for those that depend on what comes back."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        plan: _Plan,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.plan, ctx.bias_dtype = plan, None if bias is None else bias.dtype
        needed = ctx.needs_input_grad[:3] if plan.early else (False, False, False)
        counted = labels != plan.options.ignore_index
        dtype = arithmetic_dtype(plan.dtype)
        if plan.reduction == "mean":
            count = counted.sum()
            shares = torch.where(counted, 1 / count.to(dtype), 0)
        else:
            shares = counted.to(dtype)
        result = _run(hidden, weight, bias, labels, plan, shares, needed)
        ctx.shares, ctx.gradients = shares, result.gradients
        if plan.reduction == "none":
            return result.losses
        total = result.losses.sum()
        return total / count if plan.reduction == "mean" else total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (upstream,) = grads
        if torch.is_grad_enabled():
            raise RuntimeError(
                "chunked_cross_entropy: the loss can be differentiated once, got create_graph=True"
            )
        # Handed over once: what is kept besides would be copied. A second pass computes them anew.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            shares = ctx.shares * upstream
            needed = ctx.needs_input_grad[:3]
            hidden, weight, bias, labels = ctx.saved_tensors
            gradients = _run(hidden, weight, bias, labels, ctx.plan, shares, needed).gradients
            assert gradients is not None
        else:
            for gradient in gradients:
                if gradient is not None:
                    _multiply(gradient, upstream)
        of_hidden, of_weight, of_bias = gradients
        if of_bias is not None:
            of_bias = of_bias.to(ctx.bias_dtype)
        return of_hidden, of_weight, of_bias, None, None


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    plan: _Plan,
    shares: torch.Tensor,
    needed: tuple[bool, ...],
) -> _Result:
    gradients: Gradients | None = None
    if any(needed):
        words, device = weight.shape[0], hidden.device
        gradients = Gradients(
            torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed[0] else None,
            torch.empty(weight.shape, dtype=weight.dtype, device=device) if needed[1] else None,
            torch.empty(words, dtype=shares.dtype, device=device) if needed[2] else None,
        )
    with torch.autocast(hidden.device.type, enabled=False):
        losses = evaluate(
            hidden.to(plan.dtype),
            Head(weight, bias, plan.dtype),
            labels,
            plan.options,
            shares,
            gradients,
        )
    return _Result(losses, gradients)


def _multiply(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """In place, with the factor's own precision."""
    if gradient.dtype == factor.dtype:
        gradient.mul_(factor)
        return
    width = max(1, gradient.numel() // max(1, gradient.shape[0]))
    for part in torch.split(gradient, max(1, ROW_BYTES // (4 * width))):
        part.copy_(part.to(factor.dtype).mul_(factor))


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    r"""PyTorch's `cross_entropy` of ``hidden @ weight.T``, without all the logits at once.

    Logits, losses and gradients are computed for `chunk_tokens` tokens after another, the gradients
    already with the loss, so that at no time more than ``chunk_tokens * vocabulary`` logits exist:
    in spirit that of Wijmans, Huval, Hertzberg, Koltun and Krähenbühl: "Cut Your Losses in
    Large-Vocabulary Language Models" (2024, arXiv 2411.09009) and of Liger Kernel (Hsu et al. 2024,
    arXiv 2410.10989). Softmax and loss are in float32 (float64 inputs: float64) whatever the
    inputs' dtype; under autocast the products are in its dtype.

    A weight that is trained needs one gradient of its own size, in its own dtype, also where an
    optimizer has others never formed; there is no second one. Where that dtype is narrower than
    float32 and the tokens need several chunks, the gradient is computed from logits of some words
    at a time, which takes the logits a second time and rounds every entry once. With products in
    float16, and with ``reduction="none"``, gradients are computed in the backward pass, from logits
    that are computed again: they have to be scaled before they are rounded, or summed up.

    Args:
        hidden: Floating-point, ``[..., width]``: the last hidden states.
        weight: ``[vocabulary, width]``: the output layer's weight, in the dtype of `hidden`
            (any dtype under autocast), or a :class:`gradpress.nn.QuantizedWeight`, of which a few
            rows at a time are dequantized.
        labels: Integers ``[...]``, one for each hidden state, at least 0 and below the vocabulary's
            size, or `ignore_index`.
        bias: ``[vocabulary]``, or None.
        ignore_index: Tokens of this label do not count.
        reduction: ``"mean"`` over the tokens that count (NaN where there are none), ``"sum"``, or
            ``"none"`` for a loss of each token.
        label_smoothing: Share of the target that is spread evenly over the vocabulary, in [0, 1].
        softcap: Logits become ``softcap * tanh(logits / softcap)``; None leaves them.
        logit_scale: Factor on the logits, before the cap.
        chunk_tokens: Tokens at a time; None for as many as have 64 MiB of float32 logits, and at
            least 128.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or of the shape of `labels`. It can be
        differentiated once.

    Raises:
        TypeError: an argument's dtype is none that it takes.
        ValueError: a shape or an option is out of its range.
        IndexError: a label is (checked on the CPU; a device asserts).

    Example:
        >>> import torch, gradpress
        >>> hidden = torch.randn(2, 5, 16, requires_grad=True)
        >>> weight = torch.randn(1000, 16, requires_grad=True)
        >>> labels = torch.randint(1000, (2, 5))
        >>> loss = gradpress.nn.chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4)
        >>> loss.backward()
        >>> hidden.grad.shape
        torch.Size([2, 5, 16])
    """
    _check_tensors(hidden, weight, labels, bias)
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif weight.dtype != dtype and not isinstance(weight, QuantizedWeight):
        raise TypeError(
            f"chunked_cross_entropy: weight must have the dtype of hidden, {dtype}, got"
            f" {weight.dtype}"
        )
    words, tokens = weight.shape[0], labels.numel()
    if chunk_tokens is None:
        chunk_tokens = max(AUTO_TOKENS, AUTO_BYTES // (4 * words))
    options = LossOptions(
        int(ignore_index), float(label_smoothing), softcap, float(logit_scale), chunk_tokens
    )
    _check_options(options, reduction)
    flat = labels.reshape(tokens).long()
    _check_labels(flat, ignore_index, words)
    early = torch.is_grad_enabled() and reduction != "none" and dtype != torch.float16
    plan = _Plan(options, reduction, dtype, early)
    rows = hidden.reshape(tokens, hidden.shape[-1])
    loss = cast(torch.Tensor, _ChunkedCrossEntropy.apply(rows, weight, bias, flat, plan))
    return loss.view(labels.shape) if reduction == "none" else loss


def _check_tensors(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    name = "chunked_cross_entropy"
    for argument, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: {argument} must be floating-point, got {tensor.dtype}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name}: labels must be integers, got {labels.dtype}")
    if hidden.dim() < 1 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name}: labels must have the shape of hidden without its last dimension,"
            f" {list(hidden.shape[:-1])}, got {list(labels.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not weight.shape[0]:
        raise ValueError(
            f"{name}: weight must be of shape [vocabulary, {hidden.shape[-1]}], got"
            f" {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: bias must be of shape {list(weight.shape[:1])}, got {list(bias.shape)}"
        )


def _check_options(options: LossOptions, reduction: str) -> None:
    name = "chunked_cross_entropy"
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(
            f"{name}: label_smoothing must be in [0, 1], got {options.label_smoothing}"
        )
    if options.softcap is not None and not options.softcap > 0:
        raise ValueError(f"{name}: softcap must be positive, got {options.softcap}")
    if options.chunk_tokens < 1:
        raise ValueError(f"{name}: chunk_tokens must be at least 1, got {options.chunk_tokens}")


def _check_labels(labels: torch.Tensor, ignore_index: int, words: int) -> None:
    if labels.device.type != "cpu" or not labels.numel():
        return
    wrong = ((labels < 0) | (labels >= words)) & (labels != ignore_index)
    if bool(wrong.any()):
        raise IndexError(
            f"chunked_cross_entropy: labels must be at least 0 and below {words}, or"
            f" {ignore_index}, got {int(labels[wrong][0])}"
        )
