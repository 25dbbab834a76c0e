"""The measured parts of docs/performance.md, from benchmarks/results: `python -m benchmarks.report` writes them anew.

Prose is written by hand; what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` comes from the files.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import machine, targets
from .problems import TRAINING
from .table import NOISY, milliseconds, sizes

PAGE = machine.ROOT / "docs" / "performance.md"
RESULTS = machine.ROOT / "benchmarks" / "results"
NOT_YET = "Not measured yet."
Row = dict[str, Any]


def grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    every = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def about(found: Row) -> str:
    """What the numbers were measured on, and how quiet it was."""
    where, noise = found["machine"], found["noise"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in found["ceilings"]["flops"].items())
    threads = f", {where['threads']} threads" if "core" in where["device"] else ""
    others = noise["cores_others_used"]
    lines = [
        f"{where['device']}{threads}; {versions}; {where['date']}, commit {where['commit']}.",
        f"Ceilings: {rates}; {found['ceilings']['bytes'] / 1e9:,.1f} GB/s for a copy (read and written).",
        f"{noise['noisy_rows']} of {noise['rows']} rows spread by more than {NOISY:.0%}"
        + ("." if others is None else f"; other processes used {others:.2f} cores meanwhile."),
    ]
    return " ".join(lines)


def comparisons(found: Row) -> str:
    """One line for each operator, pass and size: our ways, the floor, and how much slower the peers are."""
    lines = []
    for rows in _groups(found["rows"]):
        first = rows[0]
        ours = {r["who"].removeprefix("fla_ops "): r for r in rows if r["who"].startswith("fla_ops")}
        peers = [
            f"{name} {ratio:.2f}{'' if _same(rows, name) else '*'}"
            for name, ratio in first.get("faster_than", {}).items()
        ]
        what = first["pass"].replace(TRAINING, "forward+backward") + (", strong decay" if first["strong"] else "")
        times = [
            milliseconds(ours[way]["median_ms"]) if way in ours else "" for way in ("eager", "compiled", "inlined")
        ]
        share = f"{first['of_floor']:.0%}"
        memory = "" if first["peak_mib"] is None else f"{first['peak_mib']:.1f}"
        lines.append([f"`{first['operator']}`", what, sizes(first), *times, share, memory, "; ".join(peers)])
    header = [
        "operator",
        "pass",
        "sizes",
        "eager",
        "compiled",
        "inlined",
        "floor / eager",
        "MiB",
        "times slower than our eager",
    ]
    return grid(header, lines)


def slower(found: Row) -> str:
    """Where another implementation of the same function was faster than the best of our ways."""
    lines = []
    for rows in _groups(found["rows"]):
        best = min((r for r in rows if r["who"].startswith("fla_ops")), key=lambda r: r["median_ms"])
        name = [f"`{best['operator']}`", best["pass"], sizes(best)]
        ratios = {r["who"]: best["median_ms"] / r["median_ms"] for r in rows if r.get("same")}
        lines += [[*name, who, f"{ratio:.2f}"] for who, ratio in ratios.items() if ratio > 1]
    header = ["operator", "pass", "sizes", "who is faster", "times"]
    return grid(header, lines) if lines else "No peer that computes the same function was faster in this run."


def goals(found: Row) -> str:
    """The targets and what was measured."""
    lines = [
        [t["target"], f"{t['bound']:.2f}", f"{t['measured']:.2f}", "met" if t["met"] else "**not met**"]
        for t in targets.check(found["rows"], "cpu", found["quick"])
    ]
    return grid(["target", "at least", "measured", ""], lines)


def memory(found: Row) -> str:
    """What chunk_gsa keeps for its gradient at each checkpoint level."""
    lines = [[r["level"], f"{r['kept_mib']:.2f}", milliseconds(r["median_ms"])] for r in found["checkpoint_levels"]]
    return grid(["checkpoint_level", "kept beside the inputs, MiB", "forward+backward"], lines)


def pruning(found: Row) -> str:
    """What parallel_attn computes under decays."""
    lines = [[r["decay"], f"{r['share']:.0%}", milliseconds(r["median_ms"])] for r in found["pruning"]]
    return grid(["decay", "products computed, of those without decay", "forward"], lines)


def calls(found: Row) -> str:
    """The price of a call, and of the first one."""
    columns = ("call_us", "kernel_us", "beyond_us", "training_call_us")
    lines = [
        [f"`{r['operator']}`", *("" if r[c] is None else f"{r[c]:.0f}" for c in columns)] for r in found["overhead"]
    ]
    table = grid(["operator", "call, us", "kernel alone, us", "beyond it, us", "forward+backward, us"], lines)
    imports = [r["import_s"] for r in found["first_call"]]
    first = [max(v for name, v in r.items() if name.startswith("first_")) for r in found["first_call"]]
    if not first:
        return table
    return (
        f"{table}\n\nIn a new process with nothing compiled before, importing the package takes {max(imports):.2f} s "
        f"beyond PyTorch's own import, and the slowest first call {max(first):.2f} s."
    )


def lengths(found: Row) -> str:
    """Time for a step and memory, over lengths, ours alone."""
    lines = [
        [r["family"], r["who"].removeprefix("fla_ops "), r["pass"].replace(TRAINING, "forward+backward"),
         str(r["sizes"]["T"]), f"{r['us_per_token']:.2f}", "" if r["peak_mib"] is None else f"{r['peak_mib']:.1f}"]
        for r in found["sweep"] if r["who"].startswith("fla_ops")
    ]  # fmt: skip
    return grid(["family", "form", "pass", "T", "us for a step", "peak MiB"], lines)


def plots(found: Row) -> str:
    """The pictures of the sweep."""
    device = "cpu" if "core" in found["machine"]["device"] else "cuda"
    pictures = sorted(RESULTS.glob(f"*_{device}.svg"))
    return "\n".join(f"![{p.stem.replace('_', ' ')}](../benchmarks/results/{p.name})" for p in pictures)


PARTS: dict[str, Callable[[Row], str]] = {
    "about": about, "comparisons": comparisons, "targets": goals, "slower": slower, "memory": memory,
    "pruning": pruning, "calls": calls,
    "lengths": lengths, "plots": plots,
}  # fmt: skip


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one comparison together, without the peers that are missing."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if not row.get("missing"):
            sizes_and_decay = (tuple(row["sizes"].items()), row["strong"])
            found.setdefault(f"{row['operator']} {row['pass']} {sizes_and_decay}", []).append(row)
    return list(found.values())


def _same(rows: Sequence[Row], name: str) -> bool:
    return any(r["who"] == name and r.get("same") for r in rows)


def rendered(page: str, results: Path = RESULTS) -> str:
    """The page with every measured part written anew."""

    def part(match: re.Match[str]) -> str:
        name = match["name"]
        what, _, device = name.partition(" ")
        path = results / f"{device}.json"
        text = PARTS[what](json.loads(path.read_text())) if path.exists() else NOT_YET
        return f"<!-- begin {name} -->\n{text}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (?P<name>[\w ]+) -->\n.*?<!-- end (?P=name) -->", part, page, flags=re.DOTALL)


def main() -> int:
    """Write the page anew; the exit status."""
    PAGE.write_text(rendered(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
