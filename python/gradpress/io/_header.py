"""What a file says of itself: JSON among the metadata of safetensors."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from gradpress.io._layout import FILE_FORMATS, part_names

#: The layout that this package writes; it reads this one and all before it.
VERSION = 1
KEY = "gradpress"
_SPARSE_DTYPES = ("float32", "float16", "bfloat16")
_QUANTIZED_DTYPES = ("float64", *_SPARSE_DTYPES)
_DTYPES = {
    "bitmask": _SPARSE_DTYPES,
    "2:4": _SPARSE_DTYPES,
    "int8": _QUANTIZED_DTYPES,
    "int4": _QUANTIZED_DTYPES,
}


class Header(NamedTuple):
    """What it takes beside the file's tensors to build a state dict.

    Attributes:
        format: ``"gradpress"`` or ``"dense"``.
        tensors: The record of every tensor that is not stored densely, by name.
        aliases: Further names of tensors, each with the name under which its tensor is stored.
        order: All names in the order of the state dict.
    """

    format: str
    tensors: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    order: list[str]

    def to_metadata(self) -> dict[str, str]:
        """The header as metadata of safetensors."""
        content = {"version": VERSION, **self._asdict()}
        return {"format": "pt", KEY: json.dumps(content, separators=(",", ":"))}


def read_header(metadata: dict[str, str] | None, stored: list[str]) -> Header:
    """The header of a file, checked against the names of its tensors.

    Args:
        metadata: What safetensors holds beside the tensors.
        stored: The names of the file's tensors.

    Raises:
        ValueError: there is none, a newer package wrote it, or it does not fit the tensors.
    """
    if metadata is None or KEY not in metadata:
        raise ValueError(
            "it was not written by gradpress.io.save; plain safetensors files are for"
            " safetensors.torch.load_file"
        )
    try:
        content = json.loads(metadata[KEY])
        version = int(content["version"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError("its header is damaged: no version can be read") from error
    if version > VERSION:
        raise ValueError(
            f"its layout has version {version}, newer than {VERSION}, the last one that this"
            " gradpress reads"
        )
    try:
        header = Header(*(content[name] for name in Header._fields))
        _check(header, set(stored))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"its header is damaged: {error!r}") from error
    return header


def _check(header: Header, stored: set[str]) -> None:
    if header.format not in FILE_FORMATS:
        raise ValueError(f"unknown format {header.format!r}")
    parts: set[str] = set()
    for name, record in header.tensors.items():
        _check_record(name, record)
        parts.update(part_names(name, record["format"]))
    missing = sorted(parts - stored)
    if missing:
        raise ValueError(f"no tensors {missing}")
    tensors = (stored - parts) | header.tensors.keys()
    wrong = sorted(tensors.symmetric_difference(set(header.order) - header.aliases.keys()))
    if wrong or len(set(header.order)) != len(header.order):
        raise ValueError(f"names do not fit the tensors: {wrong}")
    dangling = sorted(set(header.aliases.values()) - tensors)
    if dangling or not header.aliases.keys() <= set(header.order) - tensors:
        raise ValueError(f"aliases do not fit the tensors: {dangling}")


def _check_record(name: str, record: dict[str, Any]) -> None:
    format, shape, dtype = record["format"], record["shape"], record["dtype"]
    if format not in _DTYPES:
        raise ValueError(f"{name} has unknown format {format!r}")
    if dtype not in _DTYPES[format]:
        raise ValueError(f"{name} has format {format} and dtype {dtype!r}")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{name} has shape {shape}")
    if format == "2:4" and (not shape or shape[-1] % 4):
        raise ValueError(f"{name} has format 2:4 and shape {shape}")
    if format.startswith("int") and not record["group_size"] >= 1:
        raise ValueError(f"{name} has group_size {record['group_size']}")
