"""Workers that are forked in milliseconds, and a database of one's own for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.chaos.kit import Measured, Nursery, Stage, staged


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def stage(nursery: Nursery, dsn: str, tmp_path: Path) -> Iterator[Stage]:
    with staged(nursery, dsn, tmp_path) as made:
        yield made


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Measured:
    """What is said with it is shown at the end of the suite."""
    return lambda text: record_property("measured", text)
