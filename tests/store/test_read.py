"""What status, list, history and result show, of runs that were written as the engine writes them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.store.kit import rows, started, transition

from durable.core.state import Begun, Claim, Ending, Entry, EntryKind, Failure, MessageKind, Run
from durable.core.transition import Event, FailedAttempt, Next, Successor
from durable.errors import ConfigurationError, PayloadError, RunNotFound
from durable.snapshots import DERIVED, ErrorInfo, HistoryEvent, StepSnapshot
from durable.store import operations, read
from durable.store.apply import apply
from durable.store.connection import Connection
from durable.store.db import Store
from durable.values import Status, WaitingFor

FAILURE = Failure("shop.CardDeclined", "no funds", "exhausted", "charge", 3, "Traceback ...", {"code": 51})


@pytest.fixture
def store(dsn: str) -> Store:
    return Store(dsn)


async def write(
    store: Store, connection: Connection, run: Run, after: Mapping[str, Any] | None = None, **parts: Any
) -> Run:
    """One transition."""
    made = transition(run, after=dict(after or {}), **parts)
    async with connection.transaction():
        await apply(store, connection, made)
    return made.after


async def now(connection: Connection) -> datetime:
    return (await rows(connection, "select durable.engine_now()"))[0][0]  # type: ignore[no-any-return]


def entry(step_id: str, result: Any = None, kind: EntryKind = EntryKind.STEP, **more: Any) -> Entry:
    return Entry(step_id, kind, more.pop("status", "completed"), json.dumps(result), **more)


# ---------------------------------------------------------------- status


async def test_an_unknown_run(store: Store, connection: Connection) -> None:
    nobody = uuid.uuid4()
    assert await read.status_of(store, connection, nobody) is None
    assert not await read.exists(store, connection, nobody)
    for operation in (read.snapshot, read.history, read.outcome):
        with pytest.raises(RunNotFound, match=str(nobody)):
            await operation(store, connection, nobody)


async def test_a_run_that_was_just_started(store: Store, connection: Connection) -> None:
    run = await started(store, connection, key="k", tags={"tenant": "acme"}, priority=3, input='{"total": 1.50}')
    shown = await read.snapshot(store, connection, run.id)
    assert (shown.id, shown.workflow, shown.version) == (run.id, "order", "1")
    assert (shown.status, shown.derived, shown.cursor, shown.ended) == (Status.PENDING, "pending", 0, False)
    assert (shown.key, shown.tags, shown.priority, shown.input) == ("k", {"tenant": "acme"}, 3, {"total": 1.5})
    assert (shown.steps, shown.children, shown.results, shown.error) == ((), (), {}, None)
    assert (shown.created_at, shown.started_at, shown.finished_at) == (run.created_at, None, None)
    assert shown.total_steps is None
    counted = await read.snapshot(store, connection, run.id, totals=lambda name, version: len(name + version))
    assert counted.total_steps == 6
    assert await read.exists(store, connection, run.id)
    assert await read.status_of(store, connection, run.id) is Status.PENDING


async def test_steps_and_results(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    time = await now(connection)
    run = await write(
        store,
        connection,
        run,
        {
            "status": Status.SUSPENDED,
            "waiting_for": WaitingFor.SIGNAL,
            "waiting_name": "approval",
            "current_step": 4,
            "frame": {"signoff": Begun(since=time, waits=WaitingFor.SIGNAL, name="approval", deadline=time)},
        },
        entries=(
            entry("discover", {"a": [1, 2]}, started_at=time, finished_at=time, attempt=2),
            entry("build/ui", "u", EntryKind.BRANCH, parent="build"),
            entry("build/api", "a", EntryKind.BRANCH, parent="build"),
            entry("build", {"api": "a", "ui": "u"}, EntryKind.PARALLEL),
            entry("choice:target", "cloud", EntryKind.CHOICE, parent="target"),
            entry("target/cloud", 7, EntryKind.BRANCH, parent="target"),
            entry("target", {"branch": "cloud", "value": 7}, EntryKind.ROUTE),
            entry("poll[0]", 1, EntryKind.ITERATION, parent="poll"),
            entry("poll[1]", 2, EntryKind.ITERATION, parent="poll"),
            entry("poll", [1, 2], EntryKind.LOOP),
        ),
    )
    shown = await read.snapshot(store, connection, run.id)
    assert (shown.derived, shown.waiting_for, shown.waiting_name) == (
        "waiting_for_signal", WaitingFor.SIGNAL, "approval"
    )  # fmt: skip
    assert shown.results == {
        "discover": {"a": [1, 2]},
        "build": {"api": "a", "ui": "u"},
        "target": {"branch": "cloud", "value": 7},
        "poll": [1, 2],
    }
    assert [(s.step_id, s.kind, s.status, [c.step_id for c in s.children]) for s in shown.steps] == [
        ("discover", "step", "completed", []),
        ("build", "parallel", "completed", ["build/ui", "build/api"]),
        ("target", "route", "completed", ["target/cloud"]),
        ("poll", "loop", "completed", ["poll[0]", "poll[1]"]),
        ("signoff", "signal", "waiting", []),
    ]
    first = shown.steps[0]
    assert (first.attempt, first.result, first.started_at, first.finished_at) == (2, {"a": [1, 2]}, time, time)


async def test_a_node_that_is_not_journaled_yet_is_shown_around_its_branches(
    store: Store, connection: Connection
) -> None:
    run, time = await started(store, connection), await now(connection)
    due = time + timedelta(seconds=5)
    frame = {
        "build/ui": Begun(since=time, running=True),
        "build/api": Begun(attempts=1, since=time, due=due, waits=WaitingFor.RETRY),
    }
    claim = Claim(1, uuid.uuid4())
    attempt = FailedAttempt("build/api", 1, "failed", FAILURE, time, time, due)
    done = entry("build/db", 1, EntryKind.BRANCH, parent="build")
    run = await write(
        store,
        connection,
        run,
        {"status": Status.RUNNING, "frame": frame, "claim": claim},
        entries=(done,),
        attempts=(attempt,),
    )
    (build,) = (await read.snapshot(store, connection, run.id)).steps
    assert (build.step_id, build.kind, build.status) == ("build", "parallel", "running")
    db, ui, api = sorted(build.children, key=lambda child: ["build/db", "build/ui", "build/api"].index(child.step_id))
    assert (db.status, ui.status, api.status) == ("completed", "running", "waiting")
    assert (ui.attempt, api.attempt, api.next_attempt_at) == (1, 2, due)
    assert api.error == ErrorInfo(
        "shop.CardDeclined", "no funds", "exhausted", "charge", 3, "Traceback ...", {"code": 51}
    )
    assert str(api.error) == "shop.CardDeclined: no funds"


@pytest.mark.parametrize(
    ("journal", "frame", "expected"),
    [
        ([entry("poll[0]", 1, EntryKind.ITERATION, parent="poll")], {}, ("poll", "loop")),
        (
            [entry("choice:to", "x", EntryKind.CHOICE, parent="to"), entry("to/x", 1, EntryKind.BRANCH, parent="to")],
            {},
            ("to", "route"),
        ),
        ([], {"poll[0]": Begun(running=True)}, ("poll", "loop")),
        ([], {"nap": Begun(waits=WaitingFor.SLEEP)}, ("nap", "sleep")),
        ([], {"sub": Begun(waits=WaitingFor.CHILD, child=uuid.uuid4())}, ("sub", "child")),
        ([], {"undo:a/b": Begun(waits=WaitingFor.RETRY)}, ("undo:a/b", "undo")),
        ([], {"choice:to": Begun(waits=WaitingFor.RETRY)}, ("choice:to", "choice")),
        ([], {"run:result": Begun(waits=WaitingFor.RETRY)}, ("run:result", "result")),
        ([], {"charge": Begun(attempts=1)}, ("charge", "step")),
    ],
)
async def test_the_kind_of_what_is_open(
    store: Store,
    connection: Connection,
    journal: Sequence[Entry],
    frame: Mapping[str, Begun],
    expected: tuple[str, str],
) -> None:
    run = await started(store, connection)
    run = await write(store, connection, run, {"status": Status.RUNNING, "frame": frame}, entries=tuple(journal))
    (step,) = (await read.snapshot(store, connection, run.id)).steps
    assert (step.step_id, step.kind) == expected


def outline(steps: Sequence[StepSnapshot]) -> list[Any]:
    return [(step.step_id, step.kind, step.status, outline(step.children)) for step in steps]


async def test_what_a_function_has_passed_is_a_tree(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    entries = (
        entry("charge", 1),
        entry("charge#2", 2),
        entry("patch:v2", True, EntryKind.PATCH),
        entry("rollback:1", None, EntryKind.ROLLBACK),
        entry("mark", 0, EntryKind.CHECKPOINT),
        entry("fulfil/pick/find", 3, parent="fulfil/pick"),
        entry("fulfil/pick/wrap/tape", 4, parent="fulfil/pick/wrap"),
        entry("fulfil/pick/wrap", 5, EntryKind.BLOCK, parent="fulfil/pick"),
        entry("fulfil/pick", 6, EntryKind.BRANCH, parent="fulfil"),
        entry("fulfil/label", 7, EntryKind.BRANCH, parent="fulfil"),
        entry("fulfil", {"pick": 6, "label": 7}, EntryKind.JOIN),
        entry("items[0]", 8, EntryKind.CHILD, parent="items"),
        entry("items", [8], EntryKind.MAP),
        entry("questions", ["q"], EntryKind.RECEIVE),
        entry("reply:questions", None, EntryKind.REPLY),
        Entry("refused", EntryKind.STEP, "failed", error=FAILURE),
    )
    await write(store, connection, run, {"status": Status.RUNNING, "current_step": 7}, entries=entries)
    shown = await read.snapshot(store, connection, run.id)
    assert outline(shown.steps) == [
        ("charge", "step", "completed", []),
        ("charge#2", "step", "completed", []),
        ("mark", "checkpoint", "completed", []),
        (
            "fulfil",
            "join",
            "completed",
            [
                (
                    "fulfil/pick",
                    "branch",
                    "completed",
                    [
                        ("fulfil/pick/find", "step", "completed", []),
                        (
                            "fulfil/pick/wrap",
                            "block",
                            "completed",
                            [("fulfil/pick/wrap/tape", "step", "completed", [])],
                        ),
                    ],
                ),
                ("fulfil/label", "branch", "completed", []),
            ],
        ),
        ("items", "map", "completed", [("items[0]", "child", "completed", [])]),
        ("questions", "receive", "completed", []),
        ("refused", "step", "failed", []),
    ]
    assert shown.results == {
        "charge": 1,
        "charge#2": 2,
        "mark": 0,
        "fulfil": {"pick": 6, "label": 7},
        "items": [8],
        "questions": ["q"],
    }


@pytest.mark.parametrize(
    ("journal", "frame", "expected"),
    [
        (
            [entry("do/label", 1, EntryKind.BRANCH, parent="do")],
            {"do/pick/find": Begun(running=True)},
            [
                (
                    "do",
                    "parallel",
                    [("do/label", "branch", []), ("do/pick", "branch", [("do/pick/find", "step", [])])],
                )
            ],
        ),
        (
            [entry("pay/charge", 1, parent="pay")],
            {"pay/again/charge": Begun(running=True)},
            [
                (
                    "pay",
                    "block",
                    [("pay/charge", "step", []), ("pay/again", "block", [("pay/again/charge", "step", [])])],
                )
            ],
        ),
        (
            [],
            {"track[2]/look": Begun(running=True)},
            [("track", "loop", [("track[2]", "iteration", [("track[2]/look", "step", [])])])],
        ),
        ([], {"items[3]": Begun(waits=WaitingFor.CHILD)}, [("items", "map", [("items[3]", "child", [])])]),
        ([], {"inbox": Begun(waits=WaitingFor.SIGNAL, names=("a", "b"))}, [("inbox", "receive", [])]),
        (
            [],
            {"a/b/c/nap": Begun(waits=WaitingFor.SLEEP)},
            [("a", "block", [("a/b", "block", [("a/b/c", "block", [("a/b/c/nap", "sleep", [])])])])],
        ),
    ],
)
async def test_what_a_function_is_in_is_shown_around_it(
    store: Store, connection: Connection, journal: Sequence[Entry], frame: Mapping[str, Begun], expected: list[Any]
) -> None:
    def kinds(steps: Sequence[StepSnapshot]) -> list[Any]:
        return [(step.step_id, step.kind, kinds(step.children)) for step in steps]

    run = await started(store, connection)
    await write(store, connection, run, {"status": Status.RUNNING, "frame": frame}, entries=tuple(journal))
    assert kinds((await read.snapshot(store, connection, run.id)).steps) == expected


async def test_a_chain_is_linked_and_its_end_is_its_outcome(store: Store, connection: Connection) -> None:
    first, new = await started(store, connection), uuid.uuid4()
    done = {"status": Status.COMPLETED, "finished_at": await now(connection), "successor": new}
    await write(store, connection, first, done, successor=Successor(new, "1", "2"))
    shown = await read.snapshot(store, connection, first.id)
    assert (shown.status, shown.predecessor, shown.successor, shown.revision) == (Status.COMPLETED, None, new, 1)
    following = await read.snapshot(store, connection, new)
    assert (following.predecessor, following.successor, following.forked_from) == (first.id, None, None)
    outcome = await read.outcome(store, connection, first.id)
    assert (outcome.id, outcome.status, outcome.result) == (new, Status.PENDING, None)
    assert await read.status_of(store, connection, first.id) is Status.COMPLETED
    assert await read.revision_of(store, connection, first.id) == 1
    assert await read.revision_of(store, connection, uuid.uuid4()) is None


async def test_a_fork_says_whose(store: Store, connection: Connection) -> None:
    run, new = await started(store, connection), uuid.uuid4()
    await operations.execute_async(operations.fork(store, run.id, new), connection)
    assert (await read.snapshot(store, connection, new)).forked_from == run.id
    (created,) = await read.history(store, connection, new)
    assert (created.kind, created.data) == ("created", {"forked_from": str(run.id)})


async def test_a_suspended_step_shows_its_snapshot(store: Store, connection: Connection) -> None:
    run, time = await started(store, connection), await now(connection)
    frame = {"ask": Begun(since=time, waits=WaitingFor.RESUME, name="ask")}
    parked = {"status": Status.SUSPENDED, "waiting_for": WaitingFor.RESUME, "waiting_name": "ask", "frame": frame}
    suspended = entry("ask", {"question": "?"}, status="suspended", started_at=time, finished_at=time)
    run = await write(store, connection, run, parked, entries=(suspended,))
    shown = await read.snapshot(store, connection, run.id)
    (step,) = shown.steps
    assert shown.derived == "waiting_for_resume"
    assert shown.results == {}
    assert (step.status, step.snapshot, step.result, step.finished_at) == ("suspended", {"question": "?"}, None, None)

    frame = {"ask": Begun(since=time, resume_data='{"answer": 1}')}
    run = await write(
        store, connection, run, {"status": Status.RUNNING, "waiting_for": None, "waiting_name": None, "frame": frame}
    )
    (step,) = (await read.snapshot(store, connection, run.id)).steps
    assert (step.status, step.snapshot) == ("running", {"question": "?"})


async def test_a_failed_run_says_what_was_not_undone(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    ending = Ending(Status.FAILED, FAILURE)
    undoing = {"status": Status.COMPENSATING, "ending": ending, "error": FAILURE}
    run = await write(store, connection, run, {"status": Status.RUNNING}, entries=(entry("a", 1), entry("b", 2)))
    failed = Entry("charge", EntryKind.STEP, "failed", error=FAILURE, attempt=3)
    run = await write(store, connection, run, undoing, entries=(failed,), next=Next.COMPENSATE)
    undone = (
        Entry("undo:b", EntryKind.UNDO, "failed", error=Failure("ValueError", "")),
        Entry("undo:a", EntryKind.UNDO, "completed"),
    )
    run = await write(store, connection, run, entries=undone)
    assert (await read.snapshot(store, connection, run.id)).not_undone == ("b",)

    error = replace(FAILURE, details={"not_undone": ["b"]})
    time = await now(connection)
    run = await write(
        store, connection, run, {"status": Status.FAILED, "ending": None, "error": error, "finished_at": time}
    )
    shown = await read.snapshot(store, connection, run.id)
    assert (shown.status, shown.not_undone, shown.finished_at, shown.ended) == (Status.FAILED, ("b",), time, True)
    assert shown.error is not None
    assert (shown.error.type, shown.error.attempts) == ("shop.CardDeclined", 3)
    assert [(step.step_id, step.status) for step in shown.steps] == [
        ("a", "completed"), ("b", "completed"), ("charge", "failed"), ("undo:b", "failed"), ("undo:a", "completed"),
    ]  # fmt: skip
    assert str(shown.steps[3].error) == "ValueError"
    outcome = await read.outcome(store, connection, run.id)
    assert (outcome.status, outcome.result, outcome.not_undone) == (Status.FAILED, None, ("b",))
    assert outcome.error == shown.error


async def test_the_tree(store: Store, connection: Connection) -> None:
    root = await started(store, connection)

    async def child(parent: uuid.UUID) -> uuid.UUID:
        made = await started(store, connection)
        await connection.execute(
            b"update durable.runs set parent_id = %s, parent_step = 'sub' where id = %s", [parent, made.id]
        )
        return made.id

    children = [await child(root.id) for _ in range(3)]
    grandchildren = [await child(children[1]), await child(children[0]), await child(children[1])]

    shown = await read.snapshot(store, connection, root.id)
    assert [one.id for one in shown.children] == children
    assert [[one.id for one in two.children] for two in shown.children] == [
        [grandchildren[1]], [grandchildren[0], grandchildren[2]], []
    ]  # fmt: skip
    assert (shown.children[0].parent_id, shown.children[0].parent_step) == (root.id, "sub")

    cut = await read.snapshot(store, connection, root.id, children=2)
    assert [one.id for one in cut.children] == children[:2]
    assert [[one.id for one in two.children] for two in cut.children] == [[grandchildren[1]], [grandchildren[0]]]
    assert (await read.snapshot(store, connection, root.id, children=0)).children == ()
    below = await read.snapshot(store, connection, children[1])
    assert [one.id for one in below.children] == [grandchildren[0], grandchildren[2]]


async def test_a_snapshot_is_of_one_moment(
    store: Store, connection: Connection, rival: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plain = await started(store, connection), read._rows

    async def rows_and_then_a_write(given: Connection, query: bytes, **values: Any) -> list[dict[str, Any]]:
        found = await plain(given, query, **values)
        monkeypatch.setattr(read, "_rows", plain)
        await write(store, rival, run, {"status": Status.RUNNING}, entries=(entry("a", 1),))
        return found

    monkeypatch.setattr(read, "_rows", rows_and_then_a_write)
    shown = await read.snapshot(store, connection, run.id)
    assert (shown.status, shown.steps) == (Status.PENDING, ())
    assert len((await read.snapshot(store, connection, run.id)).steps) == 1


async def test_a_snapshot_in_the_callers_transaction(store: Store, connection: Connection) -> None:
    async with connection.transaction(force_rollback=True):
        run = await started(store, connection)
        assert (await read.snapshot(store, connection, run.id)).id == run.id
        assert [event.kind for event in await read.history(store, connection, run.id)] == ["created"]


# ---------------------------------------------------------------- result


async def test_the_default_result_is_put_together_from_texts(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    entries = (
        Entry("z", EntryKind.STEP, "completed", '{"b":1.0, "a":1e400}'),
        Entry("build/api", EntryKind.BRANCH, "completed", "1", parent="build"),
        Entry("build", EntryKind.PARALLEL, "completed", '{"api":1}'),
        Entry("choice:ä", EntryKind.CHOICE, "completed", '"x"', parent="ä"),
        Entry('ä "quoted"', EntryKind.SLEEP, "completed", None),
    )
    run = await write(store, connection, run, {"status": Status.RUNNING}, entries=entries)
    assert await read.outcome(store, connection, run.id) == read.Outcome(
        run.id, Status.RUNNING, "order", "1", run.queue
    )
    await write(store, connection, run, {"status": Status.COMPLETED, "finished_at": await now(connection)})
    outcome = await read.outcome(store, connection, run.id)
    assert outcome.result == '{"z":{"b":1.0, "a":1e400},"build":{"api":1},"ä \\"quoted\\"":null}'
    assert outcome.not_undone == ()


@pytest.mark.parametrize(("entries", "expected"), [((), "{}"), ((entry("run:result", 7, EntryKind.RESULT),), "7")])
async def test_other_results(store: Store, connection: Connection, entries: tuple[Entry, ...], expected: str) -> None:
    run = await started(store, connection)
    done = {"status": Status.COMPLETED, "finished_at": await now(connection)}
    await write(store, connection, run, done, entries=(*((entry("a", 1),) if entries else ()), *entries))
    assert (await read.outcome(store, connection, run.id)).result == expected


class Reversed:
    def encode(self, plain: bytes, /) -> bytes:
        return plain[::-1]

    decode = encode


async def test_payloads_go_through_the_codec(dsn: str, connection: Connection) -> None:
    store = Store(dsn, codec=Reversed())
    run, time = await started(store, connection, input='{"secret": 1}'), await now(connection)
    run = await write(
        store,
        connection,
        run,
        {"status": Status.FAILED, "error": FAILURE, "finished_at": time},
        entries=(entry("a", "secret"), Entry("b", EntryKind.STEP, "failed", error=FAILURE)),
        attempts=(FailedAttempt("b", 1, "failed", FAILURE, None, time),),
        events=(Event("branch_discarded", "x/y", {"secret": 1}),),
    )
    await connection.execute(
        b"insert into durable.inbox (run_id, kind, name, body, sent_at) values (%s, 'signal', 'go', %s, now())",
        [run.id, store.payloads.encode('"secret"')],
    )
    shown = await read.snapshot(store, connection, run.id)
    assert (shown.input, shown.results) == ({"secret": 1}, {"a": "secret"})
    assert shown.error is not None
    assert shown.error.message == "no funds"
    events = await read.history(store, connection, run.id)
    assert {"secret", None} == {event.payload for event in events}
    assert next(event.data for event in events if event.kind == "branch_discarded") == {"secret": 1}
    assert next(event.parent for event in events if event.kind == "branch_discarded") == "x"
    assert (await read.page(store, connection)).items[0].input == {"secret": 1}
    with pytest.raises(PayloadError, match="codec"):
        await read.snapshot(Store(dsn), connection, run.id)


# ---------------------------------------------------------------- list


async def put(connection: Connection, status: str = "pending", **columns: Any) -> uuid.UUID:
    """A run, younger than those before it by a second."""
    id_ = uuid.uuid4()
    given = {"id": id_, "root_id": id_, "workflow": "order", "version": "1", "status": status, "queue": "shop"} | {
        "input": "{}",
        "input_hash": "",
    }
    given |= columns
    ended = f"{status in ('completed', 'failed', 'canceled')}"
    statement = f"""
    insert into durable.runs ({", ".join(given)}, created_at, finished_at) values (
      {", ".join(["%s"] * len(given))},
      (select coalesce(max(created_at), now()) + interval '1 s' from durable.runs), case when {ended} then now() end
    )"""
    await connection.execute(statement.encode(), list(given.values()))
    return id_


async def ids(store: Store, connection: Connection, **filters: Any) -> list[uuid.UUID]:
    return [one.id for one in await read.page(store, connection, **filters)]


async def test_pages_are_the_newest_first(store: Store, connection: Connection) -> None:
    runs = [await put(connection) for _ in range(5)][::-1]
    await connection.execute(b"update durable.runs set created_at = '2026-01-01 00:00:00.000001+00'")  # ids decide
    runs.sort(reverse=True)
    seen: list[uuid.UUID] = []
    after: str | None = None
    for expected in (2, 2, 1):
        page = await read.page(store, connection, limit=2, after=after)
        assert len(page) == expected
        assert (page.next is None) == (expected == 1)
        seen, after = seen + [one.id for one in page], page.next
    assert seen == runs
    assert (await read.page(store, connection, limit=5)).next is None
    assert (await read.page(store, connection, workflow="none")).items == ()


async def test_a_new_run_does_not_shift_the_pages(store: Store, connection: Connection) -> None:
    runs = [await put(connection) for _ in range(4)][::-1]
    first = await read.page(store, connection, limit=2)
    await put(connection)
    assert await ids(store, connection, limit=2, after=first.next) == runs[2:]


async def test_a_key_is_that_of_the_end_of_its_chain(store: Store, connection: Connection) -> None:
    new = uuid.uuid4()
    await put(connection, "completed", key="k-1", successor=new)
    await put(connection, id=new, root_id=new, key="k-1")
    assert await ids(store, connection, key="k-1") == [new]
    assert len(await ids(store, connection)) == 2


async def test_filters(store: Store, connection: Connection) -> None:
    old = await put(connection, "completed", version="0", tags='{"tenant": "acme", "vip": true}', key="k-1")
    other = await put(connection, workflow="refund", tags='{"tenant": "acme"}', key="k-1")
    child = await put(connection, "running", parent_id=old, root_id=old, started_at="2026-03-01 12:00+00")
    late = await put(connection, "running", started_at="2026-03-02 12:00+00")
    assert await ids(store, connection) == [late, child, other, old]
    assert await ids(store, connection, workflow="order") == [late, child, old]
    assert await ids(store, connection, workflow="order", version="0") == [old]
    assert await ids(store, connection, version="1") == [late, child, other]
    assert await ids(store, connection, tags={"tenant": "acme"}) == [other, old]
    assert await ids(store, connection, tags={"vip": True, "tenant": "acme"}) == [old]
    assert await ids(store, connection, tags={"vip": "true"}) == []
    assert await ids(store, connection, tags={}) == [late, child, other, old]
    assert await ids(store, connection, parent=old) == [child]
    assert await ids(store, connection, key="k-1") == [other, old]
    assert await ids(store, connection, key="k-1", workflow="refund") == [other]
    assert await ids(store, connection, started_after=datetime(2026, 3, 1, 12, tzinfo=UTC)) == [late]
    assert await ids(store, connection, started_after=datetime(2026, 2, 1, tzinfo=UTC), parent=old) == [child]


async def test_statuses_plain_and_derived(store: Store, connection: Connection) -> None:
    parked = {
        derived: await put(connection, "suspended", waiting_for=waiting_for.value)
        for waiting_for, derived in DERIVED.items()
    }
    delayed = await put(connection, "pending", waiting_for="start")
    undoing = await put(connection, "compensating", waiting_for="retry", ending="{}")
    paused = await put(connection, "paused", waiting_for="sleep")
    running, failed = await put(connection, "running"), await put(connection, "failed")

    for derived, run in parked.items():
        expected = [delayed, run] if derived == "delayed" else [run]
        assert await ids(store, connection, status=derived) == expected
        assert {(await read.snapshot(store, connection, one)).derived for one in expected} == {derived}
    assert await ids(store, connection, status="suspended") == list(parked.values())[::-1]
    assert await ids(store, connection, status=Status.COMPENSATING) == [undoing]
    assert (await read.snapshot(store, connection, undoing)).derived == "compensating"
    assert await ids(store, connection, status=[Status.FAILED, "running"]) == [failed, running]
    assert await ids(store, connection, status={"retrying", "paused"}) == [paused, parked["retrying"]]
    both = await ids(store, connection, status=("suspended", "retrying", "sleeping"))  # each run once
    assert both == list(parked.values())[::-1]

    page = await read.page(store, connection, status=["suspended", "running", "failed"], limit=2)
    assert [one.id for one in page] == [failed, running]
    rest = await ids(store, connection, status=["suspended", "running", "failed"], after=page.next)
    assert rest == list(parked.values())[::-1]


async def test_a_list_is_cheap(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    await write(store, connection, run, {"status": Status.RUNNING}, entries=(entry("a", 1),))
    (shown,) = await read.page(store, connection, totals=lambda _, __: 3)
    assert (shown.results, shown.steps, shown.children, shown.total_steps) == ({}, (), (), 3)
    assert shown.input == {"n": 1}


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"status": "finished"}, "unknown status 'finished': there are pending, running, .*retrying, sleeping"),
        ({"status": ["running", "x", "y"]}, "unknown status 'x', 'y'"),
        ({"status": []}, "no status at all"),
        ({"limit": 0}, "1 to 1000"),
        ({"limit": 1001}, "1 to 1000"),
        ({"after": "nonsense"}, "not the `next` of a page"),
        ({"after": "ä"}, "not the `next` of a page"),
        ({"after": ""}, "not the `next` of a page"),
        ({"started_after": datetime(2026, 1, 1)}, "time zone"),  # noqa: DTZ001 - that is the mistake
    ],
)
async def test_wrong_filters(store: Store, connection: Connection, filters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        await read.page(store, connection, **filters)


# ---------------------------------------------------------------- history


def told(events: list[HistoryEvent]) -> list[str]:
    """``kind step#attempt`` of each."""
    return [
        f"{e.kind}{f' {e.step}' if e.step else ''}{f'#{e.attempt}' if e.attempt is not None else ''}" for e in events
    ]


async def test_a_life(store: Store, connection: Connection) -> None:
    """A retried step, a signal, a sleep, a failure, a rollback: in order, although a transaction has one time."""
    run = await started(store, connection)
    begin = await now(connection)
    due = begin + timedelta(seconds=1)
    waits = {"status": Status.SUSPENDED, "waiting_for": WaitingFor.RETRY, "waiting_name": "a", "wake_at": due}
    run = await write(
        store,
        connection,
        run,
        waits | {"started_at": begin, "frame": {"a": Begun(1, since=begin, due=due, waits=WaitingFor.RETRY)}},
        attempts=(FailedAttempt("a", 1, "failed", FAILURE, begin, await now(connection), due),),
    )
    await connection.execute(b"update durable.clock set ahead = '2 s'")
    await operations.execute_async(operations.send(store, run.id, MessageKind.SIGNAL, "go", '{"x": 1}'), connection)
    free: dict[str, Any] = {"waiting_for": None, "waiting_name": None, "wake_at": None, "frame": {}}
    done = await now(connection)
    entries: tuple[Entry, ...] = (entry("a", "A", attempt=2, started_at=begin, finished_at=done),)
    run = await write(store, connection, run, free | {"status": Status.RUNNING}, entries=entries)

    time = await now(connection)
    entries = (
        entry("go", {"x": 1}, EntryKind.SIGNAL, started_at=time, finished_at=time, extra={"signal": "go"}),
        entry("nap", None, EntryKind.SLEEP, started_at=time, finished_at=time),
    )
    run = await write(store, connection, run, entries=entries)

    time = await now(connection)
    failed = Entry("b", EntryKind.STEP, "failed", error=FAILURE, attempt=1, started_at=time, finished_at=time)
    ending = {"status": Status.COMPENSATING, "ending": Ending(Status.FAILED, FAILURE), "error": FAILURE}
    run = await write(store, connection, run, ending, entries=(failed,))
    time = await now(connection)
    undone = Entry("undo:a", EntryKind.UNDO, "completed", started_at=time, finished_at=time)
    run = await write(store, connection, run, entries=(undone,))
    time = await now(connection)
    over = {"status": Status.FAILED, "ending": None, "finished_at": time}
    await write(store, connection, run, over)

    events = await read.history(store, connection, run.id)
    assert told(events) == [
        "created",
        "started",
        "attempt_started a#1",
        "attempt_failed a#1",
        "suspended",
        "attempt_started a#2",
        "message_received",
        "attempt_succeeded a#2",
        "wait_waiting go",
        "wait_satisfied go",
        "sleep_waiting nap",
        "sleep_elapsed nap",
        "attempt_started b#1",
        "attempt_failed b#1",
        "compensating",
        "compensated a#1",
        "failed",
    ]
    assert [event.at for event in events] == sorted(event.at for event in events)
    by_name = dict(zip(told(events), events, strict=True))
    assert by_name["attempt_failed a#1"].next_attempt_at == due == by_name["attempt_started a#2"].at
    assert by_name["attempt_failed a#1"].error == ErrorInfo(**vars_of(FAILURE))
    assert by_name["attempt_succeeded a#2"].payload == "A"
    assert by_name["message_received"].payload == {"x": 1}
    assert by_name["message_received"].data == {"name": "go", "id": None, "taken_by": None}
    assert by_name["wait_satisfied go"].data == {"signal": "go"}
    assert by_name["failed"].error == ErrorInfo(**vars_of(FAILURE))
    assert by_name["suspended"].data == {"waiting_for": "retry", "name": "a", "wake_at": due.isoformat()}


async def test_the_rows_own_part_of_a_history(store: Store, connection: Connection) -> None:
    """That it was created, started and completed is told by the run's row; and by events, where there are some."""
    run = await started(store, connection)
    began = await now(connection)
    entries = (entry("a", 1, started_at=began, finished_at=began),)
    run = await write(store, connection, run, {"status": Status.RUNNING, "started_at": began}, entries=entries)
    assert told(await read.history(store, connection, run.id))[:2] == ["created", "started"]
    ended = await now(connection)
    run = await write(store, connection, run, {"status": Status.COMPLETED, "finished_at": ended})
    assert await rows(connection, "select kind from durable.events where run_id = %s", run.id) == []
    life = ["created", "started", "attempt_started a#1", "attempt_succeeded a#1", "completed"]
    events = await read.history(store, connection, run.id)
    assert told(events) == life
    assert [event.at for event in events] == [run.created_at, began, began, began, ended]
    assert [event.data for event in events if event.step is None] == [None] * 3

    undoing = {"status": Status.COMPENSATING, "finished_at": None, "ending": Ending(Status.CANCELED)}
    run = await write(store, connection, run, undoing)
    assert told(await read.history(store, connection, run.id)) == [*life, "compensating"]
    canceled = {"status": Status.CANCELED, "finished_at": await now(connection), "ending": None}
    run = await write(store, connection, run, canceled)
    events = await read.history(store, connection, run.id)
    assert told(events) == [*life, "compensating", "canceled"]
    assert [event.at for event in events[:5]] == [run.created_at, began, began, began, ended]


async def test_what_rows_and_events_both_tell_is_told_once(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    began, ended = await now(connection), await now(connection)
    run = await write(store, connection, run, {"status": Status.RUNNING, "started_at": began})
    run = await write(store, connection, run, {"status": Status.COMPLETED, "finished_at": ended})
    kinds = {"created": run.created_at, "started": began, "completed": ended}
    for kind, at in kinds.items():
        await connection.execute(
            b"insert into durable.events (run_id, kind, at) values (%s, %s, %s)", [run.id, kind, at]
        )
    events = await read.history(store, connection, run.id)
    assert {event.kind: event.at for event in events} == kinds
    assert told(events) == [*kinds]


def vars_of(failure: Failure) -> dict[str, Any]:
    return {name: getattr(failure, name) for name in Failure.__dataclass_fields__}


async def history_of(store: Store, connection: Connection, *entries: Entry, **more: Any) -> list[HistoryEvent]:
    """The history of a run with these entries, without its lifecycle."""
    run = await started(store, connection)
    after = {"status": Status.RUNNING, "started_at": await now(connection)} | more.pop("after", {})
    await write(store, connection, run, after, entries=entries, **more)
    skipped = ("created", "started", "suspended")
    return [event for event in await read.history(store, connection, run.id) if event.kind not in skipped]


async def test_what_a_function_has_done_is_told_with_its_place(store: Store, connection: Connection) -> None:
    time = await now(connection)

    def at(begin: int, end: int) -> dict[str, Any]:
        return {"started_at": time + timedelta(seconds=begin), "finished_at": time + timedelta(seconds=end)}

    events = await history_of(
        store,
        connection,
        entry("do/pick/find", 1, parent="do/pick", **at(1, 2)),
        entry("do/pick/nap", None, EntryKind.SLEEP, parent="do/pick", **at(3, 4)),
        entry("do/pick", 1, EntryKind.BRANCH, parent="do", **at(1, 5)),
        entry("do", {}, EntryKind.JOIN, **at(0, 6)),
        entry("got", [], EntryKind.RECEIVE, extra={"timed_out": True}, **at(7, 8)),
        entry("mark", 0, EntryKind.CHECKPOINT, **at(9, 9)),
        entry("patch:v2", True, EntryKind.PATCH, **at(9, 9)),
        entry("reply:got", None, EntryKind.REPLY, **at(9, 9)),
        Entry("try", EntryKind.BLOCK, "failed", error=FAILURE, attempt=2, **at(10, 11)),
    )
    assert [(event.kind, event.step, event.parent) for event in events] == [
        ("attempt_started", "do", None),
        ("attempt_started", "do/pick/find", "do/pick"),
        ("attempt_started", "do/pick", "do"),
        ("attempt_succeeded", "do/pick/find", "do/pick"),
        ("sleep_waiting", "do/pick/nap", "do/pick"),
        ("sleep_elapsed", "do/pick/nap", "do/pick"),
        ("attempt_succeeded", "do/pick", "do"),
        ("attempt_succeeded", "do", None),
        ("wait_waiting", "got", None),
        ("wait_timed_out", "got", None),
        ("attempt_started", "try", None),
        ("attempt_failed", "try", None),
    ]


async def test_what_does_not_say_when_it_began_did_with_the_first_step_in_it(
    store: Store, connection: Connection
) -> None:
    time = await now(connection)
    begin, end = time + timedelta(seconds=1), time + timedelta(seconds=5)
    run = await started(store, connection)
    entries = (
        entry("do/pick/find", 1, parent="do/pick", started_at=begin, finished_at=end),
        entry("do/pick", 1, EntryKind.BRANCH, parent="do", finished_at=end),
        entry("do", {}, EntryKind.JOIN, finished_at=end),
        entry("mark", 0, EntryKind.CHECKPOINT, finished_at=end),
    )
    await write(store, connection, run, {"status": Status.RUNNING, "started_at": time}, entries=entries)
    events = await read.history(store, connection, run.id)
    assert [(e.step, e.at) for e in events if e.kind == "attempt_started"] == [
        ("do/pick/find", begin), ("do/pick", begin), ("do", begin)
    ]  # fmt: skip
    steps = (await read.snapshot(store, connection, run.id)).steps
    assert [(step.step_id, step.started_at) for step in steps] == [("do", begin), ("mark", None)]


async def test_an_open_receive_says_what_it_takes(store: Store, connection: Connection) -> None:
    time = await now(connection)
    frame = {"got": Begun(since=time, waits=WaitingFor.SIGNAL, names=("a", "b"), deadline=time)}
    (event,) = await history_of(store, connection, after={"frame": frame})
    assert (event.kind, event.step) == ("wait_waiting", "got")
    assert event.data == {"deadline": time.isoformat(), "signals": ["a", "b"]}


async def test_a_fork_does_not_tell_what_happened_to_its_origin(store: Store, connection: Connection) -> None:
    run, time = await started(store, connection), await now(connection)
    steps = tuple(entry(name, 1, started_at=time, finished_at=time) for name in ("a", "b"))
    await write(store, connection, run, {"status": Status.RUNNING, "started_at": time}, entries=steps)
    new = uuid.uuid4()
    await operations.execute_async(operations.fork(store, run.id, new, "b"), connection)
    assert told(await read.history(store, connection, new)) == ["created"]
    assert (await read.snapshot(store, connection, new)).results == {"a": 1}


async def test_waits_and_how_they_end(store: Store, connection: Connection) -> None:
    time = await now(connection)
    child = str(uuid.uuid4())
    span: dict[str, Any] = {"started_at": time, "finished_at": time + timedelta(seconds=1)}
    events = await history_of(
        store,
        connection,
        Entry("a", EntryKind.SIGNAL, "completed", "1", extra={"signal": "s", "timed_out": True}, **span),
        Entry("b", EntryKind.SIGNAL, "failed", error=FAILURE, extra={"signal": "t", "timed_out": True}, **span),
        Entry("c", EntryKind.CHILD, "failed", error=FAILURE, extra={"child": child}, **span),
        Entry("d", EntryKind.CHILD, "completed", "2", extra={"child": child}, **span),
    )
    assert told(events) == [
        "wait_waiting a", "wait_waiting b", "wait_waiting c", "wait_waiting d",
        "wait_timed_out a", "wait_timed_out b", "wait_satisfied c", "wait_satisfied d",
    ]  # fmt: skip
    assert [event.payload for event in events[4:]] == [1, None, None, 2]
    assert [event.error is not None for event in events[4:]] == [False, True, True, False]
    assert events[7].data == {"child": child}


async def test_what_is_open(store: Store, connection: Connection) -> None:
    time, child = await now(connection), uuid.uuid4()
    later = time + timedelta(hours=1)
    begun = {
        "p/a": Begun(since=time, running=True),
        "p/b": Begun(attempts=1, since=time, running=True),
        "nap": Begun(since=time, due=later, waits=WaitingFor.SLEEP),
        "sig": Begun(since=time, waits=WaitingFor.SIGNAL, name="s", deadline=later),
        "sub": Begun(since=time, waits=WaitingFor.CHILD, child=child),
        "new": Begun(),
        "again": Begun(attempts=1, since=time, waits=WaitingFor.RETRY),
    }
    attempts = (FailedAttempt("p/b", 1, "interrupted", None, time, later, None),)
    events = await history_of(store, connection, after={"frame": begun}, attempts=attempts)
    assert sorted(told(events)) == [
        "attempt_interrupted p/b#1", "attempt_started p/a#1", "attempt_started p/b#1", "attempt_started p/b#2",
        "sleep_waiting nap", "wait_waiting sig", "wait_waiting sub",
    ]  # fmt: skip
    assert told(events)[-2:] == ["attempt_interrupted p/b#1", "attempt_started p/b#2"]
    by_name = dict(zip(told(events), events, strict=True))
    assert by_name["attempt_started p/b#2"].parent == "p"
    assert by_name["sleep_waiting nap"].data == {"until": later.isoformat()}
    assert by_name["wait_waiting sig"].data == {"deadline": later.isoformat(), "signal": "s"}
    assert by_name["wait_waiting sub"].data == {"child": str(child)}


async def test_a_suspended_step_and_its_resume(store: Store, connection: Connection) -> None:
    run, time = await started(store, connection), await now(connection)
    frame = {"ask": Begun(since=time, waits=WaitingFor.RESUME, name="ask")}
    parked = {"status": Status.SUSPENDED, "waiting_for": WaitingFor.RESUME, "waiting_name": "ask", "frame": frame}
    suspended = entry("ask", {"q": 1}, status="suspended", started_at=time, finished_at=await now(connection))
    run = await write(store, connection, run, parked | {"started_at": time}, entries=(suspended,))
    events = await read.history(store, connection, run.id)
    assert told(events) == ["created", "started", "attempt_started ask#1", "wait_waiting ask#1", "suspended"]
    assert (events[3].payload, events[3].data) == ({"q": 1}, {"signal": "ask"})

    await operations.execute_async(operations.send(store, run.id, MessageKind.SIGNAL, "ask", '"yes"'), connection)
    ((seq,),) = await rows(connection, "select seq from durable.inbox")
    free: dict[str, Any] = {"status": Status.RUNNING, "waiting_for": None, "waiting_name": None, "frame": {}}
    run = await write(store, connection, run, free, taken={seq: "ask"})
    done = entry("ask", "done", started_at=time, finished_at=await now(connection))
    run = await write(store, connection, run, entries=(done,))
    events = await read.history(store, connection, run.id)
    assert told(events)[4:] == ["message_received", "wait_satisfied ask", "attempt_succeeded ask#1"]
    assert events[5].payload == "yes"


async def test_an_attempt_is_told_once(store: Store, connection: Connection) -> None:
    """The last failed attempt may stand in the attempts as well as in the journal."""
    time = await now(connection)
    failed = Entry("a", EntryKind.STEP, "failed", error=FAILURE, attempt=1, started_at=time, finished_at=time)
    attempts = (FailedAttempt("a", 1, "failed", FAILURE, time, time),)
    events = await history_of(store, connection, failed, attempts=attempts)
    assert told(events) == ["attempt_started a#1", "attempt_failed a#1"]


async def test_undoing(store: Store, connection: Connection) -> None:
    time = await now(connection)
    events = await history_of(
        store,
        connection,
        Entry("undo:build/api", EntryKind.UNDO, "completed", finished_at=time, parent="build"),
        Entry("undo:a", EntryKind.UNDO, "failed", error=FAILURE, attempt=3, finished_at=time),
    )
    assert told(events) == ["compensated build/api#1", "compensation_failed a#3"]
    assert (events[0].parent, events[1].error) == ("build", ErrorInfo(**vars_of(FAILURE)))


async def test_branches_iterations_and_choices_are_attempts_of_their_nodes(
    store: Store, connection: Connection
) -> None:
    time = await now(connection)
    span = {"started_at": time, "finished_at": time}
    events = await history_of(
        store,
        connection,
        entry("choice:to", "x", EntryKind.CHOICE, parent="to", **span),
        entry("to/x", 1, EntryKind.BRANCH, parent="to", **span),
        entry("to", {"branch": "x", "value": 1}, EntryKind.ROUTE, **span),
        entry("poll[0]", 1, EntryKind.ITERATION, parent="poll", **span),
        entry("poll", [1], EntryKind.LOOP, **span),
    )
    assert told(events) == [
        "attempt_started choice:to#1", "attempt_succeeded choice:to#1", "attempt_started to/x#1",
        "attempt_succeeded to/x#1", "attempt_started poll[0]#1", "attempt_succeeded poll[0]#1",
    ]  # fmt: skip
    assert [event.parent for event in events] == ["to", "to", "to", "to", "poll", "poll"]


async def test_pauses_cancels_and_lost_events(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    run = await write(store, connection, run, {"status": Status.PAUSED})
    run = await write(store, connection, run, {"status": Status.RUNNING, "started_at": await now(connection)})
    time = await now(connection)
    over = {"status": Status.CANCELED, "reason": "changed my mind", "finished_at": time}
    run = await write(store, connection, run, over)
    events = await read.history(store, connection, run.id)
    assert sorted(told(events)) == ["canceled", "created", "paused", "resumed", "started"]
    assert (told(events)[0], told(events)[-1]) == ("created", "canceled")
    assert events[-1].data == {"reason": "changed my mind"}

    await connection.execute(b"delete from durable.events")
    assert told(await read.history(store, connection, run.id)) == ["created", "started"]


def test_a_step_is_a_value() -> None:
    assert StepSnapshot("a", "step", "running") == StepSnapshot("a", "step", "running")
