"""The tables of the terminal and of two pages of docs: `python -m benchmarks.report` writes the pages' parts anew.

The pages' prose is written by hand. The text between `<!-- begin NAME DEVICE -->` and `<!-- end NAME DEVICE -->` comes
from `benchmarks/results/DEVICE.json`, that of docs/models.md from `models_DEVICE.json`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import machine, targets
from .comparison import OURS, WAYS, Row
from .problems import TRAINING
from .timing import NOISY

PAGES = tuple(machine.ROOT / "docs" / name for name in ("performance.md", "models.md"))
RESULTS = machine.ROOT / "benchmarks" / "results"
NOT_YET = "Not measured yet."
Table = tuple[list[str], list[list[str]]]  # the header, and the lines


class Progress:
    """A line on the terminal that says which comparison is running, and is written over."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total
        self.shown = sys.stderr.isatty()

    def start(self, label: str) -> None:
        """Show which comparison begins."""
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
    """Write a time with three figures, in the unit that suits."""
    if ms < 1:
        return f"{ms * 1e3:.3g} us"
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1e3:.3g} s"


def sizes(row: Row) -> str:
    """Write the sizes as in "B1 T4096"."""
    return " ".join(f"{letter}{size}" for letter, size in row["sizes"].items())


def dispersion(row: Row) -> str:
    """Write the interquartile range relative to the median; a ! marks a noisy row."""
    found = row.get("spread")
    return "" if found is None else f"{found:.0%}{' !' if found > NOISY else ''}"


def text_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Lay out a table for the terminal, with columns as wide as they need."""
    table = [list(header), *(list(line) for line in lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    padded = (zip(line, widths, strict=True) for line in table)
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in padded)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Lay out a table for the page."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def comparison(rows: Sequence[Row]) -> str:
    """Lay out one comparison for the terminal; its ratios are medians within rounds, over our eager call."""
    first = rows[0]
    strong = " strong decay" if first["strong"] else ""
    floor = f"floor {milliseconds(first['floor_ms'])}" if "floor_ms" in first else ""
    lines = [f"\n{first['operator']}  {first['pass']}  {sizes(first)} {first['dtype']}{strong}   {floor}"]
    for row in rows:
        if row.get("missing"):
            lines.append(f"  {row['who']}")
            continue
        ratio = first["faster_than"].get(row["who"])
        against = "" if ratio is None else f"{ratio:.2f}x ours"
        memory = _mebibytes(row, " MiB")
        lines.append(
            f"  {row['who']:32s}{milliseconds(row['median_ms']):>10s} {dispersion(row):>7s}"
            f"{row['of_floor']:>7.0%} of floor {memory:>12s}  {against} {row['note'] or ''}".rstrip()
        )
    return "\n".join(lines)


def checkpoint_levels(rows: Sequence[Row]) -> Table:
    """Tabulate what chunk_gsa keeps for its gradient at each checkpoint level."""
    lines = [[r["level"], f"{r['kept_mib']:.2f}", milliseconds(r["median_ms"])] for r in rows]
    return ["checkpoint_level", "kept beside the inputs, MiB", "forward+backward"], lines


def pruning(rows: Sequence[Row]) -> Table:
    """Tabulate what parallel_attn computes under decays."""
    lines = [[r["decay"], f"{r['share']:.0%}", milliseconds(r["median_ms"])] for r in rows]
    return ["decay", "products computed, of those without decay", "forward"], lines


def overhead(rows: Sequence[Row]) -> Table:
    """Tabulate the microseconds of a call."""
    columns = ("call_us", "kernel_us", "beyond_us", "training_call_us")
    lines = [[r["operator"], *("" if r[c] is None else f"{r[c]:.0f}" for c in columns)] for r in rows]
    return ["operator", "call, us", "kernel alone, us", "beyond it, us", "forward+backward, us"], lines


def first_calls(rows: Sequence[Row]) -> str:
    """Lay out the seconds of imports and first calls for the terminal."""
    lines = []
    for row in rows:
        times = (f"{name[:-2].replace('_', ' ')} {value:.3f}" for name, value in row.items() if name.endswith("_s"))
        lines.append(f"  {row['operator']:32s}{', '.join(times)}")
    return "\n".join(lines)


def sweep(rows: Sequence[Row]) -> Table:
    """Tabulate times and memory over lengths, with the peers."""
    lines = [
        [r["family"], r["pass"], str(r["sizes"]["T"]), r["who"], milliseconds(r["median_ms"]), dispersion(r),
         f"{r['us_per_token']:.3f}", _mebibytes(r)]
        for r in rows if "median_ms" in r
    ]  # fmt: skip
    return ["family", "pass", "T", "who", "time", "range", "us/step", "peak MiB"], lines


def models(rows: Sequence[Row]) -> Table:
    """Tabulate how many times faster a model is when it is patched, a column for each pass."""
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        ratios.setdefault(row["model"], {})[_pass(row)] = row["times_faster"]
    passes = list(dict.fromkeys(_pass(row) for row in rows))
    lines = [[model, *(f"{found[p]:.2f}" if p in found else "" for p in passes)] for model, found in ratios.items()]
    return ["model", *passes], lines


def _mebibytes(row: Row, unit: str = "") -> str:
    return "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}{unit}"


def _pass(row: Row) -> str:
    return str(row["pass"]).replace(TRAINING, "forward+backward")


def _on_cpu(found: Row) -> bool:
    return "core" in found["machine"]["device"]


def _by_comparison(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the rows by comparison, without the peers that are missing."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if not row.get("missing"):
            key = (row["operator"], row["pass"], tuple(row["sizes"].items()), row["strong"])
            found.setdefault(key, []).append(row)
    return list(found.values())


def page_about(found: Row) -> str:
    """Say which machine was measured, and how quiet it was."""
    where, noise = found["machine"], found["noise"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in found["ceilings"]["flops"].items())
    threads = f", {where['threads']} threads" if _on_cpu(found) else ""
    others = noise["cores_others_used"]
    lines = [
        f"{where['device']}{threads}; {versions}; {where['date']}, commit {where['commit']}.",
        f"Roofline: {rates}; {found['ceilings']['bytes'] / 1e9:,.1f} GB/s for a copy (read and written).",
        f"{noise['noisy_rows']} of {noise['rows']} rows are noisy"
        + ("." if others is None else f"; other processes used {others:.2f} cores meanwhile."),
    ]
    return " ".join(lines)


def page_comparisons(found: Row) -> str:
    """Tabulate each operator, pass and size: our ways, the floor, and how much slower the peers are."""
    lines = []
    for rows in _by_comparison(found["rows"]):
        first = rows[0]
        ways = {r["who"].removeprefix(f"{OURS} "): r for r in rows if r["who"].startswith(OURS)}
        same = {r["who"] for r in rows if r.get("same")}
        peers = [f"{who} {ratio:.2f}{'' if who in same else '*'}" for who, ratio in first["faster_than"].items()]
        pass_ = _pass(first) + (", strong decay" if first["strong"] else "")
        times = [milliseconds(ways[way]["median_ms"]) if way in ways else "" for way in WAYS]
        share = f"{first['of_floor']:.0%}"
        lines.append(
            [f"`{first['operator']}`", pass_, sizes(first), *times, share, _mebibytes(first), "; ".join(peers)]
        )
    header = ["operator", "pass", "sizes", *WAYS, "floor / eager", "MiB", "times slower than our eager"]
    return markdown_table(header, lines)


def page_slower(found: Row) -> str:
    """Tabulate where another implementation of the same function was faster than the best of our ways."""
    lines = []
    for rows in _by_comparison(found["rows"]):
        best = min((r for r in rows if r["who"].startswith(OURS)), key=lambda r: r["median_ms"])
        name = [f"`{best['operator']}`", best["pass"], sizes(best)]
        ratios = {r["who"]: best["median_ms"] / r["median_ms"] for r in rows if r.get("same")}
        lines += [[*name, who, f"{ratio:.2f}"] for who, ratio in ratios.items() if ratio > 1]
    header = ["operator", "pass", "sizes", "who is faster", "times"]
    return markdown_table(header, lines) if lines else "No peer that computes the same function was faster in this run."


def page_targets(found: Row) -> str:
    """Tabulate the targets and what was measured."""
    lines = [
        [t["target"], f"{t['bound']:.2f}", f"{t['measured']:.2f}", "met" if t["met"] else "**not met**"]
        for t in targets.check(found["rows"], "cpu", found["quick"])
    ]
    return markdown_table(["target", "at least", "measured", ""], lines)


def page_calls(found: Row) -> str:
    """Tabulate the cost of a call, and say what imports and the slowest first call took."""
    header, lines = overhead(found["overhead"])
    table = markdown_table(header, [[f"`{operator}`", *times] for operator, *times in lines])
    imports = [r["import_s"] for r in found["first_call"]]
    first = [max(v for name, v in r.items() if name.startswith("first_")) for r in found["first_call"]]
    if not first:
        return table
    return (
        f"{table}\n\nIn a new process with nothing compiled before, importing the package takes {max(imports):.2f} s "
        f"beyond PyTorch's own import, and the slowest first call {max(first):.2f} s."
    )


def page_lengths(found: Row) -> str:
    """Tabulate time for a step and memory over lengths, ours alone."""
    lines = [
        [r["family"], r["who"].removeprefix(f"{OURS} "), _pass(r), str(r["sizes"]["T"]),
         f"{r['us_per_token']:.2f}", _mebibytes(r)]
        for r in found["sweep"] if r["who"].startswith(OURS)
    ]  # fmt: skip
    return markdown_table(["family", "form", "pass", "T", "us for a step", "peak MiB"], lines)


def page_plots(found: Row) -> str:
    """Show the plots of the sweep."""
    pictures = sorted(RESULTS.glob(f"*_{'cpu' if _on_cpu(found) else 'cuda'}.svg"))
    return "\n".join(f"![{p.stem.replace('_', ' ')}](../benchmarks/results/{p.name})" for p in pictures)


PARTS: dict[str, Callable[[Row], str]] = {
    "about": page_about,
    "comparisons": page_comparisons,
    "targets": page_targets,
    "slower": page_slower,
    "memory": lambda found: markdown_table(*checkpoint_levels(found["checkpoint_levels"])),
    "pruning": lambda found: markdown_table(*pruning(found["pruning"])),
    "calls": page_calls,
    "lengths": page_lengths,
    "plots": page_plots,
    "models": lambda found: markdown_table(*models(found["models"])),
}


def rendered(page: str, results: Path = RESULTS) -> str:
    """Write every measured part of the page anew."""

    def part(match: re.Match[str]) -> str:
        name, _, device = match["name"].partition(" ")
        path = results / f"{device}.json"
        text = PARTS[name](json.loads(path.read_text())) if path.exists() else NOT_YET
        return f"<!-- begin {match['name']} -->\n{text}\n<!-- end {match['name']} -->"

    return re.sub(r"<!-- begin (?P<name>[\w ]+) -->\n.*?<!-- end (?P=name) -->", part, page, flags=re.DOTALL)


def main() -> int:
    """Write the pages anew; return the exit status."""
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
