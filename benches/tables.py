"""Tables as text and as Markdown, and where the sources stand; imports nothing heavy."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """Rows under a head, with remarks below."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Aligned plain text."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]

        def line(row: Sequence[str]) -> str:
            first, *rest = row
            cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
            return "  ".join([f"{first:<{widths[0]}}", *cells]).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([self.title, line(self.head), rule, *map(line, self.rows), *self.notes])

    def markdown(self) -> str:
        """The same for a result file."""
        rule = ["---", *["---:"] * (len(self.head) - 1)]
        rows = ["| " + " | ".join(row) + " |" for row in (self.head, rule, *self.rows)]
        notes = [f"\n{note}" for note in self.notes]
        return "\n".join([f"## {self.title}\n", *rows, *notes])


def facts_markdown(facts: Sequence[tuple[str, str]]) -> str:
    """The table of facts that every result file begins with."""
    return Table("Run", ("fact", "value"), facts).markdown().replace("---:", "---")


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def commit() -> str:
    """The commit that is checked out, and whether files differ from it."""

    def git(*command: str) -> str:
        folder = Path(__file__).parent
        # Without the lock that `status` takes in passing: somebody else may be working here.
        call = ["git", "--no-optional-locks", *command]
        return subprocess.check_output(
            call, cwd=folder, text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
