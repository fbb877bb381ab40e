"""What is told of a run's life may be told by its row or by events: both are held to the same, and to each other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tests import invariants
from tests.store.kit import lock, rows, started, transition

from durable.core.state import Ending, Failure, Run
from durable.core.transition import Transition
from durable.store.apply import apply
from durable.store.connection import Connection
from durable.store.db import Store
from durable.values import Status, WaitingFor

BOOM = Failure("Boom", "it broke")
EVENT = "insert into durable.events (run_id, kind, at) select id, '{kind}', {at} from durable.runs"


@pytest.fixture
def store(dsn: str) -> Store:
    return Store(dsn)


@pytest_asyncio.fixture
async def connection(store: Store) -> AsyncIterator[Connection]:
    async with store.open_pool(1) as pool, pool.connection() as connection:
        yield connection


async def live(store: Store, connection: Connection, *statuses: Status) -> Run:
    """A run that has come to these, one after the other."""
    run = await started(store, connection)
    for status in statuses:
        async with connection.transaction():
            locked = await lock(store, connection, run.id)
            assert locked is not None
            done = moved_to(*locked, status)
            await apply(store, connection, done)
            run = done.after
    return run


def moved_to(run: Run, now: Any, status: Status) -> Transition:
    after: dict[str, Any] = {"status": status, "finished_at": now if status.ended else None}
    if run.started_at is None and status not in (Status.PAUSED, Status.CANCELED):
        after["started_at"] = now
    after["waiting_for"] = WaitingFor.SLEEP if status is Status.SUSPENDED else None
    if status is Status.COMPENSATING:
        after["ending"] = Ending(Status.FAILED, BOOM)
    if status is Status.FAILED:
        after["error"] = BOOM
    if run.status is Status.FAILED:
        after["retries"] = run.retries + 1
    return transition(run, after=after)


S = Status


@pytest.mark.parametrize(
    "statuses",
    [
        (),
        (S.COMPLETED,),
        (S.RUNNING, S.COMPLETED),
        (S.SUSPENDED, S.RUNNING, S.SUSPENDED, S.RUNNING, S.COMPLETED),
        (S.PAUSED, S.RUNNING, S.COMPLETED),
        (S.CANCELED,),
        (S.PAUSED, S.CANCELED),
        (S.FAILED,),
        (S.RUNNING, S.FAILED, S.RUNNING, S.FAILED, S.RUNNING, S.COMPLETED),
        (S.RUNNING, S.COMPENSATING, S.FAILED),
        (S.RUNNING, S.COMPENSATING, S.RUNNING, S.COMPLETED),
    ],
)
async def test_lives(dsn: str, store: Store, connection: Connection, statuses: tuple[Status, ...]) -> None:
    await live(store, connection, *statuses)
    invariants.check(dsn, at_rest=False)
    kinds = {kind for (kind,) in await rows(connection, "select kind from durable.events")}
    assert not kinds & {"created", "started", "completed"}


async def test_a_life_with_an_event_for_everything(dsn: str, store: Store, connection: Connection) -> None:
    await live(store, connection, S.RUNNING, S.COMPLETED)
    for kind in ("created", "started", "completed"):
        at = "finished_at" if kind == "completed" else f"{kind}_at"
        await connection.execute(EVENT.format(kind=kind, at=at).encode())
    invariants.check(dsn, at_rest=False)


async def test_a_child_that_completed_and_is_rolled_back_by_its_parent(
    dsn: str, store: Store, connection: Connection
) -> None:
    """It has ended twice, and only the second end is in its row."""
    parent, child = await live(store, connection, S.RUNNING), await live(store, connection, S.RUNNING, S.COMPLETED)
    await connection.execute(
        b"update durable.runs set parent_id = %s, parent_step = 'a' where id = %s", [parent.id, child.id]
    )
    for status in (S.COMPENSATING, S.CANCELED):
        async with connection.transaction():
            locked = await lock(store, connection, child.id)
            assert locked is not None
            done = moved_to(*locked, status)
            done = transition(done.before, after=changed(done.after, Ending(S.CANCELED, answer_to="undo:a")))
            await apply(store, connection, done)
    invariants.check(dsn, at_rest=False)
    await connection.execute("delete from durable.events where kind = 'completed'")
    assert any("a run ended once" in line for line in invariants.violations(dsn, at_rest=False))


def changed(after: Run, ending: Ending) -> dict[str, Any]:
    return {"status": after.status, "finished_at": after.finished_at, "ending": ending}


@pytest.mark.parametrize(
    ("statuses", "broken", "told"),
    [
        ((S.COMPLETED,), EVENT.format(kind="failed", at="now()"), "the last event tells"),
        ((S.RUNNING,), EVENT.format(kind="completed", at="now()"), "the last event tells"),
        ((S.COMPLETED,), EVENT.format(kind="resumed", at="now()"), "each event may follow"),
        ((S.SUSPENDED,), EVENT.format(kind="resumed", at="now()"), "each event may follow"),
        ((S.RUNNING, S.FAILED), "delete from durable.events", "the last event tells"),
        ((S.RUNNING, S.FAILED), "delete from durable.events", "a run ended once"),
        ((S.RUNNING, S.PAUSED), "delete from durable.events", "the last event tells"),
        ((S.RUNNING, S.FAILED, S.RUNNING, S.COMPLETED), "update durable.runs set retries = 0", "a run ended once"),
        ((S.COMPLETED,), "update durable.runs set retries = 1", "a run ended once"),
        ((S.SUSPENDED,), "update durable.runs set started_at = null", "nothing happens to a run that was not started"),
        ((), EVENT.format(kind="started", at="now()"), "a run was started once, if at all"),
        ((S.SUSPENDED,), EVENT.format(kind="created", at="created_at"), "a run was created once"),
        ((S.SUSPENDED,), EVENT.format(kind="created", at="created_at"), "events are in the order of their times"),
        ((), EVENT.format(kind="canceled", at="created_at - interval '1 s'"), "events are in the order of their times"),
        ((), "update durable.runs set forked_from = id", "a run was created once"),
    ],
)
async def test_what_contradicts_is_found(
    dsn: str, store: Store, connection: Connection, statuses: tuple[Status, ...], broken: str, told: str
) -> None:
    await live(store, connection, *statuses)
    await connection.execute(broken.encode())
    assert any(told in line for line in invariants.violations(dsn, at_rest=False))


async def test_twice_is_once_too_often(dsn: str, store: Store, connection: Connection) -> None:
    await live(store, connection, S.RUNNING)
    for kind, told in (("created", "a run was created once"), ("started", "a run was started once")):
        for _ in range(2):
            await connection.execute(EVENT.format(kind=kind, at="started_at").encode())
        assert any(told in line for line in invariants.violations(dsn, at_rest=False))
        await connection.execute("delete from durable.events")
