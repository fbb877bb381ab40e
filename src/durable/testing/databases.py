"""Throw-away databases for tests: clones of one that was migrated once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote, urlsplit

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from durable import migrate
from durable.postgres import EmbeddedPostgres

OPTIONS: Final = ("max_connections=200", "shared_buffers=64MB", "autovacuum=off")


class Databases:
    """A server, to make databases on: the one of `dsn`, else an embedded one in `folder`, as long as this is entered.

    Their names carry the id of this process: several may use one server.
    """

    def __init__(self, dsn: str | None, folder: Path) -> None:
        self._given, self._folder = dsn, folder
        self._server: EmbeddedPostgres | None = None
        self._dsn = ""
        self._template: str | None = None
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        if self._given is None:
            self._folder.mkdir(exist_ok=True)
            self._server = EmbeddedPostgres(self._folder, options=OPTIONS, fsync=False).start()
        self._dsn = self._given or self._server.dsn("postgres")  # type: ignore[union-attr]
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._template is not None:
                self._drop(self._template)
        finally:
            if self._server is not None:
                self._server.stop()

    @contextmanager
    def created(self) -> Iterator[str]:
        """The DSN of a new database with durable's schema in it, which is dropped afterwards whatever still uses it."""
        if self._template is None:
            self._template = self._make_template()
        name = f"durable_test_{os.getpid()}_{next(self._numbers)}"
        self._create(name, self._template)
        try:
            yield self._url(name)
        finally:
            self._drop(name)

    def _make_template(self) -> str:
        name = f"durable_template_{os.getpid()}"
        self._create(name, "template1")
        try:
            migrate.upgrade(self._url(name))
        except BaseException:
            self._drop(name)
            raise
        return name

    def _create(self, name: str, template: str) -> None:
        create = sql.SQL("create database {} template {} strategy file_copy")
        self._execute(create.format(sql.Identifier(name), sql.Identifier(template)))

    def _drop(self, name: str) -> None:
        self._execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute(statement)

    def _url(self, name: str) -> str:
        """The DSN of another database there."""
        if "://" in self._dsn:
            return urlsplit(self._dsn)._replace(path="/" + quote(name, safe="")).geturl()
        return make_conninfo(self._dsn, dbname=name)
