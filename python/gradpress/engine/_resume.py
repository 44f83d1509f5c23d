"""What is kept in a folder so that a compression that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from gradpress.engine._batches import Calibration
from gradpress.engine._recipe import Recipe
from gradpress.engine._report import CompressedLayer

_VERSION = 1
_STATE = "state.json"


class Progress:
    """Finished blocks in a folder: their weights, their rows, and the next block's inputs.

    The state file is written last, and names the others: what a kill leaves unfinished is not
    named by it.

    Args:
        folder: Made when it is missing.
        fingerprint: Of model, recipe and calibration.

    Raises:
        ValueError: the folder holds the progress of another compression.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._state: dict[str, Any] = {
            "version": _VERSION,
            "fingerprint": fingerprint,
            "blocks": [],
        }
        path = self._folder / _STATE
        if path.exists():
            found = json.loads(path.read_text())
            if (found.get("version"), found.get("fingerprint")) != (_VERSION, fingerprint):
                raise ValueError(
                    f"compress: resume must be the folder of a compression of this model by this"
                    f" recipe with this calibration, or an empty one, got {self._folder} of another"
                )
            self._state = found

    @property
    def done(self) -> int:
        """Blocks that are finished."""
        return len(self._state["blocks"])

    def rows(self) -> list[CompressedLayer]:
        """Of the finished blocks."""
        return [
            CompressedLayer(**{**row, "shape": tuple(row["shape"])})
            for block in self._state["blocks"]
            for row in block
        ]

    def weights(self, index: int) -> dict[str, torch.Tensor]:
        """The new weights of a finished block, as matrices, by layers' names."""
        found: dict[str, torch.Tensor] = self._load(f"block-{index}.pt")
        return found

    def inputs(self) -> list[torch.Tensor]:
        """The inputs of the block that comes next."""
        found: list[torch.Tensor] = self._load(f"inputs-{self.done}.pt")
        return found

    def finish(
        self,
        weights: dict[str, torch.Tensor],
        rows: Sequence[CompressedLayer],
        inputs: list[torch.Tensor],
    ) -> None:
        """A block more is finished."""
        done = self.done
        self._save(f"block-{done}.pt", {name: w.clone() for name, w in weights.items()})
        self._save(f"inputs-{done + 1}.pt", inputs)
        self._state["blocks"].append([asdict(row) for row in rows])
        temporary = self._folder / f"{_STATE}.new"
        temporary.write_text(json.dumps(self._state))
        os.replace(temporary, self._folder / _STATE)
        (self._folder / f"inputs-{done}.pt").unlink(missing_ok=True)

    def _load(self, name: str) -> Any:
        return torch.load(self._folder / name, map_location="cpu", weights_only=True)

    def _save(self, name: str, value: Any) -> None:
        temporary = self._folder / f"{name}.new"
        torch.save(value, temporary)
        os.replace(temporary, self._folder / name)


def fingerprint(model: nn.Module, recipe: Recipe, calibration: Calibration | None) -> str:
    """A hash of everything that decides what a compression gives."""
    digest = hashlib.blake2b(digest_size=20)
    digest.update(f"{type(model).__qualname__} {recipe!r}".encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(name.encode())
            _add(digest, tensor)
    for batch in calibration or ():
        # Keys and positions too: ids and labels may be the same tensors the other way round.
        leaves, structure = tree_flatten(batch)
        digest.update(str(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                _add(digest, leaf)
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _add(digest: Any, tensor: torch.Tensor) -> None:
    digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
