"""A model's prefill as an AOTInductor package: a file that runs without the model's code and without `fla_ops`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

import fla_ops

STRANGER = """
import sys, torch
package, tokens, logits = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
torch.save(model(torch.load(tokens)), logits)
assert "fla_ops" not in sys.modules, "this process imported fla_ops"
names = torch._C._dispatch_get_all_op_names()
assert not any(name.startswith("fla::") for name in names), "this process has fla operators"
"""


class PackageError(Exception):
    """The package does not run, and what it said."""


def package_prefill(model: nn.Module, path: Path) -> torch.export.ExportedProgram:
    """Export `model(tokens)` for any batch and any time, and package it with AOTInductor.

    The exported program calls `torch.ops.fla.*`; `inlining()` puts their bodies into the package in place of the calls.
    """
    example = torch.zeros(2, 128, dtype=torch.int64, device=next(model.parameters()).device)
    sizes = {0: Dim("batch", min=1, max=4096), 1: Dim("time", min=1, max=1 << 20)}
    program = torch.export.export(model, (example,), dynamic_shapes={"tokens": sizes})
    with fla_ops.inlining(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)  # PyTorch about a copy it makes
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return program


def operators_of(program: torch.export.ExportedProgram) -> list[str]:
    """The names of the fla operators that an exported program calls."""
    names = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return sorted({name for name in names if name.startswith("fla.")})


def run_elsewhere(package: Path, tokens: Tensor) -> Tensor:
    """The package's logits for tokens, from a fresh process that never imports fla_ops."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "tokens.pt"), Path(folder, "logits.pt")
        torch.save(tokens, given)
        command = [sys.executable, "-I", "-c", STRANGER, str(package), str(given), str(found)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise PackageError(f"{package} does not run in a fresh process:\n{done.stderr.strip()}")
        return torch.load(found)
