"""Tables as plain text and as HTML: the first column to the left, all others to the right."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Table(NamedTuple):
    """Cells of text.

    Attributes:
        head: The columns' names.
        rows: As many cells each.
        totals: The last line.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    totals: Sequence[str]


def plain(table: Table, remark: str) -> str:
    """Aligned text: every row, rules above and below them, and `remark` where there is one."""
    lines = [table.head, *table.rows, table.totals]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [_line(line, widths) for line in lines]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    text = [text[0], rule, *text[1:-1], rule, text[-1]]
    return "\n".join([*text, remark] if remark else text)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return "  ".join(aligned).rstrip()


def html(table: Table, remark: str) -> str:
    """A table element of its own style."""
    body = "".join(_html_row(row, "td") for row in table.rows)
    after = f"<p>{escape(remark)}</p>" if remark else ""
    return (
        '<table style="font-variant-numeric: tabular-nums">'
        f"<thead>{_html_row(table.head, 'th')}</thead><tbody>{body}</tbody>"
        f"<tfoot>{_html_row(table.totals, 'th')}</tfoot></table>{after}"
    )


def _html_row(cells: Sequence[str], tag: str) -> str:
    sides = ["left"] + ["right"] * (len(cells) - 1)
    return (
        "<tr>"
        + "".join(
            f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        + "</tr>"
    )
