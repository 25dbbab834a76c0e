"""Plots of time against length, on two logarithmic axes, with the floor: one for each family and pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .comparison import OURS, Row


def draw(rows: Sequence[Row], folder: Path, device: str, about: str) -> Iterator[Path]:
    """Write `<family>_<pass>_<device>.svg` for each family and pass of a sweep; without matplotlib, write nothing."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fla_ops", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    measured = [r for r in rows if "median_ms" in r]
    for family, pass_ in dict.fromkeys((r["family"], r["pass"]) for r in measured):
        chosen = [r for r in measured if (r["family"], r["pass"]) == (family, pass_)]
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        for who, line in _lines(chosen).items():
            style = {"marker": "o", "lw": 2} if who.startswith(OURS) else {"marker": ".", "lw": 1, "alpha": 0.8}
            axes.loglog(*zip(*sorted(line), strict=True), label=who, **style)
        floor = sorted({(r["sizes"]["T"], r["floor_ms"]) for r in chosen if r["who"].startswith(OURS)})
        axes.loglog(*zip(*floor, strict=True), "k--", lw=1, label="floor")
        axes.set(xlabel="T", ylabel="ms", title=f"{family}, {pass_.replace('training', 'forward+backward')}")
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend(frameon=False, fontsize=8)
        figure.text(0.01, 0.003, f"{_fixed(chosen[0])}   {about}", fontsize=6, color="gray")
        path = folder / f"{family}_{pass_}_{device}.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
        yield path


def _lines(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Group the points by implementation; a peer's variant may change along its line."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in rows:
        lines.setdefault(r["who"].split(" C=")[0], []).append((r["sizes"]["T"], r["median_ms"]))
    return lines


def _fixed(row: Row) -> str:
    return " ".join(f"{letter}={size}" for letter, size in row["sizes"].items() if letter != "T") + f" {row['dtype']}"
