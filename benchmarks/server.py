"""The throw-away PostgreSQL of a measurement: it syncs as a real one does, and each measurement gets a new database."""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, LiteralString

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from durable.postgres import EmbeddedPostgres

OPTIONS: Final = ("max_connections=300",)
"""All other settings are PostgreSQL's defaults."""
SAFE: Final = ("fsync", "synchronous_commit", "full_page_writes")
"""What must be on: without them a commit is cheap, and nothing is measured of what matters."""
IN_MEMORY: Final = ("tmpfs", "ramfs")


class Server:
    """A server whose databases come and go. Its methods may be called by several threads."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self._postgres = postgres
        self._numbers = itertools.count(1)
        self._admin = postgres.dsn("postgres")

    def check(self) -> None:
        """Raises RuntimeError if a commit would not be on disk when it is answered."""
        for name in SAFE:
            value = self._value(sql.SQL("show {}").format(sql.Identifier(name)))
            if value != "on":
                raise RuntimeError(f"{name} is {value}: what is measured so would be of no use")

    @property
    def version(self) -> str:
        """``18.4``"""
        return str(self._value("show server_version"))

    def create(self, template: str | None = None) -> str:
        """A new database, empty or a copy of `template`; returns its name. Nothing is left to be written to disk from
        what was measured before."""
        name = f"measured_{next(self._numbers)}"
        create = sql.SQL("create database {}").format(sql.Identifier(name))
        if template is not None:
            create += sql.SQL(" template {} strategy file_copy").format(sql.Identifier(template))
        with psycopg.connect(self._admin, autocommit=True) as connection:
            connection.execute(create)
            connection.execute("checkpoint")
        return name

    def dsn(self, name: str) -> str:
        """A libpq URL of that database."""
        return self._postgres.dsn(name)

    def drop(self, name: str) -> None:
        """Drop a database, whatever still uses it."""
        with psycopg.connect(self._admin, autocommit=True) as connection:
            connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))

    def _value(self, query: LiteralString | sql.Composed) -> object:
        with psycopg.connect(self._admin, autocommit=True) as connection:
            row = connection.execute(query).fetchone()
        assert row is not None
        return row[0]


@contextmanager
def throw_away(below: Path | None = None) -> Iterator[Server]:
    """A server in a temporary folder, which goes with the block. `below`: where that folder is made; default: the first
    place for temporary files that is on a disk."""
    with tempfile.TemporaryDirectory(prefix="durable-bench-", dir=below or on_disk()) as folder:
        Path(folder).chmod(0o755)  # root has PostgreSQL run by another account, which must get there
        with EmbeddedPostgres(folder, options=OPTIONS) as postgres:
            server = Server(postgres)
            server.check()
            yield server


def on_disk() -> Path:
    """Where temporary files lie on a disk, and not in memory. Raises RuntimeError if they do nowhere."""
    for place in (Path(tempfile.gettempdir()), Path("/var/tmp")):  # noqa: S108 (the folder below it is made for us alone)
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK) and filesystem(place) not in IN_MEMORY:
            return place
    raise RuntimeError("temporary files lie in memory here, where a sync costs nothing: name a folder with --data")


def filesystem(place: Path) -> str:
    """``ext4``, ``tmpfs`` ... ; ``unknown`` where nobody says it."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "unknown"
    best, kind, resolved = -1, "unknown", place.resolve()
    for line in mounts.read_text(encoding="utf-8").splitlines():
        point = Path(line.split()[1].replace("\\040", " "))
        if resolved.is_relative_to(point) and len(point.parts) >= best:  # the last of those mounted there is seen
            best, kind = len(point.parts), line.split()[2]
    return kind


def sibling(dsn: str, name: str = "postgres") -> str:
    """Another database of the same server."""
    return make_conninfo(dsn, dbname=name)


def program(name: str, folder: Path) -> str:
    """The path of one of PostgreSQL's own programs in `folder`, checked. Raises RuntimeError if it is not there."""
    path = folder / name
    if not path.exists():
        raise RuntimeError(f"the PostgreSQL in {folder} comes without {name}")
    subprocess.run([path, "--version"], check=True, capture_output=True, timeout=60)
    return str(path)
