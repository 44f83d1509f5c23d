"""What the projectors of an optimizer are doing, as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ProjectorRow:
    """One projected weight.

    Attributes:
        name: The parameter's name, or its ordinal.
        shape: The parameter's shape.
        rank: Directions kept.
        steps: Steps taken.
        refreshes: How often the projector was found anew.
        interval: Steps between refreshes now.
        energy: Share of the gradient's squared norm captured at the last refresh.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    steps: int
    refreshes: int
    interval: int
    energy: float

    @classmethod
    def of(cls, name: str, p: torch.Tensor, state: dict[str, Any]) -> ProjectorRow:
        """From an optimizer's state."""
        return cls(
            name=name,
            shape=tuple(p.shape),
            rank=state["projector_rank"],
            steps=int(state["step"].item()),
            refreshes=state["projector_refreshes"],
            interval=state["projector_interval"],
            energy=state["projector_energy"],
        )


@dataclass(frozen=True)
class ProjectorReport:
    """All projected weights of an optimizer; prints as a table."""

    rows: tuple[ProjectorRow, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """One dict for each row, fit for a DataFrame."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        """The table."""
        width = max([len(row.name) for row in self.rows], default=4)
        head = f"{'name':<{width}}  {'shape':>14}  rank  steps  refreshes  interval  energy"
        lines = [
            f"{r.name:<{width}}  {'x'.join(map(str, r.shape)):>14}  {r.rank:>4}  {r.steps:>5}"
            f"  {r.refreshes:>9}  {r.interval:>8}  {r.energy:>6.3f}"
            for r in self.rows
        ]
        return "\n".join([head, *lines])

    __repr__ = __str__
