"""What every public function shares: types that a checker follows, short errors, defaults, what `dir` shows."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fla_ops

ROOT = Path(__file__).parents[1]
USER = """
import fla_ops
import torch
from torch import Tensor

q, k, v = torch.randn(3, 2, 300, 4, 64).unbind()
g = -torch.rand(2, 300, 4)


def decode(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    o, state = fla_ops.simple_gla(q, k, v, g, output_final_state=True)
    return o[:, -1] + fla_ops.simple_gla_step_(q[:, 0], k[:, 0], v[:, 0], state, g[:, 0])


def pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _, (kv, z) = fla_ops.linear_attn(q, k, v, output_final_state=True)
    _, (keys, values) = fla_ops.gsa(q, k, v, v, output_final_state=True)
    _, plain = fla_ops.chunk_linear_attn(q, k, v, normalize=False, output_final_state=True)
    return kv.sum() + z.sum() + keys.sum() + values.sum() + plain.sum()


nothing: None = fla_ops.chunk_simple_gla(q, k, v, g)[1]
mode: Tensor = fla_ops.simple_gla(q, k, v, mode="chunk", chunk_size=None)[0]
"""
WRONG = 'import fla_ops, torch\nx = torch.ones(1)\nfla_ops.simple_gla(x, x, x, mode="fast")\n'


def mypy(path: Path) -> subprocess.CompletedProcess[str]:
    options = ("--strict", "--follow-imports", "silent", "--cache-dir", str(path.parent))
    command = [sys.executable, "-m", "mypy", *options, str(path)]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    return subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, check=False)


def test_a_type_checker_follows_a_users_file(tmp_path: Path) -> None:
    file = tmp_path / "user.py"
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert "simple_gla_step_" in readme
    plain = "\n".join(line for line in readme.splitlines() if "lambda" not in line and "compiled" not in line)
    file.write_text(USER + "\n\n" + plain.split("class Layer")[0])
    checked = mypy(file)
    assert checked.returncode == 0, checked.stdout
    file.write_text(WRONG)
    assert "No overload variant" in mypy(file).stdout


def arguments() -> dict[str, Any]:
    q, k, v = torch.ones(3, 1, 20, 2, 4).unbind()
    return {"q": q, "k": k, "v": v}


@pytest.mark.parametrize("name", ["q", "v", "g", "initial_state"])
@pytest.mark.parametrize("wrong", [[7.5] * 100, np.full(100, 7.5)], ids=["list", "array"])
def test_what_is_no_tensor_is_refused_without_its_data(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError) as raised:
        fla_ops.simple_gla(**arguments() | {name: wrong})
    assert str(raised.value) == f"{name} must be a tensor, got {type(wrong).__name__}"


@pytest.mark.parametrize("function", [fla_ops.chunk_simple_gla, fla_ops.chunk_linear_attn, fla_ops.simple_gla])
def test_no_chunk_size_is_the_default(function: Any) -> None:
    assert torch.equal(function(**arguments(), chunk_size=None)[0], function(**arguments())[0])


def test_dir_shows_what_is_public() -> None:
    assert dir(fla_ops) == sorted(fla_ops.__all__)
    assert fla_ops.__version__ == importlib.metadata.version("fla-ops")


@pytest.mark.parametrize("name", ["simple_gla", "linear_attn", "lightning_attn", "gated_delta_rule", "gsa", "attn"])
def test_help_explains_the_arguments(name: str) -> None:
    text = getattr(fla_ops, name).__doc__
    for word in (
        "[B, T, H",
        "natural logarithm" if "linear" not in name and "lightning" not in name else "scale",
        "None means",
    ):
        assert word in text
    assert "module's docstring" not in text
