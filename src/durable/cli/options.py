"""The options that most commands share, and the app that they lead to."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Group, Parameter

from durable import logs
from durable.cli.problems import UsageError

if TYPE_CHECKING:
    from durable.durable import AsyncDurable

SHARED: Final = Group("Database and output", sort_key=100)
GIVEN: Final = "DURABLE_DATABASE_URL"


@Parameter(name="*", group=SHARED)
@dataclass(frozen=True)
class Where:
    """Which database, and how answers look."""

    dsn: str | None = None
    """The database. Default: DURABLE_DATABASE_URL, DATABASE_URL, else the embedded PostgreSQL in ./.durable."""
    schema: str = "durable"
    """durable's own schema there."""
    output: Annotated[Literal["table", "json"] | None, Parameter(name=["--output", "-o"])] = None
    """Tables, or one JSON object a line. Default: tables on a terminal, JSON otherwise."""

    @property
    def json(self) -> bool:
        return self.output == "json" if self.output else not sys.stdout.isatty()


@Parameter(name="*", group=SHARED)
@dataclass(frozen=True)
class Shared(Where):
    """And which workflows are known."""

    imports: Annotated[list[str], Parameter(name="--import", negative=(), show_default=False)] = field(
        default_factory=list
    )
    """A module with workflows at its top level. May be given several times."""
    app: str | None = None
    """MODULE:APP, a Durable or AsyncDurable of yours, whose database, schema, codec and workflows are taken."""


@asynccontextmanager
async def opened(shared: Shared) -> AsyncIterator[AsyncDurable]:
    """The app that the options describe, connected; closed afterwards."""
    logs.configure(level="warning")
    app, _ = find_app(shared, shared.app)
    async with connected(app, shared, shared.app):
        if sys.stderr.isatty():
            print(app.database, file=sys.stderr)
        yield app


@asynccontextmanager
async def connected(app: AsyncDurable, shared: Where, place: str | None) -> AsyncIterator[None]:
    """To the database that was asked for, and to no other."""
    try:
        await app.connect()
        if place and shared.dsn and app.database and GIVEN not in app.database.source:
            raise UsageError(f"--dsn is not for {place}: that app takes its database from {app.database.source}")
        yield
    finally:
        await app.close()


def find_app(shared: Shared, place: str | None) -> tuple[AsyncDurable, object]:
    """The app, as an AsyncDurable and as its handlers know it. Not connected yet."""
    from durable.durable import AsyncDurable

    folder = str(Path.cwd())
    if folder not in sys.path:  # modules of the project that one stands in, as with `python -m`
        sys.path.insert(0, folder)
    if place is None:
        app = AsyncDurable(shared.dsn, schema=shared.schema, imports=shared.imports)
        return app, app
    if shared.schema != "durable":
        raise UsageError(f"--schema is not for {place}: an app has its own")
    return _load_app(place, dsn=shared.dsn, imports=shared.imports)


def _load_app(place: str, *, dsn: str | None, imports: Sequence[str]) -> tuple[AsyncDurable, object]:
    """``module:name``. A DSN reaches it by the environment: apps read that, unless they name a database themselves."""
    from durable.definitions import workflows_in
    from durable.durable import AsyncDurable, Durable

    if dsn is not None:
        os.environ[GIVEN] = dsn
        os.environ["DURABLE_EMBEDDED"] = "auto"
    module, _, name = place.partition(":")
    if not module or not name:
        raise UsageError(f"{place!r} must be MODULE:NAME, as in shop.app:app")
    try:
        found: object = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise UsageError(f"{place}: {error}") from error
    except ImportError as error:
        raise UsageError(f"cannot import {module!r}: {error} (looked in {Path.cwd()} first)") from error
    app = found.async_app if isinstance(found, Durable) else found
    if not isinstance(app, AsyncDurable):
        raise UsageError(f"{place} is a {type(found).__name__}, and must be a Durable or an AsyncDurable")
    for other in imports:
        app.register(*workflows_in(other))
    return app, found
