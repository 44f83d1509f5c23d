"""The summary of all sections, and the result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benches.gpu_sections import SECTIONS
from benches.gpu_sections.findings import DRY_RUN, HEAD, Findings
from benches.tables import Table, facts_markdown

#: Characters of each log that are kept.
_LOG_CHARACTERS = 200_000

_INTRODUCTION = (
    "gradpress's CUDA kernels beside a copy of the same card, torch, bitsandbytes and galore-torch;"
    " `benches/README.md` says how this was run. Every figure was measured in this run. Times are"
    " medians, taken by CUDA events; contenders of a comparison ran in the same process on the same"
    " inputs, random numbers throughout. `ratio` is how many times as long the peer takes, or the"
    " share of the copy's rate. Results were compared with the CPU's or with a float64 reference"
    " in the same process: a wrong one is listed below the summary.",
)
_DRY_INTRODUCTION = (
    "**CPU dry run.** The sections ran on the CPU with tiny sizes, to try out the benchmark itself:"
    " no figure below says anything about a GPU, nor about a CPU.",
)


@dataclass(frozen=True)
class Run:
    """All that a run found.

    Attributes:
        found: What each section left, in order.
        dry: It was a dry run on the CPU.
        quick: Sizes were small.
        commit: Of the sources, where git does not tell it.
    """

    found: Mapping[str, Findings]
    dry: bool
    quick: bool
    commit: str | None = None

    def good(self) -> bool:
        """Whether every section came to its end, and nothing was wrong."""
        return all(f.finished and not f.wrong for f in self.found.values())

    def facts(self) -> list[tuple[str, str]]:
        """Where and with what the numbers were taken."""
        machine = self.found.get("machine")
        facts = [(name, value) for name, value in machine.facts] if machine else []
        if self.commit is not None:
            facts = [(n, self.commit if n == "commit" else value) for n, value in facts]
        times = ", ".join(f"{n} {f.seconds:.1f}" for n, f in self.found.items() if f.seconds)
        return [
            *facts,
            ("sizes", "quick: too small to quote" if self.quick else "full"),
            ("seconds in each section", times),
        ]

    def summary(self) -> Table:
        """The one table."""
        rows: list[Sequence[str]] = []
        for name, found in self.found.items():
            rows += found.rows
            rows += self._about_results(name, found)
            if not found.finished:
                error = (found.error or "cut off").replace("|", "/").replace("\n", " ")
                text = error if len(error) <= 80 else error[:77] + "..."
                rows.append((f"section {name}", text, "-", "-", "to come to its end", "no"))
        title = "Summary" if not self.dry else "Summary of a CPU dry run: no figure means anything"
        return Table(title, HEAD, rows)

    def _about_results(self, name: str, found: Findings) -> list[tuple[str, ...]]:
        right, wrong = found.right, len(found.wrong)
        if not right + wrong:
            return []
        answer = DRY_RUN if self.dry else "no" if wrong else "yes"
        text = f"{right} right, {wrong} wrong"
        return [(f"results of section {name}", text, "-", "-", "none wrong", answer)]

    def wrong(self) -> list[str]:
        """What was wrong, section by section."""
        return [f"{name}: {what}" for name, found in self.found.items() for what in found.wrong]

    def notes(self) -> list[str]:
        """All remarks, and the errors in full."""
        notes = []
        for name, found in self.found.items():
            notes += [f"{name}: {note}" for note in found.notes]
            if found.error:
                notes.append(f"{name}: {found.error}")
        return notes

    def text(self) -> str:
        """What is printed: remarks first, the table last."""
        parts = [*(f"WRONG: {what}" for what in self.wrong()), *self.notes()]
        facts = [f"{name}: {value}" for name, value in self.facts()]
        return "\n".join([*parts, "", *facts, "", self.summary().text()])

    def markdown(self) -> str:
        """The result file."""
        title = "CPU dry run of the GPU benchmark" if self.dry else "On a GPU"
        parts = [f"# {title}", *(_DRY_INTRODUCTION if self.dry else _INTRODUCTION)]
        parts += [facts_markdown(self.facts()), self.summary().markdown()]
        for head, lines in (("Wrong results", self.wrong()), ("Remarks", self.notes())):
            if lines:
                parts += [f"## {head}", "\n".join(f"- {line}" for line in lines)]
        for found in self.found.values():
            parts += [_table(fields).markdown() for fields in found.tables]
        return "\n\n".join(parts) + "\n"

    def file_name(self) -> str:
        """So that no other run is mistaken for a whole one on a card."""
        return "gpu-dry-run.md" if self.dry else "gpu-quick.md" if self.quick else "gpu.md"


def _table(fields: Mapping[str, Any]) -> Table:
    return Table(**fields)


def collect(folder: Path, names: Sequence[str], dry: bool) -> dict[str, Findings]:
    """What the sections left in a folder."""
    return {name: Findings.load(folder / f"{name}.json", dry) for name in SECTIONS if name in names}


def logs(folder: Path) -> str:
    """The ends of all logs, one after another."""
    parts = []
    for path in sorted(folder.glob("*.log")):
        text = path.read_text(encoding="utf-8", errors="replace")[-_LOG_CHARACTERS:]
        parts.append(f"===== {path.stem}\n{text}")
    return "\n".join(parts)
