"""One run of the benchmark command: what it measures in which order, what it prints, what it writes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import torch

from . import details, machine, plots, sections, table, targets
from .ceilings import Ceilings, measure_ceilings
from .contenders import COMPILED, EAGER, INLINED
from .groups import Settings, group
from .problems import Problem, problems

SECTIONS = ("rows", "details", "overhead", "first-call", "sweep")
QUICK_SECTIONS = ("rows", "overhead")
QUICK_SECONDS, SECONDS = 0.4, 3.0


class Run:
    """One run of the command: what it measured so far, and where it goes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        ways = (EAGER, COMPILED) if options.quick else (EAGER, COMPILED, INLINED)
        self.settings = Settings(
            self.device,
            options.seconds or (QUICK_SECONDS if options.quick else SECONDS),
            tuple(options.ways.split(",")) if options.ways else ways,
            peers=not options.no_peers,
        )
        usual = QUICK_SECTIONS if options.quick else SECTIONS
        self.sections = options.sections.split(",") if options.sections else usual
        self.started, self.skipped = time.perf_counter(), 0
        self.results: dict[str, Any] = {
            "machine": machine.describe(self.device),
            "quick": options.quick,
            "seconds": self.settings.seconds,
            "rows": [],
            "checkpoint_levels": [],
            "pruning": [],
            "overhead": [],
            "first_call": [],
            "sweep": [],
            "failed": [],
        }

    def chosen(self) -> list[tuple[Problem, str]]:
        """Problems and passes that --only lets through."""
        every = [(p, what) for p in problems(self.device, self.options.quick) for what in p.passes]
        return [(p, what) for p, what in every if re.search(self.options.only, p.label(what))]

    def late(self) -> bool:
        """Whether the time is up."""
        over = self.options.limit is not None and time.perf_counter() - self.started > self.options.limit
        self.skipped += over
        return over

    @contextlib.contextmanager
    def survived(self, label: str, progress: table.Progress) -> Iterator[None]:
        """What fails inside is reported, and the run goes on: time on a device is short."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            progress.clear()
            first = (str(error).splitlines() or [""])[0][:200]
            print(f"\n{label}\n  FAILED: {type(error).__name__}: {first}", flush=True)
            self.results["failed"].append({"label": label, "error": f"{type(error).__name__}: {first}"})

    def save(self) -> None:
        """Write the results so far."""
        if self.options.json is not None:
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            self.options.json.write_text(json.dumps(rounded(self.results), indent=1) + "\n")

    def measure(self) -> None:
        """Every section asked for."""
        ceilings = measure_ceilings(self.device, self.settings.seconds)
        self.results["ceilings"] = {"flops": ceilings.flops, "bytes": ceilings.bytes}
        rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {dtype}" for dtype, rate in ceilings.flops.items())
        print(f"ceilings: {rates}; copy {ceilings.bytes / 1e9:,.1f} GB/s")
        chosen, swept = self.chosen(), sections.sweep(self.device, self.options.quick)
        swept = [(forms, what) for forms, what in swept if re.search(self.options.only, forms[0].label(what))]
        progress = table.Progress(len(chosen) * ("rows" in self.sections) + len(swept) * ("sweep" in self.sections))
        if "rows" in self.sections:
            self._rows(chosen, ceilings, progress)
        operators = {p.operator: p for p, _ in reversed(chosen)}
        if "details" in self.sections:
            self._details(operators, progress)
        if "overhead" in self.sections:
            self._overhead(list(reversed(operators.values())), progress)
        if "first-call" in self.sections:
            self._first_calls(list(reversed(operators)))
        if "sweep" in self.sections:
            self._sweep(swept, ceilings, progress)
        progress.clear()

    def _rows(self, chosen: list[tuple[Problem, str]], ceilings: Ceilings, progress: table.Progress) -> None:
        for problem, what in chosen:
            if self.late():
                continue
            progress.start(problem.label(what))
            with self.survived(problem.label(what), progress):
                rows = group(problem, what, self.settings, ceilings)
                progress.clear()
                print(table.comparison(rows), flush=True)
                self.results["rows"] += rows
                self.save()

    def _details(self, operators: dict[str, Problem], progress: table.Progress) -> None:
        if "chunk_gsa" in operators and not self.late():
            with self.survived("checkpoint levels", progress):
                found = self.results["checkpoint_levels"] = details.checkpoint_levels(self.settings)
                lines = [[r["level"], f"{r['kept_mib']:.2f}", table.milliseconds(r["median_ms"])] for r in found]
                header = ["checkpoint_level", "kept MiB", "forward+backward"]
                print(
                    f"\nchunk_gsa {table.sizes(found[0])}: what is kept for the gradient\n{table.grid(header, lines)}"
                )
        if "parallel_attn" in operators and self.device.type == "cpu" and not self.late():
            with self.survived("pruning", progress):
                found = self.results["pruning"] = details.pruning(self.settings)
                lines = [[r["decay"], f"{r['share']:.0%}", table.milliseconds(r["median_ms"])] for r in found]
                header = ["decay", "of the products", "forward"]
                print(f"\nparallel_attn {table.sizes(found[0])}: what is computed\n{table.grid(header, lines)}")
        self.save()

    def _overhead(self, chosen: list[Problem], progress: table.Progress) -> None:
        if self.late():
            return
        found = self.results["overhead"]
        for problem in chosen:
            with self.survived(f"{problem.operator}, one call", progress):
                found.append(sections.overhead(problem, self.settings))
        print("\none eager call at tiny sizes, microseconds")
        columns = ("call_us", "kernel_us", "beyond_us", "training_call_us")
        lines = [[r["operator"], *("" if r[c] is None else f"{r[c]:.1f}" for c in columns)] for r in found]
        print(table.grid(["operator", "call", "kernel alone", "beyond it", "forward+backward"], lines), flush=True)
        self.save()

    def _first_calls(self, operators: list[str]) -> None:
        if self.late():
            return
        found = self.results["first_call"] = sections.first_calls(self.device, operators)
        print("\nfirst call in a new process, nothing in Triton's cache, seconds")
        for row in found:
            times = (f"{name[:-2].replace('_', ' ')} {value:.3f}" for name, value in row.items() if name.endswith("_s"))
            print(f"  {row['operator']:32s}{', '.join(times)}")
        self.save()

    def _sweep(self, swept: list[Any], ceilings: Ceilings, progress: table.Progress) -> None:
        lines = []
        for forms, what in swept:
            if self.late():
                continue
            progress.start(f"sweep {forms[0].label(what)}")
            rows = []
            with self.survived(f"sweep {forms[0].label(what)}", progress):
                rows = sections.sweep_rows(forms, what, self.settings, ceilings)
            self.results["sweep"] += rows
            self.save()
            lines += [
                [
                    r["family"],
                    what,
                    str(r["sizes"]["T"]),
                    r["who"],
                    table.milliseconds(r["median_ms"]),
                    table.spread(r),
                    f"{r['us_per_token']:.3f}",
                    "" if r["peak_mib"] is None else f"{r['peak_mib']:.1f}",
                ]
                for r in rows
                if "median_ms" in r
            ]
        progress.clear()
        if lines:
            print("\nover lengths")
            print(table.grid(["family", "pass", "T", "who", "time", "spread", "us/step", "peak MiB"], lines))
        if self.options.plots is not None:
            about = machine.source(self.device)
            for path in plots.draw(self.results["sweep"], self.options.plots, self.device.type, about):
                print(f"wrote {path.name}")

    def finish(self) -> None:
        """The targets, and how far the numbers can be trusted."""
        found = self.results["targets"] = targets.check(self.results["rows"], self.device.type, self.options.quick)
        if found:
            print(f"\ntargets\n{targets.lines(found)}")
        measured = [r for r in self.results["rows"] + self.results["sweep"] if r.get("spread") is not None]
        noisy = sum(r["spread"] > table.NOISY for r in measured)
        others = machine.WATCH.others()
        self.results["noise"] = {
            "rows": len(measured),
            "noisy_rows": noisy,
            "bound": table.NOISY,
            "cores_others_used": others,
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "comparisons_skipped": self.skipped,
        }
        print(f"\n{noisy} of {len(measured)} rows spread by more than {table.NOISY:.0%} (marked !)", end="")
        print("" if others is None else f"; other processes used {others:.2f} cores meanwhile")
        if (others or 0) > machine.BUSY:
            print("THE MACHINE WAS NOT QUIET: do not rely on these times")
        if self.skipped:
            print(f"{self.skipped} comparisons were not begun: the time was up")
        self.save()


def rounded(x: Any) -> Any:
    """Four significant figures are more than any time here is good for."""
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, (list, tuple)) else x
