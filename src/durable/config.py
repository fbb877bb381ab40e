"""Which database: an argument, ``DURABLE_DATABASE_URL``, ``DATABASE_URL``, or the embedded PostgreSQL, in this order.

Settings come from the environment (``DURABLE_…``), ``.env``, ``durable.toml`` and ``[tool.durable]`` of
``pyproject.toml``, in this order. A password is never printed: libpq's own messages about a URL can quote it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, get_args

import psycopg
from dotenv import dotenv_values
from psycopg.conninfo import conninfo_to_dict
from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    PyprojectTomlConfigSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from durable.errors import ConfigurationError

if TYPE_CHECKING:
    from durable.postgres import EmbeddedPostgres

Embedded = Literal["auto", "always", "never"]

OTHER_SPELLINGS: Final = re.compile(r"(?:postgres|postgresql\+[a-z0-9_]+)://", re.IGNORECASE)


class Settings(BaseSettings):
    """What can be set from outside."""

    model_config = SettingsConfigDict(
        env_prefix="DURABLE_",
        env_file=".env",
        toml_file="durable.toml",
        pyproject_toml_table_header=("tool", "durable"),
        extra="ignore",
        hide_input_in_errors=True,
        env_ignore_empty=True,
    )

    database_url: str | None = None
    embedded: Embedded = "auto"
    data_dir: Path = Path(".durable")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
            env_settings,
            dotenv_settings,
            TomlConfigSettingsSource(settings_cls),
            PyprojectTomlConfigSettingsSource(settings_cls),
        )

    @classmethod
    def load(cls) -> Settings:
        try:
            return cls()
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
            raise ConfigurationError(f"wrong setting of durable: {wrong}") from None
        except (SettingsError, ValueError, OSError) as error:
            raise ConfigurationError(f"cannot read the settings of durable: {error}") from error


@dataclass(frozen=True, slots=True)
class Database:
    """The database that was taken. Whoever resolved it closes it: the embedded one is left then."""

    dsn: str = field(repr=False)
    source: str
    embedded: EmbeddedPostgres | None = None

    def __str__(self) -> str:
        """One line for the log, without the password."""
        return f"database {shown(self.dsn)}, from {self.source}"

    def close(self) -> None:
        if self.embedded is not None:
            self.embedded.stop()


def resolve(
    dsn: str | None = None, *, embedded: Embedded | None = None, data_dir: Path | str | None = None
) -> Database:
    """Find the database, and start the embedded one if that is it.

    ``embedded``: ``auto`` takes it if nothing else is configured, ``always`` whatever the environment says, ``never``
    makes a missing configuration an error. A DSN in the code is always taken.
    """
    if dsn:
        return Database(normalise(dsn, "the dsn argument"), "the dsn argument")
    settings = Settings.load()
    mode = embedded or settings.embedded
    if mode not in get_args(Embedded):
        raise ConfigurationError(f"embedded is {mode!r}, and must be one of {', '.join(get_args(Embedded))}")
    if mode != "always":
        if settings.database_url:
            source = _found_in()
            return Database(normalise(settings.database_url, source), source)
        for place, variables in (("the environment", os.environ), (".env", dotenv_values(".env"))):
            if url := variables.get("DATABASE_URL"):
                source = f"DATABASE_URL in {place}"
                return Database(normalise(url, source), source)
        if mode == "never":
            raise ConfigurationError(
                "no database is configured: set DURABLE_DATABASE_URL, for example to postgresql://user@host/database "
                "(embedded is 'never', so that none is started)"
            )
    # Late: nobody who has a database needs it, and it does not exist on Windows.
    from durable.postgres import EmbeddedPostgres

    server = EmbeddedPostgres(data_dir or settings.data_dir).start()
    try:
        return Database(server.dsn(), f"the embedded PostgreSQL in {server.root}", server)
    except BaseException:
        server.stop()
        raise


def normalise(dsn: str, source: str) -> str:
    """The DSN as libpq reads it: a URL, or ``key=value`` words. SQLAlchemy's and Heroku's spellings are known."""
    plain = OTHER_SPELLINGS.sub("postgresql://", dsn.strip(), count=1)
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://", plain, re.IGNORECASE)
    if scheme and scheme[1].lower() != "postgresql":
        raise ConfigurationError(
            f"{source} is a URL of {scheme[1]}, not of PostgreSQL (postgresql://user@host/database)"
        )
    try:
        conninfo_to_dict(plain)
    except psycopg.ProgrammingError as error:
        # What stands in quotes may be a part of the password.
        reason = str(error).split('"')[0].strip(" :\n")
        raise ConfigurationError(
            f"{source} is no DSN that libpq can read ({reason}); it should look like "
            "postgresql://user:password@host:5432/database, with special characters percent-encoded"
        ) from None
    return plain


def shown(dsn: str) -> str:
    """Where a DSN leads, without what is secret in it."""
    words = conninfo_to_dict(dsn)
    host = words.get("host") or words.get("hostaddr") or "local"
    port = f" port {words['port']}" if "port" in words else ""
    user = f" as {words['user']}" if "user" in words else ""
    return f"{words.get('dbname') or words.get('user') or 'default'} on {host}{port}{user}"


def _found_in() -> str:
    """Which of the sources of Settings has the DSN, in their order."""
    name = "DURABLE_DATABASE_URL"
    for place, variables in (("the environment", os.environ), (".env", dotenv_values(".env"))):
        if any(key.upper() == name and value for key, value in variables.items()):
            return f"{name} in {place}"
    if TomlConfigSettingsSource(Settings)().get("database_url"):
        return "database_url in durable.toml"
    return "database_url in [tool.durable] of pyproject.toml"
