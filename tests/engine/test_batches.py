"""Jobs are fetched and finished many at a time, by one statement: what it takes, what it leaves, and what it costs; and
the worker around it: what it has in hand, when it looks, and how it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from procrastinate import App
from procrastinate.jobs import Job
from tests.engine.kit import PATIENCE, Facts, an_app, soon, until, working

from durable import AsyncDurable, ConfigurationError, Start, define
from durable.store import sweep
from durable.store.connection import Connection
from durable.store.db import Store
from durable.worker import Worker, serving
from durable.worker.jobs import EXCHANGE, Connector, LastingJobManager, queue_app
from durable.worker.serving import LastingWorker

QUEUE = "durable"
INSERT = """
insert into durable.procrastinate_jobs (queue_name, task_name, priority, lock, scheduled_at)
values (%s, %s, %s, %s, now() + %s::float8 * interval '1 s') returning id
"""
JOBS = """
insert into durable.procrastinate_jobs (queue_name, task_name, priority, scheduled_at)
select 'durable', 'work', 0, {scheduled_at} from generate_series(1, {count})
"""
FILL = f"""
alter table durable.procrastinate_jobs disable trigger user;
{JOBS};
alter table durable.procrastinate_jobs enable trigger user
"""


@dataclass
class Work:
    """A task that ends when it is told to."""

    began: list[int] = field(default_factory=list)
    executing: int = 0
    most: int = 0
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, number: int = 0) -> None:
        self.began.append(number)
        self.executing += 1
        self.most = max(self.most, self.executing)
        await self.go_on.wait()
        self.executing -= 1


@dataclass
class Queue:
    """A queue with a task named `work`, and a worker's side of it."""

    app: App
    manager: LastingJobManager
    facts: Facts
    work: Work
    exchanges: list[tuple[list[int], int, list[int] | None]] = field(default_factory=list)

    def put(
        self,
        task: str = "work",
        *,
        queue: str = QUEUE,
        priority: int = 0,
        lock: str | None = None,
        later: float | None = None,
    ) -> int:
        return int(self.facts.value(INSERT, queue, task, priority, lock, later))

    def put_many(self, count: int) -> list[int]:
        return [self.put() for _ in range(count)]

    async def fetch(self, wanted: int) -> list[Job]:
        fetched = await self.manager.exchange([], wanted, [QUEUE])
        assert fetched is not None
        return fetched

    async def finish(self, *jobs: Job) -> None:
        assert await self.manager.exchange(jobs, 0, [QUEUE]) == []

    def worker(self, *, concurrency: int = 20, wait: bool = True, **options: Any) -> LastingWorker:
        return LastingWorker(self.app, queue=QUEUE, concurrency=concurrency, wait=wait, **options)

    @asynccontextmanager
    async def serving(self, **options: Any) -> AsyncIterator[LastingWorker]:
        """A worker in the background, which must end in order and leave nothing in hand."""
        worker = self.worker(**options)
        task = asyncio.create_task(worker.serve())
        try:
            yield worker
        finally:
            worker.end()
            self.work.go_on.set()
            await ended(task)
        assert worker.running == []

    async def serve_until_empty(self, **options: Any) -> None:
        await ended(asyncio.create_task(self.worker(wait=False, **options).serve()))

    def statuses(self) -> dict[int, str]:
        return {job["id"]: job["status"] for job in self.facts.jobs()}

    def in_hand(self) -> int:
        return list(self.statuses().values()).count("doing")


async def ended(serving: asyncio.Task[None]) -> None:
    """Await a worker's end. One that does not come is not asked twice: its worker would wait for it, too."""
    done, _ = await asyncio.wait({serving}, timeout=PATIENCE)
    assert done, "the worker does not end"
    serving.result()


@pytest.fixture
async def queue(dsn: str, facts: Facts, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Queue]:
    app = queue_app(Store(dsn))
    manager = app.job_manager
    assert isinstance(manager, LastingJobManager)
    async with app.open_async():
        await manager.register_worker()
        made = Queue(app, manager, facts, Work())
        app.task(name="work")(made.work.__call__)
        exchange = manager.exchange

        async def noted(
            performed: Collection[Job], wanted: int, queues: Iterable[str] | None = None
        ) -> list[Job] | None:
            fetched = await exchange(performed, wanted, queues)
            made.exchanges.append((ids(performed), wanted, None if fetched is None else ids(fetched)))
            return fetched

        monkeypatch.setattr(manager, "exchange", noted)
        yield made


def ids(jobs: Iterable[Job]) -> list[int]:
    return [job.id for job in jobs if job.id is not None]


# ---------------------------------------------------------------- what a fetch takes


async def test_the_most_urgent_are_fetched_in_order(queue: Queue) -> None:
    low, early, late, high = (queue.put(priority=priority) for priority in (-1, 0, 0, 1))
    assert ids(await queue.fetch(3)) == [high, early, late]
    assert queue.statuses() == {high: "doing", early: "doing", late: "doing", low: "todo"}
    assert {job["worker_id"] for job in queue.facts.jobs() if job["status"] == "doing"} == {queue.manager.worker}
    assert ids(await queue.fetch(3)) == [low]
    assert await queue.fetch(3) == []
    assert queue.facts.value("select count(*) from durable.procrastinate_events where type = 'started'") == 4


async def test_neither_another_queues_jobs_nor_what_is_scheduled_for_later(queue: Queue) -> None:
    queue.put(queue="other")
    queue.put(later=3600)
    due = queue.put(later=-1)
    assert ids(await queue.fetch(10)) == [due]


async def test_a_batch_is_what_procrastinate_would_fetch_one_by_one(queue: Queue) -> None:
    chance = random.Random(7)
    for count in range(1, 25):
        queue.facts.execute("delete from durable.procrastinate_jobs")
        for _ in range(30):
            queue.put(
                queue=chance.choice([QUEUE, QUEUE, "other"]),
                priority=chance.randrange(3),
                lock=chance.choice([None, None, "a", "b", "c"]),
                later=chance.choice([None, None, -5, 3600]),
            )
        with queue.facts.connection.transaction(force_rollback=True):
            call = "select id from durable.procrastinate_fetch_job_v2(array['durable'], %s)"
            one_by_one = [queue.facts.value(call, queue.manager.worker) for _ in range(count)]
        assert ids(await queue.fetch(count)) == [job for job in one_by_one if job is not None]


async def test_a_lock_lets_one_job_pass_at_a_time(queue: Queue) -> None:
    first, second = queue.put(lock="one"), queue.put(lock="one")
    (job,) = await queue.fetch(10)
    assert (job.id, await queue.fetch(10)) == (first, [])
    await queue.finish(job)
    assert ids(await queue.fetch(10)) == [second]


async def test_a_fetch_waits_for_nobody_and_takes_what_is_free(queue: Queue) -> None:
    waiting = queue.put_many(5)
    with psycopg.connect(queue.facts.dsn) as other:
        other.execute("select from durable.procrastinate_jobs where id = any (%s) for update", (waiting[:2],))
        assert ids(await soon(queue.fetch(2))) == waiting[2:4]
    assert ids(await queue.fetch(5)) == [*waiting[:2], waiting[4]]


async def test_two_workers_share_the_jobs(queue: Queue) -> None:
    waiting = queue.put_many(40)
    taken = await asyncio.gather(*(queue.fetch(10) for _ in range(4)))
    assert sorted(job for fetched in taken for job in ids(fetched)) == waiting


@pytest.mark.parametrize("statistics", [False, True], ids=["never analyzed", "analyzed"])
async def test_a_fetch_costs_the_same_however_many_jobs_wait(queue: Queue, statistics: bool) -> None:
    queue.facts.connection.execute(FILL.format(count=50_000, scheduled_at="null").encode())
    if statistics:
        queue.facts.execute("analyze durable.procrastinate_jobs")
    for _ in range(7):  # also as a prepared statement
        assert await rows_looked_at(queue, 20) < 500


async def test_a_plan_made_while_the_queue_was_empty_holds_for_many_jobs(queue: Queue) -> None:
    """As a worker has it that is idle when they come: after a vacuum the planner takes an empty table at its word."""
    queue.facts.connection.execute(JOBS.format(count=1_000, scheduled_at="null").encode())
    queue.facts.execute("delete from durable.procrastinate_jobs")
    queue.facts.execute("vacuum analyze durable.procrastinate_jobs")
    connector = queue.manager.connector
    assert isinstance(connector, Connector)
    connection = await connector.connect()
    await connection.execute(b"prepare exchange as " + EXCHANGE.numbered)
    doing = "array[]::bigint[]", "array[]::bigint[]"
    assert await looked_at(connection, doing, queue.manager.worker) == 0
    queue.facts.connection.execute(JOBS.format(count=2_000, scheduled_at="null").encode())
    performed = await queue.fetch(20)
    doing = f"array{ids(performed)}", f"array{[queue.manager.worker] * 20}"
    assert await looked_at(connection, doing, queue.manager.worker) < 500
    await connection.close()


async def looked_at(connection: Connection, doing: tuple[str, str], worker: int | None) -> float:
    """How many jobs the prepared statement reads that finishes these and fetches 20 others."""
    given = {
        "performed": doing[0],
        "performers": doing[1],
        "queues": f"array['{QUEUE}']",
        "wanted": "20",
        "worker": str(worker),
    }
    execute = f"execute exchange({', '.join(given[name] for name in EXCHANGE.names)})"
    cursor = await connection.execute(f"explain (analyze, format json) {execute}".encode())
    row = await cursor.fetchone()
    assert row is not None
    return rows_read(row[0][0]["Plan"])


async def test_what_is_scheduled_for_later_costs_only_what_comes_behind_it(queue: Queue) -> None:
    queue.facts.connection.execute(FILL.format(count=100_000, scheduled_at="now() + interval '1 h'").encode())
    for _ in range(40):
        queue.put(priority=1)
    assert await rows_looked_at(queue, 20) < 500
    queue.put_many(40)
    behind = await rows_looked_at(queue, 40)
    assert 100_000 <= behind < 101_000, "walked past once for a whole batch; procrastinate's own: once for each job"


async def rows_looked_at(queue: Queue, wanted: int) -> float:
    """How many jobs the fetch read, whether it took them or not; it takes them."""
    values = {"performed": [], "performers": [], "queues": [QUEUE], "wanted": wanted, "worker": queue.manager.worker}
    (row,) = await queue.manager.connector.execute_query_all_async(
        "explain (analyze, format json) " + EXCHANGE.decode(), **values
    )
    (plan,) = row.values()
    return rows_read((plan if isinstance(plan, list) else json.loads(plan))[0]["Plan"])


def rows_read(plan: dict[str, Any]) -> float:
    """How many jobs were read for that, whether they were wanted or not."""
    todo, read = [plan], 0.0
    while todo:
        node = todo.pop()
        todo += node.get("Plans", [])
        assert "Seq Scan" not in node["Node Type"]
        if node.get("Relation Name") == "procrastinate_jobs" and "Scan" in node["Node Type"]:
            removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Join Filter", 0)
            read += (node["Actual Rows"] + removed) * node["Actual Loops"]
    return read


# ---------------------------------------------------------------- what a finish deletes


async def test_finished_is_deleted_with_its_events_and_what_is_gone_is_no_error(queue: Queue) -> None:
    queue.put_many(3)
    first, second, third = await queue.fetch(3)
    queue.facts.execute("delete from durable.procrastinate_jobs where id = %s", first.id)
    await queue.finish(first, second)
    assert queue.statuses() == {third.id: "doing"}
    await queue.manager.done(third)
    assert queue.facts.value("select count(*) from durable.procrastinate_events") == 0


@pytest.mark.parametrize("hands", ["put back", "fetched by another"])
async def test_what_was_put_back_is_not_finished_by_who_had_it_before(queue: Queue, hands: str) -> None:
    queue.put()
    (job,) = await queue.fetch(1)
    queue.facts.execute("update durable.procrastinate_jobs set status = 'todo'")
    if hands == "fetched by another":
        await queue.manager.register_worker()
        await queue.fetch(1)
    await queue.finish(job)
    assert len(queue.facts.jobs()) == 1


async def test_a_worker_that_was_forgotten_finishes_what_it_had_and_goes_on(queue: Queue) -> None:
    queue.put()
    (job,) = await queue.fetch(1)
    forgotten = queue.manager.worker
    queue.facts.execute("delete from durable.procrastinate_workers")
    waiting = queue.put()
    assert await queue.manager.exchange([job], 1, [QUEUE]) is None, "the fetch is refused, the finish with it"
    assert queue.manager.worker != forgotten
    fetched = await queue.manager.exchange([job], 1, [QUEUE])
    assert fetched is not None
    assert ids(fetched) == [waiting]
    assert queue.statuses() == {waiting: "doing"}


async def test_a_finish_waits_for_nobody(queue: Queue) -> None:
    """Whoever has the row locked is recovery, which deletes it; if it does not, the job is a stray, and found."""
    queue.put_many(2)
    first, second = await queue.fetch(2)
    with psycopg.connect(queue.facts.dsn) as other:
        other.execute("select from durable.procrastinate_jobs where id = %s for update", (first.id,))
        await soon(queue.finish(first, second))
    assert list(queue.statuses()) == [first.id]


# ---------------------------------------------------------------- the worker


async def test_free_slots_are_filled_by_one_statement_and_never_more(queue: Queue) -> None:
    waiting = queue.put_many(8)
    async with queue.serving(concurrency=5):
        await until(lambda: queue.work.executing == 5)
        assert queue.in_hand() == 5
        assert queue.exchanges == [([], 5, waiting[:5])]
        queue.work.go_on.set()
        await until(lambda: queue.facts.jobs() == [])
    assert queue.work.most == 5


async def test_one_at_a_time_if_that_is_asked_for(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "POLLING", 3600.0)
    waiting = queue.put_many(4)
    async with queue.serving(concurrency=3, fetch_batch=1):
        await until(lambda: queue.work.executing == 3)
        assert queue.exchanges == [([], 1, [job]) for job in waiting[:3]]
        queue.work.go_on.set()
        await until(lambda: queue.facts.jobs() == [])


async def test_jobs_that_end_together_are_finished_together(queue: Queue) -> None:
    waiting = queue.put_many(20)
    async with queue.serving():
        await until(lambda: queue.work.executing == 20)
        queue.work.go_on.set()
        await until(lambda: queue.facts.jobs() == [])
    assert [performed for performed, _, _ in queue.exchanges if performed] == [waiting]


async def test_a_performed_job_is_in_hand_until_the_queue_knows(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recovery asks: what this worker has not in hand, and the queue counts as its, is put back."""
    job = queue.put()
    asked, answer = asyncio.Event(), asyncio.Event()
    exchange = queue.manager.exchange

    async def slow(performed: Collection[Job], wanted: int, queues: Iterable[str] | None = None) -> list[Job] | None:
        if performed:
            asked.set()
            await answer.wait()
        return await exchange(performed, wanted, queues)

    monkeypatch.setattr(queue.manager, "exchange", slow)
    async with queue.serving() as worker:
        await until(lambda: queue.work.executing)
        assert worker.running == [job]
        queue.work.go_on.set()
        await soon(asked.wait())
        assert worker.running == [job]
        answer.set()
        await until(lambda: queue.facts.jobs() == [])
        await until(lambda: worker.running == [])


async def test_a_sweep_leaves_what_waits_for_its_finish(dsn: str, facts: Facts, queue: Queue) -> None:
    async with working(dsn, define("w").step("a", lambda ctx: 1)) as bench:
        job = queue.put()
        await queue.fetch(1)
        async with bench.engine.pool.connection() as connection:
            worker, store = queue.manager.worker, bench.engine.store
            assert worker is not None
            seen: list[int] | None = None
            for in_hand in ([job], [job]):
                deleted, seen = await sweep.own_stray_jobs(store, connection, worker, in_hand, seen)
                assert (deleted, seen) == ([], [])


async def test_many_notifications_during_a_fetch_are_one_more_look(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()
    exchange = queue.manager.exchange

    async def slow(performed: Collection[Job], wanted: int, queues: Iterable[str] | None = None) -> list[Job] | None:
        asked.set()
        await answer.wait()
        return await exchange(performed, wanted, queues)

    monkeypatch.setattr(queue.manager, "exchange", slow)
    monkeypatch.setattr(serving, "POLLING", 3600.0)
    async with queue.serving(concurrency=2) as worker:
        await soon(asked.wait())
        for job in range(50):
            await worker._handle_notification(channel="any", notification={"type": "job_inserted", "job_id": job})
        answer.set()
        await until(lambda: len(queue.exchanges) == 2)
        await idle_loop()
        assert queue.exchanges == [([], 2, [])] * 2


async def test_jobs_that_end_while_there_is_plenty_to_do_share_a_statement(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "GATHERING", 3600.0)
    turns, spare = asyncio.Semaphore(0), serving.PLENTY
    queue.app.task(name="in turn")(turns.acquire)
    for _ in range(6):
        queue.put("in turn")
    async with queue.serving(spare=lambda: spare) as worker:
        await until(lambda: queue.in_hand() == 6)
        before = len(queue.exchanges)
        for number in (1, 2, 3):
            turns.release()
            await until(lambda: len(worker._performed) == number)  # noqa: B023 (awaited here)
        spare -= 1
        turns.release()
        await until(lambda: len(queue.statuses()) == 2)
        assert [len(performed) for performed, _, _ in queue.exchanges[before:] if performed] == [4]
        for _ in range(2):
            turns.release()


async def test_a_job_that_ends_does_not_wait_for_others_for_ever(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor if there was nothing to do at the look before: all slots were taken."""
    monkeypatch.setattr(serving, "POLLING", 3600.0)
    monkeypatch.setattr(serving, "GATHERING", 0.0)
    queue.put_many(2)
    one = asyncio.Event()
    queue.app.task(name="one")(one.wait)
    queue.put("one")
    async with queue.serving(concurrency=3, spare=lambda: serving.PLENTY):
        await until(lambda: queue.in_hand() == 3)
        one.set()
        await until(lambda: queue.in_hand() == 2)


async def test_a_nudge_is_a_look_at_once(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf(**_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(queue.manager, "listen_for_jobs", deaf)
    monkeypatch.setattr(serving, "POLLING", 3600.0)
    async with queue.serving() as worker:
        await until(lambda: queue.exchanges)
        queue.put()
        await idle_loop()
        assert queue.work.began == []
        worker.nudge()
        await until(lambda: queue.work.began)


async def test_a_notification_is_a_look_at_once(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "POLLING", 3600.0)
    async with queue.serving():
        await until(lambda: queue.facts.value(LISTENING))
        queue.put()
        await until(lambda: queue.work.began)


LISTENING = """
select count(*) from pg_stat_activity where datname = current_database()
and application_name = 'durable queue' and query ilike 'listen%%' and state = 'idle'
"""


async def idle_loop() -> None:
    """Until whatever could run on this loop has run, as far as it can without an answer from elsewhere."""
    for _ in range(100):
        await asyncio.sleep(0)


# ---------------------------------------------------------------- what a job may do


async def test_a_job_that_raises_is_said_once_and_finished(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ZeroDivisionError("nothing to divide by")

    queue.app.task(name="fail")(fail)
    queue.put("fail")
    await queue.serve_until_empty()
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)
    assert "fail[" in record.getMessage()
    assert queue.facts.jobs() == []


async def test_a_job_that_nobody_knows_is_said_once_and_finished(
    queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    queue.put("foreign")
    await queue.serve_until_empty()
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "foreign[" in record.getMessage()
    assert queue.facts.jobs() == []


async def test_a_request_to_abort_a_job_reaches_it(queue: Queue) -> None:
    job = queue.put()
    async with queue.serving():
        await until(lambda: queue.work.executing and queue.facts.value(LISTENING))
        queue.facts.execute("select durable.procrastinate_cancel_job_v1(%s, true, false)", job)
        await until(lambda: queue.facts.jobs() == [])
        assert not queue.work.go_on.is_set()


# ---------------------------------------------------------------- how it ends


async def test_at_the_end_everything_in_hand_is_performed_and_finished(queue: Queue) -> None:
    begun = queue.put_many(4)
    async with queue.serving(concurrency=4) as worker:
        await until(lambda: queue.work.executing == 4)
        left = queue.put()
        worker.end()
        queue.work.go_on.set()
    assert queue.statuses() == {left: "todo"}
    assert len(queue.work.began) == len(begun)


async def test_a_finish_that_fails_is_tried_again_at_the_end_too(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, tries = queue.manager.exchange, iter(range(100))

    async def failing(performed: Collection[Job], wanted: int, queues: Iterable[str] | None = None) -> list[Job] | None:
        return None if performed and next(tries) < 2 else await exchange(performed, wanted, queues)

    monkeypatch.setattr(queue.manager, "exchange", failing)
    queue.put()
    async with queue.serving() as worker:
        await until(lambda: queue.work.executing)
        worker.end()
        queue.work.go_on.set()
    assert queue.facts.jobs() == []


async def test_an_end_with_a_database_that_does_not_answer(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for ever: what it performed stays `doing`, and recovery deletes it."""
    exchange = queue.manager.exchange

    async def failing(performed: Collection[Job], wanted: int, queues: Iterable[str] | None = None) -> list[Job] | None:
        await asyncio.sleep(0)
        return None if performed else await exchange(performed, wanted, queues)

    monkeypatch.setattr(queue.manager, "exchange", failing)
    job = queue.put()
    worker = queue.worker()
    task = asyncio.create_task(worker.serve())
    await until(lambda: queue.work.executing)
    worker.end()
    queue.work.go_on.set()
    await ended(task)
    assert queue.statuses() == {job: "doing"}


async def test_without_waiting_it_ends_when_nothing_is_left(queue: Queue) -> None:
    """What jobs put into the queue while they execute is performed as well."""
    left = iter(range(30))

    async def put_another() -> None:
        if next(left, None) is not None:
            queue.put("more")

    queue.app.task(name="more")(put_another)
    await put_another()
    await queue.serve_until_empty(concurrency=2)
    assert queue.facts.jobs() == []
    assert next(left, None) is None


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("fetch_batch", [None, 1, 3])
async def test_whole_runs(dsn: str, facts: Facts, fetch_batch: int | None) -> None:
    async with an_app(dsn, define("w").step("a", lambda ctx: 1).sleep("s", 0).step("b", lambda ctx: 2)) as app:
        await app.start_many("w", [Start() for _ in range(60)])
        await soon(Worker(app, concurrency=8, fetch_batch=fetch_batch).run(until_idle=True))
        assert facts.value("select count(*) from durable.runs where status = 'completed'") == 60
        facts.check_rest()


async def test_a_worker_may_be_nudged_at_any_time(dsn: str, facts: Facts) -> None:
    async with an_app(dsn, define("w").step("a", lambda ctx: 1)) as app:
        worker = Worker(app)
        worker.nudge()
        await app.start("w")
        worker.nudge()
        await soon(worker.run(until_idle=True))
        worker.nudge()
        facts.check_rest()


async def test_what_is_no_batch(dsn: str) -> None:
    async with AsyncDurable(dsn) as app:
        with pytest.raises(ConfigurationError, match="fetch_batch is 0"):
            Worker(app, fetch_batch=0)
