"""What INT8 weights and their rounding cost in validation loss: short runs, not timings."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from pathlib import Path
from typing import Any

from benches.harness import Options
from benches.report import Report
from benches.tables import Table
from gradpress.train import RunOptions, TrainConfig, start_run

RATES = (1e-3, 3e-3, 1e-2)
ADAMW_RATES = (3e-4, 1e-3, 3e-3)
REST = 1e-2

_VARIANTS: dict[str, dict[str, Any]] = {
    "Q-GaLore, INT8 weights, stochastic rounding": {},
    "the same, rounded to nearest": {"weight_rounding": "nearest"},
    "GaLore: float32 weights, projectors and moments": {
        "weight_bits": None,
        "projector_bits": None,
        "state_bits": 32,
    },
}
_ANCHOR = "torch AdamW, float32, full rank"

_ABOUT = (
    "A `tiny` LLaMA is trained on the Python standard library's sources and manual for 300 steps"
    " of 1024 tokens, with the same initialization and the same batches for every row. Columns are"
    " peak learning rates of the attention and MLP matrices; embeddings, norms and head have"
    f" {REST:g} in every run. Shown is the validation loss after the last step, in nats per token,"
    " on text that no run has seen. One seed: differences of a few thousandths mean nothing.",
    "Stochastic rounding pays where steps are small against the weights' grid: rounded to nearest,"
    " changes below half a step are lost. Where the rate is so high that every step crosses the"
    " grid, rounding to nearest loses nothing and adds less noise.",
)


def run(options: Options) -> Report:
    """Trains every variant at every rate."""
    extra: dict[str, Any] = {"steps": 6, "eval_every": 0} if options.quick else {"eval_every": 0}
    with tempfile.TemporaryDirectory() as folder:
        losses = _train_all(Path(folder), options.threads, extra)
    tables = [
        _table("Q-GaLore and what it is made of", RATES, {n: losses[n] for n in _VARIANTS}),
        _table("Anchor", ADAMW_RATES, {_ANCHOR: losses[_ANCHOR]}),
    ]
    return Report("INT8 weights and their rounding, in validation loss", _ABOUT, 1, tables)


def _train_all(folder: Path, threads: int, extra: dict[str, Any]) -> dict[str, dict[float, float]]:
    plans = [(name, rate, "qgalore", own) for name, own in _VARIANTS.items() for rate in RATES]
    plans += [(_ANCHOR, rate, "adamw", {}) for rate in ADAMW_RATES]
    losses: dict[str, dict[float, float]] = {}
    data: Path | None = None
    for index, (name, rate, optimizer, own) in enumerate(plans):
        config = TrainConfig.create(optimizer=optimizer, lr=rate, lr_rest=REST, **own, **extra)
        settings = RunOptions(threads=threads, save_every=0, plot=False)
        with contextlib.redirect_stdout(io.StringIO()):
            outcome = start_run(config, settings, folder / f"{index}", data_from=data)
        data = data or outcome.folder
        loss = outcome.validation_loss
        losses.setdefault(name, {})[rate] = math.nan if loss is None else loss
    return losses


def _table(title: str, rates: tuple[float, ...], losses: dict[str, dict[float, float]]) -> Table:
    rows = []
    for name, by_rate in losses.items():
        best = min(by_rate, key=by_rate.__getitem__)
        cells = [f"{by_rate[rate]:.4f}" for rate in rates]
        rows.append([name, *cells, f"{by_rate[best]:.4f} at {best:g}"])
    return Table(title, ["validation loss", *(f"lr {rate:g}" for rate in rates), "best"], rows)
