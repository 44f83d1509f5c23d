"""Writing a safetensors file tensor by tensor, all or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from gradpress.io._entries import DTYPE_CODES
from gradpress.io._layout import Layout, split

_ALIGNMENT = 8


def write_file(
    path: Path,
    tensors: dict[str, torch.Tensor],
    layouts: dict[str, Layout],
    metadata: dict[str, str],
) -> int:
    """Writes tensors as their layouts say, one at a time, so that no second model is in memory.

    Returns:
        The bytes of the file.
    """
    # Readers map the file into memory: wide elements first keeps all of them aligned.
    pieces = [
        (-torch.empty((), dtype=getattr(torch, part.dtype)).itemsize, name, key)
        for name, layout in layouts.items()
        for key, part in layout.parts.items()
    ]
    order = [(name, key) for _, name, key in sorted(pieces, key=lambda piece: piece[0])]
    with _replaced(path) as file:
        file.write(_head(order, layouts, metadata))
        # The parts of a tensor may lie far from each other; those still to come wait here.
        waiting: dict[str, torch.Tensor] = {}
        for name, key in order:
            if key not in waiting:
                waiting.update(split(tensors[name], layouts[name]))
            _write_tensor(file, waiting.pop(key))
        return file.tell()


def _head(
    order: list[tuple[str, str]], layouts: dict[str, Layout], metadata: dict[str, str]
) -> bytes:
    head: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, key in order:
        part = layouts[name].parts[key]
        head[key] = {
            "dtype": DTYPE_CODES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [offset, offset + part.nbytes],
        }
        offset += part.nbytes
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).reshape(-1)
    if tensor.numel():
        file.write(tensor.view(torch.uint8).numpy().data)


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when all of it is on the disk."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        # In a folder of its own the file gets the permissions that any new file gets.
        temporary = Path(folder) / path.name
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
