"""Several statements in one flush: one trip to the server and back, whatever their number.

This is libpq's pipeline mode by itself. psycopg's own pipeline talks to the socket at every statement, and takes a
statement for prepared once it has sent the PREPARE, though an earlier error may have kept it from being executed. Here
nothing is sent before everything is queued, and a statement counts as prepared when the server has said so.

Parameters travel as text, without a type: the server takes it from where the parameter stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, Final, TypeAlias

import psycopg
from psycopg import abc, pq
from psycopg.abc import Buffer
from psycopg.adapt import PyFormat
from psycopg.pq import ConnStatus, ExecStatus
from psycopg.pq.abc import PGconn, PGresult
from psycopg.waiting import Wait

from durable.store.connection import Connection, Exchange
from durable.store.query import Statement

Row: TypeAlias = tuple[Any, ...]

_GOOD: Final = (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK)
_OUT_OF_DATE: Final = ("26000", "0A000")
"""There is no such prepared statement, or what it was prepared for has changed."""

_AS_TEXT: Final = [[PyFormat.TEXT] * count for count in range(64)]

_numbers: Final = count(1)


class Answer:
    """What one statement came to. Empty until its flush has been sent, and if it was not executed."""

    __slots__ = ("_adapt", "_result")

    def __init__(self) -> None:
        self._result: PGresult | None = None

    def fill(self, result: PGresult, adapt: abc.Transformer) -> None:
        """The server has executed it."""
        self._result, self._adapt = result, adapt

    @property
    def tag(self) -> str | None:
        """The server's word for what was done: ``COMMIT``, ``SELECT 1``."""
        tag = self._result.command_status if self._result is not None else None
        return tag.decode() if tag is not None else None

    @property
    def rows(self) -> list[Row]:
        """All rows; read from the answer each time."""
        return self._load(self._result.ntuples) if self._result is not None else []

    @property
    def row(self) -> Row | None:
        """The first row, if there is one."""
        return self._load(1)[0] if self._result is not None and self._result.ntuples else None

    def _load(self, rows: int) -> list[Row]:
        if not rows:
            return []
        self._adapt.set_pgresult(self._result)
        return self._adapt.load_rows(0, rows, tuple)


class Flush:
    """Statements that travel together, in their order, on a connection that nobody else uses meanwhile."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._adapt = connection.adapt
        self._queued: list[tuple[Statement, Sequence[Buffer | None], Answer]] = []

    def add(self, statement: Statement, values: Mapping[str, Any] | None = None) -> Answer:
        """Queue a statement with the values of its parameters. Raises psycopg.DataError for one that has no place in
        PostgreSQL; nothing has been sent then."""
        answer = Answer()
        given = statement.pick(values) if values is not None else ()
        self._queued.append((statement, self._adapt.dump_sequence(given, _AS_TEXT[len(given)]), answer))
        return answer

    async def send(self) -> None:
        """Send everything, and fill in the answers. Raises the first error that the server met: what stood before it
        was executed, and its answers are there; what stood behind it was not."""
        connection = self._connection
        if connection.closed:
            raise psycopg.OperationalError("the connection is closed")
        error = await connection.converse(_exchange(connection, self._queued, self._adapt))
        if error is not None:
            raise error


async def send(connection: Connection, statement: Statement, values: Mapping[str, Any] | None = None) -> Answer:
    """One statement by itself. Raises what the server refuses."""
    flush = Flush(connection)
    answer = flush.add(statement, values)
    await flush.send()
    return answer


def _exchange(
    connection: Connection, queued: Sequence[tuple[Statement, Sequence[Buffer | None], Answer]], adapt: abc.Transformer
) -> Exchange[psycopg.Error | None]:
    """Everything out, everything in. Leaves the connection as it was, or closed."""
    pgconn = connection.pgconn
    known = connection.prepared if connection.prepare_threshold is not None else None
    pgconn.enter_pipeline_mode()
    try:
        expected = [_send(pgconn, query, values, known) for query, values, _ in queued]
        pgconn.pipeline_sync()
        while pgconn.flush():
            yield Wait.RW
        first: psycopg.Error | None = None
        for (query, _, answer), prepared_as in zip(queued, expected, strict=True):
            if prepared_as is not None:
                result = yield from _result(pgconn)
                if result.status == ExecStatus.COMMAND_OK and known is not None:
                    known[query] = prepared_as
                first = first or _error(result)
            result = yield from _result(pgconn)
            if result.status in _GOOD:
                answer.fill(result, adapt)
            else:
                first = first or _error(result)
        if known and first is not None and first.sqlstate in _OUT_OF_DATE:
            known.clear()
        yield from _result(pgconn, last=True)
        return first
    finally:
        _leave(pgconn)


def _send(
    pgconn: PGconn, query: Statement, values: Sequence[Buffer | None], known: Mapping[Statement, bytes] | None
) -> bytes | None:
    """Hand one statement to libpq. Returns its name, if it is prepared by this."""
    if known is None:
        pgconn.send_query_params(query.numbered, values, result_format=pq.Format.BINARY)
        return None
    name = known.get(query)
    if name is not None:
        pgconn.send_query_prepared(name, values, result_format=pq.Format.BINARY)
        return None
    name = b"durable_%d" % next(_numbers)
    pgconn.send_prepare(name, query.numbered)
    pgconn.send_query_prepared(name, values, result_format=pq.Format.BINARY)
    return name


def _result(pgconn: PGconn, *, last: bool = False) -> Exchange[PGresult]:
    """The next result, and what ends it: nothing after the pipeline's own."""
    while pgconn.is_busy():
        yield Wait.R
    result = pgconn.get_result()
    if result is None:
        raise psycopg.OperationalError(pgconn.get_error_message())
    if not last:
        while pgconn.is_busy():
            yield Wait.R
        pgconn.get_result()
    return result


def _error(result: PGresult) -> psycopg.Error | None:
    """What the server refused. What it skipped because of that is no error of its own."""
    if result.status != ExecStatus.FATAL_ERROR:
        return None
    return psycopg.errors.error_from_result(result)


def _leave(pgconn: PGconn) -> None:
    if pgconn.status == ConnStatus.OK:
        try:
            pgconn.exit_pipeline_mode()
        except psycopg.Error:  # it was left in the middle: nobody knows what the server is at
            pgconn.finish()
