"""The logits of a few tokens or of a few words at a time, and the gradients through them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gradpress.nn._weight import QuantizedWeight

#: Bytes of rows of a weight that are converted or dequantized at a time.
ROW_BYTES = 32 << 20


class LossOptions(NamedTuple):
    """What a loss is made of; see :func:`gradpress.nn.chunked_cross_entropy`."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    logit_scale: float
    chunk_tokens: int


class Gradients(NamedTuple):
    """Where gradients go; None for those that nobody needs.

    Attributes:
        hidden: ``[tokens, width]``, in the dtype of the hidden states.
        weight: ``[words, width]``, in the weight's dtype.
        bias: ``[words]``, in the dtype of the arithmetic.
    """

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


class Head(NamedTuple):
    """An output layer whose products are in `dtype`, whatever the weight is stored in."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype

    @property
    def words(self) -> int:
        """The size of the vocabulary."""
        return self.weight.shape[0]

    def blocks(self, most: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """The weight as blocks of rows in `dtype`; one, where it is stored in that.

        Args:
            most: Rows of a block, as far as groups of a quantized weight do not cross its borders.
        """
        if most is None and self.weight.dtype == self.dtype and not self._is_quantized:
            most = self.words
        elif most is None:
            most = ROW_BYTES // max(1, self.weight.shape[1] * self.dtype.itemsize)
        step = self._unit * max(1, most // self._unit)
        for first in range(0, self.words, step):
            rows = slice(first, min(first + step, self.words))
            yield rows, self._rows(rows)

    def product(self, hidden: torch.Tensor, rows: slice, weight: torch.Tensor) -> torch.Tensor:
        """The logits of a block's words: ``[tokens, rows]`` in `dtype`."""
        bias = None if self.bias is None else self.bias[rows].to(self.dtype)
        return F.linear(hidden, weight, bias)

    def logits(self, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The logits of all words: ``[tokens, words]`` in memory of their own."""
        logits: torch.Tensor | None = None
        for rows, weight in self.blocks():
            product = self.product(hidden, rows, weight)
            if product.shape[1] == self.words:
                return product.to(dtype)
            if logits is None:
                logits = hidden.new_empty(hidden.shape[0], self.words, dtype=dtype)
            logits[:, rows] = product
        assert logits is not None
        return logits

    @property
    def _is_quantized(self) -> bool:
        return isinstance(self.weight, QuantizedWeight)

    @property
    def _unit(self) -> int:
        """Rows that end where a group and a byte end."""
        if not isinstance(self.weight, QuantizedWeight):
            return 1
        group = self.weight.group_size
        group = math.lcm(group, 2) if self.weight.bits == 4 else group
        return group // math.gcd(group, self.weight.shape[1])

    def _rows(self, rows: slice) -> torch.Tensor:
        weight = self.weight
        if not isinstance(weight, QuantizedWeight):
            return weight[rows].to(self.dtype)
        width, group = weight.shape[1], weight.group_size
        first, last = rows.start * width, rows.stop * width
        codes = weight.codes[rows] if weight.bits == 8 else weight.codes[first // 2 : -(-last // 2)]
        groups = slice(first // group, -(-last // group))
        part = QuantizedWeight(
            codes,
            weight.scale[groups],
            weight.zero_point[groups],
            shape=(rows.stop - rows.start, width),
            dtype=weight.dtype,
            bits=weight.bits,
            group_size=group,
        )
        return part.dequantize(self.dtype)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what losses of logits of a dtype are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def evaluate(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    options: LossOptions,
    coefficients: torch.Tensor | None = None,
    gradients: Gradients | None = None,
) -> torch.Tensor:
    """The loss of every token, and gradients of their weighted sum.

    Args:
        hidden: ``[tokens, width]`` in the dtype of the head's products.
        head: The output layer.
        labels: int64 ``[tokens]``.
        options: The kind of loss.
        coefficients: ``[tokens]``: what the losses are weighted with in the sum; zero where the
            label is ignored.
        gradients: Are written.

    Returns:
        ``[tokens]``, zero where the label is ignored.
    """
    tokens, dtype = hidden.shape[0], arithmetic_dtype(hidden.dtype)
    losses = torch.zeros(tokens, dtype=dtype, device=hidden.device)
    normalizers = torch.zeros_like(losses)
    for wanted in gradients or ():
        if wanted is not None:
            wanted.zero_()
    by_rows = gradients is not None and _needs_second_pass(gradients, hidden, options)
    for first in range(0, tokens, options.chunk_tokens):
        chunk = slice(first, first + options.chunk_tokens)
        ignored = labels[chunk] == options.ignore_index
        index = labels[chunk].masked_fill(ignored, 0).unsqueeze(1)
        logits = head.logits(hidden[chunk], dtype)
        slope = _cap(logits, options, gradients is not None)
        rows = _losses(logits, index, options)
        losses[chunk] = rows.losses.masked_fill(ignored, 0)
        normalizers[chunk] = rows.normalizers
        if gradients is not None and coefficients is not None:
            weights = coefficients[chunk].unsqueeze(1)
            logits.mul_(weights / rows.totals)
            _finish(logits, weights, index, weights, slope, options, head.words)
            _add_chunk(logits, hidden, chunk, head, gradients, by_rows)
        del logits, slope
    if by_rows and gradients is not None and gradients.weight is not None:
        assert coefficients is not None
        _weight_gradient(hidden, head, labels, options, coefficients, normalizers, gradients.weight)
    return losses


class _Rows(NamedTuple):
    losses: torch.Tensor
    normalizers: torch.Tensor
    totals: torch.Tensor


def _losses(logits: torch.Tensor, index: torch.Tensor, options: LossOptions) -> _Rows:
    """Losses and log-sum-exp of the tokens; the logits become exponentials, in place."""
    smoothing = options.label_smoothing
    aim = logits.gather(1, index).squeeze(1)
    if smoothing:
        aim = (1 - smoothing) * aim + smoothing * logits.mean(1)
    largest = logits.amax(1, keepdim=True)
    totals = logits.sub_(largest).exp_().sum(1, keepdim=True)
    normalizers = (totals.log() + largest).squeeze(1)
    return _Rows(normalizers - aim, normalizers, totals)


def _cap(logits: torch.Tensor, options: LossOptions, with_slope: bool) -> torch.Tensor | None:
    """Scales and caps logits in place; the cap's derivative, where it is asked for."""
    if options.logit_scale != 1.0:
        logits.mul_(options.logit_scale)
    if options.softcap is None:
        return None
    logits.div_(options.softcap).tanh_()
    slope = 1 - logits.square() if with_slope else None
    logits.mul_(options.softcap)
    return slope


def _finish(
    weighted: torch.Tensor,
    weights: torch.Tensor,
    index: torch.Tensor,
    of_labels: torch.Tensor,
    slope: torch.Tensor | None,
    options: LossOptions,
    words: int,
) -> None:
    """Turns weighted probabilities into the gradient of what the head computes, in place."""
    smoothing = options.label_smoothing
    weighted.scatter_add_(1, index, (smoothing - 1) * of_labels)
    if smoothing:
        weighted.sub_(weights * (smoothing / words))
    if slope is not None:
        weighted.mul_(slope)
    if options.logit_scale != 1.0:
        weighted.mul_(options.logit_scale)


def _needs_second_pass(gradients: Gradients, hidden: torch.Tensor, options: LossOptions) -> bool:
    """Whether a sum over chunks would round the weight's gradient more than once."""
    if gradients.weight is None or hidden.shape[0] <= options.chunk_tokens:
        return False
    exact = hidden.dtype in (torch.float32, torch.float64)
    return not (exact and gradients.weight.dtype == hidden.dtype)


def _add_chunk(
    of_logits: torch.Tensor,
    hidden: torch.Tensor,
    chunk: slice,
    head: Head,
    gradients: Gradients,
    by_rows: bool,
) -> None:
    """Adds what a chunk's tokens contribute."""
    if gradients.bias is not None:
        gradients.bias.add_(of_logits.sum(0))
    of_products = of_logits.to(head.dtype)
    if gradients.weight is not None and not by_rows:
        _add_product(gradients.weight, of_products, hidden[chunk])
    if gradients.hidden is None:
        return
    of_hidden: torch.Tensor | None = None
    for rows, weight in head.blocks():
        product = of_products[:, rows] @ weight
        # In the arithmetic's dtype, so that more than one block is rounded once.
        if of_hidden is None:
            of_hidden = product if rows.stop == head.words else product.to(of_logits.dtype)
        else:
            of_hidden += product
    if of_hidden is not None:
        gradients.hidden[chunk] = of_hidden


def _add_product(target: torch.Tensor, of_products: torch.Tensor, hidden: torch.Tensor) -> None:
    """``target += of_products.T @ hidden``, without a second tensor of its size."""
    if target.dtype == hidden.dtype:
        target.addmm_(of_products.T, hidden)
        return
    step = max(1, ROW_BYTES // max(1, hidden.shape[1] * hidden.dtype.itemsize))
    for first in range(0, target.shape[0], step):
        target[first : first + step] += of_products[:, first : first + step].T @ hidden


def _weight_gradient(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    options: LossOptions,
    coefficients: torch.Tensor,
    normalizers: torch.Tensor,
    target: torch.Tensor,
) -> None:
    """The weight's gradient, some words at a time with all tokens: each is rounded once."""
    ignored = labels == options.ignore_index
    index, weights = labels.masked_fill(ignored, 0), coefficients.unsqueeze(1)
    most = max(1, options.chunk_tokens * head.words // hidden.shape[0])
    for rows, weight in head.blocks(most):
        logits = head.product(hidden, rows, weight).to(normalizers.dtype)
        slope = _cap(logits, options, True)
        logits.sub_(normalizers.unsqueeze(1)).exp_().mul_(weights)
        inside = (index >= rows.start) & (index < rows.stop)
        local = (index - rows.start).masked_fill(~inside, 0).unsqueeze(1)
        of_labels = weights.masked_fill(~inside.unsqueeze(1), 0)
        _finish(logits, weights, local, of_labels, slope, options, head.words)
        target[rows] = logits.to(head.dtype).T @ hidden
