"""Plans of training: what they take, what they leave alone, and models that do not fit."""

import copy
import time

import psutil
import pytest
import torch
from torch import nn

import gradpress
from gradpress.memory import MemoryCount, MemoryPlan, plan
from gradpress.train import TrainConfig

SHAPE = {"batch": 2, "sequence": 8}


def language_model():
    return nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 64), nn.Linear(64, 300))


def adamw8bit(model):
    return gradpress.optim.AdamW8bit(gradpress.nn.quantize_(model).parameters())


def test_model_and_optimizer_stay_as_they_are():
    model = gradpress.nn.quantize_(language_model(), target_modules=["1"])
    groups = gradpress.optim.param_groups(model, rank=4, target_modules=["1"], verbose=False)
    optimizer = gradpress.optim.QGaLoreAdamW(groups, materialize_gradients=False)

    def step():
        model(torch.arange(16).view(2, 8)).square().sum().backward()
        optimizer.step()

    step()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    state, weights = copy.deepcopy((optimizer.state_dict()["state"], model.state_dict()))
    plan(model, optimizer, **SHAPE, checkpointing=False)
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    for name, value in model.state_dict().items():
        parts = getattr(value, "parts", {"": value})
        for part, tensor in parts.items():
            expected = getattr(weights[name], part) if part else weights[name]
            assert torch.equal(tensor, expected)
    assert not model[0].weight._post_accumulate_grad_hooks
    # The kernels compute again, and the optimizer still takes this model's gradients.
    optimizer.zero_grad()
    before = model[1].weight.codes.clone()
    step()
    assert not torch.equal(model[1].weight.codes, before)


def test_an_optimizer_its_class_and_what_makes_it_give_the_same():
    model = language_model()
    kind = gradpress.optim.AdamW8bit
    plans = [
        plan(model, kind(model.parameters()), **SHAPE),
        plan(model, kind, **SHAPE),
        plan(model, lambda m: kind(m.parameters()), **SHAPE),
        plan(copy.deepcopy(model).to("meta"), kind, **SHAPE, device="cpu"),
    ]
    assert all(p.parts == plans[0].parts and p.held == plans[0].held for p in plans)
    changed = plan(model, adamw8bit, **SHAPE)
    assert changed.peak_by_category["weights"] < plans[0].peak_by_category["weights"]
    assert not isinstance(model[0].weight, gradpress.nn.QuantizedWeight)


def test_without_a_batch_states_are_counted():
    model = language_model()
    optimizer = gradpress.optim.AdamW8bit(model.parameters())
    counted = plan(model, optimizer)
    assert isinstance(counted, MemoryCount)
    assert plan(model, gradpress.optim.AdamW8bit) == counted
    planned = plan(model, optimizer, **SHAPE)
    assert isinstance(planned, MemoryPlan)
    assert planned.held == counted


def test_descriptions_are_built():
    from transformers import GPT2Config

    config = TrainConfig.create(size="tiny", optimizer="qgalore", weight_bits=8)
    own = plan(config, batch=2, sequence=16)
    assert {"weight_scales", "projectors"} <= own.peak_by_category.keys()
    by_name = plan("tiny", torch.optim.AdamW, batch=2, sequence=16, device="cpu")
    half = plan("tiny", torch.optim.AdamW, batch=2, sequence=16, device="cpu", dtype=torch.bfloat16)
    weights = by_name.peak_by_category["weights"]
    assert half.peak_by_category["weights"] == weights // 2
    other = plan(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=500),
        gradpress.optim.AdamW8bit,
        batch=2,
        sequence=16,
        checkpointing=True,
    )
    assert other.peak_by_category["weights"] == 4 * (500 * 64 + 1024 * 64 + 2 * 49984 + 128)


def test_a_loss_of_ones_own():
    def loss(model, tokens):
        return model(tokens[:, :-1]).square().mean()

    with_it = plan(language_model(), torch.optim.SGD, **SHAPE, loss=loss)
    assert with_it.peak > 0


def test_larger_batches_longer_sequences_and_wider_logits_take_more():
    def peak(**options):
        return plan(language_model(), torch.optim.SGD, **{**SHAPE, **options}).peak

    base = peak(batch=64)
    # Of each sequence one token more is given than predicted.
    assert base < peak(batch=128) == peak(batch=64, sequence=16) + 8 * (128 * 9 - 64 * 17)
    assert base < peak(batch=64, logits_dtype=torch.float64)


def test_attention_for_devices_keeps_no_scores():
    """Twice the sequence takes twice the activations, where the scores would take four times."""
    sizes = [
        plan("tiny", torch.optim.SGD, batch=1, sequence=length).peak_by_category["activations"]
        for length in (512, 1024)
    ]
    # What does not grow, like the angles of positions, is a small part.
    assert 1.9 < sizes[1] / sizes[0] < 2.1


def test_states_on_the_host_are_not_on_the_device():
    def offloaded(model):
        optimizer = gradpress.optim.AdamW8bit(model.parameters())
        gradpress.optim.offload_states(optimizer)
        return optimizer

    options = {"batch": 1, "sequence": 16}
    kept = plan("tiny", gradpress.optim.AdamW8bit, **options)
    moved = plan("tiny", offloaded, **options, device="cuda")
    assert kept.host_peak == 0
    # All but counters and moments of norms, which are small.
    assert moved.host_peak > 0.98 * kept.peak_by_category["optimizer_states"]
    states = moved.peak_by_category.get("optimizer_states", 0)
    assert states < kept.peak_by_category["optimizer_states"]
    assert "on the host in addition" in str(moved)


def test_seven_billion_parameters_on_a_small_machine():
    def make(model):
        gradpress.nn.quantize_(model)
        groups = gradpress.optim.param_groups(model, rank=256, verbose=False)
        return gradpress.optim.QGaLoreAdamW(groups, materialize_gradients=False)

    plan("tiny", gradpress.optim.AdamW8bit, batch=1, sequence=8)  # imports
    process = psutil.Process()
    memory, started = process.memory_info().rss, time.process_time()
    planned = plan(
        "7B",
        make,
        batch=16,
        sequence=256,
        dtype=torch.bfloat16,
        checkpointing=True,
        loss_chunk=512,
    )
    assert time.process_time() - started < 60  # about 6 on one core that does nothing else
    assert process.memory_info().rss - memory < 512 << 20
    matrices = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    others = 2 * 32000 * 4096 + (2 * 32 + 1) * 4096
    assert planned.peak_by_category["weights"] == matrices + 2 * others
    assert planned.peak_by_category["weight_scales"] == matrices // 256 * 5
    assert planned.largest_floating.numel < 4096 * 11008 * 4
    gibibyte = 1 << 30
    assert 9 * gibibyte < planned.peak < 13 * gibibyte


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": 0, "sequence": 8}, ValueError, "batch must be at least 1, got 0"),
        ({"batch": 2}, ValueError, "sequence must be at least 1, got None"),
        ({**SHAPE, "accumulation_steps": 0}, ValueError, "accumulation_steps .* got 0"),
        ({**SHAPE, "device": "mps"}, ValueError, "device must be"),
        ({**SHAPE, "dtype": torch.float16}, TypeError, "dtype is for models that are described"),
        ({**SHAPE, "loss_chunk": 8, "loss": len}, ValueError, "loss_chunk must be None"),
    ],
)
def test_options_that_are_refused(options, error, message):
    with pytest.raises(error, match=rf"memory\.plan: {message}"):
        plan(language_model(), torch.optim.SGD, **options)


@pytest.mark.parametrize(
    ("model", "optimizer", "error", "message"),
    [
        ("8B", torch.optim.SGD, ValueError, "model must be a size among tiny, .*, got '8B'"),
        (3, torch.optim.SGD, TypeError, "model must be a module, .*, got int"),
        (language_model(), None, TypeError, "optimizer must be an optimizer, .*, got NoneType"),
        (language_model(), list, TypeError, "optimizer made list"),
        (
            "tiny",
            torch.optim.SGD(language_model().parameters()),
            TypeError,
            "optimizer must be a class or a callable where model is a description",
        ),
    ],
)
def test_subjects_that_are_refused(model, optimizer, error, message):
    with pytest.raises(error, match=rf"memory\.plan: {message}"):
        plan(model, optimizer, **SHAPE)


def test_what_needs_values_is_said():
    class Sorting(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4)

        def forward(self, tokens):
            return self.embedding(tokens[tokens > 3])

    with pytest.raises(RuntimeError, match=r"memory\.plan: .* must not need values"):
        plan(Sorting(), torch.optim.SGD, **SHAPE)
