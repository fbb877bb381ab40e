"""Several statements in one flush: what is answered, what counts as prepared, and how a connection comes out of it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Final

import psycopg
import pytest
import pytest_asyncio
from psycopg.pq import PipelineStatus, TransactionStatus
from tests.store.kit import rows, wait_until_blocked

from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.flush import Answer, Flush, send
from durable.store.query import Statement
from durable.store.runs import abandon

IDLE, INTRANS, INERROR = TransactionStatus.IDLE, TransactionStatus.INTRANS, TransactionStatus.INERROR

BEGIN: Final = Statement.of("begin")
COMMIT: Final = Statement.of("commit")
ONE: Final = Statement.of("select 1")
ECHO: Final = Statement.of("select %(value)s::text")
DIVIDE: Final = Statement.of("select 10 / %(by)s::int")
UNKNOWN: Final = Statement.of("select n from appears_later")
SLEEP: Final = Statement.of("select pg_sleep(1000)")
HOLD: Final = Statement.of("select pg_advisory_xact_lock(%(key)s)")
MEGABYTES: Final = 6 * 2**20


@pytest_asyncio.fixture
async def own(module_dsn: str) -> AsyncIterator[Connection]:
    """A connection that may be broken."""
    connection = await Connection.connect(module_dsn, autocommit=True)
    yield connection
    await connection.close()


def state(connection: Connection) -> TransactionStatus:
    return connection.info.transaction_status


async def prepared(connection: Connection) -> list[str]:
    """The names under which the server knows statements of ours."""
    found = await rows(connection, "select name from pg_prepared_statements where name like 'durable%%' order by name")
    return [name for (name,) in found]


def taken_for_prepared(connection: Connection) -> list[str]:
    return sorted(name.decode() for name in connection.prepared.values())


async def terminate(rival: Connection, pid: int) -> None:
    await rival.execute("select pg_terminate_backend(%s, 10000)", [pid])


async def taken_back(connection: Connection) -> None:
    """Until the event loop does not look at the connection's socket any more."""
    async with asyncio.timeout(20):
        while connection._watching is not None:
            await asyncio.sleep(0)


async def asleep(connection: Connection, rival: Connection) -> asyncio.Task[Answer]:
    """A task that waits for an answer of the server's, which would come after a long time."""
    waiting = asyncio.create_task(send(connection, SLEEP))
    query = "select 1 from pg_stat_activity where pid = %s and wait_event = 'PgSleep'"
    async with asyncio.timeout(20):
        while not await rows(rival, query, connection.info.backend_pid):
            pass
    return waiting


async def works(connection: Connection) -> None:
    """Statements of both kinds, in a transaction and outside of one."""
    flush = Flush(connection)
    flush.add(BEGIN)
    echo = flush.add(ECHO, {"value": "x"})
    flush.add(COMMIT)
    await flush.send()
    assert echo.row == ("x",)
    assert (await send(connection, ONE)).row == (1,)
    assert await rows(connection, "select 1") == [(1,)]
    assert state(connection) is IDLE
    assert connection.pgconn.pipeline_status == PipelineStatus.OFF


# ---------------------------------------------------------------- statements


def test_a_statement_is_numbered_by_the_names_of_its_parameters() -> None:
    query = Statement.of("select %(b)s, %(a)s, %(b)s::int, 7 %% 2, '%%'")
    assert query.numbered == b"select $1, $2, $1::int, 7 % 2, '%'"
    assert query.names == ("b", "a")
    assert query == b"select %(b)s, %(a)s, %(b)s::int, 7 %% 2, '%%'"  # as psycopg takes it
    assert Statement.of("begin").names == ()


async def test_both_ways_of_saying_a_statement_are_the_same(connection: Connection) -> None:
    query = Statement.of("select %(b)s::int %% 4, %(a)s::text || '%%', %(b)s::int")
    given = {"a": "x", "b": 7, "more": "is not sent"}
    assert await rows(connection, "select 3, 'x%%', 7") == [(3, "x%", 7)]
    assert (await send(connection, query, given)).rows == [(3, "x%", 7)]
    assert await (await connection.execute(query, given)).fetchall() == [(3, "x%", 7)]


# ---------------------------------------------------------------- what is answered


async def test_statements_are_answered_in_their_order(connection: Connection) -> None:
    for _ in range(3):  # also once they are prepared
        flush = Flush(connection)
        answers = [flush.add(BEGIN)]
        answers += [flush.add(ECHO, {"value": str(n)}) for n in range(50)]
        many = flush.add(Statement.of("select n, null::int from generate_series(1, 3) n"))
        none = flush.add(Statement.of("select 1 where false"))
        made = flush.add(Statement.of("create temp table if not exists made (n int) on commit drop"))
        written = flush.add(Statement.of("insert into made select generate_series(1, 4)"))
        answers.append(flush.add(COMMIT))
        assert [answer.tag for answer in answers] == [None] * 52
        await flush.send()
        assert (answers[0].tag, answers[0].rows, answers[0].row) == ("BEGIN", [], None)
        assert [answer.row for answer in answers[1:-1]] == [(str(n),) for n in range(50)]
        assert (many.rows, many.row, many.tag) == ([(1, None), (2, None), (3, None)], (1, None), "SELECT 3")
        assert (none.rows, none.row, none.tag) == ([], None, "SELECT 0")
        assert (made.tag, written.tag, answers[-1].tag) == ("CREATE TABLE", "INSERT 0 4", "COMMIT")
    assert state(connection) is IDLE


async def test_nothing_is_sent_before_it_is_sent(connection: Connection) -> None:
    flush = Flush(connection)
    flush.add(BEGIN)
    flush.add(ONE)
    await rows(connection, "select 1")
    assert state(connection) is IDLE
    await Flush(connection).send()  # nothing to be said
    assert state(connection) is IDLE
    await flush.send()
    assert state(connection) is INTRANS
    await abandon(connection)


async def test_what_the_server_refuses_in_the_middle(connection: Connection) -> None:
    """What stood before is answered; what stands behind, COMMIT included, is not executed."""
    for _ in range(4):
        flush = Flush(connection)
        begin, before = flush.add(BEGIN), flush.add(ECHO, {"value": "before"})
        wrong = flush.add(DIVIDE, {"by": 0})
        behind, commit = flush.add(ECHO, {"value": "behind"}), flush.add(COMMIT)
        with pytest.raises(psycopg.errors.DivisionByZero) as error:
            await flush.send()
        assert error.value.diag.sqlstate == "22012"
        assert (begin.tag, before.row) == ("BEGIN", ("before",))
        assert [(answer.tag, answer.rows, answer.row) for answer in (wrong, behind, commit)] == [(None, [], None)] * 3
        assert state(connection) is INERROR
        await abandon(connection)
        await works(connection)


async def test_the_first_of_several_errors_is_raised(connection: Connection) -> None:
    """After it the server skips everything: nothing that comes later has an error of its own."""
    flush = Flush(connection)
    for by in (1, 0):
        flush.add(DIVIDE, {"by": by})
    flush.add(UNKNOWN)
    with pytest.raises(psycopg.errors.DivisionByZero):
        await flush.send()
    assert state(connection) is IDLE  # there was no transaction
    await works(connection)


async def test_a_commit_in_the_middle_stands_whatever_comes_after_it(connection: Connection) -> None:
    await connection.execute("create temp table stands (n int)")
    flush = Flush(connection)
    flush.add(BEGIN)
    flush.add(Statement.of("insert into stands values (1)"))
    commit = flush.add(Statement.of("commit and chain"))
    flush.add(Statement.of("insert into stands values (2)"))
    flush.add(DIVIDE, {"by": 0})
    with pytest.raises(psycopg.errors.DivisionByZero):
        await flush.send()
    assert commit.tag == "COMMIT"
    await abandon(connection)
    assert await rows(connection, "select n from stands") == [(1,)]


async def test_a_commit_that_is_answered_with_rollback_is_no_error(connection: Connection) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        await send(connection, DIVIDE, {"by": 0})
    await send(connection, BEGIN)
    with pytest.raises(psycopg.errors.DivisionByZero):
        await send(connection, DIVIDE, {"by": 0})
    assert (await send(connection, COMMIT)).tag == "ROLLBACK"


# ---------------------------------------------------------------- what is prepared


async def test_a_statement_is_prepared_once(connection: Connection) -> None:
    for n in range(3):
        assert (await send(connection, ECHO, {"value": str(n)})).row == (str(n),)
    same = Statement.of(ECHO.decode())
    assert (await send(connection, same, {"value": "x"})).row == ("x",)
    names = await prepared(connection)
    assert len(names) == 1
    assert names == taken_for_prepared(connection)


async def test_twice_in_the_flush_that_prepares_it(own: Connection) -> None:
    for expected in ("1", "2"):
        flush = Flush(own)
        answers = [flush.add(ECHO, {"value": expected}) for _ in range(3)]
        await flush.send()
        assert [answer.row for answer in answers] == [(expected,)] * 3
    assert set(taken_for_prepared(own)) <= set(await prepared(own))


async def test_what_could_not_be_prepared_is_not_taken_for_prepared(own: Connection) -> None:
    for _ in range(3):
        flush = Flush(own)
        flush.add(BEGIN)
        flush.add(UNKNOWN)
        flush.add(ECHO, {"value": "behind"})
        with pytest.raises(psycopg.errors.UndefinedTable):
            await flush.send()
        await abandon(own)
        assert UNKNOWN not in own.prepared
        assert ECHO not in own.prepared
        assert taken_for_prepared(own) == await prepared(own)
    await own.execute("create temp table appears_later as select 7 as n")
    assert (await send(own, UNKNOWN)).row == (7,)
    assert (await send(own, ECHO, {"value": "x"})).row == ("x",)


async def test_what_was_prepared_before_its_execution_failed_stays_prepared(own: Connection) -> None:
    await send(own, BEGIN)
    with pytest.raises(psycopg.errors.DivisionByZero):
        await send(own, DIVIDE, {"by": 0})
    await abandon(own)
    assert DIVIDE in own.prepared
    assert taken_for_prepared(own) == await prepared(own)
    assert (await send(own, DIVIDE, {"by": 2})).row == (5,)


@pytest.mark.parametrize("forget", ["deallocate all", "discard all"])
async def test_somebody_forgets_all_that_was_prepared(own: Connection, forget: str) -> None:
    """Who was lent the connection may do that. The error comes once."""
    await works(own)
    await own.execute(forget.encode())
    flush = Flush(own)
    flush.add(BEGIN)
    flush.add(ECHO, {"value": "x"})
    with pytest.raises(psycopg.errors.InvalidSqlStatementName):
        await flush.send()
    await abandon(own)
    await works(own)
    assert taken_for_prepared(own) == await prepared(own)


@pytest.mark.parametrize("how", ["rollback()", "savepoint", "rollback", "drop", "alter"])
async def test_psycopg_forgets_what_was_prepared(own: Connection, how: str) -> None:
    """At a ROLLBACK, of a savepoint too, and at each DROP and ALTER, psycopg says DEALLOCATE ALL if it had prepared
    something itself. No flush fails for that: it may be the one that records what a step with a connection did."""
    await own.execute("create temp table forgotten (n int)")
    for _ in range(8):
        await own.execute("select 7")
    assert await rows(own, "select name from pg_prepared_statements where name like '\\_pg3%%'") != []
    await works(own)
    await send(own, BEGIN)
    match how:
        case "rollback()":
            await own.rollback()
        case "savepoint":
            with pytest.raises(psycopg.errors.DivisionByZero):
                async with own.transaction():
                    await own.execute("select 1 / 0")
            await own.execute("select 1")
        case "rollback":
            await own.execute("rollback")
        case "drop":
            await own.execute("drop table forgotten")
        case _:
            await own.execute("alter table forgotten add m int")
    flush = Flush(own)
    answers = [flush.add(ECHO, {"value": "x"}), flush.add(ONE)]
    await flush.send()
    assert [answer.row for answer in answers] == [("x",), (1,)]
    await abandon(own)
    await works(own)


async def test_a_table_that_was_changed_under_a_prepared_statement(own: Connection) -> None:
    """A migration while workers run: the server refuses the old plan, once."""
    read = Statement.of("select * from changing")
    await own.execute("create temp table changing as select 1::int as n")
    assert (await send(own, read)).row == (1,)
    await own.execute("alter table changing alter n type text")
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="cached plan"):
        await send(own, read)
    assert (await send(own, read)).row == ("1",)


async def test_nothing_is_prepared_behind_a_pooler(store: Store) -> None:
    pool = store.open_pool(1, prepare_threshold=None)
    async with pool, pool.connection() as connection:
        for n in range(8):
            assert (await send(connection, ECHO, {"value": str(n)})).row == (str(n),)
            with pytest.raises(psycopg.errors.DivisionByZero):
                await send(connection, DIVIDE, {"by": 0})
            await works(connection)
        assert await rows(connection, "select name from pg_prepared_statements") == []
        assert connection.prepared == {}


# ---------------------------------------------------------------- values

ODD: Final = ["", " ", "a,b", '"', "\\", "{}", "null", "NULL", "it's", "ä\U0001f600", "\t\n", "%s %(x)s $1", "a\\\\b\\"]


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        ("uuid", uuid.UUID("01234567-89ab-4def-8123-456789abcdef")),
        ("timestamptz", datetime(2026, 3, 29, 1, 30, 0, 123_456, tzinfo=UTC)),
        ("timestamptz", datetime(1969, 12, 31, 23, 59, 59, tzinfo=timezone(timedelta(hours=5, minutes=45)))),
        ("interval", timedelta(days=400, hours=3, microseconds=1)),
        ("interval", timedelta(days=-1, seconds=1)),
        ("interval", timedelta(0)),
        ("bool", True),
        ("bool", False),
        ("int", -(2**31)),
        ("bigint", 2**31),
        ("bigint", 2**63 - 1),
        ("bigint", -(2**63)),
        ("text", ""),
        *(("text", text) for text in ODD),
        ("text", "\u0001\u007f\u2028\ufffd"),
        ("text[]", ODD),
        ("text[]", []),
        ("text[]", ["a", None]),
        ("bigint[]", [1, -(2**40), 2**63 - 1]),
        ("bigint[]", []),
        ("uuid[]", [uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)]),
        *((type_, None) for type_ in ("uuid", "timestamptz", "interval", "bool", "bigint", "text", "text[]")),
    ],
)
async def test_values_go_there_and_back(connection: Connection, type_: str, value: Any) -> None:
    query = Statement.of(f"select %(value)s::{type_}, %(value)s::{type_} is null")
    for _ in range(2):
        assert (await send(connection, query, {"value": value})).row == (value, value is None)
    if isinstance(value, datetime):
        assert (await send(connection, query, {"value": value})).rows[0][0].utcoffset() is not None


@pytest.mark.parametrize("text", [*ODD, "x" * 300_000])
async def test_json_stays_the_text_that_it_is(connection: Connection, text: str) -> None:
    kept = await rows(connection, "select to_json(%s::text)::text", text)
    query = Statement.of("select (%(value)s::json)::text")
    assert (await send(connection, query, {"value": kept[0][0]})).rows == kept


async def test_the_place_of_a_parameter_says_its_type(connection: Connection) -> None:
    """They travel without one."""
    await connection.execute("create temp table typed (a bigint, b uuid, c timestamptz, d text, e boolean, f interval)")
    given = {
        "a": 7, "b": uuid.uuid4(), "c": datetime.now(UTC), "d": "7", "e": True, "f": timedelta(minutes=1),
    }  # fmt: skip
    query = Statement.of("insert into typed values (%(a)s, %(b)s, %(c)s, %(d)s, %(e)s, %(f)s) returning *")
    assert (await send(connection, query, given)).row == tuple(given.values())
    found = Statement.of("select count(*) from typed where a = %(a)s and b = %(b)s and c = %(c)s and d = any(%(d)s)")
    assert (await send(connection, found, given | {"d": ["7"]})).row == (1,)


@pytest.mark.parametrize("wrong", ["a\0b", ["fine", "a\0b"]])
async def test_what_has_no_place_in_postgresql_is_refused_before_anything_is_sent(
    connection: Connection, wrong: Any
) -> None:
    flush = Flush(connection)
    begin = flush.add(BEGIN)
    with pytest.raises(psycopg.DataError):
        flush.add(ECHO, {"value": wrong})
    assert (begin.tag, state(connection)) == (None, IDLE)
    await works(connection)


async def test_a_value_that_is_missing(connection: Connection) -> None:
    with pytest.raises(KeyError, match="value"):
        Flush(connection).add(ECHO, {})
    assert state(connection) is IDLE


async def test_large_values_both_ways(connection: Connection) -> None:
    """More than the socket's buffers hold: the server sends while it still is to be told the rest."""
    large = "ab" * (MEGABYTES // 2)
    flush = Flush(connection)
    answers = [flush.add(ECHO, {"value": large + str(n)}) for n in range(4)]
    await flush.send()
    assert [answer.row == (large + str(n),) for n, answer in enumerate(answers)] == [True] * 4
    await works(connection)


# ---------------------------------------------------------------- connections


async def test_it_stays_registered_until_psycopg_says_something(own: Connection) -> None:
    assert own._watching is None
    for _ in range(3):
        await works(own)  # psycopg had the last word
        assert own._watching is None
        await send(own, ONE)
        await send(own, ONE)
        assert own._watching is asyncio.get_running_loop()
    own.unwatch()
    own.unwatch()
    assert own._watching is None
    await works(own)
    await send(own, ONE)
    await own.close()
    assert own._watching is None


async def test_a_transaction_of_both(connection: Connection) -> None:
    """psycopg's own statements between two flushes, and its own idea of the transaction."""
    await connection.execute("create temp table both_said (n int)")
    async with connection.transaction():
        await send(connection, Statement.of("insert into both_said values (1)"))
        await connection.execute("insert into both_said values (2)")
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with connection.transaction():
                await send(connection, Statement.of("insert into both_said values (3)"))
                await send(connection, DIVIDE, {"by": 0})
        await send(connection, Statement.of("insert into both_said values (4)"))
    assert await rows(connection, "select n from both_said order by n") == [(1,), (2,), (4,)]


async def test_the_server_closes_while_it_is_waited_for(own: Connection, rival: Connection) -> None:
    pid = own.info.backend_pid
    waiting = await asleep(own, rival)
    await terminate(rival, pid)
    with pytest.raises(psycopg.OperationalError):
        await waiting
    assert own.closed
    assert own._watching is None
    await refuses(own)


class Noting(Connection):
    """Notes whether its socket was still registered when it had just been closed."""

    registered: bool | None = None

    def _readable(self) -> None:
        super()._readable()
        if self.closed and self.registered is None:
            self.registered = self._watching is not None


async def test_a_socket_that_libpq_has_closed_is_not_registered_any_more(module_dsn: str, rival: Connection) -> None:
    """Its number may be another's before the task goes on that waited for it, and would take that one's away."""
    async with await Noting.connect(module_dsn, autocommit=True) as own:
        waiting = await asleep(own, rival)
        await terminate(rival, own.info.backend_pid)
        with pytest.raises(psycopg.OperationalError):
            await waiting
        assert own.registered is False


async def test_the_server_closes_while_nothing_is_said(own: Connection, rival: Connection) -> None:
    """The socket has news for ever, that nobody reads: it is taken back, or the event loop would be busy with it."""
    await send(own, ONE)
    loop = asyncio.get_running_loop()
    assert own._watching is loop
    await terminate(rival, own.info.backend_pid)
    await taken_back(own)
    with pytest.raises(psycopg.OperationalError):
        await send(own, ONE)
    assert own.closed
    assert own._watching is None
    await refuses(own)


async def test_the_server_says_something_that_nobody_asked_for(own: Connection, rival: Connection) -> None:
    """A notification does not keep the event loop busy, and is not lost."""
    await own.execute("listen unasked")
    await send(own, ONE)
    await rival.execute("notify unasked, 'while idle'")
    await taken_back(own)
    await works(own)
    await send(own, ONE)
    await rival.execute("notify unasked, 'and now'")
    notifications = own.notifies(timeout=20, stop_after=2)
    assert [notification.payload async for notification in notifications][-1] == "and now"


async def refuses(connection: Connection) -> None:
    """A closed connection says so; it does not wait."""
    flush = Flush(connection)
    answer = flush.add(ONE)
    with pytest.raises(psycopg.OperationalError, match="closed"):
        await flush.send()
    assert answer.tag is None
    await abandon(connection)
    await connection.close()


async def blocked(module_dsn: str, connection: Connection) -> None:
    with ThreadPoolExecutor() as threads:
        await asyncio.wrap_future(threads.submit(wait_until_blocked, module_dsn, connection.info.backend_pid))


async def test_a_cancelled_task_closes_the_connection(module_dsn: str, own: Connection, rival: Connection) -> None:
    """What the server has executed is answered, how far it goes on is not known."""
    answers: list[Answer] = []

    async def wait() -> None:
        flush = Flush(own)
        answers.extend([flush.add(BEGIN), flush.add(ONE), flush.add(HOLD, {"key": 7}), flush.add(ONE)])
        await flush.send()

    async with rival.transaction():
        await send(rival, HOLD, {"key": 7})
        waiting = asyncio.create_task(wait())
        await blocked(module_dsn, own)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert own.closed
        assert own._watching is None
    assert answers[-1].tag is None
    await refuses(own)
    async with rival.transaction():  # the server has noticed, or will
        await send(rival, HOLD, {"key": 7})


async def test_a_task_that_is_cancelled_before_it_begins_leaves_the_connection_alone(own: Connection) -> None:
    waiting = asyncio.create_task(send(own, ONE))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await works(own)


async def test_a_pool_replaces_what_was_closed(store: Store, rival: Connection) -> None:
    async with store.open_pool(1) as pool:
        async with pool.connection() as connection:
            waiting = await asleep(connection, rival)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert connection.closed
        async with pool.connection() as connection:
            await works(connection)


async def test_connections_side_by_side(module_dsn: str) -> None:
    """Each has its own place in the event loop."""
    connections = [await Connection.connect(module_dsn, autocommit=True) for _ in range(5)]
    try:

        async def ask(connection: Connection, n: int) -> list[Any]:
            return [(await send(connection, ECHO, {"value": f"{n}.{m}"})).row for m in range(20)]

        found = await asyncio.gather(*(ask(connection, n) for n, connection in enumerate(connections)))
        assert found == [[(f"{n}.{m}",) for m in range(20)] for n in range(5)]
    finally:
        for connection in connections:
            await connection.close()
