"""What app code calls: start, start_many, send, resume; on any connection, and against each other."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import pytest_asyncio
import sqlalchemy as sa
from psycopg.rows import dict_row
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from tests.store.kit import jobs, new, read, rows, started, wait_until_blocked

from durable import migrate
from durable.core.state import MessageKind
from durable.errors import PayloadError
from durable.store import operations
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.inbox import load_inbox
from durable.store.operations import Sent, Start, Started
from durable.store.read import history

SIGNAL = MessageKind.SIGNAL


async def go(query: operations.Query[Any], connection: Any) -> Any:
    return await operations.execute_async(query, connection)


# ---------------------------------------------------------------- start


async def test_a_start_is_a_run_a_job_and_an_event(store: Store, connection: Connection) -> None:
    run = new(
        key="k-1", tags={"tenant": "acme"}, priority=7, timeout=timedelta(hours=1), input='{"b": 1.50, "a": 1e400}'
    )
    assert await go(operations.start(store, run), connection) == Started(run.id, created=True, same=True)
    kept = await read(store, connection, run.id)
    assert (kept.workflow, kept.version, kept.status, kept.revision) == ("order", "1", "pending", 0)
    assert kept.input == '{"b": 1.50, "a": 1e400}'  # the very text
    assert (kept.key, kept.tags, kept.priority, kept.queue) == ("k-1", {"tenant": "acme"}, 7, "shop")
    assert kept.deadline == kept.created_at + timedelta(hours=1)
    assert await jobs(store, connection, run.id) == [("durable.advance", 0, 7, f"{run.id}:0", "shop", None, False)]
    (created,) = await history(store, connection, run.id)
    assert (created.kind, created.at) == ("created", kept.created_at)
    assert await rows(connection, "select root_id = id from durable.runs where id = %s", run.id) == [(True,)]


async def test_a_delayed_start_waits_without_a_job(store: Store, connection: Connection) -> None:
    run = await started(store, connection, delay=timedelta(days=1), timeout=timedelta(hours=1))
    assert (run.status, run.waiting_for) == ("pending", "start")
    assert run.wake_at == run.created_at + timedelta(days=1)
    assert run.deadline == run.created_at + timedelta(days=1, hours=1)  # a deadline counts from the start
    assert await jobs(store, connection, run.id) == []
    at_once = await started(store, connection, delay=timedelta(0))
    assert (at_once.waiting_for, at_once.wake_at) == (None, None)


async def test_a_used_key_or_id_is_the_run_that_has_it(store: Store, connection: Connection) -> None:
    key = f"key-{uuid.uuid4()}"
    first = new(key=key, input='{"a": 1, "b": 2}')
    await go(operations.start(store, first), connection)
    again = new(key=key, input='{ "b": 2, "a": 1 }')  # means the same
    assert await go(operations.start(store, again), connection) == Started(first.id, created=False, same=True)
    other = new(key=key, input='{"a": 2}')
    assert await go(operations.start(store, other), connection) == Started(first.id, created=False, same=False)
    newer = new(key=key, input=first.input, version="2")
    assert await go(operations.start(store, newer), connection) == Started(first.id, created=False, same=False)
    by_id = new(id=first.id, input=first.input)
    assert await go(operations.start(store, by_id), connection) == Started(first.id, created=False, same=True)
    by_sql = await rows(
        connection, "select same from durable.start_run(gen_random_uuid(), 'order', '1', '1', '', 'q', %s)", key
    )
    assert by_sql == [(True,)]  # a caller without a hash
    elsewhere = new("invoice", key=key)
    assert (await go(operations.start(store, elsewhere), connection)).created  # keys are one workflow's
    assert len(await jobs(store, connection, first.id)) == 1


async def test_an_id_counts_before_a_key(store: Store, connection: Connection) -> None:
    a = await started(store, connection, key=f"k-{uuid.uuid4()}")
    b = await started(store, connection, key=f"k-{uuid.uuid4()}")
    both = new(id=a.id, key=b.key)
    assert (await go(operations.start(store, both), connection)).id == a.id


async def test_concurrent_starts_with_one_key_are_one_run(store: Store, pool: Any) -> None:
    key = f"race-{uuid.uuid4()}"

    async def one() -> Started:
        async with pool.connection() as connection:
            found: Started = await go(operations.start(store, new(key=key)), connection)
            return found

    found = await asyncio.gather(*(one() for _ in range(20)))
    assert len({run.id for run in found}) == 1
    assert [run.created for run in found].count(True) == 1
    assert all(run.same for run in found)


@pytest.mark.parametrize("commits", [True, False])
async def test_a_start_waits_for_a_rival_that_may_still_roll_back(module_dsn: str, store: Store, commits: bool) -> None:
    key = f"rival-{uuid.uuid4()}"
    first, second = new(key=key), new(key=key)
    with psycopg.connect(module_dsn) as rival, psycopg.connect(module_dsn) as mine, ThreadPoolExecutor() as threads:
        operations.execute(operations.start(store, first), rival)
        waiting = threads.submit(operations.execute, operations.start(store, second), mine)
        wait_until_blocked(module_dsn, mine.info.backend_pid)
        rival.commit() if commits else rival.rollback()
        expected = Started(first.id, False, True) if commits else Started(second.id, True, True)
        assert waiting.result(20) == expected


async def test_start_many_keeps_order_text_and_rules(store: Store, connection: Connection) -> None:
    taken = await started(store, connection, key=f"k-{uuid.uuid4()}")
    ids = [uuid.uuid4() for _ in range(3)]
    runs = [
        new(id=ids[0], key=f"z-{uuid.uuid4()}", input='{"b": 1.50, "a": "\\u0041"}', tags={"a": [1]}, priority=3),
        new(key=taken.key),
        new(id=ids[1], delay=timedelta(seconds=90), timeout=timedelta(minutes=1)),
        new(id=ids[2], key=f"a-{uuid.uuid4()}"),
        new(id=ids[2]),  # the same twice in one call
    ]
    found = await go(operations.start_many(store, runs), connection)
    assert [run.id for run in found] == [ids[0], taken.id, ids[1], ids[2], ids[2]]
    assert [run.created for run in found[:3]] == [True, False, True]
    assert sorted(run.created for run in found[3:]) == [False, True]
    assert all(run.same for run in found)
    one = await read(store, connection, ids[0])
    assert (one.input, one.tags, one.priority) == ('{"b": 1.50, "a": "\\u0041"}', {"a": [1]}, 3)
    delayed = await read(store, connection, ids[1])
    assert delayed.wake_at == delayed.created_at + timedelta(seconds=90)
    assert await go(operations.start_many(store, []), connection) == []


async def test_start_many_takes_runs_without_input(store: Store, connection: Connection) -> None:
    [run] = await go(operations.start_many(store, [new(input="null")]), connection)
    assert (await read(store, connection, run.id)).input == "null"


async def test_start_many_and_start_are_one_round_trip_and_agree(store: Store, connection: Connection) -> None:
    found = await go(operations.start_many(store, [new() for _ in range(1000)]), connection)
    assert len({run.id for run in found}) == 1000
    assert all(run.created for run in found)


async def test_two_start_many_with_the_same_keys_do_not_deadlock(store: Store, pool: Any) -> None:
    keys = [f"m-{uuid.uuid4()}" for _ in range(50)]

    async def many(order: list[str]) -> list[Started]:
        async with pool.connection() as connection:
            found: list[Started] = await go(operations.start_many(store, [new(key=key) for key in order]), connection)
            return found

    one, two = await asyncio.gather(many(keys), many(keys[::-1]))
    assert [run.id for run in one] == [run.id for run in two[::-1]]


async def test_a_payload_over_the_limit_is_refused_with_sizes(module_dsn: str, connection: Connection) -> None:
    store = Store(module_dsn, max_payload=20)
    with pytest.raises(PayloadError, match=r"the input of workflow 'order'.*21 bytes.*max_payload=20"):
        operations.start(store, new(input='"' + "x" * 19 + '"'))
    operations.start(store, new(input='"' + "x" * 18 + '"'))
    with pytest.raises(PayloadError, match="22 bytes"):
        operations.send(store, uuid.uuid4(), SIGNAL, "x", '"' + "é" * 10 + '"')


async def test_tags_that_are_no_object(store: Store, connection: Connection) -> None:
    run = new()
    query = operations.start(store, run)
    bad = operations.Query(query.sql, {**query.params, "tags": "[1]"}, query.read)
    with pytest.raises(PayloadError, match="tags"):
        await go(bad, connection)


@pytest.mark.parametrize("bad", ["a\0b", "half \ud800"])
async def test_text_that_cannot_be_stored(store: Store, bad: str) -> None:
    for more in ({"key": bad}, {"tags": {"a": [bad]}}, {"tags": {bad: 1}}):
        with pytest.raises(PayloadError, match=r"the (key|tags): a NUL or half"):
            operations.start(store, new(**more))
        with pytest.raises(PayloadError, match=r"the (key|tags): a NUL or half"):
            operations.start_many(store, [new(**more)])
    for call in (
        lambda: operations.send(store, uuid.uuid4(), SIGNAL, bad),
        lambda: operations.send(store, uuid.uuid4(), SIGNAL, "a", None, bad),
        lambda: operations.resume(store, uuid.uuid4(), bad),
    ):
        with pytest.raises(PayloadError, match="a NUL or half"):
            call()


@pytest.mark.parametrize("tags", [{"a": float("nan")}, {"a": object()}, {"a": {1, 2}}])
async def test_tags_that_are_no_json(store: Store, tags: dict[str, Any]) -> None:
    with pytest.raises(PayloadError, match="the tags: they are not JSON"):
        operations.start(store, new(tags=tags))


async def test_tags_with_every_character_that_can_be_stored(store: Store, connection: Connection) -> None:
    tags = {"\u20ac \U0001f600": "\x01 \\ud800 \\u0000"}
    assert (await started(store, connection, tags=tags)).tags == tags


# ---------------------------------------------------------------- send


async def test_a_message_comes_with_a_bell_each(store: Store, connection: Connection) -> None:
    run = await started(store, connection, priority=5)
    for _ in range(2):
        assert await go(operations.send(store, run.id, SIGNAL, "approval", '{"ok": true}'), connection) == Sent("sent")
    ring = ("durable.ring", None, 2_000_005, None, "shop", None, False)
    assert (await jobs(store, connection, run.id))[1:] == [ring, ring]
    inbox = await load_inbox(store, connection, run.id)
    assert [(m.kind, m.name, m.body, m.fresh) for m in inbox] == [("signal", "approval", '{"ok": true}', True)] * 2


async def test_the_same_message_id_is_once(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    query = operations.send(store, run.id, SIGNAL, "a", None, "m-1")
    assert await go(query, connection) == Sent("sent")
    assert await go(query, connection) == Sent("duplicate")
    assert len(await jobs(store, connection, run.id)) == 2
    other = await started(store, connection)
    assert await go(operations.send(store, other.id, SIGNAL, "a", None, "m-1"), connection) == Sent("sent")


async def finish(connection: Connection, run_id: uuid.UUID, status: str) -> None:
    await connection.execute("update durable.runs set status = 'running' where id = %s", [run_id])
    await connection.execute("update durable.runs set status = %s, finished_at = now() where id = %s", [status, run_id])


@pytest.mark.parametrize("status", ["completed", "failed", "canceled"])
async def test_an_ended_run_takes_nothing_but_a_rollback(store: Store, connection: Connection, status: str) -> None:
    run = await started(store, connection)
    await go(operations.send(store, run.id, SIGNAL, "a", None, "before"), connection)
    await finish(connection, run.id, status)
    for kind in MessageKind:
        expected = Sent("sent" if (status, kind) == ("completed", MessageKind.ROLLBACK) else "finished")
        assert await go(operations.send(store, run.id, kind), connection) == expected
    assert await go(operations.send(store, run.id, SIGNAL, "a", None, "before"), connection) == Sent("duplicate")
    assert await go(operations.send(store, run.id, SIGNAL, "a", None, "after"), connection) == Sent("finished")


async def test_an_unknown_run(store: Store, connection: Connection) -> None:
    nobody = uuid.uuid4()
    assert await go(operations.send(store, nobody, SIGNAL, "a"), connection) == Sent("unknown")
    assert await go(operations.resume(store, nobody, "a"), connection) == "unknown"
    assert await load_inbox(store, connection, nobody) == ()


async def test_a_message_never_waits_for_an_executing_step(
    store: Store, connection: Connection, rival: Connection
) -> None:
    run = await started(store, connection)
    async with rival.transaction():
        await read(store, rival, run.id)  # FOR UPDATE
        async with connection.transaction():  # lock_timeout is 200 ms here
            assert await go(operations.send(store, run.id, SIGNAL, "a"), connection) == Sent("sent")
            assert await go(operations.send(store, run.id, MessageKind.CANCEL), connection) == Sent("sent")


async def test_control_requests_and_claimed_runs_are_announced(
    store: Store, connection: Connection, rival: Connection
) -> None:
    await rival.execute(f"listen {store.control_channel}".encode())
    run = await started(store, connection)
    await go(operations.send(store, run.id, SIGNAL, "a"), connection)
    await go(operations.send(store, run.id, MessageKind.CANCEL), connection)
    await connection.execute(
        "update durable.runs set claim_worker = 1, claim_token = gen_random_uuid() where id = %s", [run.id]
    )
    async with connection.transaction():
        await go(operations.send(store, run.id, SIGNAL, "a"), connection)
    heard = [n.payload async for n in rival.notifies(timeout=20, stop_after=2)]
    assert heard == [str(run.id)] * 2
    assert [n async for n in rival.notifies(timeout=0)] == []
    await rival.execute("unlisten *")


# ---------------------------------------------------------------- resume


async def park(connection: Connection, run_id: uuid.UUID, frame: dict[str, Any], **more: Any) -> None:
    await connection.execute("update durable.runs set status = 'running' where id = %s", [run_id])
    claim = (1, uuid.uuid4()) if more.get("claim") else (None, None)
    await connection.execute(
        "update durable.runs set status = %s, waiting_for = 'signal', frame = %s::jsonb, claim_worker = %s, "
        "claim_token = %s where id = %s",
        [more.get("status", "suspended"), json.dumps(frame), *claim, run_id],
    )


WAIT = {"signoff": {"waits": "signal", "name": "approve"}, "build/api": {"waits": "resume", "name": "build/api"}}


async def test_resume_is_for_exactly_this_wait(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    assert await go(operations.resume(store, run.id, "approve"), connection) == "refused"  # waits for nothing yet
    await park(connection, run.id, WAIT)
    assert await go(operations.resume(store, run.id, "signoff"), connection) == "refused"
    assert await load_inbox(store, connection, run.id) == ()
    assert len(await jobs(store, connection, run.id)) == 1
    assert await go(operations.resume(store, run.id, "approve", '{"ok":1}'), connection) == "accepted"
    assert await go(operations.resume(store, run.id, "approve", '{"ok":2}'), connection) == "refused"  # has its answer
    assert await go(operations.resume(store, run.id, "build/api"), connection) == "accepted"
    inbox = await load_inbox(store, connection, run.id)
    assert [(m.kind, m.name, m.body) for m in inbox] == [
        ("signal", "approve", '{"ok":1}'),
        ("signal", "build/api", None),
    ]
    assert [job[0] for job in await jobs(store, connection, run.id)] == [
        "durable.advance",
        "durable.ring",
        "durable.ring",
    ]


@pytest.mark.parametrize(("left", "answer"), [("1 hour", "accepted"), ("-1 s", "refused")])
async def test_a_wait_whose_time_is_over_accepts_nothing(
    store: Store, connection: Connection, left: str, answer: str
) -> None:
    """Although nobody has applied its timeout yet: a message would come too late to be taken."""
    run = await started(store, connection)
    [(deadline,)] = await rows(connection, f"select to_json(now() + interval '{left}') #>> '{{}}'")
    await park(connection, run.id, {"a": {"waits": "signal", "name": "x", "deadline": deadline}})
    assert await go(operations.resume(store, run.id, "x"), connection) == answer


async def test_two_waits_for_one_name_take_two(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    await park(connection, run.id, {"a": {"waits": "signal", "name": "x"}, "b": {"waits": "signal", "name": "x"}})
    answers = [await go(operations.resume(store, run.id, "x"), connection) for _ in range(3)]
    assert answers == ["accepted", "accepted", "refused"]


@pytest.mark.parametrize(
    ("status", "claim", "answer"),
    [
        ("suspended", False, "accepted"),
        ("paused", False, "accepted"),
        ("running", True, "accepted"),
        ("running", False, "refused"),
    ],
)
async def test_resume_by_status(
    store: Store, connection: Connection, rival: Connection, status: str, claim: bool, answer: str
) -> None:
    run = await started(store, connection)
    await park(connection, run.id, WAIT, status=status, claim=claim)
    await rival.execute(f"listen {store.control_channel}".encode())
    assert await go(operations.resume(store, run.id, "approve"), connection) == answer
    if claim:
        assert [n.payload async for n in rival.notifies(timeout=20, stop_after=1)] == [str(run.id)]
    await rival.execute("unlisten *")


async def test_resume_of_a_busy_row_writes_nothing_and_leaves_the_transaction_usable(
    store: Store, connection: Connection, rival: Connection
) -> None:
    run = await started(store, connection)
    await park(connection, run.id, WAIT)
    async with rival.transaction():
        await read(store, rival, run.id)
        async with connection.transaction():
            assert await go(operations.resume(store, run.id, "approve"), connection) == "busy"
            assert await rows(connection, "show lock_timeout") == [("200ms",)]  # its own second is over
    assert await load_inbox(store, connection, run.id) == ()
    assert await go(operations.resume(store, run.id, "approve"), connection) == "accepted"


async def test_resume_reads_the_inbox_after_its_lock(module_dsn: str, store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    await park(connection, run.id, WAIT)
    with psycopg.connect(module_dsn) as holder, psycopg.connect(module_dsn) as mine, ThreadPoolExecutor() as threads:
        holder.execute("select 1 from durable.runs where id = %s for update", [run.id])
        operations.execute(operations.send(store, run.id, SIGNAL, "approve"), holder)
        waiting = threads.submit(operations.execute, operations.resume(store, run.id, "approve"), mine)
        wait_until_blocked(module_dsn, mine.info.backend_pid)
        holder.commit()
        assert waiting.result(20) == "refused"


# ---------------------------------------------------------------- on any connection


@pytest.fixture
def engine(module_dsn: str) -> Iterator[sa.Engine]:
    engine = migrate.engine(module_dsn)
    yield engine
    engine.dispose()


@pytest_asyncio.fixture
async def async_engine(module_dsn: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(
        "postgresql+psycopg://", async_creator=lambda: psycopg.AsyncConnection.connect(module_dsn)
    )
    yield engine
    await engine.dispose()


def there(module_dsn: str, run: Start) -> bool:
    with psycopg.connect(module_dsn) as other:
        return other.execute("select 1 from durable.runs where id = %s", [run.id]).fetchone() is not None


@pytest.mark.parametrize("commits", [True, False])
def test_sync_connections_live_and_die_with_the_callers_transaction(
    module_dsn: str, engine: sa.Engine, store: Store, commits: bool
) -> None:
    plain = psycopg.connect(module_dsn, row_factory=dict_row, cursor_factory=psycopg.RawCursor)
    cursor = plain.cursor()
    connection, session = engine.connect(), Session(engine)
    scoped = scoped_session(sessionmaker(engine))
    for given, owner in (
        (plain, plain),
        (cursor, plain),
        (connection, connection),
        (session, session),
        (scoped, scoped),
    ):
        run = new()
        assert operations.execute(operations.start(store, run), given) == Started(run.id, True, True)
        assert operations.execute(operations.send(store, run.id, SIGNAL, "a", "1"), given) == Sent("sent")
        assert operations.execute(operations.start_many(store, [new()]), given)[0].created
        assert not there(module_dsn, run)
        owner.commit() if commits else owner.rollback()
        assert there(module_dsn, run) is commits
    for thing in (plain, connection, session):
        thing.close()
    scoped.remove()


@pytest.mark.parametrize("commits", [True, False])
async def test_async_connections_live_and_die_with_the_callers_transaction(
    module_dsn: str, async_engine: AsyncEngine, store: Store, commits: bool
) -> None:
    plain = await psycopg.AsyncConnection.connect(module_dsn, row_factory=dict_row)
    connection, session = await async_engine.connect(), AsyncSession(async_engine)
    scoped = async_scoped_session(async_sessionmaker(async_engine), asyncio.current_task)
    for given, owner in (
        (plain, plain), (plain.cursor(), plain), (connection, connection), (session, session), (scoped, scoped),
    ):  # fmt: skip
        run = new()
        assert await go(operations.start(store, run), given) == Started(run.id, True, True)
        assert await go(operations.resume(store, run.id, "a", "1"), given) == "refused"
        assert not there(module_dsn, run)
        await (owner.commit() if commits else owner.rollback())
        assert there(module_dsn, run) is commits
    for thing in (plain, connection, session):
        await thing.close()
    await scoped.remove()


async def test_the_wrong_kind_of_connection(
    module_dsn: str, engine: sa.Engine, async_engine: AsyncEngine, store: Store
) -> None:
    query = operations.send(store, uuid.uuid4(), SIGNAL)
    async with await psycopg.AsyncConnection.connect(module_dsn) as plain, AsyncSession(async_engine) as session:
        for given in (plain, plain.cursor(), session):
            with pytest.raises(TypeError, match="use AsyncDurable"):
                operations.execute(query, given)
    with psycopg.connect(module_dsn) as connection, Session(engine) as sync_session, engine.connect() as sync:
        for other in (connection, connection.cursor(), sync_session, sync):
            with pytest.raises(TypeError, match="use Durable"):
                await go(query, other)
    for nonsense in (engine, "postgresql://", None):
        with pytest.raises(TypeError, match="connection of psycopg or SQLAlchemy"):
            operations.execute(query, nonsense)
        with pytest.raises(TypeError, match="connection of psycopg or SQLAlchemy"):
            await go(query, nonsense)


def test_sqlalchemys_wrapping_hides_no_meaning(engine: sa.Engine, store: Store) -> None:
    query = operations.start(store, new())
    with engine.connect() as connection, pytest.raises(PayloadError, match="tags"):
        operations.execute(operations.Query(query.sql, {**query.params, "tags": "1"}, query.read), connection)


async def test_an_odd_search_path_and_another_schema(dsn: str) -> None:
    migrate.upgrade(dsn, "other_place")
    store, default = Store(dsn, schema="other_place"), Store(dsn)
    async with await Connection.connect(dsn, autocommit=True) as odd:
        await odd.execute("create schema trap")
        await odd.execute("create table trap.runs (id int)")
        await odd.execute("create table trap.procrastinate_jobs (id int)")
        await odd.execute("create function trap.enqueue(text, uuid, bigint, text, int) returns void language sql as ''")
        await odd.execute("set search_path = trap, pg_catalog")
        run = await started(store, odd)
        assert await go(operations.send(store, run.id, MessageKind.CANCEL, None, '{"reason":null}'), odd) == Sent(
            "sent"
        )
        assert await go(operations.send(default, run.id, SIGNAL), odd) == Sent("unknown")
        assert await go(operations.resume(store, run.id, "a"), odd) == "refused"
        assert len(await go(operations.start_many(store, [new(), new()]), odd)) == 2
        await odd.execute("set search_path = ''")
        assert (await go(operations.start(store, new()), odd)).created
        assert [job[0] for job in await jobs(store, odd, run.id)] == ["durable.advance", "durable.ring"]
        assert (await odd.execute("show search_path")).pgresult is not None
