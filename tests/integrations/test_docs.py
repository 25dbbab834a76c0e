"""docs/models.md and its example do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integrations.models import EVERY

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"


def test_the_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    names = {"torch": torch, "prompt": torch.randint(1, 64, (2, 12))}
    exec(compile("\n".join(blocks), str(PAGE), "exec"), names)
    assert names["tokens"].shape == (2, 20)
    assert names["llama"].config._attn_implementation == "fla_ops"
    assert names["hidden"].shape == (1, 12, 32)
    assert names["state"].shape == (2, 8, 16, 16)


def test_every_tested_model_is_named() -> None:
    text = PAGE.read_text()
    assert not [name for name in EVERY if name not in text]


@pytest.mark.slow
def test_the_example_runs() -> None:
    command = [sys.executable, str(ROOT / "examples" / "mamba2_transformers.py"), "--time", "64", "--tokens", "8"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert "100% of the tokens are the same" in done.stdout
    assert "all finite: True" in done.stdout
