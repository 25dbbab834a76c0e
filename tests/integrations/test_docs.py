"""docs/models.md and its example do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.models import EVERY

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def of_fla() -> list[str]:
    section = PAGE.read_text().partition("## Models of flash-linear-attention")[2].partition("\n## ")[0]
    return [block for block in blocks() if block in section]


def run(chosen: list[str], count: int) -> dict[str, Any]:
    assert len(chosen) == count
    names: dict[str, Any] = {"torch": torch, "prompt": torch.randint(1, 64, (2, 12))}
    exec(compile("\n".join(chosen), str(PAGE), "exec"), names)
    return names


def test_the_python_blocks_run() -> None:
    names = run([block for block in blocks() if block not in of_fla()], 5)
    assert names["tokens"].shape == (2, 20)
    assert names["llama"].config._attn_implementation == "fla_ops"
    assert names["hidden"].shape == (1, 12, 32)
    assert names["state"].shape == (2, 8, 16, 16)


@pytest.mark.usefixtures("fresh_compiler")
def test_the_python_blocks_of_fla_run() -> None:
    with warnings.catch_warnings():  # fla warns that there is no GPU
        warnings.simplefilter("ignore")
        pytest.importorskip("fla.models", reason="flash-linear-attention is not installed: `make test` installs it")
    names = run(of_fla(), 2)
    assert names["tokens"].shape == (2, 20)
    assert all(p.grad is not None for p in names["model"].parameters())
    assert names["integration"].disable() is None


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
