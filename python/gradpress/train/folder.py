"""The folder of a run: its configuration, and one process at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpress.train.config import TrainConfig, option
from gradpress.train.errors import UserError
from gradpress.train.files import remove_leftovers, write_json

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is carried out; a resumed run may change these.

    `threads` and `device` decide the order of sums in matrix products, so results agree bit for
    bit only between equal numbers of threads on the CPU. What is in use is recorded, and a resumed
    run takes it again unless told otherwise.
    """

    save_every: int = option("steps between two checkpoints; 0: only at the end", int, default=100)
    keep: int = option("checkpoints to keep", int, default=1)
    threads: int = option("CPU threads; 0: torch's choice", int, default=0)
    device: str = option("auto, cpu, cuda or cuda:N", default="auto", metavar="DEVICE")
    plot: bool = option("draw loss.png", default=True)

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: A value is out of range.
        """
        for name, bound in (("save_every", 0), ("keep", 1), ("threads", 0)):
            value = getattr(self, name)
            if value < bound:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {value}: must be at least {bound}")


def create_folder(folder: Path, config: TrainConfig, options: RunOptions) -> None:
    """Makes the folder of a new run.

    Raises:
        UserError: The folder holds something already, or cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file")
    if (folder / "config.json").exists():
        raise UserError(f"--out {folder}: holds a run already; continue it with --resume")
    if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"--out {folder}: is not empty")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror})") from error
    write_options(folder, config, options)


def write_options(folder: Path, config: TrainConfig, options: RunOptions) -> None:
    """Writes `config.json`."""
    write_json(
        folder / "config.json",
        {
            "format": _FORMAT,
            "config": config.to_dict(),
            "options": dataclasses.asdict(options),
        },
    )


def read_options(folder: Path) -> tuple[TrainConfig, RunOptions]:
    """Reads `config.json`.

    Raises:
        UserError: There is none, or it is not of this format.
    """
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"--out {folder}: holds no run to resume") from error
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error})") from error
    if stored.get("format") != _FORMAT:
        raise UserError(f"{path}: has format {stored.get('format')}, not {_FORMAT}")
    try:
        return TrainConfig.from_dict(stored["config"]), RunOptions(**stored["options"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: does not fit this version ({error})") from error


def read_options_for_resume(
    folder: Path, config_changes: dict[str, Any], option_changes: dict[str, Any]
) -> tuple[TrainConfig, RunOptions]:
    """The stored options of a run, with the changes that a resumed run may make.

    Args:
        folder: The run's folder.
        config_changes: Fields of `TrainConfig` that the caller named; they must agree.
        option_changes: Fields of `RunOptions` that the caller named; they win.

    Returns:
        What the resumed run goes by; `config.json` stays as it is.

    Raises:
        UserError: There is no run, or a named field differs from the stored one.
    """
    config, options = read_options(folder)
    changed = config.differences(config_changes)
    if changed:
        name = changed[0]
        raise UserError(
            f"--{name.replace('_', '-')} {config_changes[name]}: this run has "
            f"{getattr(config, name)}; a resumed run changes only "
            "--save-every, --keep, --threads, --device and --no-plot"
        )
    return config, dataclasses.replace(options, **option_changes)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a run's folder while the block runs.

    The lock ends with the process, however that ends. Systems without `fcntl` have no lock.

    Raises:
        UserError: Another process holds the folder.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--out {folder}: another process is working on this run") from error
        yield
    finally:
        os.close(descriptor)


def clean_folder(folder: Path) -> None:
    """Removes what interrupted writers left beside the run's files."""
    remove_leftovers(folder)


def discard_folder(folder: Path) -> None:
    """Removes a run that never came to its first step."""
    shutil.rmtree(folder, ignore_errors=True)
