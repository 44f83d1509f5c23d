"""The chunked loss is PyTorch's cross-entropy of whole logits, gradients included."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.nn.live import LiveBytes

from gradpress.nn import QuantizedWeight, chunked_cross_entropy

#: Rounding of a few hundred additions in the narrower of dtype and arithmetic.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 4e-2, "atol": 4e-3},
    torch.float16: {"rtol": 5e-3, "atol": 5e-4},
}


def inputs(tokens, words, width, *, dtype=torch.float64, with_bias=False, seed=0, ignored=0.3):
    g = torch.Generator().manual_seed(seed)
    shape = tokens if isinstance(tokens, tuple) else (tokens,)
    hidden = torch.randn(*shape, width, generator=g, dtype=torch.float64)
    weight = torch.randn(words, width, generator=g, dtype=torch.float64)
    bias = torch.randn(words, generator=g, dtype=torch.float64) if with_bias else None
    labels = torch.randint(words, shape, generator=g)
    labels[torch.rand(shape, generator=g) < ignored] = -100
    tensors = [t if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    return (*tensors, labels)


def reference(hidden, weight, labels, *, bias=None, softcap=None, logit_scale=1.0, **options):
    logits = logit_scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    options["reduction"] = options.get("reduction", "mean")
    loss = F.cross_entropy(logits.reshape(-1, weight.shape[0]), labels.reshape(-1), **options)
    return loss.view(labels.shape) if options["reduction"] == "none" else loss


def both(hidden, weight, bias, labels, *, chunk_tokens, seed=0, **options):
    """Losses and gradients: ours, and those of float64 in one piece."""
    results = []
    for function, dtype in ((chunked_cross_entropy, None), (reference, torch.float64)):
        leaves = [
            None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
            for t in (hidden, weight, bias)
        ]
        own = {"chunk_tokens": chunk_tokens} if dtype is None else {}
        loss = function(leaves[0], leaves[1], labels, bias=leaves[2], **own, **options)
        g = torch.Generator().manual_seed(seed)
        upstream = torch.randn(loss.shape, generator=g, dtype=torch.float64)
        loss.backward(upstream.to(loss.dtype))
        results.append([loss, *(t.grad for t in leaves if t is not None)])
    return results


def assert_close(results, dtype):
    for got, want in zip(*results, strict=True):
        scale = want.abs().nan_to_num().max().clamp(min=1.0) if want.numel() else 1.0
        torch.testing.assert_close(
            got.double() / scale, want / scale, equal_nan=True, **TOLERANCE[dtype]
        )


@given(
    tokens=st.sampled_from([1, 2, 7, (2, 5), (3, 1, 4)]),
    words=st.sampled_from([1, 2, 33, 100]),
    width=st.integers(1, 9),
    chunk_tokens=st.sampled_from([1, 3, 5, 64]),
    with_bias=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    softcap=st.sampled_from([None, 3.0]),
    logit_scale=st.sampled_from([1.0, 0.25]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_is_the_loss_of_whole_logits(
    tokens, words, width, chunk_tokens, with_bias, dtype, seed, **options
):
    given_tensors = inputs(tokens, words, width, dtype=dtype, with_bias=with_bias, seed=seed)
    results = both(*given_tensors, chunk_tokens=chunk_tokens, seed=seed, **options)
    assert results[0][0].dtype == dtype
    assert_close(results, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_tokens", [7, 40])
def test_narrow_dtypes(dtype, reduction, chunk_tokens):
    tensors = inputs(40, 50, 24, dtype=dtype, with_bias=True, ignored=0.1)
    options = {"reduction": reduction, "label_smoothing": 0.1, "softcap": 10.0}
    results = both(*tensors, chunk_tokens=chunk_tokens, **options)
    assert results[0][0].dtype == torch.float32
    assert [t.dtype for t in results[0][1:]] == [dtype] * 3
    assert_close(results, dtype)


def test_a_narrow_weights_gradient_is_rounded_once():
    """Sums that are rounded after each of many chunks would drift apart."""
    hidden, weight, _, labels = inputs(512, 16, 8, dtype=torch.bfloat16, ignored=0.0)
    hidden = hidden.detach().abs().requires_grad_()
    errors = []
    for chunk_tokens in (1, 512):
        loss = chunked_cross_entropy(
            hidden, weight, labels, reduction="sum", chunk_tokens=chunk_tokens
        )
        (got,) = torch.autograd.grad(loss, weight)
        exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        (want,) = torch.autograd.grad(reference(*exact, labels, reduction="sum"), exact[1])
        errors.append(float((got.double() - want).norm() / want.norm()))
    assert errors[0] == pytest.approx(errors[1], rel=0.5)


def test_small_gradients_of_float16_survive_a_scaler():
    """They are below the smallest float16 until they are multiplied with the scaler's factor."""
    hidden, weight, _, labels = inputs(256, 1000, 8, dtype=torch.float16, ignored=0.0)
    hidden = (hidden.detach() * 3e-4).requires_grad_()
    scale = 2.0**15
    results = []
    for dtype in (torch.float16, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
        function = chunked_cross_entropy if dtype == torch.float16 else reference
        (function(*leaves, labels) * scale).backward()
        results.append([leaf.grad.double() for leaf in leaves])
    assert float(results[1][1].abs().median() / scale) < 2.0**-24
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 2e-3 * want.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["ignored", "empty"])
def test_nothing_to_learn_from(reduction, kind):
    tensors = inputs(6 if kind == "ignored" else 0, 11, 4, with_bias=True, ignored=1.0)
    results = both(*tensors, chunk_tokens=2, reduction=reduction)
    assert_close(results, torch.float64)
    assert all(not t.any() for t in results[0][1:])


def test_ignores_another_label_and_takes_narrow_and_strided_ones():
    hidden, weight, _, _ = inputs((4, 6), 9, 5)
    labels = torch.arange(48).remainder(9).view(4, 12)[:, ::2].int()
    strided = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1)
    loss = chunked_cross_entropy(strided, weight.detach(), labels, ignore_index=4, chunk_tokens=5)
    want = reference(hidden, weight, labels.long(), ignore_index=4)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=0)
    loss = chunked_cross_entropy(hidden, weight.detach().t().contiguous().t(), labels)
    torch.testing.assert_close(loss, reference(hidden, weight, labels.long()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_computes_what_is_needed(needed, reduction):
    tensors = inputs(10, 12, 4, with_bias=True)
    leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors[:3], needed, strict=True)]
    hidden, weight, bias, labels = *leaves, tensors[3]
    loss = chunked_cross_entropy(
        hidden, weight, labels, bias=bias, reduction=reduction, chunk_tokens=4
    )
    want = reference(*tensors[:2], labels, bias=tensors[2], reduction=reduction).sum()
    torch.testing.assert_close(loss.sum().detach(), want.detach())
    assert loss.requires_grad == any(needed)
    if any(needed):
        loss.sum().backward()
        want.backward()
    for leaf, other, n in zip(leaves, tensors[:3], needed, strict=True):
        if n:
            torch.testing.assert_close(leaf.grad, other.grad)
        else:
            assert leaf.grad is None


def test_the_same_graph_twice_and_two_losses_of_one_weight():
    hidden, weight, _, labels = inputs(9, 12, 4)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (hidden, weight))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(3 * one, other, rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weight)
    total = sum(chunked_cross_entropy(h, weight, labels, chunk_tokens=2) for h in (hidden, -hidden))
    want = sum(reference(h, weight, labels) for h in (hidden, -hidden))
    got = torch.autograd.grad(total, (hidden, weight))
    for one, other in zip(got, torch.autograd.grad(want, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    loss = chunked_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_without_gradients_none_are_computed():
    hidden, weight, _, labels = inputs(8, 12, 4)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(hidden, weight, labels).detach())


@pytest.mark.parametrize("chunk_tokens", [5, 64])
def test_autocast_has_products_in_its_dtype(chunk_tokens):
    hidden, weight, bias, labels = inputs(20, 40, 16, dtype=torch.float32, with_bias=True)
    results = []
    for function in (chunked_cross_entropy, reference):
        leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
        own = {"chunk_tokens": chunk_tokens} if function is chunked_cross_entropy else {}
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(leaves[0], leaves[1], labels, bias=leaves[2], **own)
        (1024 * loss).backward()
        assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
        results.append([loss.double(), *(leaf.grad.double() for leaf in leaves)])
    assert_close(results, torch.bfloat16)
    plain = reference(hidden, weight, labels, bias=bias).detach()
    assert float((plain - results[0][0].detach()).abs()) > 1e-6


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("words", "width", "group_size"), [(37, 24, 16), (33, 9, 6), (40, 16, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_weights(bits, words, width, group_size, dtype, monkeypatch):
    """As the dense weight they stand for, some rows at a time, where groups cross rows too."""
    monkeypatch.setattr("gradpress.nn._chunked_head.ROW_BYTES", 7 * width * dtype.itemsize)
    hidden, weight, bias, labels = inputs(12, words, width, dtype=dtype, with_bias=True)
    quantized = QuantizedWeight.from_float(weight, bits=bits, group_size=group_size)
    largest = []
    dequantize = QuantizedWeight.dequantize

    def watched(self, to=None):
        largest.append(self.shape[0])
        return dequantize(self, to)

    stored = torch.nn.Parameter(quantized)
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedWeight, "dequantize", watched)
        loss = chunked_cross_entropy(hidden, stored, labels, bias=bias, chunk_tokens=5)
        loss.backward()
    assert largest
    assert max(largest) < words or (words, width, group_size) == (40, 16, 256)
    got = [loss, hidden.grad, stored.grad, bias.grad]
    assert type(stored.grad) is torch.Tensor
    leaves = [t.detach().double().requires_grad_() for t in (hidden, quantized.dequantize(), bias)]
    want = reference(leaves[0], leaves[1], labels, bias=leaves[2])
    want.backward()
    assert_close([got, [want, *(leaf.grad for leaf in leaves)]], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_never_exist_all_at_once(dtype):
    tokens, words, width, chunk = 768, 1000, 16, 16
    hidden, weight, _, labels = inputs(tokens, words, width, dtype=dtype)
    with LiveBytes() as live:
        chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk).backward()
    gradients = (tokens + words) * width * dtype.itemsize
    # Three times the logits of a chunk (products, float32, and back), and vectors of the tokens.
    most = gradients + 3 * chunk * words * 4 + 16 * tokens * 8
    assert gradients < live.peak <= most
    assert most < tokens * words * 4 / 6
    with LiveBytes() as live:
        reference(hidden, weight, labels).backward()
    assert live.peak > tokens * words * dtype.itemsize


def test_bad_arguments_are_named():
    hidden, weight, bias, labels = inputs((2, 3), 7, 4, with_bias=True)
    call = chunked_cross_entropy
    with pytest.raises(TypeError, match=r"hidden must be floating-point, got torch\.int64"):
        call(labels, weight, labels)
    with pytest.raises(TypeError, match="labels must be integers"):
        call(hidden, weight, hidden)
    with pytest.raises(TypeError, match=r"weight must have the dtype of hidden, torch\.float64"):
        call(hidden, weight.float(), labels)
    with pytest.raises(ValueError, match=r"labels must have the shape .* \[2, 3\], got \[6\]"):
        call(hidden, weight, labels.view(6))
    with pytest.raises(
        ValueError, match=r"weight must be of shape \[vocabulary, 4\], got \[4, 7\]"
    ):
        call(hidden, weight.t(), labels)
    with pytest.raises(ValueError, match=r"bias must be of shape \[7\], got \[3\]"):
        call(hidden, weight, labels, bias=bias[:3])
    with pytest.raises(ValueError, match=r"reduction must be one of .* got 'max'"):
        call(hidden, weight, labels, reduction="max")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 2"):
        call(hidden, weight, labels, label_smoothing=2)
    with pytest.raises(ValueError, match="softcap must be positive, got 0"):
        call(hidden, weight, labels, softcap=0)
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        call(hidden, weight, labels, chunk_tokens=0)
    for wrong in (7, -1):
        with pytest.raises(
            IndexError, match=f"labels must be at least 0 and below 7.* got {wrong}"
        ):
            call(hidden, weight, labels.clone().fill_(wrong))
