"""Fixtures of the integrations' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fla_ops.integrations.transformers as integration


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    """Whatever a test switches on is off again after it."""
    yield
    integration.disable()
