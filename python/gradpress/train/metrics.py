"""`metrics.jsonl`: one JSON object per step and per evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gradpress.train.files import write_atomically

STEP = "step"
EVALUATION = "evaluation"


class MetricsWriter:
    """Appends records, one line each, and hands every line to the operating system at once.

    Args:
        path: The file; it is created when missing.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 -- closed by close()

    def write(self, kind: str, **values: Any) -> None:
        """Appends one record; `kind` is `"step"` or `"evaluation"`."""
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Waits until all records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of a file; a last line that was cut off is passed over."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def truncate_metrics(path: Path, step: int | None) -> None:
    """Drops what was written after a checkpoint.

    Args:
        path: The file; a missing one is left missing.
        step: Completed steps at the checkpoint; None drops everything.
    """
    if not path.exists():
        return
    kept = [] if step is None else [r for r in read_metrics(path) if r["step"] <= step]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
