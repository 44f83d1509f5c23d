"""Statistics of layers' inputs, collected by hooks while a model runs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from gradpress.engine._layers import Layer, version_of
from gradpress.engine._recipe import InputStatistic, Observed, Recipe


class InputsDiffer(Exception):
    """Two layers that had the same inputs so far have others now."""


class _Watched:
    """A layer and what was seen of it in the batch that runs."""

    def __init__(self, layer: Layer, statistics: dict[str, InputStatistic]) -> None:
        self.layer = layer
        self.statistics = statistics
        self.leader: _Watched | None = None
        self.calls = 0
        self.rows = 0
        self.seen: list[tuple[weakref.ref[torch.Tensor], int]] = []

    def saw(self, x: torch.Tensor) -> bool:
        return any(known() is x and version == version_of(x) for known, version in self.seen)


class Collector:
    """Hooks on layers; statistics of inputs that several share are collected once.

    Args:
        layers: Which.
        recipe: What it wants to know of each.
        apart: Names of layers that get statistics of their own in any case.
    """

    def __init__(self, layers: Sequence[Layer], recipe: Recipe, apart: set[str]) -> None:
        self._watched = [_Watched(layer, recipe.input_statistics(layer)) for layer in layers]
        self._apart = apart
        self._padding: torch.Tensor | None = None
        self._samples = 0
        self._sequences = 0
        self._tokens = 0.0
        self._known: float | None = None
        self._first = True
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Collector:
        for watched in self._watched:
            hook = self._hook(watched)
            self._handles.append(
                watched.layer.module.register_forward_pre_hook(hook, with_kwargs=True)
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, samples: int, padding: torch.Tensor | None, tokens: float | None) -> None:
        """A batch is about to run.

        Args:
            samples: Its sequences.
            padding: bool ``[samples, tokens]``, True where a token is real, or None.
            tokens: Real tokens of a sequence, on average; None: as many as any layer sees.
        """
        self._samples, self._padding = samples, padding
        self._sequences += samples
        self._known = None if tokens is None else samples * tokens
        for watched in self._watched:
            watched.seen.clear()
            watched.rows = 0

    def end(self) -> None:
        """The batch has run.

        Raises:
            InputsDiffer: with the name of a layer that did not share its inputs after all.
        """
        for watched in self._watched:
            leader = watched.leader
            if leader is not None and not _same(watched, leader):
                raise InputsDiffer(watched.layer.name)
        for watched in self._watched:
            if not watched.seen and watched.leader is None:
                # A layer that no token came to has seen sequences all the same.
                nothing = watched.layer.weight.new_zeros(0, watched.layer.columns)
                for statistic in watched.statistics.values():
                    statistic.update(nothing, self._samples)
        most = max((watched.rows for watched in self._watched), default=0)
        self._tokens += max(most, self._samples) if self._known is None else self._known
        self._first = False

    def observed(self, gradients: dict[str, Any]) -> list[Observed]:
        """The layers with their statistics."""
        tokens = self._tokens / max(self._sequences, 1)
        return [
            Observed(
                watched.layer,
                (watched.leader or watched).statistics,
                gradients.get(watched.layer.name),
                watched.calls,
                tokens,
            )
            for watched in self._watched
        ]

    def _hook(self, watched: _Watched) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._take(watched, x)

        return hook

    def _take(self, watched: _Watched, x: torch.Tensor) -> None:
        watched.calls += 1
        again = bool(watched.seen)
        if self._first and not again:
            watched.leader = self._leader_for(watched, x)
        watched.seen.append((weakref.ref(x), version_of(x)))
        if watched.leader is not None or not watched.statistics:
            return
        rows = self._without_padding(watched.layer.inputs(x.detach()))
        watched.rows += rows.numel() // max(watched.layer.columns, 1)
        for statistic in watched.statistics.values():
            statistic.update(rows, 0 if again else self._samples)

    def _leader_for(self, watched: _Watched, x: torch.Tensor) -> _Watched | None:
        """A layer that has been given this very tensor, and wants to know the same of it."""
        if watched.layer.name in self._apart or type(watched.layer.module) is not torch.nn.Linear:
            return None
        for other in self._watched:
            if other is watched or other.leader is not None or not other.saw(x):
                continue
            if type(other.layer.module) is torch.nn.Linear and set(other.statistics) == set(
                watched.statistics
            ):
                return other
        return None

    def _without_padding(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, columns]`` of the real tokens, where the shape tells which they are."""
        real = self._padding
        if real is not None and x.shape[:-1] == real.shape:
            return x[real]
        if real is not None and x.ndim == 2 and len(x) == real.numel():
            return x[real.flatten()]
        return x


def _same(watched: _Watched, leader: _Watched) -> bool:
    if len(watched.seen) != len(leader.seen):
        return False
    pairs = zip(watched.seen, leader.seen, strict=True)
    return all(a is b and version == other for (a, version), (b, other) in pairs)
