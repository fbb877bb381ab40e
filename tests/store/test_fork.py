"""fork_run: which entries a fork has, what it inherits, and what is refused."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from tests.store.kit import jobs, read, rows, started, transition

from durable.core.state import Begun, Ending, Entry, EntryKind, Failure, Run
from durable.define.payload import canonical_hash
from durable.store import operations
from durable.store.apply import apply
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.journal import load_journal
from durable.store.operations import Forked
from durable.values import Status

FAILURE = Failure("shop.CardDeclined", "no funds", "exhausted", "charge", 3)
STEP, BRANCH, ITERATION, CHOICE = EntryKind.STEP, EntryKind.BRANCH, EntryKind.ITERATION, EntryKind.CHOICE


def entry(step_id: str, kind: EntryKind = STEP, parent: str | None = None, **more: Any) -> Entry:
    return Entry(step_id, kind, more.pop("status", "completed"), json.dumps(step_id), parent=parent, **more)


FIRST = entry("first")
BUILD = (entry("build/ui", BRANCH, "build"), entry("build/api", BRANCH, "build"), entry("build", EntryKind.PARALLEL))
TARGET = (
    entry("choice:target", CHOICE, "target"),
    entry("target/cloud", BRANCH, "target"),
    entry("target", EntryKind.ROUTE),
)
POLL = (entry("poll[0]", ITERATION, "poll"), entry("poll[1]", ITERATION, "poll"), entry("poll", EntryKind.LOOP))
SHIP = entry("ship", attempt=2, extra={"child": "c"})
ALL = (FIRST, *BUILD, *TARGET, *POLL, SHIP)


async def passed(store: Store, connection: Connection, *entries: Entry, **after: Any) -> Run:
    """A run that has written these entries, in this order."""
    run = await started(store, connection, priority=7, tags={"tenant": "acme"}, key=f"k-{uuid.uuid4()}")
    return await write(store, connection, run, *entries, **{"status": Status.RUNNING, "current_step": 5, **after})


async def write(store: Store, connection: Connection, run: Run, *entries: Entry, **after: Any) -> Run:
    made = transition(run, after=after, entries=entries)
    async with connection.transaction():
        await apply(store, connection, made)
    return made.after


async def fork(
    store: Store, connection: Connection, origin: Run, step: str | None = None, input_: str | None = None
) -> tuple[Forked, uuid.UUID]:
    new = uuid.uuid4()
    return await operations.execute_async(operations.fork(store, origin.id, new, step, input_), connection), new


async def copied(store: Store, connection: Connection, origin: Run, step: str | None) -> tuple[list[str], int]:
    """The entries of a fork, in their order; and its cursor."""
    forked, new = await fork(store, connection, origin, step)
    assert forked == Forked("forked")
    journal = await load_journal(store, connection, new)
    assert all(copy.extra is not None and copy.extra["copied"] is True for copy in journal.values())
    return list(journal), (await read(store, connection, new)).current_step


def ids(*entries: Entry) -> list[str]:
    return [one.step_id for one in entries]


async def test_what_a_fork_inherits(store: Store, connection: Connection) -> None:
    origin = await passed(store, connection, *ALL)
    before = await rows(connection, "select r::text from durable.runs r where id = %s", origin.id)
    _, new = await fork(store, connection, origin, "ship")
    run = await read(store, connection, new)
    assert (run.workflow, run.version, run.queue, run.priority, run.tags, run.input) == (
        origin.workflow, origin.version, origin.queue, 7, {"tenant": "acme"}, origin.input
    )  # fmt: skip
    assert (run.status, run.revision, run.key, run.parent_id, run.deadline, run.started_at) == (
        Status.PENDING, 1, None, None, None, None
    )  # fmt: skip
    assert (run.chain, run.predecessor, run.successor) == (None, None, None)
    assert await rows(connection, "select seed, forked_from, root_id from durable.runs where id = %s", new) == [
        (origin.id, origin.id, new)
    ]
    assert await rows(connection, "select kind, data::text from durable.events where run_id = %s", new) == [
        ("created", f'{{"forked_from":"{origin.id}","from_step":"ship"}}')
    ]
    assert [job[:2] for job in await jobs(store, connection, new)] == [("durable.advance", 1)]
    assert await rows(connection, "select r::text from durable.runs r where id = %s", origin.id) == before


async def test_a_fork_of_a_fork_draws_the_same_random_numbers(store: Store, connection: Connection) -> None:
    origin = await passed(store, connection, FIRST)
    _, new = await fork(store, connection, origin)
    _, newer = await fork(store, connection, await read(store, connection, new))
    assert await rows(connection, "select seed, forked_from from durable.runs where id = %s", newer) == [
        (origin.id, new)
    ]


async def test_entries_are_copied_whole(store: Store, connection: Connection) -> None:
    origin = await passed(store, connection, SHIP, entry("last"))
    _, new = await fork(store, connection, origin, "last")
    was, copy = (await load_journal(store, connection, origin.id))["ship"], await load_journal(store, connection, new)
    made = copy["ship"]
    assert made.extra == {"child": "c", "copied": True}
    assert (made.kind, made.status, made.result, made.attempt, made.finished_at) == (
        was.kind, was.status, was.result, 2, was.finished_at
    )  # fmt: skip


@pytest.mark.parametrize(
    ("step", "expected", "cursor"),
    [
        (None, [], 0),
        ("first", [], 0),
        ("build", [FIRST], 1),
        ("build/api", [FIRST], 1),
        ("target", [FIRST, *BUILD], 2),
        ("choice:target", [FIRST, *BUILD], 2),
        ("target/cloud", [FIRST, *BUILD], 2),
        ("poll", [FIRST, *BUILD, *TARGET], 3),
        ("poll[1]", [FIRST, *BUILD, *TARGET], 3),
        ("poll[1]/charge", [FIRST, *BUILD, *TARGET], 3),
        ("ship", [FIRST, *BUILD, *TARGET, *POLL], 4),
    ],
)
async def test_up_to_the_top_level_step_around(
    store: Store, connection: Connection, step: str | None, expected: list[Entry], cursor: int
) -> None:
    origin = await passed(store, connection, *ALL)
    assert await copied(store, connection, origin, step) == (ids(*expected), cursor)


async def test_a_step_that_has_begun_and_has_no_entry_yet(store: Store, connection: Connection) -> None:
    origin = await passed(store, connection, FIRST, *BUILD, frame={"poll[0]": Begun(attempts=1), "nap": Begun()})
    assert await copied(store, connection, origin, "nap") == (ids(FIRST, *BUILD), 2)
    assert await copied(store, connection, origin, "poll") == (ids(FIRST, *BUILD), 2)


async def test_of_a_step_in_the_middle_nothing_is_copied(store: Store, connection: Connection) -> None:
    """One branch has finished, the other one waits."""
    origin = await passed(store, connection, FIRST, BUILD[0], frame={"build/api": Begun(attempts=1)})
    assert await copied(store, connection, origin, "build/api") == (ids(FIRST), 1)


async def test_what_a_body_has_caught_is_copied_too(store: Store, connection: Connection) -> None:
    """It went on after the failure, and would go elsewhere without it."""
    failed = Entry("charge", STEP, "failed", error=FAILURE)
    origin = await passed(
        store, connection, failed, entry("patch:v2", EntryKind.PATCH), entry("reply:1", EntryKind.REPLY), SHIP
    )
    assert await copied(store, connection, origin, "ship") == (["charge", "patch:v2", "reply:1"], 2)


async def test_a_suspended_step_is_not_copied(store: Store, connection: Connection) -> None:
    origin = await passed(store, connection, FIRST, entry("ask", status="suspended"), frame={"ask": Begun()})
    assert await copied(store, connection, origin, "ask") == (ids(FIRST), 1)


@pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELED, Status.COMPLETED])
async def test_of_a_run_that_has_ended(store: Store, connection: Connection, status: Status) -> None:
    failed = Entry("ship", STEP, "failed", error=FAILURE)
    now = (await rows(connection, "select durable.engine_now()"))[0][0]
    result = entry("run:result", EntryKind.RESULT)
    origin = await passed(store, connection, FIRST, failed, result, status=status, finished_at=now)
    assert await copied(store, connection, origin, "ship") == (ids(FIRST), 1)


async def test_another_input(store: Store, connection: Connection) -> None:
    origin = await passed(store, connection, FIRST, SHIP)
    _, new = await fork(store, connection, origin, "ship", '{"n": 2.50}')
    assert (await read(store, connection, new)).input == '{"n": 2.50}'
    hashes = "select input_hash from durable.runs where id = %s"
    assert await rows(connection, hashes, new) == [(canonical_hash('{"n": 2.5}'),)]
    _, same = await fork(store, connection, origin, "ship")
    assert await rows(connection, hashes, same) == await rows(connection, hashes, origin.id)


# ---------------------------------------------------------------- refused


async def nothing_written(connection: Connection, new: uuid.UUID) -> bool:
    counted = (
        "select (select count(*) from durable.runs where id = %s) + count(*) from durable.journal where run_id = %s"
    )
    return await rows(connection, counted, new, new) == [(0,)]


async def test_an_unknown_run(store: Store, connection: Connection) -> None:
    query = operations.fork(store, uuid.uuid4(), uuid.uuid4(), "ship")
    assert await operations.execute_async(query, connection) == Forked("unknown")


async def test_an_unknown_step_is_answered_with_those_there_are(store: Store, connection: Connection) -> None:
    result = entry("run:result", EntryKind.RESULT)
    frame = {"nap": Begun(), "undo:first": Begun(), "run:body": Begun()}
    origin = await passed(store, connection, *ALL, result, entry("patch:v2", EntryKind.PATCH), frame=frame)
    for step in ("shipping", "patch:v2", "run:result", "run:body", "undo:first", ""):
        forked, new = await fork(store, connection, origin, step)
        assert forked == Forked("no_step", ("first", "build", "target", "poll", "ship", "nap"))
        assert await nothing_written(connection, new)
    nothing = await started(store, connection)
    assert (await fork(store, connection, nothing, "ship"))[0] == Forked("no_step")


async def test_what_was_undone_can_not_be_built_on(store: Store, connection: Connection) -> None:
    now = (await rows(connection, "select durable.engine_now()"))[0][0]
    origin = await passed(store, connection, FIRST, entry("charge"), SHIP)
    origin = await write(store, connection, origin, status=Status.COMPENSATING, ending=Ending(Status.FAILED, FAILURE))
    undone = (entry("undo:charge", EntryKind.UNDO, status="failed", error=FAILURE), entry("undo:first", EntryKind.UNDO))
    await write(store, connection, origin, *undone, status=Status.FAILED, finished_at=now, error=FAILURE)
    forked, new = await fork(store, connection, origin, "ship")
    assert forked == Forked("undone", ("first", "charge"))
    assert await nothing_written(connection, new)
    assert (await fork(store, connection, origin, "charge"))[0] == Forked("undone", ("first",))
    assert await copied(store, connection, origin, "first") == ([], 0)


async def test_what_comes_after_a_rollback_can_not_be_built_on(store: Store, connection: Connection) -> None:
    origin = await passed(store, connection, FIRST, entry("rollback:1", EntryKind.ROLLBACK), SHIP)
    assert (await fork(store, connection, origin, "ship"))[0] == Forked("rolled_back")
    assert await copied(store, connection, origin, "first") == ([], 0)


# ---------------------------------------------------------------- the callers


async def test_it_waits_for_nobody_and_makes_nobody_wait(
    store: Store, connection: Connection, rival: Connection
) -> None:
    origin = await passed(store, connection, *ALL)
    async with rival.transaction():
        await read(store, rival, origin.id)  # holds the row
        async with connection.transaction():
            await fork(store, connection, origin, "ship")
            async with rival.transaction():
                await rival.execute(b"update durable.runs set revision = revision + 1 where id = %s", [origin.id])


async def test_it_commits_with_its_caller(store: Store, connection: Connection) -> None:
    origin = await passed(store, connection, *ALL)
    async with connection.transaction(force_rollback=True):
        _, new = await fork(store, connection, origin, "ship")
        assert (await read(store, connection, new)).current_step == 4
    assert await nothing_written(connection, new)
    assert await jobs(store, connection, new) == []


async def test_from_sql_without_a_hash(store: Store, connection: Connection) -> None:
    origin, new = await passed(store, connection, *ALL), uuid.uuid4()
    sql = "select answer from durable.fork_run(%s, %s, p_input => '7')"
    assert await rows(connection, sql, origin.id, new) == [("forked",)]
    assert await rows(connection, "select input_hash from durable.runs where id = %s", new) == [("",)]
