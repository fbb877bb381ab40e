"""Which database is taken, and that a wrong DSN is told without its password."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from durable import config
from durable.config import Database, normalise, resolve, shown
from durable.errors import ConfigurationError
from durable.postgres import EmbeddedPostgres

Write = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """An empty project, with nothing set outside; call it to put a file there."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name == "DATABASE_URL" or (name.startswith("DURABLE_") and name != "DURABLE_PG_BIN"):
            monkeypatch.delenv(name)

    def put(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)

    return put


class NoServer:
    """Stands in for the embedded PostgreSQL: whether it was started, and where."""

    def __init__(self, root: Path | str = ".durable") -> None:
        self.root = Path(root).resolve()
        self.stopped = False

    def start(self) -> NoServer:
        return self

    def stop(self) -> None:
        self.stopped = True

    def dsn(self) -> str:
        return "postgresql://postgres@/durable?host=/tmp/x&port=5432"


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("durable.postgres.EmbeddedPostgres", NoServer)


# ---------------------------------------------------------------- the order


def test_the_order(write: Write, monkeypatch: pytest.MonkeyPatch, no_server: None) -> None:
    """Each place is filled in turn, from the last to the first; the newest one wins each time."""

    def taken() -> tuple[str, str]:
        database = resolve()
        return urlsplit(database.dsn).path.strip("/"), database.source

    root = Path(".durable").resolve()
    assert taken() == ("durable", f"the embedded PostgreSQL in {root}")
    write(".env", "DATABASE_URL=postgresql://h/a\n")
    assert taken() == ("a", "DATABASE_URL in .env")
    monkeypatch.setenv("DATABASE_URL", "postgresql://h/b")
    assert taken() == ("b", "DATABASE_URL in the environment")
    write("pyproject.toml", '[tool.durable]\ndatabase_url = "postgresql://h/c"\n')
    assert taken() == ("c", "database_url in [tool.durable] of pyproject.toml")
    write("durable.toml", 'database_url = "postgresql://h/d"\n')
    assert taken() == ("d", "database_url in durable.toml")
    write(".env", "DURABLE_DATABASE_URL=postgresql://h/e\n")
    assert taken() == ("e", "DURABLE_DATABASE_URL in .env")
    monkeypatch.setenv("DURABLE_DATABASE_URL", "postgresql://h/f")
    assert taken() == ("f", "DURABLE_DATABASE_URL in the environment")
    assert resolve("postgresql://h/g") == Database("postgresql://h/g", "the dsn argument")


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURABLE_DATABASE_URL", "")
    monkeypatch.setenv("DATABASE_URL", "postgresql://h/b")
    assert resolve().source == "DATABASE_URL in the environment"


def test_a_pyproject_without_our_table(write: Write, no_server: None) -> None:
    write("pyproject.toml", '[project]\nname = "shop"\n')
    write("durable.toml", "")
    assert resolve().embedded


@pytest.mark.usefixtures("no_server")
def test_embedded_always_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURABLE_DATABASE_URL", "postgresql://h/f")
    assert resolve(embedded="always").embedded
    monkeypatch.setenv("DURABLE_EMBEDDED", "always")
    assert resolve().embedded
    assert resolve(embedded="auto").dsn == "postgresql://h/f"
    assert resolve("postgresql://h/g").dsn == "postgresql://h/g"


def test_embedded_never(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="no database is configured: set DURABLE_DATABASE_URL"):
        resolve(embedded="never")
    monkeypatch.setenv("DURABLE_DATABASE_URL", "postgresql://h/f")
    assert resolve(embedded="never").dsn == "postgresql://h/f"


@pytest.mark.usefixtures("no_server")
def test_where_the_embedded_one_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURABLE_DATA_DIR", "elsewhere")
    assert str(tmp_path / "elsewhere") in resolve().source
    assert str(tmp_path / "third") in resolve(data_dir="third").source


@pytest.mark.usefixtures("no_server")
def test_close_leaves_the_embedded_one() -> None:
    database = resolve()
    assert isinstance(database.embedded, NoServer)
    database.close()
    assert database.embedded.stopped
    Database("postgresql://h/x", "the dsn argument").close()


@pytest.mark.usefixtures("no_server")
def test_a_server_that_has_no_database_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[NoServer] = []
    monkeypatch.setattr(NoServer, "dsn", lambda _: 1 / 0)
    monkeypatch.setattr(NoServer, "stop", lambda self: stopped.append(self))
    with pytest.raises(ZeroDivisionError):
        resolve()
    assert len(stopped) == 1


def test_the_embedded_one_in_earnest(server_root: Path) -> None:
    database = resolve(data_dir=server_root / ".durable")
    try:
        assert isinstance(database.embedded, EmbeddedPostgres)
        assert str(server_root) in str(database)
        assert "durable on" in str(database)
    finally:
        database.close()


# ---------------------------------------------------------------- spellings, and what is wrong with a DSN


@pytest.mark.parametrize(
    "spelling",
    ["postgresql", "postgres", "postgresql+psycopg", "postgresql+asyncpg", "postgresql+psycopg2", "POSTGRES"],
)
def test_spellings_of_a_url(spelling: str) -> None:
    assert normalise(f" {spelling}://app:p%40ss@db:6432/shop?sslmode=require\n", "x") == (
        "postgresql://app:p%40ss@db:6432/shop?sslmode=require"
    )


def test_libpq_words_are_a_dsn_too() -> None:
    words = "host=/run/postgresql dbname=shop user=app"
    assert normalise(words, "x") == words
    assert shown(words) == "shop on /run/postgresql as app"


@pytest.mark.parametrize(
    ("dsn", "says"),
    [
        ("mysql://app:s3cret@db/shop", "is a URL of mysql, not of PostgreSQL"),
        ("postgresql+psycopg//app:s3cret@db/shop", "no DSN that libpq can read"),
        ("postgresql://app:s3cret%zz@db/shop", "invalid percent-encoded token"),
        ("postgresql://app:s3cret@db/shop?passwort=s3cret", "invalid URI query parameter"),
        ("postgresql://app@db/shop?s3cret", "missing key/value separator"),
        ("s3cret", "no DSN that libpq can read"),
        ("host=db password='s3cret", "unterminated quoted string"),
        ("host=db s3cret=1", "invalid connection option"),
        ("postgresql://[s3cret/shop", "no DSN that libpq can read"),
    ],
)
def test_a_wrong_dsn_is_told_without_its_password(dsn: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURABLE_DATABASE_URL", dsn)
    with pytest.raises(ConfigurationError) as error:
        resolve()
    assert str(error.value).startswith("DURABLE_DATABASE_URL in the environment ")
    assert says in str(error.value)
    assert "s3cret" not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_a_database_is_shown_without_its_password() -> None:
    database = resolve("postgresql://app:s3cret@db:6432/shop")
    assert str(database) == "database shop on db port 6432 as app, from the dsn argument"
    assert "s3cret" not in repr(database)
    assert shown("postgresql:///") == "default on local"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("durable.toml", "database_url = [", "cannot read the settings"),
        ("durable.toml", 'embedded = "sometimes"', "embedded: Input should be 'auto', 'always' or 'never'"),
        ("durable.toml", "database_url = 5", "database_url: Input should be a valid string"),
        (".env", "DURABLE_EMBEDDED=s3cret", "embedded: Input should be"),
    ],
)
def test_wrong_settings(write: Write, name: str, text: str, says: str) -> None:
    write(name, text)
    with pytest.raises(ConfigurationError) as error:
        resolve()
    assert says in str(error.value)
    assert "s3cret" not in str(error.value)


def test_a_wrong_mode() -> None:
    wrong: config.Embedded = "sometimes"  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match="must be one of auto, always, never"):
        resolve(embedded=wrong)
