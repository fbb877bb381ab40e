"""Writing a transition: all of it, once, or nothing."""

from __future__ import annotations

import asyncio
import json
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from tests.store.kit import jobs, lock, moved, read, rows, started, transition, wait_until_blocked

from durable import migrate
from durable.core.state import Begun, Claim, Ending, Entry, EntryKind, Failure, MessageKind, Run
from durable.core.transition import ChildStart, Event, FailedAttempt, Next, Outgoing, Transition
from durable.store import operations
from durable.store.apply import Applied, apply, apply_and_commit, apply_and_relock, check_move, lifecycle
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.errors import InboxNews, InternalError, JournalConflict, RowBusy, StaleRevision
from durable.store.flush import send
from durable.store.inbox import load_inbox
from durable.store.journal import load_journal
from durable.store.runs import abandon, begin_and_lock, let_go
from durable.values import MOVES, Status, WaitingFor, child_id

T0 = datetime(2026, 1, 1, tzinfo=UTC)
RUNNING = {"status": Status.RUNNING, "started_at": T0}
CHARGE = Entry("charge", EntryKind.STEP, "completed", '{"paid": 1.50}', started_at=T0, finished_at=T0)
BOOM = Failure("Boom", "it broke", traceback="...", details={"n": [1, "x"]})


async def write(store: Store, connection: Connection, done: Transition, **more: Any) -> Applied:
    await connection.execute("begin")
    try:
        applied = await apply(store, connection, done, **more)
    except BaseException:
        await abandon(connection)
        raise
    await connection.execute("commit")
    return applied


async def running(store: Store, connection: Connection, **more: Any) -> Run:
    run = await started(store, connection, **more)
    done = transition(run, after=RUNNING)
    await write(store, connection, done)
    return done.after


async def events(connection: Connection, run: Run) -> list[tuple[Any, ...]]:
    """But for the run's creation."""
    return await rows(
        connection,
        "select kind, step_id, data from durable.events where run_id = %s and kind <> 'created' order by seq",
        run.id,
    )


async def test_every_column_comes_back(store: Store, connection: Connection) -> None:
    run = await running(store, connection, tags={"a": 1}, timeout=timedelta(hours=1))
    frame = {
        "wait": Begun(
            waits=WaitingFor.SIGNAL, name="x", since=T0, deadline=T0, child=uuid.uuid4(), resume_data='{"a": 1}'
        ),
        "receive": Begun(waits=WaitingFor.SIGNAL, names=("x", "y")),
        "receive#2": Begun(waits=WaitingFor.SIGNAL, names=()),
        "build/api": Begun(attempts=2, crashes=1, due=T0, running=True),
    }
    claimed = moved(
        run, frame=frame, claim=Claim(3, uuid.uuid4()), pausing=True, current_step=2, retries=1, cleanup=True
    )
    await write(store, connection, Transition(run, claimed))
    assert await read(store, connection, run.id) == claimed
    parked = moved(
        claimed, claim=None, status=Status.SUSPENDED, waiting_for=WaitingFor.SIGNAL, waiting_name="x", wake_at=T0,
        deadline=None,
    )  # fmt: skip
    await write(store, connection, Transition(claimed, parked))
    assert await read(store, connection, run.id) == parked
    undoing = moved(
        parked, status=Status.COMPENSATING, undo_cursor=7, waiting_for=None, waiting_name=None, wake_at=None,
        ending=Ending(Status.FAILED, BOOM, answer_to="a", to="paid", compensate=True, until=T0), cleanup=False,
    )  # fmt: skip
    await write(store, connection, Transition(parked, undoing))
    assert await read(store, connection, run.id) == undoing
    ended = moved(undoing, status=Status.CANCELED, error=BOOM, reason="why", finished_at=T0, frame={})
    await write(store, connection, Transition(undoing, ended))
    assert await read(store, connection, run.id) == ended


async def test_a_step(store: Store, connection: Connection) -> None:
    run = await running(store, connection, priority=2)
    applied = await write(
        store, connection, transition(run, after={"current_step": 1}, entries=(CHARGE,), next=Next.ADVANCE)
    )
    assert [replace(entry, seq=0) for entry in applied.entries] == [CHARGE]
    assert await load_journal(store, connection, run.id) == {"charge": applied.entries[0]}
    assert (await read(store, connection, run.id)).current_step == 1
    assert (await jobs(store, connection, run.id))[1:] == [
        ("durable.advance", 2, 1_000_002, f"{run.id}:2", "shop", None, False)
    ]


async def test_the_last_step_of_a_burst(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    locked = await begin_and_lock(store, connection, run.id)
    assert locked is not None
    applied, _ = await apply_and_commit(store, connection, transition(run, entries=(CHARGE,)))
    assert connection.info.transaction_status is TransactionStatus.IDLE
    assert await load_journal(store, connection, run.id) == {"charge": applied.entries[0]}


async def test_an_end_stands_though_nobody_could_be_told(
    store: Store, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    run = await running(store, connection)
    await connection.execute(b"alter table durable.waiters rename to gone")
    assert await begin_and_lock(store, connection, run.id) is not None
    ended = transition(run, after={"status": Status.COMPLETED, "finished_at": T0}, entries=(CHARGE,))
    applied, _ = await apply_and_commit(store, connection, ended)
    assert connection.info.transaction_status is TransactionStatus.IDLE
    assert (await read(store, connection, run.id)).status is Status.COMPLETED
    assert await load_journal(store, connection, run.id) == {"charge": applied.entries[0]}
    assert "it is written, but not what was to follow" in caplog.text


async def test_entries_keep_everything_and_their_order(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    entries = (
        Entry("b", EntryKind.BRANCH, "failed", error=BOOM, attempt=3, started_at=T0, finished_at=T0, parent="a"),
        Entry("a", EntryKind.LOOP, "completed", "[1e400]", finished_at=T0, extra={"next": '{"x":1}', "n": [1]}),
        Entry("c", EntryKind.STEP, "suspended", "null", finished_at=T0),
    )
    applied = await write(store, connection, transition(run, entries=entries))
    journal = await load_journal(store, connection, run.id)
    assert list(journal) == ["b", "a", "c"]
    assert tuple(journal.values()) == applied.entries
    assert sorted(entry.seq for entry in applied.entries) == [entry.seq for entry in applied.entries]


async def test_a_stale_transition_writes_nothing(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    await write(store, connection, transition(run, next=Next.ADVANCE))
    late = transition(run, entries=(CHARGE,), events=(Event("branch_discarded"),), next=Next.COMPENSATE)
    for _ in range(7):
        with pytest.raises(StaleRevision, match=f"run {run.id} is no longer at revision 1"):
            await write(store, connection, late)
        for at_once in (apply_and_relock, apply_and_commit):  # also with COMMIT behind it in the same flush
            await connection.execute("begin")
            with pytest.raises(StaleRevision):
                await at_once(store, connection, late)
        assert connection.info.transaction_status is TransactionStatus.IDLE
    assert await load_journal(store, connection, run.id) == {}
    assert len(await jobs(store, connection, run.id)) == 2


async def test_the_first_write_wins(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    first = transition(run, entries=(CHARGE,))
    await write(store, connection, first)
    again = transition(first.after, entries=(replace(CHARGE, result="2"),))
    for attempt in (write, apply_and_relock):
        with pytest.raises(JournalConflict, match=rf"\({run.id}, charge\) already exists"):
            await attempt(store, connection, again)
    assert (await load_journal(store, connection, run.id))["charge"].result == CHARGE.result
    assert (await read(store, connection, run.id)).revision == first.after.revision


async def test_a_suspended_entry_is_replaced_and_comes_last(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    asked = replace(CHARGE, step_id="ask", status="suspended", result='{"snap":1}')
    first = transition(run, entries=(asked, CHARGE))
    await write(store, connection, first)
    answered = transition(first.after, entries=(replace(asked, status="completed", result="5", attempt=2),))
    await write(store, connection, answered)
    journal = await load_journal(store, connection, run.id)
    assert list(journal) == ["charge", "ask"]
    assert (journal["ask"].status, journal["ask"].result, journal["ask"].attempt) == ("completed", "5", 2)


async def test_only_what_the_journal_is_said_to_have_makes_room(store: Store, connection: Connection) -> None:
    """Who says wrong that nothing stands there gets an error, and loses nothing."""
    run = await running(store, connection)
    asked = replace(CHARGE, step_id="ask", status="suspended", result='{"snap":1}')
    first = transition(run, entries=(asked, CHARGE))
    await write(store, connection, first, journal=())
    answered = transition(first.after, entries=(replace(asked, status="completed", result="5"),))
    more = transition(first.after, entries=(replace(CHARGE, step_id="ship"), *answered.entries))
    for wrong in (answered, more):
        with pytest.raises(JournalConflict, match=rf"\({run.id}, ask\) already exists"):
            await write(store, connection, wrong, journal=())
    assert (await load_journal(store, connection, run.id))["ask"].result == '{"snap":1}'
    await write(store, connection, answered, journal={"ask", "charge"})
    assert (await load_journal(store, connection, run.id))["ask"].result == "5"
    late = transition(answered.after, entries=(replace(asked, status="completed", result="6"),))
    with pytest.raises(JournalConflict):
        await write(store, connection, late, journal={"ask", "charge"})
    assert (await load_journal(store, connection, run.id))["ask"].result == "5"


async def test_an_entry_with_no_time_of_its_own_is_of_now(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    await connection.execute("update durable.clock set ahead = '3 days'")
    entries = (replace(CHARGE, finished_at=None), Entry("patch:a", EntryKind.PATCH, "completed", "true"))
    await write(store, connection, transition(run, entries=entries))
    for entry in (await load_journal(store, connection, run.id)).values():
        assert entry.finished_at is not None
        assert timedelta(days=2) < entry.finished_at - datetime.now(UTC) < timedelta(days=4)


async def test_retry_forgets_what_failed(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    failed = replace(CHARGE, step_id="ship", status="failed", result=None, error=BOOM)
    first = transition(run, entries=(CHARGE, failed), after={"status": Status.FAILED, "finished_at": T0, "error": BOOM})
    await write(store, connection, first)
    anew = transition(
        first.after, forget=("ship", "charge"), next=Next.ADVANCE,
        after={"status": Status.RUNNING, "finished_at": None, "error": None, "retries": 1},
    )  # fmt: skip
    await write(store, connection, anew)
    assert list(await load_journal(store, connection, run.id)) == ["charge"]
    await write(store, connection, transition(anew.after, entries=(replace(failed, status="completed", error=None),)))
    assert list(await load_journal(store, connection, run.id)) == ["charge", "ship"]
    assert [kind for kind, _, _ in await events(connection, run)] == ["failed", "resumed"]


async def test_old_iterations_are_pruned_whatever_became_of_them(store: Store, connection: Connection) -> None:
    run, other = await running(store, connection), await running(store, connection)
    names = ("poll[0]", "poll[1]", "poll[1]/ask", "poll[10]")
    entries = [Entry(name, EntryKind.ITERATION, "completed", "1", finished_at=T0) for name in names]
    entries[1] = replace(entries[1], status="failed", result=None, error=BOOM)
    entries[2] = replace(entries[2], status="suspended")
    first = transition(run, entries=tuple(entries))
    await write(store, connection, first)
    await write(store, connection, transition(other, entries=tuple(entries)))
    new = Entry("poll[11]", EntryKind.ITERATION, "completed", "1", finished_at=T0)
    pruned = transition(first.after, entries=(new,), prune=("poll[0]", "poll[1]", "poll[1]/ask", "gone"))
    await write(store, connection, pruned)
    assert list(await load_journal(store, connection, run.id)) == ["poll[10]", "poll[11]"]
    assert list(await load_journal(store, connection, other.id)) == list(names)
    assert await rows(connection, "select 1 from durable.attempts where run_id = %s", run.id) == []


async def test_attempts_and_events(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    attempt = FailedAttempt("charge", 1, "failed", BOOM, T0, T0, T0 + timedelta(seconds=2))
    crashed = FailedAttempt("charge", 2, "interrupted", None, None, T0)
    parked = {"status": Status.SUSPENDED, "waiting_for": WaitingFor.RETRY, "wake_at": T0}
    discarded = Event("branch_discarded", "build/api", {"why": "late"})
    await write(store, connection, transition(run, after=parked, attempts=(attempt, crashed), events=(discarded,)))
    found = await rows(
        connection,
        "select step_id, attempt, kind, error ->> 'message', finished_at, next_attempt_at from durable.attempts "
        "where run_id = %s order by seq",
        run.id,
    )
    assert found == [
        ("charge", 1, "failed", "it broke", T0, T0 + timedelta(seconds=2)),
        ("charge", 2, "interrupted", None, T0, None),
    ]
    assert await events(connection, run) == [
        ("suspended", None, {"waiting_for": "retry", "wake_at": "2026-01-01T00:00:00+00:00"}),
        ("branch_discarded", "build/api", {"why": "late"}),
    ]


async def test_messages_are_taken_or_seen(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    for name in ("a", "b", "c"):
        await operations.execute_async(operations.send(store, run.id, MessageKind.SIGNAL, name), connection)
    inbox = await load_inbox(store, connection, run.id)
    await operations.execute_async(operations.send(store, run.id, MessageKind.SIGNAL, "unseen"), connection)
    done = transition(run, taken={inbox[0].seq: "signoff", inbox[1].seq: None})
    await write(store, connection, done, inbox=inbox)
    columns = "name, state, taken_by, taken_at is not null"
    found = await rows(connection, f"select {columns} from durable.inbox where run_id = %s order by seq", run.id)
    assert found == [
        ("a", "taken", "signoff", True),
        ("b", "taken", None, True),
        ("c", "seen", None, False),
        ("unseen", "new", None, False),
    ]
    assert [(m.name, m.fresh) for m in await load_inbox(store, connection, run.id)] == [("c", False), ("unseen", True)]


async def answers(connection: Connection, run: Run) -> list[tuple[Any, ...]]:
    columns = "name, state, taken_by, reply::text, replied_at is not null, taken_at is not null"
    return await rows(connection, f"select {columns} from durable.inbox where run_id = %s order by seq", run.id)


async def test_a_message_is_completed_once(store: Store, connection: Connection) -> None:
    run, other = await running(store, connection), await running(store, connection)
    for name in ("a", "b", "c"):
        await operations.execute_async(operations.send(store, run.id, MessageKind.SIGNAL, name), connection)
    a, b, c = await load_inbox(store, connection, run.id)
    first = transition(run, taken={a.seq: "receive"})
    await write(store, connection, first, inbox=(a, b, c))
    second = transition(first.after, replies={a.seq: '{"n": 1.50}', b.seq: "null"})
    await write(store, connection, second, inbox=(replace(b, fresh=True),))
    expected = [
        ("a", "taken", "receive", '{"n": 1.50}', True, True),
        ("b", "taken", None, "null", True, True),
        ("c", "seen", None, None, False, False),
    ]
    assert await answers(connection, run) == expected
    again = transition(second.after, replies={a.seq: "2"}, taken={c.seq: "receive#2"})
    await write(store, connection, again)
    await write(store, connection, transition(other, replies={c.seq: "3"}))  # of another run
    assert await answers(connection, run) == [*expected[:2], ("c", "taken", "receive#2", None, False, True)]


async def test_a_message_has_the_id_that_it_was_sent_with(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    for id_ in ("m-1", None):
        query = operations.send(store, run.id, MessageKind.SIGNAL, "a", None, id_)
        await operations.execute_async(query, connection)
    assert [message.id for message in await load_inbox(store, connection, run.id)] == ["m-1", None]


async def test_children_and_messages_to_others(store: Store, connection: Connection) -> None:
    run = await running(store, connection, tags={"t": 1}, priority=4, timeout=timedelta(hours=1))
    other = await started(store, connection)
    child = ChildStart(child_id(run.id, "rollout", 0), "rollout", "3", '{"x": 1}', "rollout")
    message = Outgoing(other.id, MessageKind.CHILD, "rollout", '{"status":"completed"}', id="end")
    gone = Outgoing(uuid.uuid4(), MessageKind.SIGNAL)
    first = transition(run, children=(child,), outgoing=(message, message, gone))
    await write(store, connection, first)
    found = await read(store, connection, child.id)
    assert (found.workflow, found.version, found.input, found.key) == ("rollout", "3", '{"x": 1}', None)
    assert (found.parent_id, found.parent_step) == (run.id, "rollout")
    assert (found.queue, found.priority, found.tags, found.deadline) == (run.queue, 4, {"t": 1}, run.deadline)
    assert [m.body for m in await load_inbox(store, connection, other.id)] == ['{"status":"completed"}']
    await write(store, connection, transition(first.after, children=(child,)))  # started before: fine
    assert len(await jobs(store, connection, child.id)) == 1
    grandchild = ChildStart(child_id(child.id, "a", 0), "leaf", "1", "null", "a")
    await write(store, connection, transition(found, after=RUNNING, children=(grandchild,)))
    assert await rows(connection, "select root_id from durable.runs where id = %s", grandchild.id) == [(run.id,)]


async def test_the_relock_reads_what_was_written(store: Store, connection: Connection, rival: Connection) -> None:
    run = await running(store, connection)
    locked = await begin_and_lock(store, connection, run.id)
    assert locked is not None
    for n in range(8):
        await operations.execute_async(operations.send(store, run.id, MessageKind.SIGNAL, f"s{n}"), rival)
        entry = replace(CHARGE, step_id=f"charge#{n}")
        frame = {"x": Begun(since=T0, resume_data="1")}
        done = transition(locked.run, after={"current_step": n, "frame": frame}, entries=(entry,), next=Next.ADVANCE)
        applied, committed = await apply_and_relock(store, connection, done, locked.inbox)
        assert applied.entries[0].seq > 0
        assert committed.error is None
        assert committed.inbox is not None
        assert committed.inbox[-1].name == f"s{n}"
        locked = replace(locked, run=done.after, inbox=committed.inbox)
        assert await rows(rival, "select count(*) from durable.journal where run_id = %s", run.id) == [(n + 1,)]
        assert await lock(store, rival, run.id, "skip") is None
    await connection.execute("commit")
    assert await read(store, connection, run.id) == locked.run
    advancing = [job[1] for job in await jobs(store, connection, run.id) if job[0] == "durable.advance"]
    assert advancing == [0]  # whoever has the lock needs no job


async def test_the_relock_waits_for_nobody(store: Store, connection: Connection, rival: Connection) -> None:
    """A lock that was waited for would be younger than what its statement sees of the inbox."""
    run = await running(store, connection)

    async def relock() -> Any:
        return (await send(connection, store.sql.relock, {"run": run.id})).row

    async with rival.transaction():
        await read(store, rival, run.id)  # FOR UPDATE
        assert await relock() is None
    assert await relock() == (run.revision, False)
    await operations.execute_async(operations.send(store, run.id, MessageKind.SIGNAL, "late"), rival)
    assert await relock() == (run.revision, True)
    assert (await send(connection, store.sql.relock, {"run": uuid.uuid4()})).row is None


async def test_a_relock_that_fails_after_commit_went_through(
    store: Store, connection: Connection, rival: Connection
) -> None:
    """A table stands for the row: only what comes after COMMIT asks for it, and finds it held."""
    run = await running(store, connection)
    for n in range(7):
        entry = replace(CHARGE, step_id=f"charge#{n}")
        done = transition(run, after={"current_step": n}, entries=(entry,))
        await connection.execute("begin")
        await connection.execute("select 1 from durable.runs where id = %s for update", [run.id])
        async with rival.transaction():
            await rival.execute("lock table durable.inbox")
            applied, committed = await apply_and_relock(store, connection, done)
        assert committed.inbox is None
        assert isinstance(committed.error, RowBusy)
        assert connection.info.transaction_status is TransactionStatus.IDLE
        assert await read(store, connection, run.id) == done.after
        assert list((await load_journal(store, connection, run.id)).values())[-1:] == list(applied.entries)
        run = done.after


async def test_a_relock_of_a_connection_that_dies_after_commit(
    module_dsn: str, store: Store, rival: Connection
) -> None:
    """COMMIT was answered, and the lock never was: what was written is known, and no error of the transition."""
    run = await running(store, rival)
    done = transition(run, entries=(CHARGE,))
    async with await Connection.connect(module_dsn, autocommit=True) as mine:
        await mine.execute("begin")
        async with rival.transaction():
            await rival.execute("lock table durable.inbox")
            writing = asyncio.create_task(apply_and_relock(store, mine, done))
            with ThreadPoolExecutor() as threads:
                blocked = threads.submit(wait_until_blocked, module_dsn, mine.info.backend_pid)
                await asyncio.wrap_future(blocked)
            await rival.execute("select pg_terminate_backend(%s, 10000)", [mine.info.backend_pid])
            applied, committed = await writing
        assert mine.closed
    assert committed.inbox is None
    assert isinstance(committed.error, psycopg.OperationalError)
    assert await load_journal(store, rival, run.id) == {"charge": applied.entries[0]}


async def test_a_connection_that_is_lost_before(module_dsn: str, store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    for at_once in (apply_and_relock, apply_and_commit):
        async with await Connection.connect(module_dsn, autocommit=True) as mine:
            await begin_and_lock(store, mine, run.id)
            await connection.execute("select pg_terminate_backend(%s, 10000)", [mine.info.backend_pid])
            with pytest.raises(psycopg.OperationalError):
                await at_once(store, mine, transition(run, entries=(CHARGE,)))
            assert mine.closed
    assert await read(store, connection, run.id) == run


async def test_a_relock_that_finds_another_revision(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    await connection.execute(
        "create or replace function later() returns trigger language plpgsql as $$ begin "
        "update durable.runs set revision = revision + 1 where id = new.id; return null; end $$"
    )
    await connection.execute(
        "create constraint trigger later after update on durable.runs deferrable initially deferred "
        "for each row when (new.revision = 2) execute function later()"
    )
    await begin_and_lock(store, connection, run.id)
    try:
        _, committed = await apply_and_relock(store, connection, transition(run))
    finally:
        await connection.execute("drop trigger later on durable.runs")
    assert (committed.inbox, committed.error) == (None, None)
    assert connection.info.transaction_status is TransactionStatus.IDLE


async def test_a_commit_that_is_refused(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    await connection.execute("create table if not exists owed (n int unique deferrable initially deferred)")
    for _ in range(7):
        await begin_and_lock(store, connection, run.id)
        await connection.execute("insert into owed values (1), (1)")
        with pytest.raises(psycopg.errors.UniqueViolation):
            await apply_and_relock(store, connection, transition(run, entries=(CHARGE,)))
        assert connection.info.transaction_status is TransactionStatus.IDLE
    for at_once in (apply_and_relock, apply_and_commit):
        await begin_and_lock(store, connection, run.id)
        with pytest.raises(psycopg.errors.DivisionByZero):
            await connection.execute("select 1 / 0")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            await at_once(store, connection, transition(run, entries=(CHARGE,)))
        assert connection.info.transaction_status is TransactionStatus.IDLE
    assert await read(store, connection, run.id) == run
    assert await load_journal(store, connection, run.id) == {}
    assert await rows(connection, "select * from owed") == []


@pytest.mark.parametrize("entries", [(), (CHARGE,)])
async def test_a_column_that_does_not_change_is_not_written(
    store: Store, connection: Connection, rival: Connection, entries: tuple[Entry, ...]
) -> None:
    """Only what changes travels: another column keeps what it was given meanwhile."""
    run = await running(store, connection)
    await rival.execute("update durable.runs set reason = 'mine' where id = %s", [run.id])
    done = transition(run, after={"current_step": 1}, entries=entries)
    await write(store, connection, done)
    assert await read(store, connection, run.id) == replace(done.after, reason="mine")


async def test_nothing_but_the_revision_changes(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    done = transition(run)
    await write(store, connection, done)
    assert await read(store, connection, run.id) == done.after


async def signaled(store: Store, connection: Connection, run: Run, name: str) -> None:
    await operations.execute_async(operations.send(store, run.id, MessageKind.SIGNAL, name), connection)


@pytest.mark.parametrize("known", [0, 1, 3])
async def test_an_end_that_knows_the_whole_inbox(
    store: Store, connection: Connection, rival: Connection, known: int
) -> None:
    """Taken messages do not count, seen ones do; what was known is no news, whatever becomes of it."""
    run = await running(store, connection)
    for n in range(known):
        await signaled(store, rival, run, f"s{n}")
    inbox = await load_inbox(store, connection, run.id)
    if known == 3:
        done = transition(run, taken={inbox[0].seq: "wait"})
        await write(store, connection, done, inbox=inbox)
        run, inbox = done.after, await load_inbox(store, connection, run.id)
        assert [message.fresh for message in inbox] == [False, False]
    for n in range(7):  # also once the statements are prepared
        await begin_and_lock(store, connection, run.id)
        late = f"late{n}"
        await signaled(store, rival, run, late)
        ending = transition(
            run, after={"status": Status.COMPLETED, "finished_at": T0}, entries=(CHARGE,), next=Next.ADVANCE
        )
        with pytest.raises(InboxNews, match=str(run.id)):
            await apply_and_commit(store, connection, ending, inbox, whole=inbox)
        assert connection.info.transaction_status is TransactionStatus.INTRANS
        assert await begin_and_lock(store, rival, run.id, "skip") is None  # the row is still locked
        await let_go(store, connection)
        assert await read(store, connection, run.id) == run
        assert await load_journal(store, connection, run.id) == {}
        assert [job[1] for job in await jobs(store, connection, run.id) if job[0] == "durable.advance"] == [0]
        now = await load_inbox(store, connection, run.id)
        assert [(m.name, m.fresh) for m in now[len(inbox) :]] == [(late, True)]
        await connection.execute("delete from durable.inbox where seq = %s", [now[-1].seq])
    await begin_and_lock(store, connection, run.id)
    taken = {inbox[-1].seq: "wait"} if inbox else None
    ending = replace(ending, taken=taken)
    await apply_and_commit(store, connection, ending, inbox, whole=inbox)
    assert await read(store, connection, run.id) == ending.after


async def test_the_inbox_of_another_run_is_no_news(store: Store, connection: Connection) -> None:
    run, other = await running(store, connection), await running(store, connection)
    await signaled(store, connection, other, "a")
    await begin_and_lock(store, connection, run.id)
    await apply_and_commit(store, connection, transition(run), whole=())
    await signaled(store, connection, run, "a")
    await begin_and_lock(store, connection, run.id)
    again = transition(await read(store, connection, run.id))
    await apply_and_commit(store, connection, again)  # nothing is asked for
    assert await read(store, connection, run.id) == again.after


async def test_a_rollback_tells_when_the_run_had_completed(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    ended = transition(run, after={"status": Status.COMPLETED, "finished_at": T0})
    await write(store, connection, ended)
    assert await events(connection, run) == []
    undoing = {"status": Status.COMPENSATING, "finished_at": None, "ending": Ending(Status.CANCELED)}
    await write(store, connection, transition(ended.after, after=undoing))
    at = "select kind, at = %s from durable.events where run_id = %s order by seq"
    assert await rows(connection, at, T0, run.id) == [("completed", True), ("compensating", False)]


async def test_what_user_code_said_passes_through_the_codec(module_dsn: str, connection: Connection) -> None:
    class Zip:
        def encode(self, plain: bytes, /) -> bytes:
            return zlib.compress(plain)

        def decode(self, stored: bytes, /) -> bytes:
            return zlib.decompress(stored)

    store, secret = Store(module_dsn, codec=Zip()), "s3cret"
    run = await started(store, connection, input=f'"{secret}"')
    assert run.input == f'"{secret}"'
    other = await started(store, connection)
    boom = replace(BOOM, message=secret)
    entry = replace(CHARGE, result=f'"{secret}"', extra={"next": secret})
    frame = {"a": Begun(name="n", resume_data=f'"{secret}"')}
    failed = {"status": Status.FAILED, "finished_at": T0, "error": boom, "ending": Ending(Status.FAILED, boom)}
    await operations.execute_async(operations.send(store, run.id, MessageKind.SIGNAL, "q", f'"{secret}"'), connection)
    [asked] = await load_inbox(store, connection, run.id)
    done = transition(
        run,
        replies={asked.seq: f'"{secret}"'},
        after=RUNNING | failed | {"frame": frame},
        entries=(entry, replace(CHARGE, step_id="b", status="failed", result=None, error=boom)),
        attempts=(FailedAttempt("b", 1, "failed", boom, None, T0),),
        outgoing=(Outgoing(other.id, MessageKind.SIGNAL, "a", f'"{secret}"'),),
        children=(ChildStart(uuid.uuid4(), "w", "1", f'"{secret}"', "c"),),
    )  # fmt: skip
    applied = await write(store, connection, done)
    assert await read(store, connection, run.id) == done.after
    assert tuple((await load_journal(store, connection, run.id)).values()) == applied.entries
    assert (await load_inbox(store, connection, other.id))[0].body == f'"{secret}"'
    for table in ("runs", "journal", "inbox", "attempts", "events"):
        kept = await rows(connection, f"select t::text from durable.{table} t")
        assert secret not in json.dumps(kept)


async def test_another_schema_and_an_odd_search_path(dsn: str) -> None:
    migrate.upgrade(dsn, "elsewhere")
    store = Store(dsn, schema="elsewhere")
    async with await Connection.connect(dsn, autocommit=True) as odd:
        await odd.execute("set search_path = ''")
        run, other = await started(store, odd), await started(store, odd)
        for target in (run, run):
            await operations.execute_async(operations.send(store, target.id, MessageKind.SIGNAL, "a"), odd)
        locked = await begin_and_lock(store, odd, run.id)
        assert locked is not None
        done = transition(
            run,
            after=RUNNING,
            entries=(CHARGE,),
            attempts=(FailedAttempt("charge", 1, "failed", BOOM, None, T0),),
            forget=("ship",),
            prune=("poll[0]",),
            replies={locked.inbox[1].seq: "1"},
            taken={locked.inbox[0].seq: "a"},
            outgoing=(Outgoing(other.id, MessageKind.PAUSE),),
            children=(ChildStart(uuid.uuid4(), "w", "1", "1", "c"),),
        )
        _, committed = await apply_and_relock(store, odd, done, locked.inbox)
        assert committed.inbox is not None
        following = transition(done.after, next=Next.ADVANCE)
        await apply_and_commit(store, odd, following, committed.inbox, whole=committed.inbox)
        assert await read(store, odd, run.id) == following.after
        assert list(await load_journal(store, odd, run.id)) == ["charge"]
        assert len(await jobs(store, odd, run.id)) == 4
        assert await rows(odd, "select count(*) from durable.runs") == [(0,)]


@pytest.mark.parametrize("before", Status)
@pytest.mark.parametrize("after", Status)
def test_moves(before: Status, after: Status) -> None:
    run = replace(some_run(), status=before)
    if before is after or after in MOVES[before]:
        check_move(run, moved(run, status=after))
    else:
        with pytest.raises(InternalError, match=f"no move from {before} to {after}"):
            check_move(run, moved(run, status=after))
    for wrong in (0, 2):
        with pytest.raises(InternalError, match="revision"):
            check_move(run, replace(run, revision=run.revision + wrong))


async def test_an_error_may_say_anything(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    odd = replace(BOOM, message="a\0b \ud800 \U0001f600 \\u0000", details={"k\0": ["\udfff"]})
    undoing = {"status": Status.COMPENSATING, "ending": Ending(Status.FAILED, odd), "error": odd, "reason": "\0"}
    entry = replace(CHARGE, status="failed", result=None, error=odd, extra={"x": odd.message})
    await write(store, connection, transition(run, after=undoing, entries=(entry,)))
    kept = await read(store, connection, run.id)
    assert kept.error is not None
    assert kept.error.message == "a\ufffdb \ufffd \U0001f600 \\u0000"
    assert kept.error.details == {"k\ufffd": ["\ufffd"]}
    assert (kept.ending, kept.reason) == (Ending(Status.FAILED, kept.error), "\ufffd")


async def test_the_databases_own_checks_are_the_engines_fault(store: Store, connection: Connection) -> None:
    run = await running(store, connection)
    with pytest.raises(InternalError, match="runs_suspended_says_why_check"):
        await write(store, connection, transition(run, after={"status": Status.SUSPENDED}))


def some_run(**changes: Any) -> Run:
    return replace(Run(uuid.uuid4(), "w", "1", Status.PENDING, 0, 0, "1", "q", T0), **changes)


S = Status
BEGAN: dict[str, Any] = {"started_at": T0}
SLEEP: dict[str, Any] = {"waiting_for": WaitingFor.SLEEP, "wake_at": T0}


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        ({}, {"status": S.RUNNING} | BEGAN, []),
        ({}, {"status": S.SUSPENDED} | BEGAN | SLEEP, ["suspended"]),
        ({}, {"status": S.COMPLETED} | BEGAN, []),
        ({"status": S.RUNNING} | BEGAN, {"status": S.COMPLETED}, []),
        ({}, {"status": S.FAILED}, ["failed"]),
        ({}, {"status": S.PAUSED}, ["paused"]),
        ({}, {"status": S.CANCELED}, ["canceled"]),
        ({"status": S.PAUSED}, {"status": S.RUNNING} | BEGAN, ["resumed"]),
        ({"status": S.PAUSED} | BEGAN, {"status": S.SUSPENDED} | SLEEP, ["resumed"]),
        ({"status": S.RUNNING} | BEGAN, {}, []),
        ({"status": S.RUNNING} | BEGAN, {"status": S.SUSPENDED} | SLEEP, ["suspended"]),
        ({"status": S.SUSPENDED} | BEGAN | SLEEP, {"status": S.RUNNING, "waiting_for": None, "wake_at": None}, []),
        ({"status": S.SUSPENDED} | BEGAN | SLEEP, {}, []),
        ({"status": S.SUSPENDED} | BEGAN | SLEEP, {"waiting_for": WaitingFor.RETRY}, ["suspended"]),
        ({"status": S.RUNNING} | BEGAN, {"status": S.COMPENSATING}, ["compensating"]),
        ({"status": S.COMPLETED} | BEGAN, {"status": S.COMPENSATING}, ["completed", "compensating"]),
        ({"status": S.COMPENSATING} | BEGAN, {"status": S.RUNNING}, ["resumed"]),
        ({"status": S.COMPENSATING} | BEGAN, {"status": S.CANCELED}, ["canceled"]),
        ({"status": S.FAILED} | BEGAN, {"status": S.RUNNING}, ["resumed"]),
    ],
)
def test_lifecycle(before: dict[str, Any], after: dict[str, Any], kinds: list[str]) -> None:
    run = some_run(**before)
    assert [event.kind for event in lifecycle(run, moved(run, **after))] == kinds
