"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.engine.kit import Facts


@pytest.fixture
def facts(dsn: str) -> Iterator[Facts]:
    """What the database says, beside the engine."""
    found = Facts(dsn)
    yield found
    found.close()
