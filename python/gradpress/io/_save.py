"""Saving a model in the space that its zeros and its integers leave."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from gradpress.io._entries import Entries, collect
from gradpress.io._header import Header
from gradpress.io._layout import Layout, plan
from gradpress.io._report import SavedFile, SizeTable
from gradpress.io._write import write_file


def size_table(
    model: nn.Module | Mapping[str, torch.Tensor], *, format: str = "gradpress"
) -> SizeTable:
    """What :func:`save` would write, without writing it.

    Args:
        model: A module or a state dict.
        format: As :func:`save` takes it.

    Raises:
        TypeError, ValueError: as :func:`save`.

    Example:
        >>> import torch, gradpress
        >>> weight = torch.eye(64)
        >>> gradpress.io.size_table({"weight": weight})
        name    shape    dtype  sparsity   format  dense bytes  stored bytes  ratio
        ---------------------------------------------------------------------------
        weight  64x64  float32     98.4%  bitmask       16,384           768  0.047
        ---------------------------------------------------------------------------
        total                                           16,384           768  0.047
    """
    entries = collect("size_table", model)
    return _table(entries, plan("size_table", entries.tensors, format))


def save(
    model: nn.Module | Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    format: str = "gradpress",
) -> SavedFile:
    """Saves a model's state as one safetensors file; :func:`load` gives it back bit for bit.

    A file takes the space that the model's zeros leave: a float32, float16 or bfloat16 tensor is
    stored without them (:func:`gradpress.prune.pack_sparse`) as ``"2:4"`` or as ``"bitmask"`` where
    that is smaller than the dense tensor, whichever is smallest. Quantized weights are stored as
    their codes, scales and zero points. Tensors that share their memory are stored once. A smaller
    file does not make a model faster: :func:`load` restores dense tensors.

    An element is left out when all its bits are zero. Negative zeros, which a product with a mask
    leaves, are stored like any other value; the table says how many there are, and
    :func:`gradpress.prune.apply_masks_` writes positive ones.

    The file replaces what stands at `path` once it is complete. Tensors are packed and moved to the
    host one at a time. The layout is described in ``docs/container.md``.

    Args:
        model: A module or a state dict of plain tensors and
            :class:`gradpress.nn.QuantizedWeight`, on any device.
        path: The file. Its folder has to exist.
        format: ``"gradpress"`` as above; ``"dense"`` for a file that every reader of safetensors
            loads, with quantized weights dequantized and every element stored.

    Returns:
        The table of all tensors with their sizes before and after; it prints.

    Raises:
        TypeError: the state holds something else than tensors, or a dtype that safetensors has not.
        ValueError: `format` is unknown, a tensor is on the meta device, or names collide.
        FileNotFoundError: the folder does not exist.
        RuntimeError: a tensor was changed while it was saved.

    Example:
        >>> import tempfile, torch, gradpress
        >>> weight = torch.eye(64)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = gradpress.io.save({"weight": weight}, f"{folder}/model.safetensors")
        ...     back = gradpress.io.load(f"{folder}/model.safetensors")
        >>> saved.dense_bytes, saved.stored_bytes, torch.equal(back["weight"], weight)
        (16384, 768, True)
    """
    path = Path(path)
    entries = collect("save", model)
    layouts = plan("save", entries.tensors, format)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save: the folder of path does not exist: {path.parent}")
    size = write_file(path, entries.tensors, layouts, _header(entries, layouts, format))
    table = _table(entries, layouts)
    return SavedFile(rows=table.rows, aliases=table.aliases, path=path, file_bytes=size)


def _table(entries: Entries, layouts: dict[str, Layout]) -> SizeTable:
    return SizeTable(tuple(layout.row for layout in layouts.values()), entries.aliases)


def _header(entries: Entries, layouts: dict[str, Layout], format: str) -> dict[str, str]:
    records = {name: layout.record for name, layout in layouts.items() if layout.record is not None}
    return Header(format, records, entries.aliases, entries.order).to_metadata()
