"""The options that most commands share, and the app that they lead to."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from durable import logs
from durable.cli.problems import UsageError

if TYPE_CHECKING:
    from durable.durable import AsyncDurable

SHARED = Group("Database and output", sort_key=100)


@Parameter(name="*", group=SHARED)
@dataclass(frozen=True, slots=True)
class Shared:
    """Where the runs are, and how they are shown."""

    dsn: str | None = None
    """The database. Default: DURABLE_DATABASE_URL, DATABASE_URL, else the embedded PostgreSQL in ./.durable."""
    schema: str = "durable"
    """durable's own schema there."""
    imports: Annotated[list[str], Parameter(name="--import", negative=())] = field(default_factory=list)
    """A module with workflows at its top level. May be given several times."""
    app: str | None = None
    """MODULE:APP, a Durable or AsyncDurable of yours, whose database, schema, codec and workflows are taken."""
    output: Annotated[Literal["table", "json"] | None, Parameter(name=["--output", "-o"])] = None
    """Tables, or one JSON object a line. Default: tables on a terminal, JSON otherwise."""

    @property
    def json(self) -> bool:
        return self.output == "json" if self.output else not sys.stdout.isatty()


@asynccontextmanager
async def opened(shared: Shared) -> AsyncIterator[AsyncDurable]:
    """The app that the options describe, connected; closed afterwards."""
    logs.configure(level="warning")
    app = make_app(shared)
    try:
        await app.connect()
        if sys.stderr.isatty():
            print(app.database, file=sys.stderr)
        yield app
    finally:
        await app.close()


def make_app(shared: Shared) -> AsyncDurable:
    """Not connected yet."""
    from durable.durable import AsyncDurable

    see_working_folder()
    if shared.app is None:
        return AsyncDurable(shared.dsn, schema=shared.schema, imports=shared.imports)
    if shared.schema != "durable":
        raise UsageError(f"--schema and --app {shared.app} exclude each other: the app has its own")
    return load_app(shared.app, dsn=shared.dsn, imports=shared.imports)[0]


def load_app(place: str, *, dsn: str | None, imports: Sequence[str]) -> tuple[AsyncDurable, object]:
    """The app ``module:name``, as an AsyncDurable and as it is. A `dsn` holds for apps that name none themselves."""
    from durable.definitions import workflows_in
    from durable.durable import AsyncDurable, Durable

    see_working_folder()
    if dsn is not None:
        os.environ["DURABLE_DATABASE_URL"] = dsn
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
        raise UsageError(f"cannot import {module!r}: {error} (looked in {os.getcwd()} first)") from error  # noqa: PTH109
    app = found.async_app if isinstance(found, Durable) else found
    if not isinstance(app, AsyncDurable):
        raise UsageError(f"{place} is a {type(found).__name__}, and must be a Durable or an AsyncDurable")
    for module in imports:
        app.register(*workflows_in(module))
    return app, found


def see_working_folder() -> None:
    """Modules of the project that one stands in can be imported, as with ``python -m``."""
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
