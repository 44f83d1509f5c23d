"""Writes `kernels/include/map_tables.cuh`: the tables of the dynamic maps, from the Rust ones.

`python -m tests.kernels.tables` writes the file; a test compares it.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from gradpress.ops.dynamic import dequantize_dynamic

HEADER = Path(__file__).parents[2] / "kernels" / "include" / "map_tables.cuh"
DECADES = 7
KINDS = (False, True)
NONE = np.float32(2)  # no decade begins in this binade


def values(signed: bool, bits: int) -> np.ndarray:
    """What every code stands for in a block of scale 1."""
    codes = torch.arange(256, dtype=torch.uint8)
    if bits == 4:
        codes = torch.arange(16, dtype=torch.uint8)
        codes = codes[::2] | codes[1::2] << 4
    count = 1 << bits
    scale = torch.ones(1)
    out = dequantize_dynamic(
        codes, scale, signed=signed, bits=bits, block_size=count, shape=(count,)
    )
    return out.numpy()


def decades(signed: bool) -> tuple[list[tuple[str, str]], list[tuple[str, ...]]]:
    """Rows of binades and of decades, by the arithmetic of `Decades::new` in src/quant/dynamic."""
    magnitudes = values(signed, 8)[127 if signed else 0 :]
    froms = [NONE] * 32
    below = [0] * 32
    rows = [(np.float32(0), np.float32(0), np.float32(0), 0)]
    first = 1
    for d in range(DECADES + 1):
        start = np.float32((magnitudes[first - 1] + magnitudes[first]) / np.float32(2))
        if d == 0 and not signed:
            start = np.float32(0)
        binade = min(max(int(start.view(np.uint32)) >> 23, 96), 127) - 96
        assert froms[binade] == NONE
        froms[binade] = start
        below[binade + 1 :] = [count + 1 for count in below[binade + 1 :]]
        count = 1 << (d + (not signed)) if d < DECADES else 1
        slope, offset = np.float32(0), np.float32(first)
        if d < DECADES:
            slope = np.float32(count * 10.0 ** (DECADES - 1 - d) / 0.9)
            offset = np.float32(first - count / 9.0)
        rows.append((slope, offset, np.float32(first + count - 1), 1))
        first += count
    binades = [(literal(f), str(b)) for f, b in zip(froms, below, strict=True)]
    return binades, [(*map(literal, row[:3]), str(row[3])) for row in rows]


def literal(x: np.float32) -> str:
    """A float32 as C++, exactly."""
    if x == int(x):
        return f"{x:.1f}f"  # -0 too, which the signed map has
    return re.sub(r"\.?0*p", "p", float(x).hex()) + "f"


def lines(items: Iterable[str], indent: int) -> str:
    """Items with commas between, in lines of at most 100 columns."""
    rows, row = [], ""
    for item in items:
        if row and indent + len(row) + len(item) + 2 > 100:
            rows.append(row)
            row = ""
        row += f" {item}," if row else f"{item},"
    pad = " " * indent
    return "\n".join(pad + row for row in [*rows, row])


def array(declaration: str, *parts: str) -> str:
    """A definition in which every part is one entry of the outer dimension."""
    if len(parts) == 1:
        return f"__device__ const {declaration} = {{\n{parts[0]}\n}};\n"
    inner = "\n".join(f"    {{\n{part}\n    }}," for part in parts)
    return f"__device__ const {declaration} = {{\n{inner}\n}};\n"


def header() -> str:
    """The file's text."""
    both = [decades(signed) for signed in KINDS]
    braces = [[[f"{{{', '.join(row)}}}" for row in rows] for rows in pair] for pair in both]
    four = values(True, 4)
    middles = (four[:-1] + four[1:]) / np.float32(2)
    return "\n".join(
        [
            "// Tables of the dynamic maps: map8bit.cuh and map4bit.cuh say what they mean.",
            "// Written by tests/kernels/tables.py from the Rust tables. First the map of second",
            "// moments, without a sign, then that of first moments.",
            "#pragma once\n",
            "struct Binade {\n    float from;\n    int below;\n};",
            "struct alignas(16) Decade {\n    float slope, offset, cap;\n    int least;\n};\n",
            array(
                "float MAP8_VALUES[2][256]", *(lines(map(literal, values(s, 8)), 8) for s in KINDS)
            ),
            array("Binade MAP8_BINADES[2][32]", *(lines(b[0], 8) for b in braces)),
            array("Decade MAP8_DECADES[2][9]", *(lines(b[1], 8) for b in braces)),
            array(
                "float MAP4_VALUES[2][16]", *(lines(map(literal, values(s, 4)), 8) for s in KINDS)
            ),
            array("float MAP4_MIDDLES[15]", lines(map(literal, middles), 4)),
        ]
    )


if __name__ == "__main__":
    HEADER.write_text(header())
