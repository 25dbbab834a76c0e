"""The benchmark command: every operator, forward, forward+backward and decode, beside what else computes it.

`python -m benchmarks` measures everything on the device at hand; `--quick` takes small sizes and a minute or two.
Contenders of a comparison run in turn, in one loop, on inputs that rotate past the cache. Ratios are medians of ratios
within a round. "of floor" is the least time that the operations and bytes need at this machine's measured ceilings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import machine
from .peers import peers_of
from .problems import UNTIMED
from .run import QUICK_SECTIONS, SECTIONS, Run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="small sizes and few rounds")
    add(
        "--only",
        metavar="REGEX",
        default="",
        help="only rows whose label matches (see --list), as in '^chunk.*training'",
    )
    add("--list", action="store_true", help="print the rows and the peers, and measure nothing")
    add("--json", metavar="FILE", type=Path, help="write the results; written anew after each comparison")
    add("--plots", metavar="FOLDER", type=Path, help="write pictures of the sweep")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, help="threads on a CPU")
    add("--seconds", type=float, help="for each comparison (default 3, quick 0.4)")
    add("--limit", type=float, metavar="SECONDS", help="begin no further comparison after this long")
    add("--ways", default="", help="of eager,compiled,inlined; default all, quick: eager,compiled")
    add("--sections", default="", help=f"of {','.join(SECTIONS)}; default all, quick: {','.join(QUICK_SECTIONS)}")
    add("--no-peers", action="store_true", help="ours alone")
    return parser.parse_args(arguments)


def show_list(run: Run) -> None:
    """Every row and its peers."""
    for problem, what in run.chosen():
        found = peers_of(problem, what, run.device)
        peers = (p.name if machine.version(p.package) else f"{p.name} (not installed)" for p in found)
        print(f"{problem.label(what):72s} beside {', '.join(peers) or 'nothing'}")
    for name, why in UNTIMED.items():
        print(f"{name:72s} not timed: {why}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run(options)
    if options.list:
        show_list(run)
        return 0
    if not run.chosen():
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
