"""The bits of a sequence alone and in company, as other processors would have them.

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


@pytest.mark.parametrize("switches", SWITCHES)
def test_bits_do_not_depend_on_company(switches: dict[str, str]) -> None:
    selected = ("tests/contract/test_bits.py", "-k", "alone or company or batch or pack", "-m", "not slow")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | switches, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
