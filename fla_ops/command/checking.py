"""`python -m fla_ops check`: this machine, and whether the operators compute here what they should."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from dataclasses import asdict
from typing import Any

import torch

import fla_ops
from fla_ops.common.cpu import cache

from . import Report
from .numbers import compare
from .problems import problems


def report(device: str) -> Report:
    """The machine, then a line for each public operator; status 1 if one is wrong."""
    about = machine(device)
    results = [compare(problem, device) for problem in problems()]
    wrong = [x.operator for x in results if not x.right]
    verdict = f"wrong: {', '.join(wrong)}" if wrong else f"all {len(results)} operators are right"
    lines = [*(f"{name:30s} {value}" for name, value in about.items()), "", *map(str, results), "", verdict]
    data = {"machine": about, "operators": [asdict(x) for x in results], "right": not wrong}
    return Report(data, "\n".join(lines), 1 if wrong else 0)


def machine(device: str) -> dict[str, Any]:
    """Versions, the device, the compiler and the folder of compiled libraries."""
    return {
        "fla_ops": fla_ops.__version__,
        "torch": torch.__version__,
        "Triton": _triton(),
        "Python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, threads: {torch.get_num_threads()}",
        "C++ compiler": compiler(),
        "cache": cache_folder()[1],
    }


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def compiler() -> str:
    """The command that compiles the C++ kernels, and what it says of its version."""
    named = os.environ.get("CXX") or "c++"
    try:
        command = [*shlex.split(named), "--version"]
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, ValueError, subprocess.SubprocessError):
        return f"{named} does not run: libraries that are kept serve, else ATen calls"
    return f"{named}: {asked.stdout.partition(chr(10))[0]}"


def cache_folder() -> tuple[bool, str]:
    """Whether compiled libraries can be kept, and where."""
    try:
        folder = cache.home()
    except (OSError, RuntimeError) as error:
        return False, f"none ({error})"
    writable = os.access(folder, os.W_OK)
    return writable, f"{folder} ({'writable' if writable else 'not writable'})"
