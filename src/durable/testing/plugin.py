"""Fixtures for pytest: a database of one's own for each test, an app on it, and a harness that drives its runs.

    @pytest.fixture
    def durable_workflows():
        return [order]

    def test_order(durable_app, durable_harness):
        run = durable_app.start(order, Order(id=17))
        durable_harness.drain()
        assert run.result() == ...

The database is one of a throw-away embedded server, which the first test that wants it starts and the processes of
pytest-xdist share; with ``DURABLE_TEST_DSN`` it is one of the server there (as a role that may create databases).
Whoever uses none of the fixtures pays for none of it: what they need is imported in them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from durable import Durable
    from durable.define.registry import AnyWorkflow
    from durable.testing.databases import Databases
    from durable.testing.harness import Harness


def pytest_configure(config: pytest.Config) -> None:
    """The async twins come after all other plugins: pytest warns of a pytest-asyncio that it did not import first."""
    from durable.testing import async_fixtures

    config.pluginmanager.register(async_fixtures, "durable-async")


@pytest.fixture(scope="session")
def _durable_databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    from durable.testing.databases import Databases

    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    with Databases(os.environ.get("DURABLE_TEST_DSN"), shared / "durable-postgres") as databases:
        yield databases


@pytest.fixture
def durable_database(_durable_databases: Databases) -> Iterator[str]:
    """The DSN of a new database with durable's schema in it; it is dropped after the test."""
    with _durable_databases.created() as dsn:
        yield dsn


@pytest.fixture
def durable_workflows() -> list[AnyWorkflow]:
    """The workflows that the apps of the fixtures know. To be overridden; a test may also `register` its own."""
    return []


@pytest.fixture
def durable_app(durable_database: str, durable_workflows: list[AnyWorkflow]) -> Iterator[Durable]:
    """A Durable on `durable_database`."""
    from durable import Durable

    with Durable(durable_database, workflows=durable_workflows) as app:
        yield app


@pytest.fixture
def durable_harness(durable_app: Durable) -> Iterator[Harness]:
    """A Harness that drives the runs of `durable_app`."""
    from durable.testing import Harness

    with Harness(durable_app) as harness:
        yield harness
