"""The command line, `python -m fla_ops`: list, explain, check, warm."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from fla_ops.command import checking, explaining, listing, warming


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and print its report; the exit status, which is 2 for wrong usage."""
    parser = argparse.ArgumentParser("python -m fla_ops", description="Linear-attention operators for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("list", parents=[common], help="every operator: kind, where it inlines, schema")
    explain = commands.add_parser(
        "explain",
        parents=[common],
        usage="python -m fla_ops explain DISPATCHER [options]",  # --help lists them
        help="which form serves a call, and why not the others",
    )
    explaining.add_arguments(explain)
    check = commands.add_parser("check", parents=[common], help="this machine, and every operator's error on it")
    check.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU, unless given")
    warm = commands.add_parser("warm", parents=[common], help="compile kernels into the caches, C++ and Triton's")
    warming.add_arguments(warm)

    options = parser.parse_args(arguments)
    if options.command == "list":
        report = listing.report()
    elif options.command == "explain":
        try:
            report = explaining.report(options)
        except (TypeError, ValueError, NotImplementedError) as error:
            explain.error(f"{options.dispatcher}: {error}")
    elif options.command == "check":
        if options.device == "cuda" and not torch.cuda.is_available():
            check.error("there is no GPU here")
        report = checking.report(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    else:
        try:
            report = warming.report(options)
        except ValueError as error:
            warm.error(str(error))
    print(json.dumps(report.data, indent=2) if options.json else report.text)
    return report.status


if __name__ == "__main__":
    sys.exit(main())
