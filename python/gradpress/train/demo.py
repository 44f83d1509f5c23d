"""AdamW and Q-GaLore side by side: the same model, text, seed, batches and groups."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpress.train.config import TrainConfig
from gradpress.train.device import choose_device
from gradpress.train.errors import UserError
from gradpress.train.files import write_atomically, write_json
from gradpress.train.folder import RunOptions
from gradpress.train.loop import Outcome, start_run
from gradpress.train.metrics import read_metrics
from gradpress.train.report import Records, draw_losses, figure, megabytes, table

# One rate for the rest, and for the matrices the best of three that were tried for either method
# on the default text: a low-rank method wins by its split of rates alone where AdamW has none.
TRIED: dict[str, tuple[float, ...]] = {"adamw": (3e-4, 1e-3, 3e-3), "qgalore": (1e-3, 3e-3, 1e-2)}
CHOSEN: dict[str, dict[str, float]] = {
    "adamw": {"lr": 3e-4, "lr_rest": 1e-2},
    "qgalore": {"lr": 3e-3, "lr_rest": 1e-2},
}
_TITLES = {"adamw": "AdamW", "qgalore": "Q-GaLore"}
_COLORS = {"adamw": "tab:orange", "qgalore": "tab:blue"}


@dataclass(frozen=True)
class Entry:
    """One finished run of the demo.

    Attributes:
        config: What it computed.
        summary: Its `summary.json`.
        memory: Its `memory.json`.
        records: Its metrics.
    """

    config: TrainConfig
    summary: dict[str, Any]
    memory: dict[str, Any]
    records: Records

    @property
    def title(self) -> str:
        """Name for tables and plots."""
        return _TITLES[self.config.optimizer]


def run_demo(folder: Path, *, threads: int = 0, device: str = "auto", **options: Any) -> int:
    """Trains one model twice and compares.

    AdamW keeps float32 weights and moments. Q-GaLore keeps INT8 weights, INT4 projectors and
    8-bit moments for the attention and MLP matrices. Both get the same two groups of parameters
    with a learning rate each. Writes `demo.txt`, `demo.json`, `demo.png` and both run folders.

    Args:
        folder: A folder that does not exist yet or is empty.
        threads: CPU threads; 0 leaves torch's choice.
        device: Where both run, as `choose_device` takes it.
        **options: Fields of `TrainConfig` for both runs.

    Returns:
        Exit code: 0, or 128 plus the number of the signal that ended it.

    Raises:
        UserError: An option, a path or a missing package stands in the way.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: exists already; name another folder")
    run_options = RunOptions(threads=threads, save_every=0, device=str(choose_device(device)))
    started = time.perf_counter()
    entries: list[Entry] = []
    first: Path | None = None
    for optimizer, title in _TITLES.items():
        print(f"\n{title}", flush=True)
        config = TrainConfig.create(optimizer=optimizer, **CHOSEN[optimizer], **options)
        outcome = start_run(config, run_options, folder / optimizer, data_from=first)
        if outcome.exit_code:
            print(_stopped(outcome))
            return outcome.exit_code
        first = first or outcome.folder
        entries.append(_read_entry(outcome, config))
    seconds = time.perf_counter() - started
    text = f"{comparison_table(entries)}\n\n{_notes(entries, seconds)}\n"
    write_atomically(folder / "demo.txt", text.encode())
    write_json(folder / "demo.json", _as_json(entries, seconds))
    plot_comparison(entries, folder / "demo.png")
    print(f"\n{text}\n{folder / 'demo.png'}")
    return 0


def comparison_table(entries: list[Entry]) -> str:
    """The runs as columns, what was measured as rows."""
    rows = [
        ["final validation loss", *(f"{e.summary['validation']['loss']:.4f}" for e in entries)],
        ["perplexity", *(f"{e.summary['validation']['perplexity']:.2f}" for e in entries)],
        ["weights", *(megabytes(weight_bytes(e.memory)) for e in entries)],
        [
            "optimizer (states, projectors)",
            *(megabytes(optimizer_bytes(e.memory)) for e in entries),
        ],
        ["median step", *(_milliseconds(e, "median_step_seconds") for e in entries)],
        ["median optimizer step", *(_milliseconds(e, "median_optimizer_seconds") for e in entries)],
        *_peak_rows(entries),
        ["projector refreshes", *(str(e.summary["refreshes"]) for e in entries)],
        ["lr, attention and MLP", *(f"{e.config.lr:g}" for e in entries)],
        ["lr, rest", *(f"{e.config.lr_rest:g}" for e in entries)],
    ]
    return table(["", *(entry.title for entry in entries)], rows)


def _peak_rows(entries: list[Entry]) -> list[list[str]]:
    key = "cuda_peak_bytes"
    peaks = [megabytes(entry.summary[key]) for entry in entries if key in entry.summary]
    return [["peak CUDA memory", *peaks]] if peaks else []


def weight_bytes(memory: dict[str, Any]) -> int:
    """Bytes of all weights, scales and zero points included."""
    return _category_bytes(memory, "weight")


def optimizer_bytes(memory: dict[str, Any]) -> int:
    """Bytes of optimizer states and projectors, scales included."""
    return _category_bytes(memory, "optimizer") + _category_bytes(memory, "projector")


def _category_bytes(memory: dict[str, Any], prefix: str) -> int:
    categories: dict[str, int] = memory["by_category"]
    return sum(count for name, count in categories.items() if name.startswith(prefix))


def plot_comparison(entries: list[Entry], path: Path) -> None:
    """Writes loss curves of all runs and bars of their bytes.

    Raises:
        UserError: `matplotlib` is not installed.
    """
    made, (curves, bars) = figure(2, 12.0)
    for entry in entries:
        draw_losses(curves, entry.records, entry.title, _COLORS[entry.config.optimizer])
    curves.set_title("loss")
    titles = [entry.title for entry in entries]
    weights = [weight_bytes(entry.memory) / 1e6 for entry in entries]
    states = [optimizer_bytes(entry.memory) / 1e6 for entry in entries]
    bars.bar(titles, weights, width=0.5, label="weights", color="tab:gray")
    drawn = bars.bar(
        titles, states, width=0.5, bottom=weights, label="optimizer", color="tab:green"
    )
    totals = [f"{a + b:.1f} MB" for a, b in zip(weights, states, strict=True)]
    bars.bar_label(drawn, labels=totals)
    bars.set_ylabel("MB")
    bars.set_title("weights and optimizer")
    bars.legend()
    made.savefig(path, dpi=120)


def _read_entry(outcome: Outcome, config: TrainConfig) -> Entry:
    def read(name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((outcome.folder / name).read_text(encoding="utf-8"))
        return content

    return Entry(
        config,
        read("summary.json"),
        read("memory.json"),
        read_metrics(outcome.folder / "metrics.jsonl"),
    )


def _milliseconds(entry: Entry, key: str) -> str:
    return f"{entry.summary[key] * 1e3:.1f} ms"


def _stopped(outcome: Outcome) -> str:
    return (
        f"stopped after step {outcome.step}; this run alone continues with: "
        f"gradpress train --resume --out {outcome.folder}"
    )


def _notes(entries: list[Entry], seconds: float) -> str:
    config = entries[0].config
    validation = entries[0].summary["validation"]
    lines = [
        f"Same model ({config.size}), text, seed, batches and two parameter groups for both; "
        f"{config.steps} steps of {config.tokens_per_step} tokens on "
        f"{entries[0].summary['device']}.",
        f"Validation: {validation['tokens']} tokens that neither has seen. "
        f"Whole demo: {seconds:.0f} s.",
        "Learning rates are fixed beforehand: one for embeddings, norms and head, and for the "
        "attention and MLP matrices the best of three tried for each on the default text ("
        + "; ".join(
            f"{_TITLES[name]}: {', '.join(f'{rate:g}' for rate in rates)}"
            for name, rates in TRIED.items()
        )
        + ").",
    ]
    return "\n".join(lines)


def _as_json(entries: list[Entry], seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "runs": {
            entry.config.optimizer: {
                "config": entry.config.to_dict(),
                "summary": entry.summary,
                "memory": entry.memory,
                "weight_bytes": weight_bytes(entry.memory),
                "optimizer_bytes": optimizer_bytes(entry.memory),
            }
            for entry in entries
        },
    }
