"""Recovery's questions, asked of a real database. Two sweeps at once put a run back once, and neither waits."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from tests.store.kit import jobs, rows

from durable.store import sweep
from durable.store.connection import Connection
from durable.store.db import Pool, Store
from durable.store.flush import send

HERE = "database = (select oid from pg_database where datname = current_database())"


@pytest.fixture
def store(dsn: str) -> Store:
    return Store(dsn)


@pytest_asyncio.fixture
async def direct(dsn: str) -> AsyncIterator[Connection]:
    """The connection that a worker holds its lock on."""
    async with await Connection.connect(dsn, autocommit=True) as connection:
        yield connection


async def put(connection: Connection, status: str = "suspended", **columns: Any) -> uuid.UUID:
    """A run in any state, without a job."""
    id_ = columns.pop("id", None) or uuid.uuid4()
    ended = status in ("completed", "failed", "canceled")
    given = {
        "id": id_,
        "workflow": "order",
        "version": "1",
        "status": status,
        "input": "{}",
        "input_hash": "",
        "queue": "shop",
        "root_id": columns.get("root_id", id_),
        "waiting_for": "sleep" if status == "suspended" else None,
        "ending": '{"status": "failed"}' if status == "compensating" else None,
    } | columns
    times = {"created_at": "now()"} | ({"finished_at": "now()"} if ended and "finished_at" not in columns else {})
    if "due" in given:
        times["wake_at"] = f"durable.engine_now() + interval '{given.pop('due')}'"
    if "ended" in given:
        times["finished_at"] = f"durable.engine_now() - interval '{given.pop('ended')}'"
    names = [*given, *times]
    values = [*("%s" for _ in given), *times.values()]
    statement = f"insert into durable.runs ({', '.join(names)}) values ({', '.join(values)})"
    await connection.execute(statement.encode(), list(given.values()))
    return uuid.UUID(str(id_))


async def message(connection: Connection, run_id: uuid.UUID, age: str = "2 s", kind: str = "signal") -> None:
    await connection.execute(
        b"insert into durable.inbox (run_id, kind, name, sent_at) values (%s, %s, 'go', "
        b"durable.engine_now() - %s::interval)",
        [run_id, kind, age],
    )


async def enqueue(connection: Connection, run_id: uuid.UUID, revision: int | None = 0, task: str = "advance") -> int:
    await connection.execute(b"select durable.enqueue(%s, %s, %s, 'shop', 0)", [f"durable.{task}", run_id, revision])
    return int((await rows(connection, "select max(id) from durable.procrastinate_jobs"))[0][0])


async def doing(connection: Connection, job: int, queue_worker: int | None) -> None:
    await connection.execute(
        b"update durable.procrastinate_jobs set status = 'doing', worker_id = %s where id = %s", [queue_worker, job]
    )


async def queue_worker(connection: Connection, heartbeat: str = "0 s") -> int:
    made = await rows(
        connection,
        "insert into durable.procrastinate_workers (last_heartbeat) values (now() - %s::interval) returning id",
        heartbeat,
    )
    return int(made[0][0])


async def dead_worker(store: Store, dsn: str) -> int:
    """A worker that was here, and whose connection is gone."""
    async with await Connection.connect(dsn, autocommit=True) as connection:
        return await sweep.register_worker(store, connection, "shop", "there", 1)


# ---------------------------------------------------------------- one look at all of it

ME = 4712
ANSWERS = ("due", "crashed", "unread", "known", "alone", "deliveries", "waiting", "stray_claims", "stray_jobs", "news")


async def found(store: Store, connection: Connection, **watcher: Any) -> dict[str, Any]:
    """What a look finds there to do, but for what nobody has to do."""
    await connection.execute(
        b"insert into durable.workers (id, queue, host, pid, started_at) overriding system value "
        b"values (%s, 'shop', 'here', 7, now()) on conflict do nothing",
        [ME],
    )
    await connection.execute(b"select pg_advisory_lock(hashtext('durable'), %s)", [ME])
    try:
        seen = await sweep.look(store, connection, sweep.Watcher(ME, "shop", **watcher))
    finally:
        await connection.execute(b"select pg_advisory_unlock(hashtext('durable'), %s)", [ME])
    answers = {name: getattr(seen, name) for name in ANSWERS}
    return {name: answer for name, answer in answers.items() if answer}


async def test_a_look_finds_nothing_in_what_is_parked_or_has_ended(store: Store, connection: Connection) -> None:
    await put(connection, "completed")
    await put(connection, due="1 hour")
    await put(connection, "paused", due="-1 hour")
    read = await put(connection, waiting_for="signal")
    await message(connection, read, age="0 s")
    await message(connection, await put(connection, "completed"), age="0 s")
    await put(connection, waiting_for="definition", waiting_name="gone@1")
    assert await found(store, connection, executing=[uuid.uuid4()], jobs=[1], known=[("order", "1")]) == {}
    (row,) = await rows(
        connection,
        "select wake_at, durable.engine_now() from durable.runs where status = 'suspended' and wake_at is not null",
    )
    seen = await sweep.look(store, connection, sweep.Watcher(ME, "shop"))
    assert seen.next_wake == row[0]
    assert seen.now >= row[1]
    assert seen.last is None


async def test_a_look_finds_what_is_due(store: Store, connection: Connection) -> None:
    run = await put(connection, due="-1 s")
    assert await found(store, connection) == {"due": True}
    await enqueue(connection, run)
    assert await found(store, connection) == {"waiting": True}, "it has its continuation"


async def test_a_look_finds_what_the_dead_left(store: Store, dsn: str, connection: Connection) -> None:
    worker = await dead_worker(store, dsn)
    await gone(store, connection, worker)
    assert await found(store, connection) == {"crashed": True}
    await sweep.forget_workers(store, connection, [worker])
    assert await found(store, connection) == {}
    run = await put(connection, "running", claim_worker=worker, claim_token=uuid.uuid4())
    assert await found(store, connection) == {"crashed": True}, "a claim of nobody"
    await connection.execute(b"update durable.runs set claim_worker = %s", [ME])
    assert await found(store, connection, executing=[run]) == {}
    job = await enqueue(connection, run)
    for queue_worker_, answer in (
        (await queue_worker(connection), {}),
        (await queue_worker(connection, "31 s"), {"crashed": True}),
        (None, {"crashed": True}),
    ):
        await doing(connection, job, queue_worker_)
        assert await found(store, connection, executing=[run]) == answer


async def test_a_look_finds_strays_of_the_watcher(store: Store, connection: Connection) -> None:
    mine = await queue_worker(connection)
    known, stray = [await put(connection, "running", claim_worker=ME, claim_token=uuid.uuid4()) for _ in range(2)]
    jobs_ = [await enqueue(connection, run) for run in (known, stray)]
    for job in jobs_:
        await doing(connection, job, mine)
    answers = await found(store, connection, queue_worker=mine, executing=[known], jobs=jobs_[:1])
    assert answers == {"stray_claims": [stray], "stray_jobs": jobs_[1:]}
    assert await found(store, connection, executing=[known, stray]) == {}, "the queue does not know it yet"


async def test_a_look_finds_messages_that_nobody_read(store: Store, connection: Connection) -> None:
    run = await put(connection, waiting_for="signal")
    await message(connection, run)
    assert await found(store, connection) == {"unread": True}
    assert await found(store, connection, executing=[run, uuid.uuid4()]) == {"unread": True, "news": [run]}
    await enqueue(connection, run, None, "ring")
    assert await found(store, connection) == {"waiting": True}, "a doorbell waits"
    await connection.execute(b"delete from durable.procrastinate_jobs; delete from durable.inbox")
    await message(connection, await put(connection, "completed"))
    assert await found(store, connection) == {"unread": True}, "it is to be settled"
    await sweep.settle_unread(store, connection)
    await message(connection, uuid.uuid4())
    assert await found(store, connection) == {"unread": True}, "of no run"


async def test_a_look_finds_runs_that_wait_for_a_definition_of_the_watcher(
    store: Store, connection: Connection
) -> None:
    await put(connection, waiting_for="definition", waiting_name="order@1")
    assert await found(store, connection, known=[("order", "1"), ("else", "1")]) == {"known": True}
    assert await found(store, connection, known=[("order", "2")]) == {}


async def test_a_look_goes_through_the_runnable_runs_by_page(store: Store, connection: Connection) -> None:
    ids = sorted([await put(connection, "running") for _ in range(5)])
    await enqueue(connection, ids[0])
    await connection.execute(b"update durable.runs set claim_worker = %s, claim_token = id where id = %s", [ME, ids[1]])
    await doing(connection, await enqueue(connection, ids[2]), await queue_worker(connection))
    me = sweep.Watcher(ME, "shop")
    seen = await sweep.look(store, connection, me, limit=3)
    assert (seen.alone, seen.last) == (False, ids[2]), "a job waits; it is claimed; a job is executed"
    seen = await sweep.look(store, connection, me, seen.last, limit=3)
    assert (seen.alone, seen.last) == (True, None)
    seen = await sweep.look(store, connection, me, ids[-1], limit=3)
    assert (seen.alone, seen.last) == (False, None)


async def test_a_look_finds_deliveries_that_are_due_for_its_hooks(store: Store, connection: Connection) -> None:
    await connection.execute(
        b"insert into durable.deliveries (run_id, queue, kind, body, due) "
        b"values (%s, 'shop', 'status', '{}', durable.engine_now())",
        [uuid.uuid4()],
    )
    assert await found(store, connection, kinds=["status"]) == {"deliveries": True}
    assert await found(store, connection, kinds=["error"]) == await found(store, connection) == {}
    await connection.execute(b"update durable.deliveries set due = due + interval '1 minute'")
    assert await found(store, connection, kinds=["status"]) == {}


async def test_a_look_finds_jobs_that_can_be_fetched_from_its_queue(store: Store, connection: Connection) -> None:
    job = await enqueue(connection, uuid.uuid4())
    assert await found(store, connection) == {"waiting": True}
    later = b"update durable.procrastinate_jobs set scheduled_at = now() + %s::interval where id = %s"
    await connection.execute(later, ["1 minute", job])
    assert await found(store, connection) == {}
    await connection.execute(later, ["-1 second", job])
    assert await found(store, connection) == {"waiting": True}
    await connection.execute(b"update durable.procrastinate_jobs set queue_name = 'another'")
    assert await found(store, connection) == {}


async def test_a_look_waits_for_no_lock_and_takes_none(store: Store, connection: Connection, rival: Connection) -> None:
    await put(connection, due="-1 s")
    await put(connection, "running")
    await rival.execute(b"begin")
    await rival.execute(b"select from durable.runs for update")
    assert await found(store, connection) == {"due": True, "alone": True}, "who acts on it passes by what is held"
    await rival.execute(b"rollback")
    await connection.execute(b"begin")
    await sweep.look(store, connection, sweep.Watcher(ME, "shop"))
    assert await rows(rival, "select count(*) from (select from durable.runs for update skip locked) free") == [(2,)]
    held = "select count(*) from pg_locks where pid = %s and (locktype in ('tuple', 'advisory') or mode <> %s)"
    mine = connection.info.backend_pid
    assert await rows(rival, f"{held} and locktype <> 'virtualxid'", mine, "AccessShareLock") == [(0,)]
    await connection.execute(b"rollback")


# ---------------------------------------------------------------- workers


async def test_a_worker_lives_as_long_as_its_connection(
    store: Store, connection: Connection, direct: Connection
) -> None:
    worker = await sweep.register_worker(store, direct, "shop", "here", 7)
    assert await sweep.dead_workers(store, connection) == []
    assert await sweep.workers_alive(store, connection, "shop") == 1
    assert await sweep.workers_alive(store, connection, "another") == 0

    await direct.close()
    await gone(store, connection, worker)
    assert await sweep.workers_alive(store, connection, "shop") == 0


async def gone(store: Store, connection: Connection, worker: int) -> None:
    """Until the server has noticed that the worker's connection is closed."""
    async with asyncio.timeout(20):
        while worker not in await sweep.dead_workers(store, connection):
            pass


async def test_a_worker_registers_and_locks_at_once(store: Store, connection: Connection, direct: Connection) -> None:
    await direct.execute("begin")
    worker = await sweep.register_worker(store, direct, "shop", "here", 7)
    assert await sweep.dead_workers(store, connection) == []
    await direct.execute("commit")
    assert await sweep.dead_workers(store, connection) == []
    assert await rows(connection, "select id from durable.workers") == [(worker,)]


async def test_the_class_of_the_lock_is_that_of_the_schema(
    store: Store, connection: Connection, direct: Connection
) -> None:
    worker = await sweep.register_worker(store, direct, "shop", "here", 7)
    ours = f"select classid::bigint, objid::bigint from pg_locks where locktype = 'advisory' and {HERE}"
    assert await rows(connection, ours) == await rows(
        connection, "select hashtext('durable')::oid::bigint, %s::bigint", worker
    )


@pytest.mark.parametrize("schema", ["durable", "a", "b", "c", "d", "e"])
async def test_the_lock_is_found_whatever_the_sign_of_the_hash(connection: Connection, schema: str) -> None:
    await connection.execute(b"select pg_advisory_lock(hashtext(%s), 5)", [schema])
    found = await rows(connection, sweep._LIVE.replace("%(schema)s", "%s"), schema)
    assert found == [(5,)]
    await connection.execute(b"select pg_advisory_unlock_all()")


async def test_a_worker_locks_anew_after_its_connection_was_lost(
    store: Store, dsn: str, connection: Connection, direct: Connection
) -> None:
    worker = await dead_worker(store, dsn)
    await gone(store, connection, worker)
    assert await sweep.lock_worker(store, direct, worker)
    assert await sweep.dead_workers(store, connection) == []
    assert not await sweep.lock_worker(store, connection, worker)


async def test_a_forgotten_worker_cannot_lock_anew(
    store: Store, dsn: str, connection: Connection, direct: Connection
) -> None:
    worker = await dead_worker(store, dsn)
    await gone(store, connection, worker)
    assert await sweep.forget_workers(store, connection, [worker]) == [worker]
    assert not await sweep.lock_worker(store, direct, worker)
    assert await rows(connection, f"select from pg_locks where locktype = 'advisory' and {HERE}") == []


async def test_a_worker_unregisters(store: Store, connection: Connection, direct: Connection) -> None:
    worker = await sweep.register_worker(store, direct, "shop", "here", 7)
    assert await sweep.registered(store, connection, worker)
    await sweep.unregister_worker(store, direct, worker)
    assert not await sweep.registered(store, connection, worker)
    assert await rows(connection, "select from durable.workers") == []
    assert await rows(connection, f"select from pg_locks where locktype = 'advisory' and {HERE}") == []


async def test_a_live_worker_is_not_forgotten(store: Store, connection: Connection, direct: Connection) -> None:
    worker = await sweep.register_worker(store, direct, "shop", "here", 7)
    assert await sweep.forget_workers(store, connection, [worker]) == []
    assert await sweep.forget_workers(store, connection, []) == []


async def test_a_dead_worker_is_forgotten_once_it_owns_nothing(store: Store, dsn: str, connection: Connection) -> None:
    worker, other = await dead_worker(store, dsn), await queue_worker(connection)
    await sweep.set_queue_worker(store, connection, worker, other)
    await gone(store, connection, worker)
    run = await put(connection, "running", claim_worker=worker, claim_token=uuid.uuid4())
    job = await enqueue(connection, run)
    await doing(connection, job, other)

    assert await sweep.forget_workers(store, connection, [worker]) == []
    await connection.execute(b"update durable.runs set claim_worker = null, claim_token = null")
    assert await sweep.forget_workers(store, connection, [worker]) == []
    assert await sweep.delete_jobs(store, connection, [job]) == [job]
    assert await sweep.forget_workers(store, connection, [worker]) == [worker]
    assert await rows(connection, "select from durable.procrastinate_workers") == []


# ---------------------------------------------------------------- what dead workers held


async def test_claims_of_the_dead_and_of_the_unknown(
    store: Store, dsn: str, connection: Connection, direct: Connection
) -> None:
    alive, dead = await sweep.register_worker(store, direct, "shop", "here", 7), await dead_worker(store, dsn)
    await gone(store, connection, dead)

    async def claimed(worker: int) -> uuid.UUID:
        return await put(connection, "running", claim_worker=worker, claim_token=uuid.uuid4())

    await claimed(alive)
    of_dead, of_unknown = await claimed(dead), await claimed(4711)
    await put(connection, "running")
    assert await sweep.claims_of(store, connection, [dead]) == sorted([of_dead, of_unknown])
    assert await sweep.claims_of(store, connection, []) == [of_unknown]


async def test_jobs_of_the_dead(store: Store, dsn: str, connection: Connection, direct: Connection) -> None:
    alive, dead = await sweep.register_worker(store, direct, "shop", "here", 7), await dead_worker(store, dsn)
    queue_workers = {
        "of the live": await queue_worker(connection, "1 hour"),  # its heartbeat may hang: its lock says that it lives
        "of the dead": await queue_worker(connection),
        "unknown, fresh": await queue_worker(connection),
        "unknown, stale": await queue_worker(connection, "31 s"),
        "none": None,
    }
    await sweep.set_queue_worker(store, connection, alive, queue_workers["of the live"])
    await sweep.set_queue_worker(store, connection, dead, queue_workers["of the dead"])
    runs = {name: await put(connection, "running") for name in queue_workers}
    for name, run in runs.items():
        await doing(connection, await enqueue(connection, run), queue_workers[name])
    await enqueue(connection, await put(connection, "running"))

    found = await sweep.doing_jobs_of(store, connection, [dead])
    expected = {runs[name] for name in ("of the dead", "unknown, stale", "none")}
    assert {job.run_id for job in found} == expected
    assert {job.task for job in found} == {"durable.advance"}
    assert found[0].args == {"run_id": str(found[0].run_id), "revision": 0}

    assert await sweep.delete_jobs(store, connection, [job.id for job in found]) == [job.id for job in found]
    assert await sweep.doing_jobs_of(store, connection, [dead]) == []


async def test_only_one_sweep_deletes_a_dead_job(store: Store, connection: Connection, rival: Connection) -> None:
    job = await enqueue(connection, await put(connection, "running"))
    assert await sweep.delete_jobs(store, connection, [job]) == []  # it waits, nobody had it
    await doing(connection, job, None)
    async with connection.transaction():
        assert await sweep.delete_jobs(store, connection, [job]) == [job]
        assert await sweep.delete_jobs(store, rival, [job]) == []  # and did not wait
    assert await sweep.delete_jobs(store, rival, [job]) == []


async def test_stray_jobs_of_a_live_worker(store: Store, connection: Connection) -> None:
    me, other = await queue_worker(connection), await queue_worker(connection)
    mine = [await enqueue(connection, await put(connection, "running")) for _ in range(3)]
    for job in mine:
        await doing(connection, job, me)
    await doing(connection, await enqueue(connection, await put(connection, "running")), other)

    assert await sweep.own_stray_jobs(store, connection, me, mine[:1], seen=()) == ([], mine[1:])
    assert await sweep.own_stray_jobs(store, connection, me, mine[:1], seen=mine[2:]) == (mine[2:], mine[1:2])
    assert await sweep.own_stray_jobs(store, connection, me, mine[:1]) == (mine[1:2], [])
    assert await sweep.own_doing_jobs(store, connection, me) == mine[:1]


# ---------------------------------------------------------------- timers


async def test_what_is_due(store: Store, connection: Connection) -> None:
    first = await put(connection, due="-2 s")
    undoing = await put(connection, "compensating", due="-1 s", waiting_for="retry", revision=3, priority=5)
    delayed = await put(connection, "pending", due="-0.5 s", waiting_for="start")
    await put(connection, due="1 hour")
    await put(connection, "paused", due="-1 s")
    await put(connection, "running", due="-1 s")
    await put(connection, "pending", due="-1 s", claim_worker=1, claim_token=uuid.uuid4())
    has_job = await put(connection, due="-1 s", revision=4)
    await enqueue(connection, has_job, 4)
    has_stale_job = await put(connection, due="-0.2 s", revision=4)
    await enqueue(connection, has_stale_job, 3)

    assert await sweep.enqueue_due(store, connection, 3) == 3
    enqueued = [len(await jobs(store, connection, run)) for run in (first, undoing, delayed, has_stale_job)]
    assert enqueued == [1, 1, 1, 1], "the longest due first: the last has only the job that it had"
    assert await sweep.enqueue_due(store, connection) == 1
    assert await sweep.enqueue_due(store, connection) == 0
    assert [job[:2] for job in await jobs(store, connection, first)] == [("durable.advance", 0)]
    assert [job[:3] for job in await jobs(store, connection, undoing)] == [("durable.compensate", 3, 1_000_005)]


async def test_time_is_the_engines(store: Store, connection: Connection) -> None:
    await put(connection, due="1 hour")
    assert await sweep.enqueue_due(store, connection) == 0
    ((now, due),) = await rows(connection, "select durable.engine_now(), min(wake_at) from durable.runs")
    wake = await sweep.next_wake(store, connection, now)
    assert wake == due
    await connection.execute(b"update durable.clock set ahead = '2 hours'")
    assert await sweep.next_wake(store, connection, due) is None
    assert await sweep.enqueue_due(store, connection) == 1


async def test_two_sweeps_share_what_is_due(store: Store, connection: Connection, rival: Connection) -> None:
    runs = [await put(connection, due=f"-{9 - i} s") for i in range(4)]
    async with connection.transaction():
        assert await sweep.enqueue_due(store, connection, 2) == 2
        assert await sweep.enqueue_due(store, rival) == 2  # the others, without waiting
    for run in runs:
        assert len(await jobs(store, connection, run)) == 1


async def test_many_sweeps_at_once_enqueue_once(store: Store, connection: Connection, pool: Pool) -> None:
    for _ in range(200):
        await put(connection, due="-1 s")

    async def one() -> None:
        async with pool.connection() as mine:
            while await sweep.enqueue_due(store, mine, 7):
                pass

    await asyncio.gather(*(one() for _ in range(5)))
    counted = await rows(
        connection, "select count(*), count(distinct args ->> 'run_id') from durable.procrastinate_jobs"
    )
    assert counted == [(200, 200)]


async def test_a_held_run_is_left_alone(store: Store, connection: Connection, rival: Connection) -> None:
    run = await put(connection, due="-1 s")
    async with rival.transaction():
        await rival.execute(b"select from durable.runs where id = %s for update", [run])
        assert await sweep.enqueue_due(store, connection) == 0
    assert await sweep.enqueue_due(store, connection) == 1


# ---------------------------------------------------------------- messages that nobody read


async def test_what_is_unread(store: Store, connection: Connection, rival: Connection) -> None:
    late, held, rung, fresh, ended = [await put(connection) for _ in range(4)] + [await put(connection, "failed")]
    for run in (late, held, rung, ended):
        await message(connection, run)
    await message(connection, late)
    await message(connection, fresh, "0.5 s")
    await message(connection, uuid.uuid4())  # to nobody
    await enqueue(connection, rung, None, "ring")
    async with rival.transaction():
        await rival.execute(b"select from durable.runs where id = %s for update", [held])
        assert await sweep.unread(store, connection) == [late]

    assert sorted(await sweep.unread(store, connection)) == sorted([late, held])
    assert len(await sweep.unread(store, connection, 1)) == 1
    assert await sweep.unread_of(store, connection, [late, rung, uuid.uuid4()]) == {late, rung}
    assert await sweep.unread_of(store, connection, []) == set()

    assert await sweep.ring(store, connection, late)
    assert await sweep.ring(store, connection, late)
    assert not await sweep.ring(store, connection, uuid.uuid4())
    assert [job[0] for job in await jobs(store, connection, late)] == ["durable.ring"]
    assert await sweep.unread(store, connection) == [held]


async def test_busy_runs_do_not_hide_free_ones(store: Store, connection: Connection, rival: Connection) -> None:
    runs = [await put(connection) for _ in range(6)]
    for run in runs:
        await message(connection, run)
    async with rival.transaction():
        await rival.execute(b"select from durable.runs where id <> %s for update", [runs[3]])
        assert await sweep.unread(store, connection, 1) == [runs[3]]


async def test_a_ring_of_the_sweep_can_be_fetched_at_once(store: Store, connection: Connection) -> None:
    run = await put(connection)
    await sweep.ring(store, connection, run)
    assert await rows(connection, "select (durable.procrastinate_fetch_job_v2(null, null)).args ->> 'run_id'") == [
        (str(run),)
    ]


@pytest.mark.parametrize(
    ("status", "kind", "heard"),
    [
        ("failed", "signal", False),
        ("canceled", "child", False),
        ("completed", "cancel", False),
        ("completed", "rollback", True),
        ("running", "signal", True),
        ("paused", "signal", True),
    ],
)
async def test_what_reaches_an_ended_run(
    store: Store, connection: Connection, status: str, kind: str, heard: bool
) -> None:
    run = await put(connection, status)
    await message(connection, run, kind=kind)
    await message(connection, run, "0.1 s", kind=kind)
    assert await sweep.unread(store, connection) == [run] * heard
    assert await sweep.settle_unread(store, connection) == (0 if heard else 1)
    states = await rows(connection, "select state from durable.inbox order by sent_at")
    assert states == [("new" if heard else "seen",), ("new",)]


async def test_messages_to_nobody_are_settled(store: Store, connection: Connection) -> None:
    await message(connection, uuid.uuid4())
    assert await sweep.settle_unread(store, connection) == 1
    assert await sweep.settle_unread(store, connection) == 0


# ---------------------------------------------------------------- runs without a job


async def test_what_looks_orphaned(
    store: Store, dsn: str, connection: Connection, direct: Connection, rival: Connection
) -> None:
    alive, dead = await sweep.register_worker(store, direct, "shop", "here", 7), await dead_worker(store, dsn)
    await gone(store, connection, dead)
    live_queue, dead_queue = await queue_worker(connection), await queue_worker(connection)
    await sweep.set_queue_worker(store, connection, alive, live_queue)
    await sweep.set_queue_worker(store, connection, dead, dead_queue)

    lost = await put(connection, "running", revision=5)
    lost_undo = await put(connection, "compensating")
    lost_start = await put(connection, "pending")
    stale = await put(connection, "running", revision=5)
    await enqueue(connection, stale, 4)
    of_dead = await put(connection, "running")
    await doing(connection, await enqueue(connection, of_dead), dead_queue)
    at_work = await put(connection, "running")
    await doing(connection, await enqueue(connection, at_work), live_queue)
    unregistered = await put(connection, "running")
    await doing(connection, await enqueue(connection, unregistered), await queue_worker(connection))
    await enqueue(connection, await put(connection, "running"))
    await put(connection, "running", claim_worker=alive, claim_token=uuid.uuid4())
    await put(connection)
    await put(connection, "paused")
    await put(connection, "completed")
    await put(connection, "pending", waiting_for="start")
    held = await put(connection, "running")

    async with rival.transaction():
        await rival.execute(b"select from durable.runs where id = %s for update", [held])
        found, behind = await sweep.orphans(store, connection)
    expected = {lost: 5, lost_undo: 0, lost_start: 0, stale: 5}  # of_dead is the takeover's, which charges the crash
    assert (dict(found), behind) == (expected, None)
    await connection.execute(b"select from durable.runs for update nowait")  # no lock was kept

    assert not await sweep.adopt(store, connection, lost, 4)
    assert not await sweep.has_job(store, connection, lost, 5)
    assert await sweep.adopt(store, connection, lost, 5)
    assert await sweep.has_job(store, connection, lost, 5)
    assert not await sweep.adopt(store, connection, lost, 5)
    assert await sweep.adopt(store, connection, lost_undo, 0)
    assert [job[:2] for job in await jobs(store, connection, lost)] == [("durable.advance", 5)]
    assert [job[:2] for job in await jobs(store, connection, lost_undo)] == [("durable.compensate", 0)]
    assert lost not in dict((await sweep.orphans(store, connection))[0])


async def test_the_walk_goes_page_by_page(store: Store, connection: Connection) -> None:
    runs = sorted([await put(connection, "running") for _ in range(7)])
    for run in runs[:3]:  # a page without an orphan is no end
        await enqueue(connection, run)
    found, looks, after = [], 0, None
    while looks == 0 or after is not None:
        page, after = await sweep.orphans(store, connection, after, 3)
        found += [run for run, _ in page]
        looks += 1
    assert (found, looks) == (runs[3:], 3)
    assert await sweep.orphans(store, connection, runs[-1], 3) == ([], None)


async def test_an_orphan_is_adopted_once(store: Store, connection: Connection, rival: Connection) -> None:
    run = await put(connection, "running")
    async with connection.transaction():
        assert await sweep.adopt(store, connection, run, 0)
        assert not await sweep.adopt(store, rival, run, 0)  # and did not wait
    assert not await sweep.adopt(store, rival, run, 0)
    assert len(await jobs(store, connection, run)) == 1


async def test_after_the_queue_was_emptied_everything_is_found(store: Store, connection: Connection) -> None:
    runs = [await put(connection, status) for status in ("pending", "running", "compensating")]
    for run in runs:
        await enqueue(connection, run)
    assert (await sweep.orphans(store, connection))[0] == []
    await connection.execute(b"delete from durable.procrastinate_jobs")
    assert {run for run, _ in (await sweep.orphans(store, connection))[0]} == set(runs)


# ---------------------------------------------------------------- unknown definitions


async def test_runs_that_wait_for_a_definition(store: Store, connection: Connection, rival: Connection) -> None:
    async def waiting(name: str, status: str = "suspended", **more: Any) -> uuid.UUID:
        return await put(connection, status, waiting_for="definition", waiting_name=name, **more)

    own = await waiting("order@2")
    child = await waiting("order@")
    undoing = await waiting("order@2", "compensating", revision=2)
    others = [await waiting("order@3"), await waiting("orders@"), await waiting("order@2", "paused")]
    known = [("order", "1"), ("order", "2")]
    assert sweep.missing_name("order", None) == "order@"
    assert sweep.missing_name("order", "2") == "order@2"
    assert {run.id for run in await sweep.waiting_for_definition(store, connection, known)} == {own, child, undoing}
    assert await sweep.waiting_for_definition(store, connection, []) == []

    async with connection.transaction():
        assert await sweep.enqueue_known(store, connection, known, 2) == 2
        assert await sweep.enqueue_known(store, rival, known) == 1
    assert await sweep.enqueue_known(store, connection, known) == 0
    assert await sweep.waiting_for_definition(store, connection, known) == []
    assert [job[:2] for job in await jobs(store, connection, undoing)] == [("durable.compensate", 2)]
    for other in others:
        assert await jobs(store, connection, other) == []


# ---------------------------------------------------------------- who waits for an end


async def tell(store: Store, connection: Connection, run: uuid.UUID) -> None:
    await send(connection, store.sql.tell, {"run": run, "channel": store.ended_channel})


async def test_waiters_are_told_once(store: Store, connection: Connection, direct: Connection) -> None:
    run, waiters = uuid.uuid4(), sorted([uuid.uuid4(), uuid.uuid4()])
    await direct.execute(b"listen " + store.ended_channel.encode())
    await tell(store, connection, uuid.uuid4())
    for waiter in (*waiters, waiters[0]):
        await sweep.register_waiter(store, connection, run, waiter)
    waiting = "select waiter from durable.waiters order by waiter"
    assert [waiter for (waiter,) in await rows(connection, waiting)] == waiters
    for ended in (run, uuid.uuid4(), run):
        await tell(store, connection, ended)
    assert await rows(connection, waiting) == []
    told = [notice.payload async for notice in direct.notifies(timeout=0.5)]
    assert told == [str(run)]


async def test_stale_waiters_are_dropped(store: Store, connection: Connection) -> None:
    await sweep.register_waiter(store, connection, uuid.uuid4(), uuid.uuid4())
    assert await sweep.drop_stale_waiters(store, connection) == 0
    await connection.execute(b"update durable.waiters set registered_at = now() - interval '61 minutes'")
    assert await sweep.drop_stale_waiters(store, connection) == 1


# ---------------------------------------------------------------- purge

WITH_RUN = ("journal", "inbox", "attempts", "events", "waiters")


async def furnish(connection: Connection, run: uuid.UUID) -> None:
    """A row in every table that belongs to runs."""
    for table, columns, values in (
        ("journal", "step_id, seq, kind, status, finished_at", "'a', 1, 'step', 'completed', now()"),
        ("inbox", "kind, state, sent_at", "'signal', 'taken', now()"),
        ("attempts", "step_id, attempt, kind, finished_at", "'a', 1, 'failed', now()"),
        ("events", "kind, at", "'created', now()"),
        ("waiters", "waiter, registered_at", "gen_random_uuid(), now()"),
    ):
        statement = f"insert into durable.{table} (run_id, {columns}) values (%s, {values})".encode()
        await connection.execute(statement, [run])


async def left(connection: Connection) -> set[uuid.UUID]:
    return {row[0] for row in await rows(connection, "select id from durable.runs")}


async def test_whole_trees_are_purged(store: Store, connection: Connection) -> None:
    old = await put(connection, "completed", ended="31 days")
    child = await put(connection, "canceled", root_id=old, parent_id=old, ended="1 hour")
    grandchild = await put(connection, "failed", root_id=old, parent_id=child, ended="40 days")
    young = await put(connection, "completed", ended="29 days")
    alive = await put(connection, "completed", ended="90 days")
    still_runs = await put(connection, "running", root_id=alive, parent_id=alive)
    root_runs = await put(connection, "running")
    done_below = await put(connection, "completed", root_id=root_runs, parent_id=root_runs, ended="90 days")
    kept = {young, alive, still_runs, root_runs, done_below}
    for run in (old, child, grandchild, *kept):
        await furnish(connection, run)

    assert await sweep.purge(store, connection, timedelta(days=30)) == 3
    assert await left(connection) == kept
    for table in WITH_RUN:
        found = await rows(connection, f"select distinct run_id from durable.{table}")
        assert {row[0] for row in found} == kept
    assert await sweep.purge(store, connection, timedelta(days=30)) == 0


async def test_purge_goes_in_batches_the_oldest_first(store: Store, connection: Connection) -> None:
    runs = [await put(connection, "completed", ended=f"{40 - i} days") for i in range(5)]
    assert await sweep.purge(store, connection, timedelta(days=30), 2) == 2
    assert await left(connection) == set(runs[2:])
    assert await sweep.purge(store, connection, timedelta(days=30), 2) == 2
    assert await sweep.purge(store, connection, timedelta(days=30), 2) == 1


async def test_a_tree_in_which_somebody_is_at_work_stays_whole(
    store: Store, connection: Connection, rival: Connection
) -> None:
    root = await put(connection, "completed", ended="31 days")
    child = await put(connection, "completed", root_id=root, parent_id=root, ended="31 days")
    other = await put(connection, "completed", ended="31 days")
    async with rival.transaction():
        await rival.execute(b"select from durable.runs where id = %s for update", [child])
        assert await sweep.purge(store, connection, timedelta(days=30)) == 1  # the other one, without waiting
    assert await left(connection) == {root, child}
    assert other not in await left(connection)


async def test_two_purges_at_once(store: Store, connection: Connection, rival: Connection) -> None:
    for _ in range(4):
        await put(connection, "completed", ended="31 days")
    async with connection.transaction():
        assert await sweep.purge(store, connection, timedelta(days=30), 3) == 3
        assert await sweep.purge(store, rival, timedelta(days=30), 3) == 1
    assert await left(connection) == set()
