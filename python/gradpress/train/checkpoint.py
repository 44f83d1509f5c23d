"""Checkpoints that are whole or absent, and read without executing anything."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradpress.train.errors import UserError, require
from gradpress.train.files import remove_folder, remove_leftovers, whole_folder, write_json

_MODEL = "model.safetensors"
_OPTIMIZER = "optimizer.pt"
_TRAINER = "trainer.json"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk.

    Attributes:
        folder: Where it stands.
        trainer: What `trainer.json` says; `step` counts the completed steps.
    """

    folder: Path
    trainer: dict[str, Any]

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return int(self.trainer["step"])

    def load(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Puts the stored weights and states into a model and an optimizer, bit for bit.

        Raises:
            UserError: The files do not fit them.
        """
        from gradpress import nn

        load_file = require("safetensors.torch").load_file
        try:
            nn.load_flat_state_dict_(model, load_file(self.folder / _MODEL))
            optimizer.load_state_dict(
                torch.load(self.folder / _OPTIMIZER, map_location="cpu", weights_only=True)
            )
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"{self.folder}: cannot be loaded ({error})") from error


def save_checkpoint(
    checkpoints: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer: dict[str, Any],
    keep: int,
) -> Path:
    """Writes `step-N`, and only then removes what exceeds the newest `keep`.

    The files are written into a sibling folder, synchronized, and take their name by one rename.
    A killed process or a power cut leaves the previous checkpoint in place.

    Args:
        checkpoints: Folder of all checkpoints; it is created when missing.
        model: Its weights go to `model.safetensors`, quantized ones as codes and scales.
        optimizer: Its state goes to `optimizer.pt`, which loads with `weights_only=True`.
        trainer: JSON-ready values with at least `step`.
        keep: Checkpoints that remain, at least 1.

    Returns:
        The new folder.
    """
    from gradpress import nn

    save_file = require("safetensors.torch").save_file
    target = checkpoints / f"step-{trainer['step']}"
    if not _is_complete(target):
        with whole_folder(target) as folder:
            save_file(nn.flatten_state_dict(model), folder / _MODEL)
            torch.save(optimizer.state_dict(), folder / _OPTIMIZER)
            sizes = {name: (folder / name).stat().st_size for name in (_MODEL, _OPTIMIZER)}
            write_json(folder / _TRAINER, {**trainer, "files": sizes})
    for folder in _complete_folders(checkpoints)[:-keep]:
        remove_folder(folder)
    return target


def newest_checkpoint(checkpoints: Path) -> Checkpoint | None:
    """The complete checkpoint with the most steps, or None."""
    folders = _complete_folders(checkpoints)
    if not folders:
        return None
    trainer = json.loads((folders[-1] / _TRAINER).read_text(encoding="utf-8"))
    return Checkpoint(folders[-1], trainer)


def clean_checkpoints(checkpoints: Path) -> None:
    """Removes what interrupted writers left, and folders whose files are missing or cut off."""
    if not checkpoints.is_dir():
        return
    remove_leftovers(checkpoints)
    for folder in _numbered_folders(checkpoints):
        if not _is_complete(folder):
            remove_folder(folder)


def _numbered_folders(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    folders = [path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def _complete_folders(checkpoints: Path) -> list[Path]:
    return [folder for folder in _numbered_folders(checkpoints) if _is_complete(folder)]


def _is_complete(folder: Path) -> bool:
    try:
        trainer = json.loads((folder / _TRAINER).read_text(encoding="utf-8"))
        return all(
            (folder / name).stat().st_size == size for name, size in trainer["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False
