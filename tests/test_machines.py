"""The C++ kernels of a CPU with another compiler, and on another processor's emulator, where those are installed.

On Debian: `apt install clang-16 g++-aarch64-linux-gnu qemu-user`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fla_ops.common.cpu import build
from tests import emulation

ROOT = Path(__file__).parents[1]
CLANGS = [f"clang++-{version}" for version in range(22, 14, -1)]
KERNELS = "tests/test_cpp.py"
ON_AN_EMULATOR = "windows or widths or lengths or half_precision or grow_back or decoding or infinity"

pytestmark = pytest.mark.slow


def passed(*selected: str, **environment: str) -> str:
    """What pytest prints of tests that all pass, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected, "-m", "not slow"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.skipif(not any(map(shutil.which, CLANGS)), reason="Clang from version 15 on is not installed")
def test_clang_makes_kernels_that_are_right(tmp_path: Path) -> None:
    clang = next(name for name in CLANGS if shutil.which(name))
    passed(KERNELS, "-k", "not lesser_machines and not aten", CXX=clang, FLA_OPS_CACHE_DIR=str(tmp_path))
    kept = {path.name.rpartition("-")[0] for path in tmp_path.glob("*.so")}
    assert kept == {Path(source).stem for source in build.sources()}


@pytest.mark.skipif(
    not (shutil.which(emulation.COMPILER) and shutil.which(emulation.EMULATOR)),
    reason=f"{emulation.COMPILER} and {emulation.EMULATOR} are not installed",
)
def test_an_emulated_aarch64_computes_the_same() -> None:
    said = passed("-p", "tests.emulation", "-v", KERNELS, "-k", ON_AN_EMULATOR)
    assert f"C++ kernels: by {emulation.COMPILER}, on {emulation.EMULATOR}" in said
