"""`python -m fla_ops warm`: compile the C++ kernels now, so that no first call has to."""

from __future__ import annotations

from fla_ops.common.cpu import build

from . import Report
from .checking import cache_folder


def report() -> Report:
    """A line for each source file; status 1 if one does not compile, or if nothing can be kept."""
    compiled = build.warm()
    writable, folder = cache_folder()
    lines = [f"{source:40s} {'ready' if ready else 'does not compile'}" for source, ready in compiled.items()]
    data = {"cache": folder, "writable": writable, "compiled": compiled}
    return Report(data, "\n".join([*lines, f"{'cache':40s} {folder}"]), 0 if writable and all(compiled.values()) else 1)
