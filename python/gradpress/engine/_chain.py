"""Blocks that follow each other: what each is given, and whether nothing else joins them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from gradpress.engine._batches import Batch, call, copied
from gradpress.engine._blocks import replaced_forward
from gradpress.engine._layers import version_of

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
#: Where a block takes what the one before it returns: a position, or a keyword.
Slot: TypeAlias = int | str
#: Results that differ by more than so many roundings of their dtype are not the same.
_ROUNDINGS = 4


class _Stop(BaseException):
    """The rest of the model is not needed; no exception that a model may catch."""


@dataclass(frozen=True)
class Chain:
    """Blocks each of which passes its result on to the next one, and nothing else.

    Attributes:
        blocks: In order.
        slot: Where a block takes it.
        parts: For each block how long the tuple is that it returns; None for a tensor.
        runs: Whether blocks have to run for the model to tell what it gives them; otherwise they
            may hand on what they are given.
    """

    blocks: tuple[nn.Module, ...]
    slot: Slot
    parts: tuple[int | None, ...]
    runs: bool = False

    def arguments(
        self, model: nn.Module, batch: Batch, factor: float | None = None
    ) -> tuple[torch.Tensor, list[Arguments]]:
        """What the first block takes, and what the model gives all of them besides.

        Args:
            model: It runs until the last block would.
            batch: What it is called with.
            factor: What blocks that run return is multiplied by it.
        """
        calls: list[Arguments] = []
        first: list[torch.Tensor] = []

        def recorder(i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                x = _given((args, kwargs), self.slot)
                if i == 0:
                    first.append(x.clone())  # a batch of the caller's, or what a block writes into
                calls.append(_with_input(args, kwargs, self.slot, None))
                if i == len(self.blocks) - 1:
                    raise _Stop
                if self.runs:
                    output = forward(*args, **kwargs)
                    return output if factor is None else _scaled(output, factor)
                parts = self.parts[i]
                return x if parts is None else (x, *[None] * (parts - 1))

            return record

        with ExitStack() as stack:
            for i, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, recorder(i, block.forward)))
            with contextlib.suppress(_Stop):
                call(model, copied(batch))
        return first[0], calls

    def run(self, index: int, arguments: Arguments, x: torch.Tensor) -> torch.Tensor:
        """The result of one block."""
        args, kwargs = _with_input(*arguments, self.slot, x)
        result = first_tensor(self.blocks[index](*args, **kwargs))
        assert result is not None
        return result


def find_chain(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> Chain | None:
    """Runs one batch and watches: None where the blocks do not simply follow each other.

    The result of every block, or its first part, must be what the next one is given, in the same
    place, and no other result may go to a block. That this is all, is tried: the blocks alone must
    give what they give in the model, and what they are given besides must not depend on results.
    """
    trace = _Trace(blocks)
    with trace:
        call(model, copied(batch))
    expected = trace.result
    if not trace.simple or trace.slot is None or expected is None:
        return None
    chain = Chain(tuple(blocks), trace.slot, tuple(trace.parts), runs=True)
    x, calls = chain.arguments(model, batch)
    for i, arguments in enumerate(calls):
        x = chain.run(i, arguments, x)
    if not _close(x, expected):
        return None
    # The model ran before: what fails now is due to what blocks are made to return.
    with contextlib.suppress(Exception):
        silent = replace(chain, runs=False)
        if _same(silent.arguments(model, batch)[1], calls):
            return silent
    with contextlib.suppress(Exception):
        if _same(chain.arguments(model, batch, factor=0.5)[1], calls):
            return chain
    return None


def _same(first: Any, second: Any) -> bool:
    """Whether arguments are the same, as far as can be told of objects that are no tensors."""
    leaves, structure = tree_flatten(first)
    others, other = tree_flatten(second)
    pairs = zip(leaves, others, strict=False)
    return structure == other and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else type(x) is type(y) for x, y in pairs
    )


def _scaled(output: Any, factor: float) -> Any:
    if isinstance(output, torch.Tensor):
        return output * factor
    return (output[0] * factor, *output[1:])


def _close(x: torch.Tensor, expected: torch.Tensor) -> bool:
    if x.shape != expected.shape or x.dtype != expected.dtype:
        return False
    if torch.equal(x, expected) or not x.is_floating_point():
        return torch.equal(x, expected)
    # Kernels that add in any order, as some on CUDA devices do.
    allowed = _ROUNDINGS * torch.finfo(x.dtype).eps * float(expected.float().norm())
    return float((x.float() - expected.float()).norm()) <= allowed


class _Trace:
    """What is seen of blocks while a model runs once. Results are not kept longer than needed."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._handles: list[Any] = []
        self._called = 0
        self._version = 0
        self._earlier: list[weakref.ref[torch.Tensor]] = []
        self._entrances: set[Slot] = set()
        self._slots: set[Slot | None] = set()
        self._as_listed = True
        self.parts: list[int | None] = []
        self.result: torch.Tensor | None = None

    @property
    def slot(self) -> Slot | None:
        """The place in which all blocks but the first one took the result before."""
        return next(iter(self._slots), None)

    @property
    def simple(self) -> bool:
        """Whether each block ran once, in order, and took nothing but the last one's result."""
        complete = self._as_listed and self._called == len(self._blocks)
        return complete and len(self._slots) == 1 and self.slot in self._entrances

    def __enter__(self) -> _Trace:
        for i, block in enumerate(self._blocks):
            before, after = self._before(i), self._after(i)
            self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(block.register_forward_hook(after))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, i: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._as_listed &= i == self._called
            self._called += 1
            passed: list[tuple[Slot, Any]] = [*enumerate(args), *kwargs.items()]
            if i == 0:
                self._entrances = {k for k, x in passed if isinstance(x, torch.Tensor)}
            else:
                self._slots.add(self._slot_of(passed))

        return hook

    def _slot_of(self, passed: list[tuple[Slot, Any]]) -> Slot | None:
        result = self.result
        found = [slot for slot, x in passed if x is result]
        if result is None or len(found) != 1 or version_of(result) != self._version:
            return None
        others = [value for slot, value in passed if slot != found[0]]
        earlier = {id(x) for known in self._earlier if (x := known()) is not None}
        return None if any(id(x) in earlier for x in _tensors_in(others)) else found[0]

    def _after(self, i: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            self._earlier += map(weakref.ref, _tensors_in(output))
            self.result = first_tensor(output)
            if i == len(self._blocks) - 1 and self.result is not None:
                self.result = self.result.clone()  # the model may write into it
            self.parts.append(len(output) if isinstance(output, tuple | list) else None)
            if self.result is not None:
                self._version = version_of(self.result)

        return hook


def first_tensor(output: Any) -> torch.Tensor | None:
    """A result, or the first part of one."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors_in(inner)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))


def _given(arguments: Arguments, slot: Slot) -> Any:
    args, kwargs = arguments
    return kwargs[slot] if isinstance(slot, str) else args[slot]


def _with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot, x: torch.Tensor | None
) -> Arguments:
    """The arguments of a call with another tensor in the slot."""
    if isinstance(slot, str):
        return args, {**kwargs, slot: x}
    return (*args[:slot], x, *args[slot + 1 :]), kwargs
