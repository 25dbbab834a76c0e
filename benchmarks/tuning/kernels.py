"""Tune kernels on the GPU at hand: `python -m benchmarks.tuning.kernels` rewrites `fla_ops/launch/<class>.json`.

For each operator it finds the entries of the table that its launches read, tries the neighbours of each (tiles and
warps halved and doubled, stages one up and one down), and keeps a setting that is faster by more than the noise. A
setting is dropped if its kernel spills, does not fit into shared memory, or changes the result. The widths of an entry
are bounds: a setting tuned at smaller widths than its entry's becomes a new entry.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fla_ops import launch

from .. import machine
from ..comparison import EAGER, input_sets, ours
from ..problems import Problem, problems, schema_arguments
from ..report import milliseconds
from ..timing import Implementation, measure, synchronise

Entry = dict[str, Any]
GAIN = 0.97  # a new setting must take less than this share of the time before
BLOCKS = ("BT", "BR", "BK", "BV", "BD", "BLOCK")
LIMITS = {"BT": (16, 128), "BR": (16, 128), "BK": (16, 256), "BV": (8, 256), "BD": (16, 256), "BLOCK": (256, 4096)}
WARPS, STAGES = (1, 8), (1, 5)
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative difference that another order of sums may make
COMPOSED = ("linear_attn", "lightning_attn", "ssd", "ssd_step_")  # families that launch other families' kernels
# Prefixes of the operators that are used most.
FIRST = ("fused_chunk", "chunk", "simple_gla_step_", "gsa", "parallel_attn", "fused_recurrent")


@dataclass(frozen=True)
class Task:
    """One pass of one operator at some widths, with which the settings of its kernels are tried."""

    problem: Problem
    pass_: str

    def __str__(self) -> str:
        return self.problem.label(self.pass_)


def tasks(device: torch.device, only: str) -> list[Task]:
    """List every operator that has kernels of its own, at the usual widths, most used first."""
    found = []
    owning = [p for p in problems(device) if p.operator == "normalize_output" or p.family not in COMPOSED]
    for problem in {p.operator: p for p in reversed(owning) if p.form != "auto" and not p.strong}.values():
        for dtype, width in ((torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float32, 64)):
            narrow = replace(problem.resized(K=width, V=width), dtype=dtype)
            found += [Task(narrow, pass_) for pass_ in narrow.passes]
    unique = {str(task): task for task in found if re.search(only, str(task))}

    def rank(task: Task) -> tuple[int, int, int]:
        first = next((i for i, name in enumerate(FIRST) if task.problem.operator.startswith(name)), len(FIRST))
        return (task.problem.dtype is torch.float32, task.problem.sizes["K"] != 128, first)

    return sorted(unique.values(), key=rank)


def neighbours(entry: Entry) -> Iterator[Entry]:
    """Yield the settings one step away in a tile, in warps, in stages, or in a tile and the warps together."""
    tiles = [{}, *_halved_and_doubled(entry)]
    low, high = WARPS
    warps = [w for w in (entry["num_warps"] // 2, entry["num_warps"], entry["num_warps"] * 2) if low <= w <= high]
    stages = [s for s in range(entry["num_stages"] - 1, entry["num_stages"] + 2) if STAGES[0] <= s <= STAGES[1]]
    for tile, warp in itertools.product(tiles, warps):
        yield entry | tile | {"num_warps": warp}
    for stage in stages:
        yield entry | {"num_stages": stage}


def _halved_and_doubled(entry: Entry) -> Iterator[Entry]:
    for name in BLOCKS:
        if name in entry:
            low, high = LIMITS[name]
            yield from ({name: size} for size in (entry[name] // 2, entry[name] * 2) if low <= size <= high)


@contextlib.contextmanager
def watching() -> Iterator[tuple[list[tuple[str, Entry]], list[Any]]]:
    """Record the entries that launchers read, and the kernels that they launch."""
    read: list[tuple[str, Entry]] = []
    compiled: list[Any] = []
    entry = launch.entry

    def reading(kernel: str, *args: Any) -> Entry:
        found = entry(kernel, *args)
        read.append((kernel, found))
        return found

    def running(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        if programs > 0:
            compiled.append(kernel[(programs,)](*args, **constants))

    with mock.patch.object(launch, "entry", reading), mock.patch.object(launch, "run", running):
        yield read, compiled


def spills(compiled: Sequence[Any]) -> bool:
    """Whether any of the kernels spills registers."""
    return any(getattr(kernel, "n_spills", 0) for kernel in compiled)


class Tuner:
    """Improves the table of one device class, and logs what it tried."""

    def __init__(self, device: torch.device, seconds: float, end: float) -> None:
        self.device, self.seconds, self.end = device, seconds, end
        self.name = launch.device_class(device.index)
        self.entries = launch.table(self.name)
        self.log: list[dict[str, Any]] = []
        self.seen: set[tuple[str, int]] = set()

    def tune(self, task: Task) -> None:
        """Improve the entries that this task's launches read."""
        call = self._call(task)
        with watching() as (read, _):
            call.call(0)
        for kernel, used in read:
            entry, added = self._own_entry(kernel, used, task)
            if (kernel, id(entry)) not in self.seen:
                self.seen.add((kernel, id(entry)))
                self._improve(task, call, kernel, entry, added)

    def compile_all(self, task: Task) -> None:
        """Compile into Triton's cache the settings that `tune` will try first."""
        call = self._call(task)
        with watching() as (read, _):
            call.call(0)
        for _, entry in read:
            kept = dict(entry)
            for candidate in neighbours(kept):
                if time.perf_counter() < self.end:
                    entry.update(candidate)
                    with contextlib.suppress(Exception):
                        call.call(0)
            entry.update(kept)

    def _call(self, task: Task) -> Implementation:
        """Make a call on one set of inputs, which puts back what the call before updated in place."""
        first = input_sets(task.problem, task.pass_, self.device, rotate=False)[0]
        written = [a.name for a in schema_arguments(task.problem.operator) if a.alias_info and a.alias_info.is_write]
        updated = [first[name] for name in written if name in first]
        before = [x.clone() for x in updated]
        plain = ours(task.problem, task.pass_, EAGER, [first])

        def call(i: int) -> Any:
            for x, kept in zip(updated, before, strict=True):
                x.copy_(kept)
            return plain.call(i)

        return Implementation(str(task), call)

    def _own_entry(self, kernel: str, entry: Entry, task: Task) -> tuple[Entry, bool]:
        """Find the entry for exactly these widths; add a copy of the one in use if that also covers wider calls."""
        widths = {"key_width": task.problem.sizes["K"], "value_width": task.problem.sizes["V"]}
        if all(entry[name] <= width for name, width in widths.items()):
            return entry, False
        own = entry | widths
        for found in self.entries[kernel]:
            if all(found[name] == own[name] for name in (*widths, "dtype")):
                return found, False
        self.entries[kernel].append(own)
        self.entries[kernel].sort(key=lambda e: (e["dtype"] == "float32", e["key_width"], e["value_width"]))
        launch._nearest.cache_clear()
        return own, True

    def _improve(self, task: Task, call: Implementation, kernel: str, entry: Entry, added: bool) -> None:
        kept, truth = dict(entry), self._outputs(call)
        best, before, tried, dropped = dict(entry), self._time(call), 0, 0
        fastest = before
        for _ in range(2):
            start = dict(best)
            for candidate in neighbours(start):
                if candidate == start or time.perf_counter() > self.end:
                    continue
                tried += 1
                entry.update(candidate)
                found = self._try(call, truth, task.problem.dtype)
                dropped += found is None
                if found is not None and found < GAIN * fastest:
                    best, fastest = candidate, found
            if best == start:
                break
        entry.update(best)
        if added and best == kept:
            self.entries[kernel].remove(entry)
            launch._nearest.cache_clear()
        self.log.append(
            {
                "task": str(task), "kernel": kernel, "before_ms": before * 1e3, "after_ms": fastest * 1e3,
                "entry": dict(entry), "changed": best != kept, "tried": tried, "dropped": dropped,
            }
        )  # fmt: skip
        mark = "->" if best != kept else "=="
        times = f"{milliseconds(before * 1e3)} {mark} {milliseconds(fastest * 1e3)}"
        print(f"{task}: {kernel} {times}", flush=True)

    def _try(self, call: Implementation, truth: list[Tensor], dtype: torch.dtype) -> float | None:
        """Time the call with the settings as they are now; None if they must not be used."""
        try:
            with watching() as (_, compiled):
                outputs = self._outputs(call)
            if spills(compiled) or not _agree(outputs, truth, CLOSE[dtype]):
                return None
            return self._time(call)
        except Exception:  # noqa: BLE001  (Triton raises many kinds for a setting that does not fit)
            return None

    def _outputs(self, call: Implementation) -> list[Tensor]:
        found = call.call(0)
        synchronise(self.device)
        return [x.clone() for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, Tensor)]

    def _time(self, call: Implementation) -> float:
        call.samples.clear()
        measure([call], self.device, self.seconds)
        return min(call.samples)


def _agree(outputs: list[Tensor], truth: list[Tensor], tolerance: float) -> bool:
    pairs = ((a.double(), b.double()) for a, b in zip(outputs, truth, strict=True))
    return all(bool((a - b).norm() <= tolerance * b.norm()) for a, b in pairs)


def as_text(entries: dict[str, list[Entry]]) -> str:
    """Write the table as JSON with one line for each entry."""
    kernels = (
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"    {json.dumps(entry)}" for entry in found) + "\n  ]"
        for name, found in entries.items()
    )
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.tuning.kernels", description=__doc__)
    add = parser.add_argument
    add("--only", default="", metavar="REGEX", help="Tune only tasks whose label matches.")
    add("--limit", type=float, default=900, metavar="SECONDS", help="Stop after this long; the default is 900.")
    add("--seconds", type=float, default=0.05, help="Time each setting this long; the default is 0.05.")
    add("--table", type=Path, help="Write this file instead of the package's table.")
    add("--json", type=Path, metavar="FILE", help="Write what was tried.")
    add("--compile-only", metavar="I/N", help="Compile share I of N of the settings, and time nothing.")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.tuning.kernels needs a GPU, and torch sees none", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    tuner = Tuner(device, options.seconds, time.perf_counter() + options.limit)
    chosen = tasks(device, options.only)
    if options.compile_only:
        share, shares = map(int, options.compile_only.split("/"))
        _each(chosen[share::shares], tuner.compile_all)
        return 0
    failed = _each(chosen, tuner.tune)
    path = options.table or Path(launch.__file__).with_name(f"{tuner.name}.json")
    path.write_text(as_text(tuner.entries))
    print(f"wrote {path.name}: {sum(e['changed'] for e in tuner.log)} of {len(tuner.log)} entries changed")
    if options.json is not None:
        about = {"machine": machine.describe(device), "class": tuner.name, "tried": tuner.log, "failed": failed}
        options.json.write_text(json.dumps(about, indent=1) + "\n")
    return 1 if failed else 0


def _each(chosen: list[Task], work: Callable[[Task], None]) -> list[str]:
    """Do the work for every task; return the failures."""
    return [failure for task in chosen if (failure := _failure(task, work)) is not None]


def _failure(task: Task, work: Callable[[Task], None]) -> str | None:
    try:
        work(task)
    except Exception as error:  # noqa: BLE001  (the other tasks are still worth their time)
        failure = f"{task}: {type(error).__name__}: {error}"[:300]
        print(f"FAILED {failure}", flush=True)
        return failure
    return None


if __name__ == "__main__":
    sys.exit(main())
