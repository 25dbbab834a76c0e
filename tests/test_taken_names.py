"""Another library registers one of the operators' names in `torch.ops.fla`: a message, whoever comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
THEIRS = """
import warnings
import torch

def register():
    @torch.library.custom_op("fla::chunk_simple_gla", mutates_args=())
    def theirs(x: torch.Tensor) -> torch.Tensor:
        return x + 1
"""


def run(program: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", THEIRS + program], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_they_come_first() -> None:
    """Importing works and warns, their operator stays, and every function of ours raises."""
    printed = run("""
register()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fla_ops
print(*(w.message for w in caught if w.category is RuntimeWarning))
assert torch.equal(torch.ops.fla.chunk_simple_gla(torch.ones(2)), torch.full((2,), 2.0))
q = torch.ones(1, 4, 1, 8)
for function in (fla_ops.chunk_simple_gla, fla_ops.simple_gla, fla_ops.parallel_attn):
    try:
        function(q, q, q)
    except RuntimeError as error:
        print(error)
assert "chunk_simple_gla" not in fla_ops.ops() and "parallel_attn" in fla_ops.ops()
""").splitlines()
    warning, *errors = printed
    assert warning.startswith("another library registered fla::chunk_simple_gla before fla_ops was imported")
    names = ("chunk_simple_gla", "simple_gla", "parallel_attn")
    assert errors == [f"fla_ops.{name} cannot run: {warning}" for name in names]


def test_we_come_first() -> None:
    """PyTorch refuses theirs, and names the operator and the file that registered it; ours go on."""
    printed = run("""
import fla_ops
try:
    register()
except RuntimeError as error:
    print(error)
q = torch.ones(1, 4, 1, 8)
assert fla_ops.chunk_simple_gla(q, q, q)[0].shape == q.shape
""")
    assert "fla::chunk_simple_gla" in printed
    assert f"Original registration: registered at {Path('fla_ops') / 'registrations' / '_op.py'}" in printed.replace(
        f"{ROOT}{os.sep}", ""
    )
