"""What the training benchmarks share: one loop, runs that are kept, a table and a figure."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gradpress
from benches.methods import Method, set_rates
from benches.tables import Table, number
from gradpress.train.evaluate import token_losses
from gradpress.train.report import figure
from gradpress.train.schedule import lr_multiplier

#: By method: `rate`, `tried`, `validation` (step and loss), `training`, bytes, seconds.
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """What every method is trained on.

    Attributes:
        build: Makes the model, the same one each time.
        windows: The tokens of a step, one more column than is predicted.
        loss: The validation loss.
        steps: Of a run.
        trial_steps: Of the runs that choose the rate.
        every: Steps between evaluations.
        rank: Of the projections.
        rest: Peak learning rate of embeddings, norms and head in every run; None: the matrices'.
    """

    build: Callable[[], torch.nn.Module]
    windows: Callable[[int], torch.Tensor]
    loss: Callable[[torch.nn.Module], float]
    steps: int
    trial_steps: int
    every: int
    rank: int
    rest: float | None


def run_all(task: Task, methods: Sequence[Method], path: Path | None) -> Results:
    """Trains with every method whose run the file does not hold yet.

    Args:
        task: The task.
        methods: The contenders.
        path: A JSON file that is read before and written after every method; None keeps nothing.
    """
    found: Results = {}
    if path is not None and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    for method in methods:
        if method.name in found:
            continue
        found[method.name] = _best_of(method, task)
        if path is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return {method.name: found[method.name] for method in methods}


def _best_of(method: Method, task: Task) -> dict[str, Any]:
    trials = {rate: _train(method, rate, task, task.trial_steps) for rate in method.rates}
    best = min(trials, key=lambda rate: trials[rate]["validation"][-1][1])
    result = _train(method, best, task, task.steps)
    tried = {f"{rate:g}": outcome["validation"][-1][1] for rate, outcome in trials.items()}
    print(f"{method.name}: {result['validation'][-1][1]:.4f} at {best:g}", flush=True)
    return {"rate": best, "tried": tried, **result}


def _train(method: Method, rate: float, task: Task, steps: int) -> dict[str, Any]:
    model = task.build()
    optimizer = method.prepare(model, task.rank)
    training: list[float] = []
    seconds: list[float] = []
    trial = steps == task.trial_steps
    validation = [] if trial else [(0, round(task.loss(model), 4))]
    for step in range(steps):
        multiplier = lr_multiplier(step + 1, steps=steps + 1)
        other = rate if task.rest is None else task.rest
        set_rates(optimizer, (rate * multiplier, other * multiplier))
        optimizer.zero_grad()
        loss = token_losses(model, task.windows(step)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        training.append(round(float(loss.detach()), 4))
        if step + 1 == steps or (not trial and (step + 1) % task.every == 0):
            validation.append((step + 1, round(task.loss(model), 4)))
    counted = gradpress.memory.count(model, optimizer).by_category
    return {
        "validation": validation,
        "training": training,
        "state_bytes": sum(counted.get(name, 0) for name in ("optimizer_states", "projectors")),
        "weight_bytes": counted["weights"] + counted.get("weight_scales", 0),
        "optimizer_seconds": round(statistics.median(seconds), 5),
    }


def final_table(found: Results) -> Table:
    """The methods by their last validation loss."""
    head = ("optimizer", "validation loss", "lr", "tried", "states, MB", "weights, MB")
    rows = []
    for name, result in sorted(found.items(), key=lambda item: item[1]["validation"][-1][1]):
        cells = (number(result[key] / 1e6) for key in ("state_bytes", "weight_bytes"))
        loss = f"{result['validation'][-1][1]:.4f}"
        tried = ", ".join(result["tried"])
        rows.append((name, loss, f"{result['rate']:g}", tried, *cells))
    note = "States are moments, projectors, error buffers and their scales."
    return Table("After the last step, best first", head, rows, [note])


def draw(found: Results, path: Path, title: str) -> None:
    """Writes the validation losses over the steps, and the last ones over the states' bytes."""
    made, (curves, sizes) = figure(2, 13.0)
    styles = ("-", "--", ":")
    for index, (name, result) in enumerate(found.items()):
        color = f"C{index % 10}"
        steps, losses = zip(*result["validation"], strict=True)
        style = styles[index // 10]
        curves.plot(steps, losses, style, color=color, label=name, linewidth=1.4)
        place = (result["state_bytes"] / 1e6, losses[-1])
        sizes.scatter(*place, color=color, s=25)
        offset = (4, 3 if index % 2 else -8)
        sizes.annotate(name, place, xytext=offset, textcoords="offset points", fontsize=7)
    last = [result["validation"][-1][1] for result in found.values()]
    second = max(result["validation"][1][1] for result in found.values())
    margin = 0.05 * (second - min(last))
    curves.set_ylim(min(last) - margin, max(second, *last) + margin)
    curves.set(xlabel="step", ylabel="validation loss (nats per token)", title=title)
    curves.legend(fontsize=7)
    sizes.set(xscale="log", xlabel="optimizer states (MB)", ylabel="last validation loss")
    for axes in (curves, sizes):
        axes.grid(alpha=0.3)
    made.savefig(path, dpi=120)
