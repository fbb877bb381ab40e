from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from durable.store.connection import Connection
from durable.store.db import Pool, Store


@pytest.fixture
def store(module_dsn: str) -> Store:
    return Store(module_dsn)


@pytest_asyncio.fixture
async def pool(store: Store) -> AsyncIterator[Pool]:
    async with store.open_pool(6, application_name="test", lock_timeout_ms=200) as pool:
        yield pool


@pytest_asyncio.fixture
async def connection(pool: Pool) -> AsyncIterator[Connection]:
    async with pool.connection() as connection:
        yield connection


@pytest_asyncio.fixture
async def rival(pool: Pool) -> AsyncIterator[Connection]:
    async with pool.connection() as connection:
        yield connection
