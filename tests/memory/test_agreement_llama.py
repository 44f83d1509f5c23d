"""What is predicted for LLaMAs on the meta device is what is measured on the CPU."""

import pytest
import torch
from tests.memory.steps import check, measured

import gradpress
from gradpress.memory import plan
from gradpress.memory._losses import own_loss, token_loss
from gradpress.train import TrainConfig
from gradpress.train.model import build_model


def llama(size, dtype="float32"):
    return build_model(TrainConfig.create(size=size, dtype=dtype))


def adamw(model):
    return torch.optim.AdamW(model.parameters())


def adamw8bit(model):
    return gradpress.optim.AdamW8bit(model.named_parameters())


def adamw8bit_int8(model):
    return adamw8bit(gradpress.nn.quantize_(model))


def qgalore(model, bits=8, **options):
    gradpress.nn.quantize_(model, bits=bits)
    groups = gradpress.optim.param_groups(model, rank=16, verbose=False)
    return gradpress.optim.QGaLoreAdamW(groups, **options)


def qgalore_int4(model):
    return qgalore(model, bits=4)


def no_gradients(model, **options):
    return qgalore(model, materialize_gradients=False, **options)


def fused(model):
    optimizer = no_gradients(model)
    gradpress.optim.fused_backward(model, optimizer)
    return optimizer


def offloaded(model):
    optimizer = qgalore(model)
    gradpress.optim.offload_states(optimizer)
    return optimizer


def check_llama(size, make, *, dtype="float32", batch=2, sequence=32):
    model = llama(size, dtype)
    shape = {"batch": batch, "sequence": sequence}
    # By a callable on a model that is not built, before anything exists.
    with torch.device("meta"):
        described = llama(size, dtype)
    planned = plan(described, make, **shape, device="cpu")
    optimizer = make(model)
    # By the optimizer itself.
    assert plan(model, optimizer, **shape).peak_by_category == planned.peak_by_category
    vocabulary = model.config.vocab_size
    watched = measured(model, optimizer, token_loss(torch.float32), **shape, vocabulary=vocabulary)
    check(planned, watched)


@pytest.mark.parametrize(
    ("size", "make"),
    [
        *((size, make) for size in ("tiny", "9M") for make in (adamw, adamw8bit, qgalore)),
        ("35M", qgalore),
    ],
)
def test_llama(size, make):
    check_llama(size, make)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (adamw8bit_int8, "bfloat16"),
        (qgalore_int4, "float32"),
        (no_gradients, "bfloat16"),
        (fused, "float32"),
        (offloaded, "float32"),
    ],
)
def test_llama_in_little_memory(make, dtype):
    check_llama("tiny", make, dtype=dtype, batch=4, sequence=64)


@pytest.mark.parametrize("loss_chunk", [None, 64])
def test_checkpoints_and_chunks_of_the_loss(loss_chunk):
    shape = {"batch": 4, "sequence": 64}
    model = llama("tiny")
    optimizer = no_gradients(model)
    planned = plan(model, optimizer, **shape, checkpointing=True, loss_chunk=loss_chunk)
    without = plan(model, optimizer, **shape)
    assert planned.peak < 0.8 * without.peak
    gradpress.nn.checkpoint_blocks_(model)
    loss = token_loss(torch.float32)
    if loss_chunk is not None:
        gradpress.nn.chunk_loss_(model, chunk_tokens=loss_chunk)
        loss = own_loss
    vocabulary = model.config.vocab_size
    check(planned, measured(model, optimizer, loss, **shape, vocabulary=vocabulary))


def test_gradients_that_are_accumulated():
    options = {"batch": 2, "sequence": 16, "accumulation_steps": 3}
    model = llama("tiny")
    optimizer = no_gradients(model, accumulation_steps=3)
    planned = plan(model, optimizer, **options)
    assert planned.peak_by_category["accumulators"]
    loss = token_loss(torch.float32)
    check(planned, measured(model, optimizer, loss, **options, vocabulary=1024))
