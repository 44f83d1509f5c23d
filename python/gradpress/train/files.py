"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TEMPORARY = ".tmp"


def fsync_path(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and writes their entries through by itself
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file's content: after a crash the old or the new one stands, never a part."""
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that people can read, all or nothing."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only when it is complete and on the disk.

    Whatever stands at `path` is replaced. If the block raises, nothing remains of the new folder.

    Args:
        path: The folder's final name.

    Yields:
        The empty folder beside it that is to be filled.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            fsync_path(file)
        fsync_path(temporary)
        remove_folder(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(path.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder; one that is half gone never bears its old name."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.old{_TEMPORARY}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Removes what interrupted writers left in a folder."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
