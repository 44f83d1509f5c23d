"""What a section found: lines of the summary, tables, remarks, and whether results were right."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benches.tables import Table, number, percent

#: Of the summary.
HEAD = ("quantity", "ours", "peer", "ratio", "target", "met")
DRY_RUN = "dry run"
_NOT_KEPT = ("path", "dry", "begun")


@dataclass
class Findings:
    """What a section found so far, kept in a file.

    Attributes:
        path: The file.
        dry: Nothing is measured: no target is met or missed.
        rows: Lines of the summary, with the columns of `HEAD`.
        tables: Further tables, as the fields of `Table`.
        notes: Remarks.
        facts: Of the machine: names and values.
        right: How many results were compared with a reference and agreed.
        wrong: What did not agree.
        error: What ended the section before its end.
        finished: The section came to its end.
        seconds: What it took until the file was written.
        begun: When it began, on the clock of `time.monotonic`.
    """

    path: Path
    dry: bool
    rows: list[list[str]] = field(default_factory=list)
    tables: list[dict[str, object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: list[list[str]] = field(default_factory=list)
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    error: str | None = None
    finished: bool = False
    seconds: float = 0.0
    begun: float = field(default_factory=time.monotonic)

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        self.seconds = time.monotonic() - self.begun
        kept = {name: value for name, value in asdict(self).items() if name not in _NOT_KEPT}
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(kept), encoding="utf-8")
        os.replace(beside, self.path)

    @classmethod
    def load(cls, path: Path, dry: bool) -> Findings:
        """What a section left."""
        found = cls(path, dry)
        if not path.exists():
            found.error = "not run"
            return found
        for name, value in json.loads(path.read_text(encoding="utf-8")).items():
            setattr(found, name, value)
        return found

    def row(
        self,
        quantity: str,
        ours: str,
        peer: str = "-",
        ratio: str = "-",
        target: str = "-",
        met: bool | None = None,
    ) -> None:
        """Adds a line to the summary; `met` is left out where there is no target."""
        answer = "-" if met is None else DRY_RUN if self.dry else "yes" if met else "no"
        self.rows.append([quantity, ours, peer, ratio, target, answer])
        self.save()

    def share(self, quantity: str, ours: str, peer: str, share: float, target: float) -> None:
        """Adds a line about a share of what is possible."""
        met = share >= target
        self.row(quantity, ours, peer, percent(share), f"at least {percent(target)}", met)

    def times(
        self, quantity: str, ours: float, peer: float, who: str, target: float | None = None
    ) -> None:
        """Adds a line about a duration beside a peer's.

        Args:
            quantity: What was timed.
            ours: Seconds.
            peer: Seconds of the peer.
            who: The peer.
            target: How many times as long the peer is to take; none where left out.
        """
        ratio = peer / ours
        self.row(
            quantity,
            f"{number(1e3 * ours)} ms",
            f"{number(1e3 * peer)} ms, {who}",
            f"{number(ratio)}x",
            "-" if target is None else f"at least {target:g}x",
            None if target is None else ratio >= target,
        )

    def check(self, what: str, right: bool) -> None:
        """Counts a comparison with a reference."""
        if right:
            self.right += 1
        else:
            self.wrong.append(what)
        self.save()

    def table(self, table: Table) -> None:
        """Adds a table below the summary."""
        self.tables.append(asdict(table))
        self.save()

    def note(self, text: str) -> None:
        """Adds a remark, once."""
        if text not in self.notes:
            self.notes.append(text)
            self.save()
