"""Calibration batches: how a model is called with them, and what they hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

Batch: TypeAlias = Any
Loss: TypeAlias = Callable[[nn.Module, Batch], torch.Tensor]
#: Labels that a causal loss leaves out.
_IGNORED = -100


@dataclass(frozen=True)
class Calibration:
    """Batches as they are used: more than once, in the same order.

    Attributes:
        batches: Tensors, mappings of keyword arguments, or tuples of positional ones.
    """

    batches: tuple[Batch, ...]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def samples(self) -> int:
        """Sequences, images or rows in all batches."""
        return sum(map(samples_in, self.batches))


def read_calibration(op: str, batches: Iterable[Batch] | None, device: torch.device) -> Calibration:
    """The batches on a device.

    Raises:
        TypeError: `batches` is not iterable, or a batch holds no tensor.
        ValueError: there are none.
    """
    if batches is None:
        raise ValueError(f"{op}: calibration must be batches of inputs for this recipe, got None")
    if isinstance(batches, torch.Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{op}: calibration must be an iterable of batches, got {type(batches).__name__};"
            " one batch goes into a list"
        )
    read = []
    for i, batch in enumerate(batches):
        if not tensors_in(batch):
            raise TypeError(
                f"{op}: calibration[{i}] must be a tensor, or a mapping or tuple with tensors,"
                f" got {type(batch).__name__}"
            )
        if samples_in(batch):
            read.append(_moved(batch, device))
    if not read:
        raise ValueError(f"{op}: calibration must hold at least one sample, got none")
    return Calibration(tuple(read))


def _moved(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Mapping):
        batch = dict(batch)  # what tokenizers return is a mapping, but no dict
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, batch)


def copied(batch: Batch) -> Batch:
    """A batch that a model may write into."""
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, batch)


def tensors_in(batch: Batch) -> list[torch.Tensor]:
    """The tensors of a batch that have dimensions."""
    if isinstance(batch, Mapping):
        batch = dict(batch)
    return [x for x in tree_leaves(batch) if isinstance(x, torch.Tensor) and x.ndim]


def samples_in(batch: Batch) -> int:
    """The first dimension of the first tensor of a batch."""
    return int(tensors_in(batch)[0].shape[0])


def call(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """Calls a model as its batch asks for: by keywords, by positions, or with the tensor."""
    if isinstance(batch, Mapping):
        return model(**{**batch, **options})
    if isinstance(batch, tuple | list):
        return model(*batch, **options)
    return model(batch, **options)


def padding_of(batch: Batch) -> torch.Tensor | None:
    """Bool ``[samples, tokens]``, True where a token is real; None where all of them are."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    real = mask != 0
    return None if bool(real.all()) else real


def single_samples(batch: Batch) -> Iterator[Batch]:
    """The samples of a batch, as batches of one."""
    count = samples_in(batch)
    if count == 1:
        yield batch
        return
    for i in range(count):
        yield tree_map(lambda x, i=i: _narrow(x, i, count), batch)


def _narrow(x: Any, i: int, count: int) -> Any:
    if isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == count:
        return x[i : i + 1]
    return x


def causal_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The model's own loss on a batch: with its labels, or those of predicting the next token.

    Raises:
        ValueError: the model gives no loss for it.
    """
    found = None
    with contextlib.suppress(TypeError):
        if isinstance(batch, Mapping):
            labels = batch.get("labels")
            if labels is None and "input_ids" in batch:
                labels = batch["input_ids"]
                real = padding_of(batch)
                if real is not None:
                    labels = labels.masked_fill(~real, _IGNORED)
            found = model(**{**batch, "labels": labels})
        elif isinstance(batch, torch.Tensor):
            found = model(batch, labels=batch)
    loss = getattr(found, "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise ValueError(
            "compress: loss must be a function of model and batch that returns a scalar, since"
            f" {type(model).__name__} gives no loss for batches of {type(batch).__name__}; got None"
        )
    return loss
