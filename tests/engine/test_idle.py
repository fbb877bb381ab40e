"""What a worker costs that has nothing to do: one statement a tick, however many runs are parked. And that each thing
that a tick finds is done, and what cannot be done is tried once a tick, no more."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import psycopg
import pytest
from tests.engine.kit import Bench, Facts, an_app, until, working

from durable import StatusChange, define
from durable.engine import loops as module
from durable.engine import recover
from durable.engine.hold import take
from durable.engine.loops import Loops
from durable.engine.points import Point
from durable.store.flush import Flush

WAITS: Final = define("waits").wait_for_signal("s", "go")
NEVER: Final = 100_000.0
LOOK: Final = "-- what there is to do: nothing is locked, nothing is changed"
PUT_BACK: Final = "-- give them their continuations"
OF_THE_OTHERS: Final = {
    "select 1",  # liveness
    "-- finish jobs that were performed, and fetch others",
    "",  # procrastinate's pool looks whether a connection is alive, before the heartbeat
    "SELECT procrastinate_update_heartbeat_v1(%(worker_id)s)",
}

LOCKS: Final = (
    "select count(*) from pg_locks where locktype = 'advisory' "
    "and database = (select oid from pg_database where datname = current_database())"
)
PARKED: Final = """
insert into durable.runs (
  id, workflow, version, status, input, input_hash, queue, root_id, waiting_for, waiting_name, wake_at, created_at
)
select
  id, 'waits', '1', case when i %% 5 = 0 then 'paused' else 'suspended' end, '{}', '', 'durable', id, waiting_for,
  case waiting_for when 'definition' then 'unknown@1' when 'signal' then 'go' end,
  case when waiting_for in ('sleep', 'retry') then now() + interval '1 hour' end, now()
from (
  select gen_random_uuid() as id, i,
    (array['signal', 'sleep', 'retry', 'child', 'definition', 'start'])[i %% 6 + 1] as waiting_for
  from generate_series(1, %s) i
) made
"""


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first line of each statement that this process has sent to a server."""
    found: list[str] = []
    execute, add = psycopg.AsyncCursor.execute, Flush.add

    async def recorded(cursor: Any, query: Any, *args: Any, **more: Any) -> Any:
        text = query.decode() if isinstance(query, bytes) else str(query)
        found.append(text.strip().splitlines()[0])
        return await execute(cursor, query, *args, **more)

    def queued(flush: Flush, statement: Any, *args: Any) -> Any:
        found.append(statement.decode().splitlines()[0])
        return add(flush, statement, *args)

    monkeypatch.setattr(psycopg.AsyncCursor, "execute", recorded)
    monkeypatch.setattr(Flush, "add", queued)
    return found


class Clockwork:
    """The loops of a bench, which tick when they are told to."""

    def __init__(self, b: Bench) -> None:
        self.jobs_in_hand: list[int] = []
        self.loops = Loops(b.engine, b.session.liveness, lambda: (b.manager.worker, self.jobs_in_hand))

    async def tick(self) -> None:
        """One look, and the end of all that it has set off beside the timers."""
        await self.loops.tick()
        assert self.loops._recovering is not None
        await self.loops._recovering
        await asyncio.gather(*self.loops._taken_up.values())


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may call others dead as soon as it holds its lock, and ticks only when it is told to."""
    monkeypatch.setattr(recover, "STOOD", 0.0)
    monkeypatch.setattr(recover, "LOOK_AGAIN", 0.0)
    monkeypatch.setattr(module, "TICK", NEVER)


@asynccontextmanager
async def clockwork(b: Bench) -> AsyncIterator[Clockwork]:
    made = Clockwork(b)
    made.loops.start()
    try:
        yield made
    finally:
        await made.loops.stop()


# ---------------------------------------------------------------- nothing to do


@pytest.mark.parametrize("parked", [0, 10_000])
async def test_a_tick_of_an_idle_worker_is_one_statement(dsn: str, facts: Facts, said: list[str], parked: int) -> None:
    async with working(dsn, WAITS) as b, clockwork(b) as clock:
        await b.app.start("waits")
        await b.drain()
        facts.execute(PARKED, parked)
        await clock.tick()
        said.clear()
        for _ in range(5):
            await clock.tick()
        assert said == [LOOK] * 5


async def test_an_idle_worker_says_nothing_but_its_looks(
    dsn: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TICK", 0.001)
    async with an_app(dsn, WAITS) as app, app.worker():
        await until(lambda: set(said[-100:]) - OF_THE_OTHERS == {LOOK}, "it has begun, and opened its connections")
        said.clear()
        await until(lambda: said.count(LOOK) >= 100, "it looks")
        told = set(said)
    assert told - OF_THE_OTHERS == {LOOK}


# ---------------------------------------------------------------- something to do


async def test_a_tick_puts_a_lost_job_back(dsn: str, facts: Facts) -> None:
    async with working(dsn, WAITS) as b, clockwork(b) as clock:
        run = await b.app.start("waits")
        facts.execute("delete from durable.procrastinate_jobs")
        await clock.tick()
        assert facts.tasks(run) == ["durable.advance"]


async def test_a_tick_rings_for_a_message_whose_doorbell_got_lost(dsn: str, facts: Facts) -> None:
    async with working(dsn, WAITS) as b, clockwork(b) as clock:
        run = await b.app.start("waits")
        await b.drain()
        await run.signal("go", 1)
        facts.execute("delete from durable.procrastinate_jobs")
        await b.skip(seconds=2)
        await clock.tick()
        assert facts.tasks(run) == ["durable.ring"]


async def test_a_tick_rings_the_timers(dsn: str, facts: Facts) -> None:
    async with working(dsn, define("w").sleep("s", 1_000)) as b, clockwork(b) as clock:
        run = await b.app.start("w")
        await b.drain()
        await clock.tick()
        assert facts.tasks(run) == []
        await b.skip(seconds=2_000)
        await clock.tick()
        await until(lambda: facts.tasks(run) == ["durable.advance"], "it is due")


async def test_a_timer_that_another_process_set_gets_an_alarm(dsn: str, facts: Facts) -> None:
    async with working(dsn, WAITS) as b, clockwork(b) as clock:
        run = await b.app.start("waits", delay=0.3)
        await clock.tick()
        assert facts.tasks(run) == []
        await until(lambda: facts.tasks(run) == ["durable.advance"], "it is due, without another tick")


async def test_what_falls_due_while_others_are_put_back_is_not_passed_by(
    dsn: str, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back = recover.put_back_due

    async def slowly(desk: Any) -> int:
        count = await put_back(desk)
        facts.execute("update durable.runs set wake_at = durable.engine_now() where id = %s", late.id)
        monkeypatch.setattr(recover, "put_back_due", put_back)
        return count

    async with working(dsn, WAITS) as b, clockwork(b) as clock:
        late = await b.app.start("waits", delay=1_000)
        run = await b.app.start("waits", delay=0.3)
        await clock.tick()
        monkeypatch.setattr(recover, "put_back_due", slowly)
        await until(lambda: facts.tasks(run) == ["durable.advance"], "it is due")
        await until(lambda: facts.tasks(late) == ["durable.advance"], "it was due a moment later, without another tick")


@pytest.mark.parametrize("news", [False, True])
async def test_what_falls_due_while_its_row_is_held_is_not_passed_by(dsn: str, facts: Facts, news: bool) -> None:
    """Who puts back what is due does not wait for rows; who held one sets the alarm again."""
    async with working(dsn, define("w").sleep("s", 1_000)) as b, clockwork(b):
        run = await b.app.start("w")
        await b.drain()
        if news:
            await run.signal("unasked", 1)
            facts.execute("delete from durable.procrastinate_jobs")

        def time_passes() -> None:
            facts.execute("update durable.clock set ahead = '2000 s'")
            b.engine.heard(facts.value("select durable.engine_now()"))

        b.points.on(Point.AFTER_LOCK if news else Point.BEFORE_LOCK, time_passes)
        await b.deliver(run)
        await until(lambda: facts.tasks(run) == ["durable.advance"], "it is due, without a tick")


async def test_what_was_due_when_there_was_nothing_to_do_is_left_to_the_next_look(dsn: str) -> None:
    """Else a run for which there is nothing to do though it is due would be taken up without a pause."""
    second = timedelta(seconds=1)
    async with working(dsn, define("w").sleep("s", 1_000)) as b:
        run = await b.app.start("w")
        await b.drain()
        await b.skip(seconds=2_000)
        hold = await take(b.engine, run.id)
        assert hold is not None
        due = hold.view.run.wake_at
        assert due is not None
        await hold.discard()
        b.engine.alarms = asyncio.Queue()
        b.engine.left(hold.view.run, due + second)
        assert b.engine.alarms.empty()
        b.engine.left(hold.view.run, due - second)
        assert b.engine.alarms.get_nowait() == due


async def test_a_tick_takes_over_from_the_dead(dsn: str, facts: Facts) -> None:
    began = asyncio.Event()

    async def hangs(ctx: Any) -> None:
        began.set()
        await asyncio.Event().wait()

    flow = define("w").step("a", hangs, transactional=False)
    async with working(dsn, flow) as dead, working(dsn, flow) as b, clockwork(b) as clock:
        run = await dead.app.start("w")
        await dead.start_jobs()
        await began.wait()
        await clock.tick()
        assert facts.attempts(run) == []
        await dead.crash()
        await until(lambda: facts.value(LOCKS) == 1, "the server has noticed")
        await clock.tick()
        assert facts.attempts(run) == [("a", "interrupted", 1)]
        await clock.tick()
        assert facts.value("select count(*) from durable.workers") == 1, "it is forgotten"


async def test_stray_jobs_end_at_the_second_tick_that_finds_them(dsn: str, facts: Facts) -> None:
    async with working(dsn, WAITS) as b, clockwork(b) as clock:
        await b.app.start("waits")
        job = await b.fetch()
        assert job is not None
        assert job.id is not None
        clock.jobs_in_hand = [job.id]
        for _ in range(3):
            await clock.tick()
        clock.jobs_in_hand = []
        await clock.tick()
        assert len(facts.jobs()) == 1, "it might have been fetched this moment"
        await clock.tick()
        assert [job["id"] for job in facts.jobs() if job["status"] == "doing"] == []


async def test_a_stray_claim_is_ended(dsn: str, facts: Facts) -> None:
    async with working(dsn, WAITS) as b, clockwork(b) as clock:
        run = await b.app.start("waits")
        facts.execute("delete from durable.procrastinate_jobs")
        taken = "update durable.runs set status = 'running', claim_worker = %s, claim_token = id"
        facts.execute(taken, b.engine.worker)
        await clock.tick()
        assert facts.run(run)["claim_token"] is None


async def test_a_tick_takes_up_what_waited_for_a_definition(dsn: str, facts: Facts) -> None:
    async with an_app(dsn, WAITS) as app, working(dsn, define("other").step("a", lambda ctx: 1)) as ignorant:
        run = await app.start("waits")
        await ignorant.drain()
        assert facts.run(run)["waiting_for"] == "definition"
    async with working(dsn, WAITS) as b, clockwork(b) as clock:
        await clock.tick()
        await until(lambda: facts.run(run)["waiting_for"] == "signal", "it is taken up")


async def test_a_tick_wakes_the_hooks(dsn: str, facts: Facts) -> None:
    told: list[StatusChange] = []
    async with working(dsn, WAITS) as b, clockwork(b) as clock:
        b.app.on_status_change(told.append)
        run = await b.app.start("waits")
        deliver = "insert into durable.deliveries (run_id, queue, kind, body, due) values (%s, %s, 'status', %s, now())"
        body = {"workflow": "waits", "version": "1", "key": None, "at": "2020-01-01T00:00:00+00:00", "error": None}
        body |= {"before": "pending", "status": "running", "reason": None}
        facts.execute(deliver, run.id, b.app.queue, json.dumps(body))
        await clock.tick()
        await until(lambda: facts.value("select count(*) from durable.deliveries") == 0, "it is told")
        assert [change.status for change in told] == ["running"]


# ---------------------------------------------------------------- what cannot be done now


async def test_what_is_held_is_tried_once_a_tick(dsn: str, facts: Facts, said: list[str]) -> None:
    """A due timer and a lost job, of runs whose rows somebody holds for long."""
    flow = define("w").sleep("s", 1_000)
    async with working(dsn, flow, WAITS) as b, clockwork(b) as clock:
        due, lost = await b.app.start("w"), await b.app.start("waits")
        await b.drain()
        facts.execute("update durable.runs set waiting_for = null, status = 'running' where id = %s", lost.id)
        await b.skip(seconds=2_000)
        with psycopg.connect(dsn) as holder:
            holder.execute("select from durable.runs for update")
            said.clear()
            for tick in range(1, 11):
                await clock.tick()
                await until(lambda tick=tick: said.count("-- when the next one is due") == tick)  # type: ignore[misc]
            counts = Counter(said)
            assert counts.pop(LOOK) == 10
            assert counts.pop(PUT_BACK) == counts.pop("-- when the next one is due") == 10
            (orphans,) = counts.values()
            assert orphans == 10
        await clock.tick()
        await until(lambda: facts.tasks(due) == facts.tasks(lost) == ["durable.advance"], "they are free")


async def test_jobs_that_can_be_fetched_are_announced_once_a_tick(dsn: str) -> None:
    async with working(dsn, WAITS) as b, clockwork(b) as clock:
        fetches: list[None] = []
        b.engine.fetch = lambda: fetches.append(None)
        await clock.tick()
        assert len(fetches) == 0
        await b.app.start("waits")
        for _ in range(3):
            await clock.tick()
        assert len(fetches) == 3
