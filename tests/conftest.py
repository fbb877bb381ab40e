"""The tests need nothing installed: one throw-away embedded server serves all of them, xdist's workers included.

``DURABLE_TEST_DSN=postgresql://user:password@host/postgres`` takes a running server instead (a superuser there).
A database that was migrated once is the template; a test gets a clone of it, and drops it whatever still uses it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from pytest_postgresql import factories
from pytest_postgresql.executors import NoopExecutor

from durable import migrate
from durable.postgres import EmbeddedPostgres

OPTIONS: Final = (
    "max_connections=200",
    "shared_buffers=64MB",
    "max_wal_size=512MB",
    "wal_level=minimal",
    "max_wal_senders=0",
    "autovacuum=off",
)
ROOM: Final = 2 * 1024**3  # bytes that must be free in memory for the servers to live there

_server: EmbeddedPostgres | None = None
_numbers = itertools.count(1)


def _fast_folder() -> Path | None:
    """Memory, where a clone takes 10 ms; on a disk it takes 100 to 250."""
    memory = Path("/dev/shm")
    try:
        roomy = shutil.disk_usage(memory).free > ROOM
    except OSError:
        return None
    return memory if roomy and os.access(memory, os.W_OK | os.X_OK) else None


def _shared_root(tree: Path) -> Path:
    if (memory := _fast_folder()) is None:
        return tree / ".durable-test"
    key = hashlib.sha256(os.fsencode(tree)).hexdigest()[:10]
    return memory / f"durable-test-{os.geteuid()}-{key}"


def pytest_configure(config: pytest.Config) -> None:
    """Every process joins the same server: xdist's controller is the first, and the last to leave it."""
    global _server
    looks_only = config.option.help or config.option.version or config.option.collectonly
    if not looks_only and not os.environ.get("DURABLE_TEST_DSN"):
        _server = EmbeddedPostgres(_shared_root(config.rootpath), options=OPTIONS, fsync=False).start()


def pytest_unconfigure() -> None:
    if _server is not None:
        _server.stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have measured: takeover times, counts of kills. No test asserts any of it."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    lines = [text for report in reports for name, text in report.user_properties if name == "measured"]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)


@dataclass(frozen=True)
class Base:
    """The server as pytest-postgresql wants to know it."""

    dsn: str
    host: str
    port: int
    user: str
    password: str | None
    maintenance_dbname: str
    options: str = ""
    template_dbname: str | None = None

    def database(self, name: str) -> str:
        """The URL of another database there."""
        return urlsplit(self.dsn)._replace(path="/" + quote(name, safe="")).geturl()

    @contextmanager
    def created(self, name: str, template: str = "template1") -> Iterator[str]:
        """A database for as long as the block lasts."""
        create = sql.SQL("create database {} template {} strategy file_copy")
        drop = sql.SQL("drop database if exists {} with (force)")
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
        try:
            yield self.database(name)
        finally:
            with psycopg.connect(self.dsn, autocommit=True) as connection:
                connection.execute(drop.format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def base() -> Base:
    """The server that the tests share."""
    dsn = os.environ.get("DURABLE_TEST_DSN") or (_server.dsn("postgres") if _server else None)
    assert dsn, "no server was started"
    words: dict[str, Any] = conninfo_to_dict(dsn)
    return Base(
        dsn=dsn,
        host=words.get("host", "localhost"),
        port=int(words.get("port", 5432)),
        user=words.get("user", "postgres"),
        password=words.get("password"),
        maintenance_dbname=words.get("dbname", "postgres"),
    )


def _migrated(*, host: str, port: int, user: str, dbname: str, password: str | None, **_: object) -> None:
    secret = f":{quote(password, safe='')}" if password else ""
    migrate.upgrade(f"postgresql://{quote(user)}{secret}@/{dbname}?host={quote(host)}&port={port}")


# Made at first use, once in every xdist worker; the process id keeps two runs on one server apart.
template = factories.postgresql_noproc(depends_on="base", dbname=f"durable_test_{os.getpid()}", load=[_migrated])


def _name() -> str:
    return f"durable_test_{os.getpid()}_{next(_numbers)}"


@pytest.fixture
def dsn(base: Base, template: NoopExecutor) -> Iterator[str]:
    """A database of one's own with durable's schema in it."""
    with base.created(_name(), template.template_dbname) as url:
        yield url


@pytest.fixture(scope="module")
def module_dsn(base: Base, template: NoopExecutor) -> Iterator[str]:
    """One database for a module, for tests that do not mind each other's rows."""
    with base.created(_name(), template.template_dbname) as url:
        yield url


@pytest.fixture
def empty_dsn(base: Base) -> Iterator[str]:
    """A database without durable's schema."""
    with base.created(_name()) as url:
        yield url


@pytest.fixture(scope="session")
def server() -> EmbeddedPostgres | None:
    """The server that all tests share, not to be restarted; None with DURABLE_TEST_DSN."""
    return _server


@pytest.fixture
def server_root() -> Iterator[Path]:
    """A folder for a server: unlike tmp_path, open to the account that runs PostgreSQL for root."""
    folder = Path(tempfile.mkdtemp(prefix="durable-test-", dir=_fast_folder()))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def own_server(server_root: Path) -> Iterator[EmbeddedPostgres]:
    """A server of one's own, to be restarted and killed at will."""
    with EmbeddedPostgres(server_root / "own", options=OPTIONS, fsync=False) as started:
        yield started
