"""What a file holds and how large that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gradpress._tables import Table, TableReport, shape_text

_COLUMNS = ("name", "shape", "dtype", "sparsity", "format", "dense bytes", "stored bytes", "ratio")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, and how it is stored.

    Attributes:
        name: Its name in the state dict.
        shape: Its shape.
        dtype: Its dtype by name; of a quantized weight, the dtype that it stands for.
        sparsity: Share of its elements that are zero, negative zeros among them; None for quantized
            weights, whose codes are stored whatever their values.
        negative_zeros: How many of the elements are negative zeros, which a packed tensor stores
            like any other value.
        format: ``"dense"``, ``"bitmask"``, ``"2:4"``, ``"int8"`` or ``"int4"``.
        dense_bytes: Bytes of all its elements in its dtype.
        stored_bytes: Bytes of what the file holds of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float | None
    negative_zeros: int
    format: str
    dense_bytes: int
    stored_bytes: int


@dataclass(frozen=True, repr=False)
class SizeTable(TableReport):
    """Every tensor of a model and its bytes before and after; prints as a table.

    Attributes:
        rows: One :class:`StoredTensor` for each tensor, in the order of the state dict.
        aliases: Names of tensors that are stored under another name, because the two share their
            memory, with that name.
    """

    rows: tuple[StoredTensor, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors when each element is stored; shared memory counts once."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored, without the file's header."""
        return sum(row.stored_bytes for row in self.rows)

    def _table(self) -> Table:
        before, after = self.dense_bytes, self.stored_bytes
        totals = ["total", "", "", "", "", f"{before:,}", f"{after:,}", _ratio(before, after)]
        return Table(list(_COLUMNS), [_cells(row) for row in self.rows], totals)

    def _remark(self) -> str:
        remarks = []
        if self.aliases:
            pairs = ", ".join(f"{name} = {kept}" for name, kept in self.aliases.items())
            remarks.append(f"stored once: {pairs}")
        wasted = sum(row.negative_zeros for row in self.rows)
        if wasted:
            remarks.append(
                f"{wasted:,} negative zeros take the space of values;"
                " gradpress.prune.apply_masks_ writes positive ones"
            )
        return "; ".join(remarks)


@dataclass(frozen=True, repr=False)
class SavedFile(SizeTable):
    """What :func:`save` wrote.

    Attributes:
        path: The file.
        file_bytes: Its whole size, with the header.
    """

    path: Path = field(kw_only=True)
    file_bytes: int = field(kw_only=True)

    def _remark(self) -> str:
        written = f"{self.path}: {self.file_bytes:,} bytes with the header"
        return "; ".join(filter(None, [written, super()._remark()]))


def _cells(row: StoredTensor) -> list[str]:
    return [
        row.name,
        shape_text(row.shape),
        row.dtype,
        "-" if row.sparsity is None else f"{row.sparsity:.1%}",
        row.format,
        f"{row.dense_bytes:,}",
        f"{row.stored_bytes:,}",
        _ratio(row.dense_bytes, row.stored_bytes),
    ]


def _ratio(before: int, after: int) -> str:
    return f"{after / before:.3f}" if before else "-"
