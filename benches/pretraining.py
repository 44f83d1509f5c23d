"""Validation loss of every optimizer, pre-training one model on real text: not timings."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from benches.harness import Options
from benches.methods import METHODS
from benches.report import RESULTS, Report
from benches.training import Task, draw, final_table, run_all
from gradpress.train import TrainConfig
from gradpress.train.evaluate import evaluate
from gradpress.train.model import build_model
from gradpress.train.tokens import prepare_tokens, training_batch

#: 9M parameters, 85 % of them in the matrices that the methods treat differently.
_MODEL: dict[str, Any] = {
    "hidden_size": 320,
    "intermediate_size": 864,
    "heads": 5,
    "layers": 6,
    "vocab_size": 2048,
    "batch_size": 4,
    "sequence_length": 128,
    "rank": 80,
}
_STEPS, _TRIAL_STEPS, _REST = 160, 30, 1e-2

_ABOUT = (
    "A LLaMA of 9M parameters (hidden size 320, 6 layers, vocabulary 2048, so that 85 % of them"
    " are attention and MLP matrices) is trained on the Python standard library's sources and"
    f" manual for {_STEPS} steps of 512 tokens, with the same initialization and the same batches"
    " for every row. Projections have rank 80 of 320. The peak rate of the matrices is the best of"
    f" three by the validation loss of runs of {_TRIAL_STEPS} steps with a schedule of their own;"
    f" embeddings, norms and head have {_REST:g} everywhere: a low-rank method wins by its split"
    " of rates alone where the others have none. Linear warm-up over a tenth, cosine to a tenth,"
    " no decay. Losses are nats per token on text that no run has seen. One seed: differences of a"
    " hundredth mean nothing, and 160 steps say nothing about 100,000.",
    "`pretraining.png` beside this file shows the same runs, `pretraining.json` has their numbers.",
)


def run(options: Options) -> Report:
    """Trains with every method whose run `pretraining.json` does not hold yet."""
    with tempfile.TemporaryDirectory() as folder:
        task = _task(Path(folder), options.quick)
        path = None if options.quick else RESULTS / "pretraining.json"
        found = run_all(task, METHODS, path)
    if not options.quick:
        draw(found, RESULTS / "pretraining.png", "Pre-training a LLaMA of 9M")
    return Report("Pre-training, in validation loss", _ABOUT, 1, [final_table(found)])


def _task(folder: Path, quick: bool) -> Task:
    config = TrainConfig.create(**_MODEL)
    data = prepare_tokens(config, folder)
    length = config.sequence_length
    batches = 1 if quick else 4
    return Task(
        build=functools.partial(build_model, config),
        windows=lambda step: training_batch(
            data.train,
            step,
            seed=config.seed,
            batch_size=config.batch_size,
            sequence_length=length,
        ),
        loss=lambda model: (
            evaluate(
                model, data.validation, sequence_length=length, batch_size=16, batches=batches
            ).loss
        ),
        steps=6 if quick else _STEPS,
        trial_steps=3 if quick else _TRIAL_STEPS,
        every=3 if quick else 20,
        rank=config.rank,
        rest=_REST,
    )
