"""Which weights a selection compares, and how many of them it drops."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_GROUP = re.compile(r"(\d+):(\d+)")
#: Sparsities of a pattern and of a caller are the same when they are as close as this.
_SAME = 1e-9


@dataclass(frozen=True)
class Pattern:
    """What is dropped.

    Attributes:
        sparsity: The share of the weights that goes.
        size: Consecutive columns that are compared, of which `drop` go; 0 for no such groups.
        drop: How many of each group go.
    """

    sparsity: float
    size: int = 0
    drop: int = 0

    def count(self, numel: int) -> int:
        """How many of `numel` weights an unstructured selection drops."""
        return int(numel * self.sparsity)


def read_pattern(op: str, pattern: str, sparsity: float | None, columns: int) -> Pattern:
    """What a caller asks for, for matrices of so many columns.

    Raises:
        ValueError: `pattern` is neither ``"unstructured"`` nor N:M, M does not divide the columns,
            or `sparsity` is missing, out of range, or another one than the pattern's.
    """
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"{op}: sparsity must be from 0 to 1, got {sparsity}")
    if pattern == "unstructured":
        if sparsity is None:
            raise ValueError(f"{op}: sparsity must be given for an unstructured pattern")
        return Pattern(float(sparsity))
    match = _GROUP.fullmatch(pattern)
    keep, size = (int(number) for number in match.groups()) if match else (0, 0)
    if not 1 <= keep <= size:
        raise ValueError(
            f'{op}: pattern must be "unstructured" or "N:M", N of M kept and from 1 to M,'
            f" got {pattern!r}"
        )
    if columns % size:
        raise ValueError(
            f"{op}: pattern {pattern} needs a multiple of {size} columns, got {columns}"
        )
    share = (size - keep) / size
    if sparsity is not None and not math.isclose(sparsity, share, abs_tol=_SAME):
        raise ValueError(f"{op}: sparsity of pattern {pattern} is {share}, got {sparsity}")
    return Pattern(share, size, size - keep)
