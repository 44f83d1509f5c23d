"""The chunked loss on a CUDA device: numbers, memory, and nobody waiting."""

import pytest
import torch
import torch.nn.functional as F

from gradpress.nn import QuantizedWeight, chunked_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def inputs(dtype, tokens=700, words=5000, width=256):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g).to("cuda", dtype).requires_grad_()
    weight = (torch.randn(words, width, generator=g) / 16).to("cuda", dtype).requires_grad_()
    labels = torch.randint(words, (tokens,), generator=g).cuda()
    labels[::5] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("quantized", [False, True])
def test_is_the_loss_of_whole_logits(dtype, reduction, quantized):
    hidden, weight, labels = inputs(dtype)
    if quantized:
        weight = torch.nn.Parameter(QuantizedWeight.from_float(weight, bits=8, group_size=64))
    options = {"reduction": reduction, "label_smoothing": 0.1}
    loss = chunked_cross_entropy(hidden, weight, labels, softcap=20.0, chunk_tokens=96, **options)
    dense = weight.dequantize() if quantized else weight
    exact = [t.detach().double().requires_grad_() for t in (hidden, dense)]
    logits = 20 * torch.tanh(exact[0] @ exact[1].T / 20)
    want = F.cross_entropy(logits, labels, **options)
    # Rounding of products to the dtype; TF32 is off by default.
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=tolerance)
    loss.sum().backward()
    want.sum().backward()
    for leaf, other in zip((hidden, weight), exact, strict=True):
        assert (leaf.grad.double() - other.grad).norm() <= tolerance * other.grad.norm()


def test_nobody_waits_and_logits_do_not_decide_the_peak():
    hidden, weight, labels = inputs(torch.bfloat16, tokens=4096, words=32000)
    chunked_cross_entropy(hidden, weight, labels, chunk_tokens=256).backward()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunked_cross_entropy(hidden, weight, labels, chunk_tokens=256).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    used = torch.cuda.max_memory_allocated() - before
    gradients = hidden.nbytes + weight.nbytes
    assert used <= gradients + 3 * 256 * 32000 * 4 + (16 << 20)
    assert used < 4096 * 32000 * 2
