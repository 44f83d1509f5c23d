import json

import pytest

from gradpress.train import SIZES, RunOptions, TrainConfig, UserError


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "qgalore"])
def test_round_trip_through_json(optimizer):
    config = TrainConfig.create(optimizer=optimizer, text=("a", "b"), betas=(0.8, 0.95), lr=1 / 3)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("size", SIZES)
def test_sizes_fill_what_is_not_given(size):
    config = TrainConfig.create(size=size, layers=3)
    assert config.hidden_size == SIZES[size].hidden_size
    assert config.vocab_size == SIZES[size].vocab_size
    assert config.layers == 3


def test_optimizer_decides_the_weights():
    assert TrainConfig.create(optimizer="qgalore").weight_bits == 8
    assert TrainConfig.create(optimizer="qgalore", weight_bits=None).weight_bits is None
    assert TrainConfig.create(optimizer="adamw").weight_bits is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "3M"}, "--size 3M: choose from"),
        ({"optimizer": "sgd"}, "--optimizer sgd: choose from"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"warmup": 1.5}, "--warmup 1.5: must lie between 0 and 1"),
        ({"betas": (0.9, 1.0)}, "--betas"),
        ({"betas": (0.9,)}, "--betas"),
        ({"heads": 3}, "--heads 3"),
        ({"vocab_size": 256}, "--vocab-size 256"),
        ({"optimizer": "qgalore", "rank": 257}, "--rank 257.*256"),
        ({"optimizer": "adamw", "weight_bits": 8}, "--weight-bits 8"),
        ({"optimizer": "qgalore", "weight_bits": 4}, "--weight-bits 4: choose from 8, none"),
        ({"optimizer": "qgalore", "state_bits": 3}, "--state-bits 3"),
        ({"projector_bits": 3}, "--projector-bits 3: choose from 4, 8, none"),
        ({"cos_threshold": 2.0}, "--cos-threshold"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**63}, "--seed"),
        ({"learning_rate": 1.0}, "unknown option 'learning_rate'"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(UserError, match=words):
        TrainConfig.create(**options)


def test_other_versions_configuration_is_refused():
    values = TrainConfig.create().to_dict()
    del values["rank"]
    with pytest.raises(UserError, match="rank"):
        TrainConfig.from_dict(values)


def test_differences():
    config = TrainConfig.create(lr=0.5)
    assert config.differences({"lr": 0.5, "size": "tiny"}) == []
    assert config.differences({"lr": 0.25, "size": "tiny"}) == ["lr"]


@pytest.mark.parametrize("options", [{"save_every": -1}, {"keep": 0}, {"threads": -2}])
def test_wrong_run_options(options):
    with pytest.raises(UserError, match="must be at least"):
        RunOptions(**options)


def test_least_memory_implies_an_optimizer_and_takes_no_other():
    config = TrainConfig.create(memory="least")
    assert (config.optimizer, config.weight_bits) == ("qgalore", 8)
    for options in ({"optimizer": "adamw"}, {"weight_bits": None}):
        with pytest.raises(UserError, match="--memory least: takes --optimizer qgalore"):
            TrainConfig.create(memory="least", **options)
