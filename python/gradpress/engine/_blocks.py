"""The repeated blocks of a model, found in the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from gradpress.engine._layers import Layer


@dataclass(frozen=True)
class _List:
    """Modules that may be blocks."""

    blocks: tuple[nn.Module, ...]
    inside: tuple[frozenset[int], ...]

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> _List:
        inside = (frozenset(map(id, block.modules())) for block in modules)
        return cls(tuple(modules), tuple(inside))

    def parts(self, sizes: dict[int, int]) -> tuple[int, int]:
        """Weights of the largest block, or of all outside if these are more; and of the latter."""
        held = self._held(sizes)
        outside = sum(sizes.values()) - sum(held)
        return max(*held, outside), outside

    def useful(self, sizes: dict[int, int], taken: set[int]) -> bool:
        """Whether it splits layers that no other list has."""
        apart = all(taken.isdisjoint(modules) for modules in self.inside)
        return apart and sum(held > 0 for held in self._held(sizes)) > 1

    def _held(self, sizes: dict[int, int]) -> list[int]:
        return [
            sum(size for module, size in sizes.items() if module in block) for block in self.inside
        ]


def find_blocks(model: nn.Module, layers: Sequence[Layer]) -> list[tuple[nn.Module, ...]]:
    """The lists of modules that cut the layers into the smallest parts, in the model's order.

    Lists are `ModuleList`s, and `Sequential`s of more than one module; no list lies in a block of
    another one. A transformer has one, an encoder with a decoder two, a model without any none.
    """
    sizes = {id(layer.module): layer.weight.numel() for layer in layers}
    lists = [
        _List.of(list(module))
        for module in model.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len(set(map(id, module))) == len(module)
    ]
    taken: set[int] = set()
    chosen: list[_List] = []
    while useful := [one for one in lists if one.useful(sizes, taken)]:
        # Of lists inside each other that cut alike, the last one has smaller blocks.
        best = min(reversed(useful), key=lambda one: one.parts(sizes))
        chosen.append(best)
        taken.update(*best.inside)
        sizes = {module: size for module, size in sizes.items() if module not in taken}
    return [one.blocks for one in lists if one in chosen]


@contextmanager
def replaced_forward(block: nn.Module, forward: object) -> Iterator[None]:
    """A module runs something else, until it is as before."""
    before = block.__dict__.get("forward")
    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = before
