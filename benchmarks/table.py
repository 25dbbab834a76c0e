"""What the terminal shows: a progress line, and one table for each comparison."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from .timing import NOISY

Row = dict[str, Any]


class Progress:
    """Which comparison is running; one line that is written over, on a terminal only."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total
        self.shown = sys.stderr.isatty()

    def start(self, label: str) -> None:
        """Show what begins now."""
        self.done += 1
        if self.shown:
            filled = 24 * (self.done - 1) // max(self.total, 1)
            bar = "#" * filled + "." * (24 - filled)
            print(f"\r\x1b[K[{bar}] {self.done}/{self.total} {label}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for a table."""
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def milliseconds(ms: float) -> str:
    """Three figures, with the unit that suits."""
    if ms < 1:
        return f"{ms * 1e3:.3g} us"
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1e3:.3g} s"


def sizes(row: Row) -> str:
    """The sizes as in B1 T4096."""
    return " ".join(f"{letter}{size}" for letter, size in row["sizes"].items())


def spread(row: Row) -> str:
    """How far apart the quartiles lie; a ! where that is too far."""
    found = row.get("spread")
    return "" if found is None else f"{found:.0%}{' !' if found > NOISY else ''}"


def comparison(rows: Sequence[Row]) -> str:
    """The table of one comparison; ratios are of medians within rounds, over our eager call."""
    first = rows[0]
    strong = " strong decay" if first["strong"] else ""
    floor = f"floor {milliseconds(first['floor_ms'])}" if "floor_ms" in first else ""
    lines = [f"\n{first['operator']}  {first['pass']}  {sizes(first)} {first['dtype']}{strong}   {floor}"]
    for row in rows:
        if row.get("missing"):
            lines.append(f"  {row['who']}")
            continue
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f} MiB"
        ratio = first["faster_than"].get(row["who"])
        against = "" if ratio is None else f"{ratio:.2f}x ours"
        lines.append(
            f"  {row['who']:32s}{milliseconds(row['median_ms']):>10s} {spread(row):>7s}"
            f"{row['of_floor']:>7.0%} of floor {memory:>12s}  {against} {row['note'] or ''}".rstrip()
        )
    return "\n".join(lines)


def grid(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with columns as wide as they need."""
    table = [list(header), *(list(line) for line in lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    padded = (zip(line, widths, strict=True) for line in table)
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in padded)
