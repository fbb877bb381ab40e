"""One database, one schema, one codec: what every function of this room is given, and how connections to it are made.

Connections are psycopg's own, in autocommit mode, without a check on checkout: a broken one shows itself at its first
statement, and a transaction is run again anyway. The engine says BEGIN and COMMIT itself, several to a flush.
"""

from __future__ import annotations

import os
from typing import Any, Final, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool

from durable.store.codec import MAX_PAYLOAD, Codec, Payloads
from durable.store.connection import Connection
from durable.store.sql import Sql
from durable.store.tables import DEFAULT_SCHEMA

Pool: TypeAlias = AsyncConnectionPool[Connection]

DEAD_AFTER: Final = 10
"""Seconds after which a peer that does not answer is given up."""


class Store:
    """Where runs are kept."""

    def __init__(
        self,
        dsn: str,
        *,
        schema: str = DEFAULT_SCHEMA,
        codec: Codec | None = None,
        max_payload: int = MAX_PAYLOAD,
    ) -> None:
        self.dsn = dsn
        self.schema = schema
        self.sql = Sql(schema)
        self.payloads = Payloads(codec, max_payload)

    @property
    def control_channel(self) -> str:
        """Where a control request, or a message to a claimed run, is announced: the payload is the run's id."""
        return f"{self.schema}_control"

    @property
    def ended_channel(self) -> str:
        """Where the end of a run is announced that somebody waits for: the payload is the run's id."""
        return f"{self.schema}_ended"

    def open_pool(
        self,
        size: int,
        *,
        application_name: str = "durable",
        min_size: int = 1,
        lock_timeout_ms: int | None = None,
        idle_in_transaction_ms: int | None = None,
        executing: bool = False,
        prepare_threshold: int | None = 5,
    ) -> Pool:
        """A pool that is not open yet: ``async with`` it, or ``await pool.open()``.

        The two limits, and what else `executing` sets, become the sessions' own defaults (``RESET ALL`` keeps them); a
        transaction pooler refuses them, and needs ``prepare_threshold=None``. `executing`: this pool is for the advance
        path, whose statements find their rows by primary keys: they need to be planned once.
        """
        limits = {"lock_timeout": lock_timeout_ms, "idle_in_transaction_session_timeout": idle_in_transaction_ms}
        options = [f"-c {name}={value}" for name, value in limits.items() if value is not None]
        if executing:
            options.append("-c plan_cache_mode=force_generic_plan")
        return AsyncConnectionPool(
            self.dsn,
            connection_class=Connection,
            min_size=min(min_size, size),
            max_size=size,
            open=False,
            configure=_autocommit,
            name=application_name,
            kwargs=connection_settings(self.dsn, application_name, options) | {"prepare_threshold": prepare_threshold},
        )


async def alive(pool: Pool) -> Connection:
    """A connection of the pool, to be put back there, that the server has not closed while it lay there."""
    while True:
        connection = await pool.getconn()
        try:
            if connection.has_news():
                await pool.check_connection(connection)
        except psycopg.Error:
            await connection.close()
            await pool.putconn(connection)
        except BaseException:
            await pool.putconn(connection)
            raise
        else:
            return connection


def connection_settings(dsn: str, application_name: str, options: list[str] | None = None) -> dict[str, Any]:
    """What psycopg is told beside the DSN, whose own settings win: how a host that vanished is noticed."""
    given = conninfo_to_dict(dsn)
    settings: dict[str, Any] = {
        "application_name": application_name,
        "client_encoding": "utf8",
        "connect_timeout": DEAD_AFTER,
        "keepalives": 1,
        "keepalives_idle": DEAD_AFTER,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": DEAD_AFTER * 1000,
    }
    settings = {name: value for name, value in settings.items() if name not in given}
    if options:
        settings["options"] = " ".join([str(given.get("options") or os.environ.get("PGOPTIONS", "")), *options]).strip()
    return settings


async def _autocommit(connection: Connection) -> None:
    # As a connection setting it would break procrastinate's listener, which shares this way of making pools.
    await connection.set_autocommit(True)
