"""continue_as_new: what the successor takes over, and how starts, messages and resumptions find the end of a chain."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from tests import invariants
from tests.store.kit import jobs, lock, new, read, rows, started, transition, wait_until_blocked

from durable.core.state import Entry, EntryKind, MessageKind, Run
from durable.core.transition import ChildStart, Outgoing, Successor, Transition
from durable.store import operations
from durable.store.apply import apply, apply_and_commit, check_successor
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.errors import InternalError, StaleRevision
from durable.store.inbox import forward, load_inbox, mark_seen
from durable.store.journal import load_journal
from durable.store.operations import Sent, Start, Started
from durable.store.read import history as read_history
from durable.store.runs import abandon, begin_and_lock
from durable.values import Status, child_id

SIGNAL = MessageKind.SIGNAL
T0 = datetime(2026, 1, 1, tzinfo=UTC)
CHARGE = Entry("charge", EntryKind.STEP, "completed", "1", finished_at=T0)
ONE = '{"n": 1}'  # the input of `new()`


async def go(query: operations.Query[Any], connection: Any) -> Any:
    return await operations.execute_async(query, connection)


async def send(
    store: Store, connection: Connection, run: Run, name: str | None, id_: str | None = None, kind: MessageKind = SIGNAL
) -> str:
    sent: Sent = await go(operations.send(store, run.id, kind, name, f'"{name}"', id_), connection)
    return sent.answer


async def write(store: Store, connection: Connection, done: Transition) -> None:
    await connection.execute("begin")
    await apply_and_commit(store, connection, done)


def successor_of(run: Run, n: int, **parts: Any) -> Transition:
    """The transition with which a run goes on as another one with the input ``{"n": n}``."""
    following = Successor(uuid.uuid4(), run.version, f'{{"n": {n}}}')
    began = run.started_at or T0
    after = {"status": Status.COMPLETED, "started_at": began, "finished_at": T0, "successor": following.id}
    return transition(run, after=after | parts.pop("after", {}), successor=following, **parts)


async def follow(store: Store, connection: Connection, run: Run, n: int = 2, **parts: Any) -> Run:
    """The run that goes on in its place."""
    done = successor_of(await read(store, connection, run.id), n, **parts)
    await write(store, connection, done)
    assert done.successor is not None
    return await read(store, connection, done.successor.id)


async def keyed(store: Store, connection: Connection, **more: Any) -> Run:
    return await started(store, connection, key=f"key-{uuid.uuid4()}", **more)


async def chain_end(connection: Connection, run: Run) -> uuid.UUID:
    [(found,)] = await rows(connection, "select durable.chain_end(%s)", run.id)
    assert isinstance(found, uuid.UUID)
    return found


async def inbox(store: Store, connection: Connection, run: Run) -> list[tuple[Any, ...]]:
    return [(m.kind.value, m.name, m.id, m.fresh) for m in await load_inbox(store, connection, run.id)]


# ---------------------------------------------------------------- what it takes over


async def test_a_successor_has_what_its_predecessor_had(store: Store, connection: Connection) -> None:
    more: dict[str, Any] = {"tags": {"a": 1}, "priority": 3, "timeout": timedelta(hours=1), "queue": "tools"}
    run = await keyed(store, connection, **more)
    done = successor_of(run, 2, entries=(CHARGE,))
    assert done.successor is not None
    following = replace(done.successor, version="7")
    await write(store, connection, replace(done, successor=following))
    assert await read(store, connection, run.id) == done.after
    assert list(await load_journal(store, connection, run.id)) == ["charge"]
    successor = await read(store, connection, following.id)
    same = ("workflow", "key", "tags", "priority", "deadline", "queue", "parent_id", "parent_step")
    assert [getattr(successor, name) for name in same] == [getattr(run, name) for name in same]
    assert run.deadline is not None
    assert (successor.version, successor.input, successor.status) == ("7", '{"n": 2}', Status.PENDING)
    assert (successor.predecessor, successor.chain, successor.successor) == (run.id, run.id, None)
    assert (successor.revision, successor.current_step, successor.retries, successor.seed) == (0, 0, 0, None)
    assert await load_journal(store, connection, successor.id) == {}
    assert await jobs(store, connection, successor.id) == [
        ("durable.advance", 0, 3, f"{successor.id}:0", "tools", None, False)
    ]
    for shown, kinds in ((run, ["completed", "created", "started"]), (successor, ["created"])):
        events = await read_history(store, connection, shown.id)
        assert sorted(event.kind for event in events if event.step is None) == kinds


async def test_a_chain_knows_its_first_run(store: Store, connection: Connection) -> None:
    first = await keyed(store, connection)
    second = await follow(store, connection, first)
    third = await follow(store, connection, second, 3)
    assert (third.chain, third.predecessor) == (first.id, second.id)
    assert {await chain_end(connection, run) for run in (first, second, third)} == {third.id}
    nobody = replace(first, id=uuid.uuid4())
    assert await chain_end(connection, nobody) == nobody.id
    hashes = "select count(distinct input_hash), count(distinct root_id) from durable.runs where id = any(%s)"
    assert await rows(connection, hashes, [first.id, second.id, third.id]) == [(1, 1)]


async def test_a_child_goes_on_as_its_parents_child(store: Store, connection: Connection) -> None:
    parent = await started(store, connection)
    child = ChildStart(child_id(parent.id, "rollout", 0), "rollout", "1", ONE, "rollout")
    await write(store, connection, transition(parent, children=(child,)))
    successor = await follow(store, connection, await read(store, connection, child.id))
    assert (successor.parent_id, successor.parent_step, successor.key) == (parent.id, "rollout", None)
    assert await rows(connection, "select root_id from durable.runs where id = %s", successor.id) == [(parent.id,)]


async def test_a_refused_continuation_writes_nothing(store: Store, connection: Connection) -> None:
    run, other = await keyed(store, connection), await started(store, connection)
    await send(store, connection, run, "a")
    done = successor_of(run, 2)
    taken = replace(
        done, after=replace(done.after, successor=other.id), successor=Successor(other.id, run.version, "1")
    )
    with pytest.raises(InternalError, match=f"can not go on as {other.id}: there is such a run already"):
        await write(store, connection, taken)
    with pytest.raises(StaleRevision):
        await write(
            store, connection, replace(done, before=replace(run, revision=5), after=replace(done.after, revision=6))
        )
    assert await read(store, connection, run.id) == run
    assert await inbox(store, connection, run) == [("signal", "a", None, True)]
    assert await rows(connection, "select count(*) from durable.runs where predecessor = %s", run.id) == [(0,)]


def test_the_row_names_the_successor_that_is_started() -> None:
    run = Run(uuid.uuid4(), "w", "1", Status.RUNNING, 0, 0, "1", "q", T0)
    done = successor_of(run, 2)
    check_successor(done)
    check_successor(Transition(done.after, replace(done.after, revision=2)))  # it keeps the name ever after
    for wrong in (
        replace(done, successor=None),
        replace(done, after=replace(done.after, successor=None)),
        replace(done, after=replace(done.after, successor=uuid.uuid4())),
    ):
        with pytest.raises(InternalError, match="names"):
            check_successor(wrong)


# ---------------------------------------------------------------- starts


async def test_a_used_key_is_the_end_of_its_chain(store: Store, connection: Connection) -> None:
    first = run = await keyed(store, connection)
    for n in (2, 3):
        run = await follow(store, connection, run, n)
        again = new(key=first.key)
        assert await go(operations.start(store, again), connection) == Started(run.id, created=False, same=True)
        [found] = await go(operations.start_many(store, [again]), connection)
        assert found == Started(run.id, created=False, same=True)
        other = new(key=first.key, input=run.input)  # what it went on with is not what was asked for
        assert await go(operations.start(store, other), connection) == Started(run.id, created=False, same=False)


async def test_a_used_id_is_that_run(store: Store, connection: Connection) -> None:
    first = await keyed(store, connection)
    await follow(store, connection, first)
    for key in (None, first.key):
        again = new(id=first.id, key=key)
        assert await go(operations.start(store, again), connection) == Started(first.id, created=False, same=True)


async def test_a_chain_may_go_on_under_another_version(store: Store, connection: Connection) -> None:
    run = await keyed(store, connection)
    done = successor_of(run, 2)
    assert done.successor is not None
    await write(store, connection, replace(done, successor=replace(done.successor, version="2")))
    for version, same in (("1", True), ("2", False)):  # version 1 was asked for
        query = operations.start(store, new(key=run.key, version=version))
        assert await go(query, connection) == Started(done.successor.id, created=False, same=same)


@pytest.mark.parametrize("commits", [True, False])
async def test_a_start_with_the_key_of_a_run_that_goes_on_now(
    module_dsn: str, store: Store, connection: Connection, commits: bool
) -> None:
    run = await keyed(store, connection)
    again: Start = new(key=run.key)
    with psycopg.connect(module_dsn) as mine, ThreadPoolExecutor() as threads:
        await connection.execute("begin")
        done = successor_of(run, 2)
        await apply(store, connection, done)
        waiting = threads.submit(operations.execute, operations.start(store, again), mine)
        wait_until_blocked(module_dsn, mine.info.backend_pid)
        await (connection.commit() if commits else connection.rollback())
        assert done.successor is not None
        found = done.successor.id if commits else run.id
        assert waiting.result(20) == Started(found, created=False, same=True)


# ---------------------------------------------------------------- messages


async def test_unread_messages_go_to_the_successor_as_new(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    for name in ("taken", "seen", "answered", "new"):
        await send(store, connection, run, name, f"id-{name}")
    await send(store, connection, run, None, kind=MessageKind.CANCEL)
    await send(store, connection, run, "rollout", kind=MessageKind.CHILD)
    taken, seen, answered, *_ = before = await load_inbox(store, connection, run.id)
    await mark_seen(store, connection, run.id, [seen.seq])
    successor = await follow(store, connection, run, taken={taken.seq: "wait"}, replies={answered.seq: "1"})
    assert await inbox(store, connection, successor) == [
        ("signal", "seen", "id-seen", True),
        ("signal", "new", "id-new", True),
        ("cancel", None, None, True),
    ]
    moved = {m.seq: m for m in await load_inbox(store, connection, successor.id)}
    assert all(replace(m, fresh=True) == moved[m.seq] for m in before if m.seq in moved)  # order, time and body stay
    assert await inbox(store, connection, run) == [("child", "rollout", None, True)]  # the answer that it asked for
    states = "select name, state, taken_by, reply::text from durable.inbox where run_id = %s order by seq"
    assert await rows(connection, states, run.id) == [
        ("taken", "taken", "wait", None),
        ("answered", "taken", None, "1"),
        ("rollout", "new", None, None),
    ]


@pytest.mark.parametrize(
    "kind", [SIGNAL, MessageKind.CANCEL, MessageKind.PAUSE, MessageKind.RESUME, MessageKind.ROLLBACK]
)
async def test_a_message_to_an_old_run_goes_to_the_end_of_the_chain(
    store: Store, connection: Connection, rival: Connection, kind: MessageKind
) -> None:
    first = await started(store, connection)
    second = await follow(store, connection, first)
    third = await follow(store, connection, second, 3)
    await rival.execute(f"listen {store.control_channel}".encode())
    for run in (first, second, third):
        assert await send(store, connection, run, "a", kind=kind) == "sent"
    assert await inbox(store, connection, third) == [(kind.value, "a", None, True)] * 3
    assert [job[0] for job in await jobs(store, connection, third.id)] == ["durable.advance", *["durable.ring"] * 3]
    assert len(await jobs(store, connection, first.id)) == 1
    if kind is not SIGNAL:
        assert [n.payload async for n in rival.notifies(timeout=20, stop_after=3)] == [str(third.id)] * 3
    await rival.execute("unlisten *")


async def test_a_childs_answer_is_for_the_run_that_asked(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    successor = await follow(store, connection, run)
    assert await send(store, connection, run, "rollout", kind=MessageKind.CHILD) == "finished"
    assert await inbox(store, connection, successor) == []


async def test_an_id_is_sent_once_to_a_chain(store: Store, connection: Connection) -> None:
    first = await started(store, connection)
    for id_ in ("taken", "unread"):
        assert await send(store, connection, first, "a", id_) == "sent"
    taken, _ = await load_inbox(store, connection, first.id)
    second = await follow(store, connection, first, taken={taken.seq: "wait"})
    assert await send(store, connection, second, "a", "second") == "sent"
    [_, by_second] = await load_inbox(store, connection, second.id)
    third = await follow(store, connection, second, 3, taken={by_second.seq: "wait"})
    assert await send(store, connection, third, "a", "third") == "sent"
    for run in (first, second, third):
        for id_ in ("taken", "unread", "second", "third"):
            assert await send(store, connection, run, "a", id_) == "duplicate"
    assert [m[2] for m in await inbox(store, connection, third)] == ["unread", "third"]
    for _ in range(2):
        assert await send(store, connection, first, "a") == "sent"  # without an id each is one of its own
    ended = {"status": Status.FAILED, "started_at": T0, "finished_at": T0}
    await write(store, connection, transition(await read(store, connection, third.id), after=ended))
    assert await send(store, connection, first, "a", "taken") == "duplicate"
    assert await send(store, connection, first, "a", "late") == "finished"


async def test_what_a_run_sends_to_itself_at_its_end_reaches_the_successor(
    store: Store, connection: Connection
) -> None:
    run = await started(store, connection)
    successor = await follow(store, connection, run, outgoing=(Outgoing(run.id, SIGNAL, "on", id="m"),))
    assert await inbox(store, connection, successor) == [("signal", "on", "m", True)]


# ---------------------------------------------------------------- messages that cross


async def forwarded(store: Store, connection: Connection, run: Run) -> int:
    """As the doorbell does it: under the run's lock."""
    await begin_and_lock(store, connection, run.id)
    count = await forward(store, connection, run.id)
    await connection.execute("commit")
    return count


async def test_a_message_that_crosses_is_sent_on(module_dsn: str, store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    with psycopg.connect(module_dsn) as sender:
        for name, id_, kind in (("a", None, SIGNAL), ("b", "m", SIGNAL), (None, None, MessageKind.CANCEL)):
            operations.execute(operations.send(store, run.id, kind, name, "1", id_), sender)
        successor = await follow(store, connection, run)
        assert await inbox(store, connection, successor) == []
        sender.commit()
    bells = await jobs(store, connection, run.id)
    assert [job[0] for job in bells] == ["durable.advance", *["durable.ring"] * 3]
    late = await load_inbox(store, connection, run.id)
    last = await follow(store, connection, successor, 3)
    assert await forwarded(store, connection, run) == 3
    assert await load_inbox(store, connection, last.id) == late
    assert await inbox(store, connection, run) == []
    assert [job[0] for job in await jobs(store, connection, last.id)] == ["durable.advance", "durable.ring"]
    assert await forwarded(store, connection, run) == 0
    assert await forwarded(store, connection, last) == 0  # nothing leaves the end of a chain
    assert len(await load_inbox(store, connection, last.id)) == 3
    assert len(await jobs(store, connection, last.id)) == 2


@pytest.mark.parametrize("taken", [True, False])
async def test_a_message_that_crosses_after_it_was_repeated_is_dropped(
    module_dsn: str, store: Store, connection: Connection, taken: bool
) -> None:
    run = await started(store, connection)
    with psycopg.connect(module_dsn) as sender:
        operations.execute(operations.send(store, run.id, SIGNAL, "a", "1", "m"), sender)
        successor = await follow(store, connection, run)
        assert await send(store, connection, run, "a", "m") == "sent"  # nobody can see the other one yet
        sender.commit()
    if taken:
        [message] = await load_inbox(store, connection, successor.id)
        await follow(store, connection, successor, 3, taken={message.seq: "wait"})
    assert await forwarded(store, connection, run) == 0
    total = "select count(*) from durable.inbox where message_id = 'm' and run_id = any(%s)"
    ends = [run.id, successor.id, await chain_end(connection, run)]
    assert await rows(connection, total, ends) == [(1,)]


# ---------------------------------------------------------------- resume


async def park(connection: Connection, run: Run, frame: Mapping[str, Any]) -> None:
    await connection.execute("update durable.runs set status = 'running' where id = %s", [run.id])
    await connection.execute(
        "update durable.runs set status = 'suspended', waiting_for = 'signal', frame = %s::jsonb where id = %s",
        [json.dumps(frame), run.id],
    )


async def resume(store: Store, connection: Connection, run: Run, name: str) -> str:
    answer: str = await go(operations.resume(store, run.id, name, "1"), connection)
    return answer


async def test_resume_asks_the_end_of_the_chain(store: Store, connection: Connection) -> None:
    first = await started(store, connection)
    second = await follow(store, connection, first)
    assert await resume(store, connection, first, "x") == "refused"  # waits for nothing yet
    await park(connection, second, {"a": {"waits": "signal", "name": "x"}})
    assert await resume(store, connection, first, "x") == "accepted"
    assert await resume(store, connection, second, "x") == "refused"  # has its answer
    assert await inbox(store, connection, second) == [("signal", "x", None, True)]
    assert await inbox(store, connection, first) == []


async def test_resume_of_a_run_that_goes_on_now(module_dsn: str, store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    await park(connection, run, {"a": {"waits": "signal", "name": "x"}})
    with psycopg.connect(module_dsn) as mine, ThreadPoolExecutor() as threads:
        await connection.execute("begin")
        locked = await lock(store, connection, run.id)
        assert locked is not None
        await apply(store, connection, successor_of(locked[0], 2, after={"waiting_for": None, "frame": {}}))
        waiting = threads.submit(operations.execute, operations.resume(store, run.id, "x"), mine)
        wait_until_blocked(module_dsn, mine.info.backend_pid)
        await connection.commit()
        assert waiting.result(20) == "refused"


@pytest.mark.parametrize(
    ("waits", "unread", "answers"),
    [
        ([["x", "y"]], [], {"x": "accepted", "y": "accepted", "z": "refused"}),
        ([[]], [], {"x": "accepted", "z": "accepted"}),  # any
        ([["x", "y"]], ["y"], {"x": "refused", "y": "refused"}),  # what came before satisfies it
        ([["x", "y"]], ["z"], {"x": "accepted", "z": "refused"}),
        ([[]], ["z"], {"x": "refused", "z": "refused"}),
        ([["x", "y"], "x"], ["y"], {"x": "accepted", "y": "refused"}),
        ([["x", "y"], "x"], ["x"], {"x": "accepted"}),
        ([["x", "y"], "x"], ["x", "y"], {"x": "refused", "y": "refused"}),
        (["x", []], ["z"], {"x": "accepted", "z": "refused"}),
        (["x"], [], {"y": "refused", "x": "accepted"}),
    ],
)
async def test_resume_of_waits_for_several_names(
    store: Store, connection: Connection, waits: list[Any], unread: list[str], answers: dict[str, str]
) -> None:
    for name, answer in answers.items():
        run = await started(store, connection)
        frame = {
            f"wait#{n}": {"waits": "signal", "names" if isinstance(wait, list) else "name": wait}
            for n, wait in enumerate(waits)
        }
        await park(connection, run, frame)
        for other in unread:
            await send(store, connection, run, other)
        assert await resume(store, connection, run, name) == answer
        assert len(await load_inbox(store, connection, run.id)) == len(unread) + (answer == "accepted")


# ---------------------------------------------------------------- all of it


async def test_the_invariants_know_chains(dsn: str) -> None:
    store = Store(dsn)
    async with await Connection.connect(dsn, autocommit=True) as connection:
        first = await keyed(store, connection)
        await send(store, connection, first, "a", "m")
        second = await follow(store, connection, first)
        third = await follow(store, connection, second, 3)
        invariants.check(dsn, at_rest=False)
        await connection.execute("create table kept as select * from durable.runs")
        await connection.execute("create table letters as select * from durable.inbox")
        for broken, told in (
            ("update durable.runs set predecessor = null where id = %(third)s", "a chain is linked both ways"),
            ("update durable.runs set chain = null where id = %(third)s", "is its only successor"),
            ("update durable.runs set key = 'other' where id = %(third)s", "a chain is linked both ways"),
            ("update durable.runs set predecessor = %(first)s where id = %(third)s", "is its only successor"),
            ("update durable.inbox set replied_at = now() where run_id = %(third)s", "a message that was completed"),
            ("update durable.inbox set reply = '1' where run_id = %(third)s", "a message that was completed"),
            ("update durable.inbox set run_id = %(first)s where run_id = %(third)s", "left nothing behind"),
            (
                "insert into durable.inbox (run_id, message_id, kind, sent_at) values (%(first)s, 'm', 'pause', now())",
                "a message's id is once in a chain",
            ),
        ):
            await connection.execute(broken.encode(), {"first": first.id, "third": third.id})
            assert any(told in line for line in invariants.violations(dsn)), broken
            await connection.execute("truncate durable.runs, durable.inbox")
            await connection.execute("insert into durable.runs select * from kept")
            await connection.execute("insert into durable.inbox overriding system value select * from letters")
        invariants.check(dsn, at_rest=False)


async def test_abandoned_after_an_error(store: Store, connection: Connection) -> None:
    """A continuation that is refused in the middle of a flush leaves a connection that can be used."""
    run = await started(store, connection)
    done = successor_of(run, 2)
    for _ in range(7):
        await connection.execute("begin")
        with pytest.raises(InternalError):
            await apply(
                store,
                connection,
                replace(done, successor=Successor(run.id, "1", "1"), after=replace(done.after, successor=run.id)),
            )
        await abandon(connection)
    await write(store, connection, done)
