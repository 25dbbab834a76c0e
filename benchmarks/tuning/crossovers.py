"""Find the sizes from which one form is faster than another: `python -m benchmarks.tuning.crossovers`.

It times every form over a grid of sizes on the device at hand, and keeps the grid in
`benchmarks/results/crossovers_<device>.json`. To the grid it fits that device's thresholds in
`fla_ops/dispatch/crossovers.json`. `--fit` only fits the thresholds again to the grid that was kept; `--check` only
says how far the choices are from the best.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fla_ops
from fla_ops.dispatch import crossovers

from .. import machine
from ..comparison import implementation, input_sets
from ..problems import FORWARD, TRAINING, Problem, dtype_name
from ..report import RESULTS, Progress, milliseconds, sizes, text_table
from ..timing import measure

ALLOWED = 1.15  # how much slower than the best form a choice may be
AGAIN = 3  # how often points with a slower choice are timed once more, and longer, because most of that is noise
HOPELESS = 6.0  # from HOPELESS_FROM steps on, a form this much slower than the best is not timed at greater lengths
HOPELESS_FROM = 64
LENGTHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 4096)
SHAPES: dict[str, dict[str, list[dict[str, int]]]] = {
    "simple_gla": {
        "cpu": [
            {"B": 1, "H": 4, "K": 64, "V": 64}, {"B": 1, "H": 8, "K": 128, "V": 128},
            {"B": 8, "H": 4, "K": 32, "V": 64}, {"B": 4, "H": 16, "K": 64, "V": 64},
        ],
        "cuda": [
            {"B": 1, "H": 16, "K": 128, "V": 128}, {"B": 8, "H": 16, "K": 128, "V": 128},
            {"B": 4, "H": 8, "K": 64, "V": 64}, {"B": 32, "H": 16, "K": 128, "V": 128},
        ],
    },
    "gated_delta_rule": {
        "cpu": [{"B": 1, "H": 4, "K": 64, "V": 64}, {"B": 4, "H": 8, "K": 128, "V": 128}],
        "cuda": [{"B": 1, "H": 16, "K": 128, "V": 128}, {"B": 8, "H": 16, "K": 128, "V": 128}],
    },
    "gsa": {
        "cpu": [{"B": 1, "H": 4, "K": 64, "V": 64, "M": 64}, {"B": 4, "H": 4, "K": 32, "V": 64, "M": 32}],
        "cuda": [{"B": 1, "H": 16, "K": 128, "V": 128, "M": 64}, {"B": 8, "H": 16, "K": 128, "V": 128, "M": 64}],
    },
}  # fmt: skip
CANDIDATES = {  # values that each threshold may take
    "recurrent_up_to": (0, *LENGTHS[:-1]),
    "parallel_up_to": (0, *LENGTHS[:-1]),
    "parallel_up_to_scores": (0, *(1 << n for n in range(14, 20))),
    "fused_from_heads": (4, 16, 32, 64, 128, 256),
    "fused_from_time": (1, 65, 256, 512, 1024, 4096, 1 << 20),
}
Point = dict[str, Any]  # family, sizes, gradient, dtype, and milliseconds by form


def family_of(family: str) -> Any:
    """Import what chooses a family's form."""
    return importlib.import_module(f"fla_ops.{family}.forms").FAMILY


def call_of(point: Point, state: bool = False) -> Any:
    """A call of a point's sizes, in tensors without memory; with a state, forms that have none refuse."""
    call = importlib.import_module(f"fla_ops.{point['family']}.call")
    heads = point["sizes"]["H"]
    found = {"HK": heads, "HQ": heads, **point["sizes"]}
    device = "cpu" if point["device"] == "cpu" else "meta"
    element = torch.zeros((), device=device, requires_grad=point["gradient"])
    names = [name for name in call.Call._fields if name not in call.Call._field_defaults]
    tensors = {name: element.expand([found[letter] for letter in call.AXES[name].split()]) for name in names}
    return call.Call(**tensors, output_final_state=state)


def chosen(point: Point, state: bool = False) -> str:
    """The form that `auto` picks."""
    form: str = family_of(point["family"]).choose(call_of(point, state)).form.name
    return form


def regret(point: Point, state: bool = False) -> float:
    """Divide the time of the chosen form by that of the best; infinite if it was too slow to be timed."""
    wanted = call_of(point, state)
    able = [form.name for form in family_of(point["family"]).forms if not form.refuse(wanted)]
    times = {name: ms for name, ms in point["ms"].items() if name in able}
    return float(times.get(chosen(point, state), math.inf)) / min(times.values())


def regrets(points: Sequence[Point]) -> list[float]:
    """The regret of every point, without a state and with one."""
    return [regret(point, state) for point in points for state in (False, True)]


def measure_family(family: str, device: torch.device, seconds: float, longest: int) -> Iterator[Point]:
    """Time every form at every size and length, without those that were hopelessly slow at a smaller length."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    names = [form.name for form in family_of(family).forms]
    for shape, gradient in itertools.product(SHAPES[family][device.type], (False, True)):
        alive = set(names)
        for length in (t for t in LENGTHS if t <= longest):
            problem = Problem(family, family, "auto", {**shape, "T": length}, dtype)
            timed = _time_forms(problem, [n for n in names if n in alive], gradient, device, seconds)
            best = min(timed.values())
            alive = {n for n, ms in timed.items() if n == names[0] or ms < HOPELESS * best or length < HOPELESS_FROM}
            yield {
                "family": family, "device": device.type, "sizes": problem.sizes, "gradient": gradient,
                "dtype": dtype_name(dtype), "ms": timed,
            }  # fmt: skip


def _time_forms(
    problem: Problem, names: Sequence[str], gradient: bool, device: torch.device, seconds: float
) -> dict[str, float]:
    """Find the milliseconds of each form, the best of many samples taken in turn."""
    pass_ = TRAINING if gradient else FORWARD
    inputs = input_sets(problem, pass_, device, rotate=False)[0]
    leaves = [[inputs[name] for name in problem.trained]]
    dispatcher = getattr(fla_ops, problem.family)
    calls = [implementation(n, lambda _, n=n: dispatcher(**inputs, mode=n), leaves, pass_) for n in names]
    measure(calls, device, seconds)
    return {c.name: float(f"{min(c.samples) * 1e3:.4g}") for c in calls}


def time_again(point: Point, seconds: float) -> None:
    """Time a point's forms once more and keep the smaller times."""
    problem = Problem(point["family"], point["family"], "auto", point["sizes"], getattr(torch, point["dtype"]))
    timed = _time_forms(problem, list(point["ms"]), point["gradient"], torch.device(point["device"]), seconds)
    point["ms"] = {name: min(ms, timed[name]) for name, ms in point["ms"].items()}


def fit(points: Sequence[Point], thresholds: Sequence[str]) -> dict[str, int]:
    """Find the thresholds with the smallest worst regret, and of those the ones with the smallest mean.

    Two thresholds at a time are improved, until no pair can be.
    """
    module = importlib.import_module(f"fla_ops.{points[0]['family']}.forms")

    def score(tried: dict[str, int]) -> tuple[float, float]:
        with mock.patch.object(module, "crossovers", return_value=tried):
            found = regrets(points)
        return max(*found, ALLOWED), sum(map(math.log, found))

    best = {name: CANDIDATES[name][0] for name in thresholds}
    found, before = score(best), None
    while found != before:
        before = found
        for names in itertools.combinations(thresholds, min(2, len(thresholds))):
            for values in itertools.product(*(CANDIDATES[name] for name in names)):
                tried = best | dict(zip(names, values, strict=True))
                if (now := score(tried)) < found:
                    best, found = tried, now
    return best


def rewrite(points: Sequence[Point], device: str, source: str, path: Path = crossovers.TABLE) -> None:
    """Fit thresholds for the points' families on this device, and write them into the table."""
    found = json.loads(path.read_text())
    for family in dict.fromkeys(p["family"] for p in points):
        part = found[family].setdefault(device, dict(found[family]["cuda"]))
        part["source"] = source
        for name, gradient in (("forward", False), ("training", True)):
            mine = [p for p in points if (p["family"], p["gradient"]) == (family, gradient)]
            part[name] = fit(mine, list(part[name]))
    path.write_text(_as_text(found) + "\n")
    crossovers.crossovers.cache_clear()


def _as_text(found: dict[str, Any]) -> str:
    """Write JSON with one line for each row of thresholds."""
    families = []
    for family, devices in found.items():
        parts = []
        for device, part in devices.items():
            lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(value)}" for name, value in part.items())
            parts.append(f"    {json.dumps(device)}: {{\n{lines}\n    }}")
        families.append(f"  {json.dumps(family)}: {{\n" + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(families) + "\n}"


def show(points: Sequence[Point]) -> float:
    """Print each point with its choice, without and with a state; return the worst regret."""
    lines = []
    for p in points:
        times = ", ".join(f"{name} {milliseconds(ms)}" for name, ms in p["ms"].items())
        choices = [f"{chosen(p, state)} {regret(p, state):.2f}" for state in (False, True)]
        lines.append([p["family"], TRAINING if p["gradient"] else FORWARD, sizes(p), *choices, times])
    print(text_table(["family", "pass", "sizes", "auto picks, against best", "with a state", "times"], lines))
    return max(regrets(points))


def save(kept: dict[str, Any], path: Path) -> None:
    """Write the grid, one line for each point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(p)}" for p in kept["points"])
    about = json.dumps({name: value for name, value in kept.items() if name != "points"}, indent=1)[:-2]
    path.write_text(f'{about},\n "points": [\n{lines}\n ]\n}}\n')


def measure_grid(device: torch.device, seconds: float, longest: int, table: Path) -> dict[str, Any]:
    """Measure the grid of every family; points where the fitted choice is too slow are timed again."""
    kept = {"machine": machine.describe(device), "source": machine.source(device), "points": []}
    progress = Progress(sum(2 * len(SHAPES[f][device.type]) for f in SHAPES) * len(LENGTHS))
    for family in SHAPES:
        for point in measure_family(family, device, seconds, longest):
            progress.start(f"{family} {point['sizes']}")
            kept["points"].append(point)
    progress.clear()
    with mock.patch.object(crossovers, "TABLE", table):
        for _ in range(AGAIN):
            rewrite(kept["points"], device.type, kept["source"], table)
            for point in kept["points"]:
                if max(regret(point), regret(point, True)) > ALLOWED:
                    time_again(point, 3 * seconds)
    kept["cores_others_used"] = machine.OTHER_LOAD.cores()
    return kept


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.tuning.crossovers", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--seconds", type=float, default=0.4, help="Time each size and length this long; the default is 0.4.")
    add("--longest", type=int, default=LENGTHS[-1], help="Leave out greater lengths than this.")
    add("--results", type=Path, default=RESULTS, help="Keep the measured grid in this folder.")
    add("--table", type=Path, default=crossovers.TABLE, help="Rewrite this table instead of the package's.")
    add("--fit", action="store_true", help="Fit to the grid that was measured before.")
    add("--check", action="store_true", help="Check the choices against that grid, and write nothing.")
    options = parser.parse_args(arguments)
    grid = options.results / f"crossovers_{options.device}.json"
    if options.fit or options.check:
        kept = json.loads(grid.read_text())
    else:
        kept = measure_grid(torch.device(options.device), options.seconds, options.longest, options.table)
        save(kept, grid)
        if (kept["cores_others_used"] or 0) > machine.BUSY:
            print(f"THE MACHINE WAS NOT QUIET: others used {kept['cores_others_used']:.2f} cores")
    if not options.check:
        rewrite(kept["points"], options.device, kept["source"], options.table)
    with mock.patch.object(crossovers, "TABLE", options.table):
        worst = show(kept["points"])
    crossovers.crossovers.cache_clear()
    print(f"worst choice: {worst:.2f} times the best form's time (allowed {ALLOWED})")
    return 0 if worst <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
