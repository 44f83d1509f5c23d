"""Calibration inputs at the entrance of one block after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from gradpress.engine._batches import (
    Batch,
    Calibration,
    call,
    copied,
    padding_of,
    samples_in,
    tensors_in,
)
from gradpress.engine._chain import Arguments, Chain


@dataclass(frozen=True)
class Run:
    """A batch that is about to run.

    Attributes:
        samples: Its sequences.
        padding: bool ``[samples, tokens]``, True where a token is real; None for all.
        tokens: Real tokens of a sequence, on average; None where only the layers can tell.
    """

    samples: int
    padding: torch.Tensor | None
    tokens: float | None

    @classmethod
    def of(cls, batch: Batch) -> Run:
        """Of a batch."""
        samples, padding = samples_in(batch), padding_of(batch)
        if padding is not None:
            return cls(samples, padding, max(float(padding.sum()) / samples, 1.0))
        x = tensors_in(batch)[0]
        if x.ndim == 3 or (x.ndim == 2 and not x.is_floating_point()):
            return cls(samples, None, float(max(x.shape[1], 1)))
        return cls(samples, None, None)


class Stream(ABC):
    """Runs blocks on all calibration batches."""

    @abstractmethod
    def begin(self) -> None:
        """The first of the blocks comes next; what the model has become so far stays."""

    @abstractmethod
    def run(self, index: int, begin: Callable[[Run], None], end: Callable[[], None]) -> None:
        """Runs block `index` on every batch; `begin` and `end` are called around each one."""

    @abstractmethod
    def advance(self, index: int) -> None:
        """Block `index` is what it will be: its results are what the next one is given."""

    def state(self) -> list[torch.Tensor]:
        """What is needed to go on, besides the model."""
        return []

    @abstractmethod
    def restore(self, state: list[torch.Tensor]) -> None:
        """Goes on from there, after :meth:`begin`."""

    @abstractmethod
    def end(self) -> None:
        """The last of the blocks is done: nothing is held any more."""

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs that are held."""
        return sum(x.nbytes for x in self.state())


class WholeModel(Stream):
    """The whole model runs, whichever block is meant: right for any model, and slow."""

    def __init__(self, model: nn.Module, calibration: Calibration) -> None:
        self._model, self._calibration = model, calibration

    def begin(self) -> None:
        """Nothing."""

    def run(self, index: int, begin: Callable[[Run], None], end: Callable[[], None]) -> None:
        """Runs the model on every batch."""
        for batch in self._calibration:
            begin(Run.of(batch))
            # A copy, since a model may write into what it is given.
            call(self._model, copied(batch))
            end()

    def advance(self, index: int) -> None:
        """Nothing: the next run passes through what the blocks have become."""

    def restore(self, state: list[torch.Tensor]) -> None:
        """Nothing: the model's own weights are the state."""

    def end(self) -> None:
        """Nothing."""


class BlockStream(Stream):
    """Keeps the inputs of one block, which alone runs; then those of the next one.

    All other arguments of every block are those that the model gave it, whatever they are.
    """

    def __init__(self, model: nn.Module, chain: Chain, calibration: Calibration) -> None:
        self._model, self._chain = model, chain
        self._batches = calibration.batches
        self._calls: list[list[Arguments]] = []
        self._inputs: list[torch.Tensor] = []

    def begin(self) -> None:
        """Takes what the model gives its blocks, once for every batch."""
        for batch in self._batches:
            x, calls = self._chain.arguments(self._model, batch)
            self._inputs.append(x)
            self._calls.append(_without_copies(calls, self._calls[-1]) if self._calls else calls)

    def run(self, index: int, begin: Callable[[Run], None], end: Callable[[], None]) -> None:
        """Runs one block on every batch."""
        for i, batch in enumerate(self._batches):
            begin(Run.of(batch))
            # A copy, since a block may write into what it is given.
            self._chain.run(index, self._calls[i][index], self._inputs[i].clone())
            end()

    def advance(self, index: int) -> None:
        """Replaces the inputs by the block's results, one after the other."""
        for i, x in enumerate(self._inputs):
            self._inputs[i] = self._chain.run(index, self._calls[i][index], x)

    def state(self) -> list[torch.Tensor]:
        """The inputs of the block that comes next."""
        return self._inputs

    def restore(self, state: list[torch.Tensor]) -> None:
        """Takes the inputs of the block that comes next."""
        self._inputs = [
            x.to(own.device, own.dtype) for x, own in zip(state, self._inputs, strict=True)
        ]

    def end(self) -> None:
        """Lets all of it go."""
        self._inputs, self._calls = [], []

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs, and of all other arguments of all blocks."""
        held = [x for x in tree_leaves(self._calls) if isinstance(x, torch.Tensor)]
        return super().nbytes + sum({id(x): x.nbytes for x in held}.values())


def _without_copies(calls: list[Arguments], known: list[Arguments]) -> list[Arguments]:
    """Arguments, with those that another batch has just the same, such as masks, held once."""
    leaves, structure = tree_flatten(calls)
    others, other = tree_flatten(known)
    if structure != other:
        return calls
    instead: dict[int, object] = {}
    for x, y in zip(leaves, others, strict=True):
        if isinstance(x, torch.Tensor) and id(x) not in instead:
            instead[id(x)] = y if _equal(x, y) else x
    held: list[Arguments] = tree_unflatten([instead.get(id(x), x) for x in leaves], structure)
    return held


def _equal(x: torch.Tensor, y: object) -> bool:
    return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
