import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from gradpress.train import SIZES, TrainConfig, start_run
from gradpress.train.model import build_model
from gradpress.train.optimizer import split_parameters

# Millions of parameters: (attention and MLP matrices, all), as the papers' configurations give.
PUBLISHED = {
    "60M": (25.30, 58.07),
    "130M": (84.93, 134.11),
    "350M": (302.38, 367.97),
    "1B": (1207.91, 1339.08),
    "7B": (6476.01, 6738.42),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_parameter_counts(size):
    with torch.device("meta"):
        model = build_model(TrainConfig.create(size=size))
    matrices, rest = split_parameters(model)
    linear = sum(parameter.numel() for parameter in matrices)
    total = linear + sum(parameter.numel() for parameter in rest)
    assert (round(linear / 1e6, 2), round(total / 1e6, 2)) == PUBLISHED[size]
    assert len(matrices) == 7 * SIZES[size].layers


@pytest.mark.parametrize(("size", "millions"), [("9M", 9.0), ("35M", 35.2)])
def test_small_sizes_bear_their_names(size, millions):
    with torch.device("meta"):
        model = build_model(TrainConfig.create(size=size))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_initialization_is_a_function_of_the_seed(small):
    before = torch.random.get_rng_state()
    first, again, other = (build_model(small(seed=seed)).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_initialization_leaves_the_generators_of_cuda_alone(small, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("seeded"))
    build_model(small())


def test_shape_of_the_model(small):
    model = build_model(small(dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.rms_norm_eps == 1e-6
    assert model.config.hidden_act == "silu"
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


@pytest.mark.parametrize("optimizer", ["adamw", "qgalore"])
def test_export_gives_the_same_logits(small, quiet, tmp_path, optimizer):
    from gradpress.train.checkpoint import newest_checkpoint
    from gradpress.train.optimizer import build_optimizer, quantize_weights

    config = small(optimizer=optimizer, steps=3)
    start_run(config, quiet(), tmp_path / "run")
    trained = build_model(config)
    quantize_weights(trained, config)
    checkpoint = newest_checkpoint(tmp_path / "run" / "checkpoints")
    checkpoint.load(trained, build_optimizer(trained, config))
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    ids = tokenizer("a tensor of gradient 7", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "a tensor of gradient 7"
    trained.eval()
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        # The same numbers in the same order, but a quantized Linear may take another product
        # kernel: float32 sums over at most 48 terms of order one.
        torch.testing.assert_close(exported(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert exported.dtype == torch.float32
