"""Every test of this folder runs under the memory checker, so that one run checks numbers, memory and races."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.helpers import INTERPRETED


@pytest.fixture(autouse=True)
def checked_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """No access of any kernel that the test launches is out of bounds, before its time, or in another's place."""
    if not INTERPRETED or request.path.name in ("test_checker.py", "test_memory.py"):
        yield
        return
    from .checker import Checker

    with Checker() as checker:
        yield
    assert not checker.findings, checker.report()
