"""Fixtures of the tests of function workflows."""

from __future__ import annotations

import pytest
from tests.engine.functions.kit import Log, Place


@pytest.fixture(params=["kept", "replayed"])
def place(request: pytest.FixtureRequest, dsn: str) -> Place:
    """Where runs are executed: once with bodies that are kept in memory, once with a replay at each step."""
    return Place(dsn, replays=request.param == "replayed")


@pytest.fixture
def log() -> Log:
    """What handlers did."""
    return Log()


@pytest.fixture
def live(dsn: str) -> Place:
    """Where bodies are kept: for what a replay does not change."""
    return Place(dsn, replays=False)
