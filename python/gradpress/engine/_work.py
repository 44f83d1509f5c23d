"""One recipe on one model."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from gradpress.engine._batches import Calibration, Loss
from gradpress.engine._gradients import Sensitivity, collect_gradients
from gradpress.engine._layers import Layer, select_layers
from gradpress.engine._observe import Collector, InputsDiffer
from gradpress.engine._pending import Pending
from gradpress.engine._plan import Block, plan_blocks, plan_groups
from gradpress.engine._recipe import GradientStatistic, Observed, Outcome, Recipe
from gradpress.engine._report import CompressedLayer, CompressionReport
from gradpress.engine._resume import Progress, fingerprint
from gradpress.engine._stream import Run

_OP = "compress"


@dataclass(frozen=True)
class Options:
    """How it is done, whatever the recipe.

    Attributes:
        loss: From model and batch to a scalar.
        gradient_memory: Bytes that statistics of gradients may take, or None.
        progress: Show a progress bar.
    """

    loss: Loss
    gradient_memory: int | None
    progress: bool


class Work:
    """Compresses the layers of a model that a recipe is meant for."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, calibration: Calibration | None, options: Options
    ) -> None:
        self._model = model
        self._calibration = calibration
        self._options = options
        self._layers = select_layers(_OP, model, recipe.modules)
        self._recipe = recipe
        for layer in self._layers:
            if recipe.needs_calibration and not layer.takes_inputs:
                raise ValueError(
                    f"{_OP}: {layer.name} must be a layer whose outputs all see the same inputs for"
                    f" {recipe.title}, got a convolution of {layer.module.groups} groups"
                )
        self._statistics_bytes = 0
        self._stream_bytes = 0
        self._bar: Any = None

    def run(self, folder: str | os.PathLike[str] | None) -> CompressionReport:
        """Does it; `folder` has what is finished already, and gets what will be."""
        started = time.perf_counter()
        progress = None
        if folder is not None:
            progress = Progress(folder, fingerprint(self._model, self._recipe, self._calibration))
        with tqdm(disable=not self._options.progress, unit="batch", desc=self._recipe.title) as bar:
            self._bar = bar
            self._recipe = self._prepared()
            blocks = plan_blocks(self._model, self._layers, self._recipe, self._calibration)
            limit = self._options.gradient_memory
            groups = plan_groups(self._model, blocks, self._recipe, limit)
            self._count(groups)
            rows = self._all(groups, progress)
        seconds = time.perf_counter() - started
        return CompressionReport(tuple(rows), seconds, self._statistics_bytes, self._stream_bytes)

    def _prepared(self) -> Recipe:
        sensitivity: dict[str, float] = {}
        if self._recipe.needs_sensitivity:
            measures = {layer.name: (layer, Sensitivity(layer)) for layer in self._layers}
            self._bar.total = self._calibrated.samples
            self._collect(measures)
            sensitivity = {name: measure.value for name, (_, measure) in measures.items()}
        return self._recipe.prepare(self._layers, sensitivity)

    @property
    def _calibrated(self) -> Calibration:
        assert self._calibration is not None
        return self._calibration

    def _count(self, groups: Sequence[Sequence[Block]]) -> None:
        steps = sum(self._steps(group) for group in groups)
        steps += sum(self._runs(block) for group in groups for block in group)
        self._bar.total = self._bar.n + steps or None
        self._bar.refresh()

    def _steps(self, group: Sequence[Block]) -> int:
        """Samples that run for the gradients of a group."""
        wanted = any(block.gradient_bytes(self._recipe) for block in group)
        return self._calibrated.samples if wanted else 0

    def _runs(self, block: Block) -> int:
        """Batches that run for the inputs of a block."""
        return len(self._calibrated) if block.stream is not None and block.layers else 0

    def _all(
        self, groups: Sequence[Sequence[Block]], progress: Progress | None
    ) -> list[CompressedLayer]:
        rows: list[CompressedLayer] = []
        done = 0 if progress is None else progress.done
        pending = Pending() if len(groups) > 1 else None
        position = 0
        for group in groups:
            gradients: dict[str, Any] = {}
            if position + len(group) > done:
                gradients = self._gradients(group[max(0, done - position) :])
            else:
                self._bar.update(self._steps(group))
            if group is groups[-1] and pending is not None:
                pending.apply()  # the unchanged model is not needed any more
                pending = None
            for block in group:
                if position < done:
                    assert progress is not None
                    self._take_up(block, progress, position, pending)
                else:
                    self._enter(block, progress if position == done else None)
                    rows += self._one(block, gradients, pending, progress)
                position += 1
        return rows if progress is None else progress.rows()

    def _enter(self, block: Block, progress: Progress | None) -> None:
        """The block's stream begins, or goes on from what a folder has."""
        stream = block.stream
        if stream is None or (block.index and progress is None):
            return
        stream.begin()
        if block.index and progress is not None:
            stream.restore(progress.inputs())

    def _gradients(self, blocks: Sequence[Block]) -> dict[str, Any]:
        statistics: dict[str, tuple[Layer, GradientStatistic]] = {}
        for block in blocks:
            for layer in block.layers:
                statistic = self._recipe.gradient_statistic(layer)
                if statistic is not None:
                    statistics[layer.name] = layer, statistic
        if statistics:
            self._collect(statistics)
        return {name: statistic for name, (_, statistic) in statistics.items()}

    def _collect(self, statistics: Any) -> None:
        collect_gradients(
            self._model, statistics, self._calibrated, self._options.loss, self._bar.update
        )

    def _one(
        self,
        block: Block,
        gradients: dict[str, Any],
        pending: Pending | None,
        progress: Progress | None,
    ) -> list[CompressedLayer]:
        """Observes, compresses, and lets the inputs pass through what the block has become."""
        stream = None if block.last else block.stream
        rows: list[CompressedLayer] = []
        with ExitStack() as unchanged:
            if block.layers:
                observed = self._observe(block, gradients)
                self._measure(block, observed, gradients)
                rows = self._compress(observed, gradients, pending, unchanged)
                del observed
            if stream is not None:
                stream.advance(block.index)
            if progress is not None:
                weights = {layer.name: layer.matrix for layer in block.layers}
                progress.finish(weights, rows, [] if stream is None else stream.state())
        if block.stream is not None and block.last:
            block.stream.end()
        return rows

    def _measure(
        self, block: Block, observed: Sequence[Observed], gradients: dict[str, Any]
    ) -> None:
        held = [s for one in observed for s in (*one.inputs.values(), one.gradient)]
        held += gradients.values()
        sizes = {id(s): s.nbytes for s in held if s is not None}
        self._statistics_bytes = max(self._statistics_bytes, sum(sizes.values()))
        if block.stream is not None:
            self._stream_bytes = max(self._stream_bytes, block.stream.nbytes)

    def _compress(
        self,
        observed: Sequence[Observed],
        gradients: dict[str, Any],
        pending: Pending | None,
        unchanged: ExitStack,
    ) -> list[CompressedLayer]:
        """Writes what becomes of layers; `unchanged` takes it back where masks have to wait."""
        rows = []
        started = time.perf_counter()
        for one, outcome in zip(observed, self._recipe.compress(observed), strict=True):
            if pending is not None:
                unchanged.callback(one.layer.write, one.layer.matrix.clone())
                pending.add(one.layer, outcome)
            one.layer.write(outcome.weight)
            gradients.pop(one.layer.name, None)
            now = time.perf_counter()
            rows.append(self._row(one.layer, outcome, now - started))
            started = now
        return rows

    def _row(self, layer: Layer, outcome: Outcome, seconds: float) -> CompressedLayer:
        if outcome.note:
            warnings.warn(f"{_OP}: {layer.name}: {outcome.note}", RuntimeWarning, stacklevel=2)
        shape = tuple(layer.weight.shape)
        title = self._recipe.title
        return CompressedLayer(
            layer.name, title, shape, outcome.sparsity, outcome.error, seconds, outcome.note
        )

    def _observe(self, block: Block, gradients: dict[str, Any]) -> list[Observed]:
        if block.stream is None:
            return [Observed(layer, gradient=gradients.get(layer.name)) for layer in block.layers]
        apart: set[str] = set()
        while True:
            before = self._bar.n
            try:
                with Collector(block.layers, self._recipe, apart) as collector:
                    self._run(block, collector)
                return collector.observed(gradients)
            except InputsDiffer as found:
                apart.add(str(found))
                self._bar.n = before

    def _run(self, block: Block, collector: Collector) -> None:
        def begin(run: Run) -> None:
            collector.begin(run.samples, run.padding, run.tokens)

        def end() -> None:
            collector.end()
            self._bar.update()

        assert block.stream is not None
        block.stream.run(block.index, begin, end)

    def _take_up(
        self, block: Block, progress: Progress, position: int, pending: Pending | None
    ) -> None:
        """A block that was finished before."""
        weights = progress.weights(position)
        for layer in block.layers:
            matrix = weights[layer.name].to(layer.weight.device)
            if pending is None:
                layer.write(matrix)
            else:
                pending.add(layer, Outcome(layer.name, matrix, _same_bits(matrix, layer.matrix)))
        self._bar.update(self._runs(block))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    dtype = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.contiguous().view(dtype) == b.contiguous().view(dtype)
