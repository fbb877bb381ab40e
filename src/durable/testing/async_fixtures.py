"""The async twins of the plugin's fixtures: for pytest-asyncio in both of its modes, and for anyio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

try:
    from pytest_asyncio import fixture  # its strict mode takes no other
except ImportError:
    fixture = pytest.fixture  # type: ignore[assignment]  # it takes the same

if TYPE_CHECKING:
    from durable import AsyncDurable
    from durable.define.registry import AnyWorkflow
    from durable.testing.harness import AsyncHarness


@fixture
async def async_durable_app(durable_database: str, durable_workflows: list[AnyWorkflow]) -> AsyncIterator[AsyncDurable]:
    """An AsyncDurable on `durable_database`."""
    from durable import AsyncDurable

    async with AsyncDurable(durable_database, workflows=durable_workflows) as app:
        yield app


@fixture
async def async_durable_harness(async_durable_app: AsyncDurable) -> AsyncIterator[AsyncHarness]:
    """An AsyncHarness that drives the runs of `async_durable_app`."""
    from durable.testing import AsyncHarness

    async with AsyncHarness(async_durable_app) as harness:
        yield harness
