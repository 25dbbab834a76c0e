"""The bits of a sequence alone and in company, and decays near one, as other processors would have them.

PyTorch and MKL choose their routines by the processor; their switches choose others on this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SWITCHES = [
    pytest.param({"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}, id="no-vectors"),
    pytest.param({"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}, id="avx2", marks=pytest.mark.slow),
    pytest.param({"MKL_CBWR": "AVX2"}, id="mkl-avx2", marks=pytest.mark.slow),
    pytest.param({"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, id="mkl-sse", marks=pytest.mark.slow),
]


def run(switches: dict[str, str], *selected: str) -> None:
    """The tests selected, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected, "-m", "not slow"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | switches, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("switches", SWITCHES)
def test_bits_do_not_depend_on_company(switches: dict[str, str]) -> None:
    run(switches, "tests/contract/test_bits.py", "-k", "alone or company or batch or pack")


@pytest.mark.slow
def test_decays_near_one_without_fused_products() -> None:
    run({"ATEN_CPU_CAPABILITY": "default"}, "tests/simple_gla/test_long_sequences.py")
