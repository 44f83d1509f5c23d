"""Which layers are compressed together, in which order, and by what they are run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from gradpress.engine._batches import Calibration
from gradpress.engine._blocks import find_blocks
from gradpress.engine._chain import find_chain
from gradpress.engine._layers import Layer
from gradpress.engine._recipe import Recipe
from gradpress.engine._stream import BlockStream, Stream, WholeModel


@dataclass(frozen=True)
class Block:
    """Layers that are compressed together.

    Attributes:
        layers: None of them where the recipe is not meant for any layer of a block.
        stream: What runs it; None where nobody looks at inputs.
        index: Which block of its stream it is.
        last: Whether the stream ends with it.
    """

    layers: tuple[Layer, ...]
    stream: Stream | None = None
    index: int = 0
    last: bool = True

    def gradient_bytes(self, recipe: Recipe) -> int:
        """What statistics of its layers' gradients take."""
        return sum(recipe.gradient_bytes(layer) for layer in self.layers)


def plan_blocks(
    model: nn.Module,
    layers: Sequence[Layer],
    recipe: Recipe,
    calibration: Calibration | None,
) -> list[Block]:
    """All layers in the order they are compressed: list after list, then those in none."""
    whole = None
    if calibration is not None and _observes_inputs(recipe):
        whole = WholeModel(model, calibration)
    if recipe.whole_model:
        return [Block(tuple(layers), whole)]
    blocks: list[Block] = []
    for modules in find_blocks(model, layers):
        groups = [_layers_in(module, layers) for module in modules]
        used = max(i for i, group in enumerate(groups) if group) + 1
        stream: Stream | None = whole
        if calibration is not None and whole is not None:
            chain = find_chain(model, modules, calibration.batches[0])
            if chain is not None:
                stream = BlockStream(model, chain, calibration)
        for i, group in enumerate(groups[:used]):
            if group or isinstance(stream, BlockStream):
                blocks.append(Block(group, stream, i, i == used - 1))
    held = {id(layer) for block in blocks for layer in block.layers}
    rest = tuple(layer for layer in layers if id(layer) not in held)
    return [*blocks, Block(rest, whole)] if rest else blocks


def _observes_inputs(recipe: Recipe) -> bool:
    """Whether a recipe wants to know anything of inputs."""
    return type(recipe).input_statistics is not Recipe.input_statistics


def _layers_in(block: nn.Module, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    inside = {id(module) for module in block.modules()}
    return tuple(layer for layer in layers if id(layer.module) in inside)


def plan_groups(
    model: nn.Module, blocks: Sequence[Block], recipe: Recipe, limit: int | None
) -> list[list[Block]]:
    """Consecutive blocks whose gradients are collected together, in no more than `limit` bytes.

    Raises:
        ValueError: one block needs more; or there would have to be several groups, and a block of
            another than the last cannot be run while all weights are what they were.
    """
    groups: list[list[Block]] = [[]]
    held = 0
    for block in blocks:
        size = block.gradient_bytes(recipe)
        if limit is not None and size > limit:
            raise ValueError(
                f"compress: gradient_memory must be at least {size} bytes, what the block of"
                f" {block.layers[0].name} needs, got {limit}"
            )
        if limit is not None and held + size > limit and groups[-1]:
            groups.append([])
            held = 0
        groups[-1].append(block)
        held += size
    early = [block.stream for group in groups[:-1] for block in group]
    if any(stream is not early[0] or isinstance(stream, WholeModel) for stream in early):
        raise ValueError(
            f"compress: gradient_memory must be left out or greater, since the blocks of"
            f" {type(model).__name__} do not simply follow each other, got {limit}"
        )
    return groups
