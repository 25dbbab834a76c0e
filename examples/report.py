"""What a run leaves to look at: a training curve and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Check:
    """Something that was verified while the example ran."""

    name: str
    found: str
    holds: bool


def draw_losses(losses: Sequence[float], reach: dict[str, float], path: Path) -> None:
    """The training loss over steps, in bits per byte, between lines at what each model reaches on held-out text."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(losses, color="0.85", linewidth=0.7)
    axes.plot(_smoothed(losses), color="C0", label="training loss, smoothed")
    for i, (name, bits) in enumerate(sorted(reach.items(), key=lambda item: -item[1])):
        style = {"color": "C0", "linestyle": "-"} if name == "this model" else {"color": f"C{i + 1}", "linestyle": "--"}
        axes.axhline(bits, label=f"{name}, held out: {bits:.3f}", linewidth=1, **style)
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(1, 1.1 * max(reach.values())))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smoothed(losses: Sequence[float], memory: float = 0.9) -> list[float]:
    """An exponential average that starts without a bias to zero."""
    smooth, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = memory * total + loss, memory * weight + 1
        smooth.append(total / weight)
    return smooth


def print_table(trained: str, reach: dict[str, float], checks: Sequence[Check], out: Path) -> None:
    """The summary at the end."""
    print(f"\ntrained: {trained}\n\nbits per byte on held-out text")
    for name, bits in sorted(reach.items(), key=lambda item: -item[1]):
        print(f"  {name:<30} {bits:6.3f}")
    print("\nchecks")
    for check in checks:
        print(f"  {'holds' if check.holds else 'FAILS'}  {check.name}: {check.found}")
    print(f"\nin {out}/")
    for name, what in CONTENTS.items():
        print(f"  {name:<15} {what}")


CONTENTS = {
    "loss.png": "the training curve beside the baselines",
    "sample.txt": "text that the model wrote after a held-out prompt",
    "model.pt2": "the prefill as an AOTInductor package: torch._inductor.aoti_load_package",
    "checkpoint.pt": "model, optimiser, step and hyper-parameters: torch.load",
}
