"""Fixtures of the integrations' tests, and models that are compared with transformers' own code.

On its import a model of the gated delta rule takes flash-linear-attention's kernels if they are installed, on a CPU
too, where they fail. So these models are imported as if they were not.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator

import pytest

import fla_ops.integrations.transformers as integration

with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
    patch.setitem(sys.modules, "fla", None)
    for model in ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid"):
        importlib.import_module(f"transformers.models.{model}.modeling_{model}")


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    """Whatever a test switches on is off again after it."""
    yield
    integration.disable()
