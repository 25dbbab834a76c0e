"""Two processes for all tests of this folder, four for the slow ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


def _pool(ranks: int) -> Iterator[Pool]:
    pool = Pool(ranks)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def pair() -> Iterator[Pool]:
    """Two processes."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Pool]:
    """Four processes."""
    yield from _pool(4)
