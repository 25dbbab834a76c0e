"""Time every operator, forward, forward+backward and decode, beside its peers.

`python -m benchmarks` measures everything on the device at hand; `--quick` takes small sizes and a minute or two.
Implementations are timed alternately in one loop, on inputs rotated so that none stays in cache. Ratios are medians of
ratios within a round. "of floor" compares a time with the floor, which is the least time that the operations and bytes
take at the rates measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import machine, models, plots, report, sections, targets
from .comparison import COMPILED, EAGER, WAYS, Row, Settings, compare
from .peers import peers_of
from .problems import UNTIMED, Problem, problems
from .roofline import Roofline, measure_roofline
from .timing import NOISY

SECTIONS = ("rows", "details", "overhead", "first-call", "sweep", "models")
QUICK_SECTIONS = ("rows", "overhead")
QUICK_WAYS = (EAGER, COMPILED)
QUICK_SECONDS, SECONDS = 0.4, 3.0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="Take small sizes and few rounds.")
    add(
        "--only",
        metavar="REGEX",
        default="",
        help="Measure only rows whose label matches, as in '^chunk.*training'; --list shows the labels.",
    )
    add("--list", action="store_true", help="Print the rows and their peers, and measure nothing.")
    add("--json", metavar="FILE", type=Path, help="Write the results to a file, anew after each comparison.")
    add("--plots", metavar="FOLDER", type=Path, help="Write plots of the sweep into a folder.")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=("cpu", "cuda"),
        help="Measure this device; the default is the GPU if there is one.",
    )
    add("--threads", type=int, help="Use this many threads on a CPU.")
    add("--seconds", type=float, help=f"Spend this long on each comparison; the default is {SECONDS:g}, or "
        f"{QUICK_SECONDS:g} with --quick.")  # fmt: skip
    add("--limit", type=float, metavar="SECONDS", help="Begin no further comparison after this long.")
    add("--ways", type=_names(WAYS), help=f"Call ours in these ways, of {','.join(WAYS)}; the default is all, or "
        f"{','.join(QUICK_WAYS)} with --quick.")  # fmt: skip
    add("--sections", type=_names(SECTIONS), help=f"Measure these sections, of {','.join(SECTIONS)}; the default is "
        f"all, or {','.join(QUICK_SECTIONS)} with --quick.")  # fmt: skip
    add("--no-peers", action="store_true", help="Measure ours alone.")
    return parser.parse_args(arguments)


def _names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Parse some of the known names, with commas between."""

    def names(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"wanted some of {','.join(known)}, got {','.join(unknown)}")
        return found

    return names


class Run:
    """One run of the command: it measures section by section, prints each, and keeps the results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.settings = Settings(
            self.device,
            options.seconds or (QUICK_SECONDS if options.quick else SECONDS),
            options.ways or (QUICK_WAYS if options.quick else WAYS),
            peers=not options.no_peers,
        )
        self.sections = options.sections or (QUICK_SECTIONS if options.quick else SECTIONS)
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
            "models": [],
            "failed": [],
        }
        every = [(p, pass_) for p in problems(self.device, options.quick) for pass_ in p.passes]
        self.chosen = [(p, pass_) for p, pass_ in every if re.search(options.only, p.label(pass_))]
        every = sections.sweep(self.device, options.quick)
        self.swept = [(forms, pass_) for forms, pass_ in every if re.search(options.only, forms[0].label(pass_))]
        known = models.MODELS if machine.version("transformers") else ()
        self.models = [name for name in known if re.search(options.only, models.label(name))]
        self.operators: dict[str, Problem] = {}
        for problem, _ in self.chosen:
            self.operators.setdefault(problem.operator, problem)
        work = {"rows": self.chosen, "sweep": self.swept, "models": self.models}
        self.progress = report.Progress(sum(len(x) for section, x in work.items() if section in self.sections))

    def out_of_time(self) -> bool:
        """Whether the limit has passed; the run counts what it therefore does not begin."""
        over = self.options.limit is not None and time.perf_counter() - self.started > self.options.limit
        self.skipped += over
        return over

    @contextlib.contextmanager
    def reporting_failure(self, label: str) -> Iterator[None]:
        """Report what fails inside and go on, because time on a device is short."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.progress.clear()
            first = (str(error).splitlines() or [""])[0][:200]
            print(f"\n{label}\n  FAILED: {type(error).__name__}: {first}", flush=True)
            self.results["failed"].append({"label": label, "error": f"{type(error).__name__}: {first}"})

    def save(self) -> None:
        """Write the results so far."""
        if self.options.json is not None:
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            self.options.json.write_text(json.dumps(rounded(self.results), indent=1) + "\n")

    def measure(self) -> None:
        """Measure every section asked for."""
        roofline = measure_roofline(self.device, self.settings.seconds)
        self.results["ceilings"] = {"flops": roofline.flops, "bytes": roofline.bytes}
        rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {dtype}" for dtype, rate in roofline.flops.items())
        print(f"roofline: {rates}; copy {roofline.bytes / 1e9:,.1f} GB/s")
        if "rows" in self.sections:
            self._rows(roofline)
        if "details" in self.sections:
            self._details()
        if "overhead" in self.sections and not self.out_of_time():
            self._overhead()
        if "first-call" in self.sections and not self.out_of_time():
            self._first_calls()
        if "sweep" in self.sections:
            self._sweep(roofline)
        if "models" in self.sections:
            self._models()
        self.progress.clear()

    def _rows(self, roofline: Roofline) -> None:
        for problem, pass_ in self.chosen:
            if self.out_of_time():
                continue
            self.progress.start(problem.label(pass_))
            with self.reporting_failure(problem.label(pass_)):
                rows = compare(problem, pass_, self.settings, roofline)
                self.progress.clear()
                print(report.comparison(rows), flush=True)
                self.results["rows"] += rows
                self.save()

    def _details(self) -> None:
        if "chunk_gsa" in self.operators and not self.out_of_time():
            with self.reporting_failure("checkpoint levels"):
                found = self.results["checkpoint_levels"] = sections.checkpoint_levels(self.settings)
                print(f"\nchunk_gsa {report.sizes(found[0])}: what is kept for the gradient")
                print(report.text_table(*report.checkpoint_levels(found)))
        if "parallel_attn" in self.operators and self.device.type == "cpu" and not self.out_of_time():
            with self.reporting_failure("pruning"):
                found = self.results["pruning"] = sections.pruning(self.settings)
                print(f"\nparallel_attn {report.sizes(found[0])}: what is computed")
                print(report.text_table(*report.pruning(found)))
        self.save()

    def _overhead(self) -> None:
        found = self.results["overhead"]
        for problem in self.operators.values():
            with self.reporting_failure(f"{problem.operator}, one call"):
                found.append(sections.overhead(problem, self.settings))
        print("\none eager call at tiny sizes, microseconds")
        print(report.text_table(*report.overhead(found)), flush=True)
        self.save()

    def _first_calls(self) -> None:
        found = self.results["first_call"] = sections.first_calls(self.device, list(self.operators))
        print(f"\nfirst call in a new process, nothing compiled before, seconds\n{report.first_calls(found)}")
        self.save()

    def _sweep(self, roofline: Roofline) -> None:
        found: list[Row] = self.results["sweep"]
        for forms, pass_ in self.swept:
            if self.out_of_time():
                continue
            label = f"sweep {forms[0].label(pass_)}"
            self.progress.start(label)
            with self.reporting_failure(label):
                found += sections.sweep_rows(forms, pass_, self.settings, roofline)
            self.save()
        self.progress.clear()
        if found:
            print(f"\nover lengths\n{report.text_table(*report.sweep(found))}")
        if self.options.plots is not None:
            about = machine.source(self.device)
            for path in plots.draw(found, self.options.plots, self.device.type, about):
                print(f"wrote {path.name}")

    def _models(self) -> None:
        found: list[Row] = self.results["models"]
        for name in self.models:
            if self.out_of_time():
                continue
            self.progress.start(models.label(name))
            with self.reporting_failure(models.label(name)):
                found += models.compare(name, self.settings, self.options.quick)
            self.save()
        self.progress.clear()
        if found:
            print(f"\nsmall models of transformers, patched\n{report.text_table(*report.models(found))}", flush=True)

    def finish(self) -> None:
        """Check the targets, and say how far the numbers can be trusted."""
        found = self.results["targets"] = targets.check(self.results["rows"], self.device.type, self.options.quick)
        if found:
            print(f"\ntargets\n{targets.lines(found)}")
        timed = self.results["rows"] + self.results["sweep"] + self.results["models"]
        measured = [r for r in timed if r.get("spread") is not None]
        noisy = sum(r["spread"] > NOISY for r in measured)
        others = machine.OTHER_LOAD.cores()
        self.results["noise"] = {
            "rows": len(measured),
            "noisy_rows": noisy,
            "bound": NOISY,
            "cores_others_used": others,
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "comparisons_skipped": self.skipped,
        }
        print(
            f"\n{noisy} of {len(measured)} rows are noisy, marked !: their quartiles lie over {NOISY:.0%} apart", end=""
        )
        print("" if others is None else f"; other processes used {others:.2f} cores meanwhile")
        if (others or 0) > machine.BUSY:
            print("THE MACHINE WAS NOT QUIET: do not rely on these times")
        if self.skipped:
            print(f"{self.skipped} comparisons were not begun: the time was up")
        self.save()


def rounded(x: Any) -> Any:
    """Round to four significant figures, more than any time here is good for."""
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, (list, tuple)) else x


def show_list(run: Run) -> None:
    """Print every row and its peers."""
    for problem, pass_ in run.chosen:
        found = peers_of(problem, pass_, run.device)
        peers = (p.name if machine.version(p.package) else f"{p.name} (not installed)" for p in found)
        print(f"{problem.label(pass_):72s} beside {', '.join(peers) or 'nothing'}")
    for name in run.models:
        print(f"{models.label(name):72s} beside transformers")
    for name, why in UNTIMED.items():
        print(f"{name:72s} not timed: {why}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run(options)
    if options.list:
        show_list(run)
        return 0
    if not run.chosen and not run.models:
        print(f"no row matches {options.only!r}; --list shows them", file=sys.stderr)
        return 2
    about = run.results["machine"]
    installed = ", ".join(f"{name} {found or 'not installed'}" for name, found in about["versions"].items())
    print(f"{about['device']}, {about['threads']} threads; {installed}; commit {about['commit']}")
    run.measure()
    run.finish()
    return 1 if run.results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
