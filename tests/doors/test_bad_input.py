"""Whatever comes in wrongly gives a clear error or a defined answer, and changes nothing else.

Each test compares every row of every table before and after what was refused.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel
from sqlalchemy import text
from tests.doors.facts import Door, dump, says

from durable import (
    AsyncDurable,
    ConfigurationError,
    Durable,
    NonRetryable,
    PayloadError,
    RunExists,
    RunFailed,
    RunNotFound,
    SchemaMismatch,
    Start,
    StepContext,
    Suspend,
    WorkflowNotRegistered,
    define,
    migrate,
)
from durable.testing import AsyncHarness
from durable.values import Status

Ctx = StepContext[Any]
MB = 1024**2


class Order(BaseModel):
    id: int
    lines: list[str] = []


class Approval(BaseModel):
    ok: bool


def one(ctx: Ctx) -> int:
    return 1


def echo(ctx: Ctx) -> Any:
    return ctx.input


async def ask(ctx: Ctx) -> Any:
    return ctx.resume_data if ctx.snapshot is not None else Suspend({"question": "?"})


plain = define("plain").step("echo", echo)
order = define("order", input=Order).step("one", one)
approve = define("approve").wait_for_signal("approval", "go", type=Approval)
loose = define("loose").wait_for_signal("answer", "go")
asking = define("asking").step("ask", ask)
WORKFLOWS = [plain, order, approve, loose, asking]


@pytest.fixture(params=["sync", "async"])
async def door(request: pytest.FixtureRequest, module_dsn: str) -> AsyncIterator[Door]:
    """Each facade, on a database that the tests of this module share."""
    if request.param == "sync":
        app = Durable(module_dsn, workflows=WORKFLOWS)
        yield Door(app, module_dsn)
        await asyncio.to_thread(app.close)
    else:
        async with AsyncDurable(module_dsn, workflows=WORKFLOWS) as async_app:
            yield Door(async_app, module_dsn)


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[AsyncDurable]:
    async with AsyncDurable(dsn, workflows=WORKFLOWS) as app:
        yield app


@pytest.fixture
async def harness(app: AsyncDurable) -> AsyncIterator[AsyncHarness]:
    async with AsyncHarness(app) as harness:
        yield harness


async def refused(door: Door, error: type[Exception], operation: str, *args: Any, **kwargs: Any) -> Exception:
    """The error that an operation raises; it has changed nothing."""
    with door.unchanged(), pytest.raises(error) as caught:
        await getattr(door, operation)(*args, **kwargs)
    return caught.value


# ---------------------------------------------------------------- what is not there


async def test_an_unknown_workflow_is_named_with_those_that_are_known(door: Door) -> None:
    says(await refused(door, WorkflowNotRegistered, "start", "milestone", {}), "'milestone'", "known workflows",
         "approve", "plain", "register it")  # fmt: skip
    says(await refused(door, WorkflowNotRegistered, "start", "plain", {}, version="7"), "'plain'", "version '7'",
         "known versions of it: 1")  # fmt: skip
    stranger = define("stranger").step("one", one)
    says(await refused(door, WorkflowNotRegistered, "start", stranger, {}), "'stranger'", "not registered")
    says(await refused(door, WorkflowNotRegistered, "start_many", "milestone", [Start({})]), "'milestone'")
    says(await refused(door, WorkflowNotRegistered, "start", 17, {}), "'17'")


UNKNOWN: list[tuple[str, tuple[Any, ...]]] = [
    ("signal", ("go",)),
    ("resume", ()),
    ("resume", ("go", {"ok": True})),
    ("pause", ()),
    ("cancel", ()),
    ("retry", ()),
    ("status", ()),
    ("history", ()),
    ("result", ()),
]


NO_RUN = uuid.UUID(int=17)


@pytest.mark.parametrize(("operation", "args"), UNKNOWN, ids=lambda value: value if isinstance(value, str) else "")
async def test_an_unknown_run_is_not_found(door: Door, operation: str, args: tuple[Any, ...]) -> None:
    with door.unchanged():
        for run_id in (NO_RUN, str(NO_RUN), "order-17", "", 17, None, "a\0b"):
            with pytest.raises(RunNotFound) as caught:
                await getattr(door, operation)(run_id, *args)
            says(caught.value, f"there is no run {str(run_id)!r}", "check the id, the DSN and the schema")


async def test_a_filter_for_what_cannot_be_is_refused(door: Door) -> None:
    says(await refused(door, ConfigurationError, "list", status="happy"), "happy")
    says(await refused(door, ConfigurationError, "list", after="not a page"), "after")
    says(await refused(door, ConfigurationError, "list", limit=0), "limit")
    says(await refused(door, RunNotFound, "list", parent="nobody"), "nobody")


# ---------------------------------------------------------------- payloads


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


@dataclass
class Opaque:
    secret: object


UNSTORABLE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "nul": ({"a": ["x", "b\0c"]}, ("at .a[1]", "\\u0000", "PostgreSQL can't store")),
    "nul in a key": ({"a\0": 1}, ("\\u0000",)),
    "surrogate": ("\ud800", ("lone surrogate", "\\ud800")),
    "surrogate in a key": ({"x\udfff": 1}, ("lone surrogate",)),
    "nan": ({"price": float("nan")}, ("at .price", "nan", "no JSON number")),
    "infinity": ([float("-inf")], ("at [0]", "-inf", "no JSON number")),
    "beyond 64 bits": ({"n": 2**63}, ("at .n", "64 bits", "store it as a string")),
    "below 64 bits": (-(2**63) - 1, ("64 bits",)),
    "too deep": (deep(300), ("nested too deeply", "200")),
    "far too deep": (deep(100_000), ("nested too deeply",)),
    "contains itself": (itself(), ("nested too deeply",)),
    "an object": ({"x": object()}, ("object", "JSON")),
}


async def waiting(door: Door, workflow: Any, payload: Any = None) -> uuid.UUID:
    """A run that waits for its signal."""
    run = await door.start(workflow, payload)
    async with AsyncDurable(door.dsn, workflows=WORKFLOWS) as app, AsyncHarness(app) as harness:
        await harness.drain()
    assert isinstance(run.id, uuid.UUID)
    return run.id


@pytest.mark.parametrize("what", UNSTORABLE)
async def test_what_can_not_be_stored_is_refused_at_every_border(door: Door, what: str) -> None:
    value, words = UNSTORABLE[what]
    plainly = [word for word in words if not word.startswith("at ")]
    says(await refused(door, PayloadError, "start", plain, value), "the input of workflow 'plain'", *words)
    many = [Start({}), Start(value)]
    says(await refused(door, PayloadError, "start_many", plain, many), "the input of workflow 'plain'", *words)
    run = (await door.start(plain, {})).id
    says(await refused(door, PayloadError, "signal", run, "go", value), "the payload of signal 'go'", *plainly)
    says(await refused(door, PayloadError, "resume", run, "go", value), "the data of resume 'go'", *plainly)


async def test_a_payload_that_does_not_match_the_type_says_where_and_what(door: Door) -> None:
    error = await refused(door, PayloadError, "start", order, {"id": "seventeen"})
    says(error, "the input of workflow 'order'", "Order", "id")
    says(await refused(door, PayloadError, "start", order, None), "Order")
    says(await refused(door, PayloadError, "start", order, Opaque(1)), "Order")
    says(await refused(door, PayloadError, "start_many", order, [Start({"id": 1}), Start({"id": []})]), "Order", "id")


async def test_resume_checks_what_the_wait_declares(door: Door) -> None:
    run = await waiting(door, approve)
    error = await refused(door, PayloadError, "resume", run, "go", {"ok": []})
    says(error, "the data of resume 'go'", "'approval'", "'approve'", "ok")
    assert (await door.resume(run, "go", {"ok": True})).accepted


START_RUN = """
select id from durable.start_run(
  p_id => gen_random_uuid(), p_workflow => 'order', p_version => '1', p_input => %s, p_input_hash => '',
  p_queue => 'durable')
"""


async def test_what_comes_past_the_facades_is_checked_where_it_is_used(
    app: AsyncDurable, harness: AsyncHarness, dsn: str
) -> None:
    """A caller in SQL can send what is no JSON, which the database refuses, or JSON that does not match."""
    total = define("total", input=Order).step("sum", lambda ctx: ctx.input.id)
    app.register(total)
    with psycopg.connect(dsn, autocommit=True) as connection:
        for text_ in ("{not json", "", '{"a": NaN}'):
            with pytest.raises(psycopg.errors.InvalidTextRepresentation):
                connection.execute(START_RUN, [text_])
        query = START_RUN.replace("'order'", "'total'").encode()
        row = connection.execute(query, ['{"id": "seventeen"}']).fetchone()
    assert row is not None
    await harness.drain()
    with pytest.raises(RunFailed) as caught:
        await app.result(row[0], timeout=0)
    says(caught.value, "'total'", "step 'sum'", "PayloadError", "Order", "id")


async def test_a_signal_that_does_not_match_fails_the_wait_alone(app: AsyncDurable, harness: AsyncHarness) -> None:
    """A sender does not know who will take it: it is the wait that refuses."""
    run, other = await app.start(approve), await app.start(approve)
    await run.signal("go", {"ok": "perhaps"})
    await other.signal("go", {"ok": True})
    await harness.drain()
    with pytest.raises(RunFailed) as caught:
        await run.result(timeout=0)
    says(caught.value, "'approve'", "'approval'", "PayloadError", "'go'", "ok")
    assert await other.result(timeout=0) == {"approval": Approval(ok=True)}


# ---------------------------------------------------------------- size


async def test_20_mb_are_refused_by_default_everywhere(door: Door) -> None:
    big = "x" * (20 * MB)
    run = (await door.start(plain, {})).id
    words = ("20,971,522 bytes", "max_payload=8,388,608", "pass a reference, or raise max_payload")
    says(await refused(door, PayloadError, "start", plain, big), "the input of workflow 'plain'", *words)
    says(await refused(door, PayloadError, "start_many", plain, [Start(1), Start(big)]), "'plain'", *words)
    says(await refused(door, PayloadError, "signal", run, "go", big), "the payload of signal 'go'", *words)
    says(await refused(door, PayloadError, "resume", run, "go", big), "the data of resume 'go'", *words)


async def test_the_limit_counts_bytes_and_can_be_set(dsn: str) -> None:
    async with AsyncDurable(dsn, workflows=WORKFLOWS, max_payload=10) as small:
        await small.start(plain, "12345678")  # and its quotes
        with pytest.raises(PayloadError, match="11 bytes are more than max_payload=10"):
            await small.start(plain, "123456789")
        with pytest.raises(PayloadError, match="11 bytes"):
            await small.start(plain, "ééé€")
    async with AsyncDurable(dsn, workflows=WORKFLOWS, max_payload=32 * MB) as large, AsyncHarness(large) as harness:
        run = await large.start(plain, "x" * (20 * MB))
        await harness.drain()
        assert len((await run.result(timeout=0))["echo"]) == 20 * MB
    for wrong in (0, -1, 1.5, "8 MB", True):
        with pytest.raises(ConfigurationError, match="max_payload"):
            AsyncDurable(dsn, max_payload=wrong)  # type: ignore[arg-type]


def big_result(ctx: Ctx) -> str:
    ctx.connection().execute(text("insert into effects values ('big')"))
    return "x" * 101


def big_snapshot(ctx: Ctx) -> Any:
    ctx.connection().execute(text("insert into effects values ('big')"))
    return Suspend("x" * 101)


@pytest.mark.parametrize(("handler", "what"), [(big_result, "result"), (big_snapshot, "snapshot")])
async def test_a_result_or_snapshot_over_the_limit_fails_the_step(
    dsn: str, handler: Callable[[Ctx], Any], what: str
) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create table effects (what text)")
        wf = define("big").step("small", one).step("big", handler)
        async with AsyncDurable(dsn, workflows=[wf], max_payload=100) as app, AsyncHarness(app) as harness:
            run = await app.start(wf)
            await harness.drain()
            status = await run.status()
        assert connection.execute("select * from effects").fetchall() == []
    assert status.status is Status.FAILED
    assert status.error is not None
    assert status.error.type == "durable.errors.PayloadError"
    assert status.error.attempts == 1  # it would not get smaller
    says(status.error.message, f"the {what} of step 'big'", "103 bytes", "max_payload=100")
    assert status.results == {"small": 1}


# ---------------------------------------------------------------- names and keys

ODD = [
    "ordinary",
    "two words",
    "naïve ünïcode",
    "🦆",
    "'; drop table runs; --",
    '"quoted"',
    "100%s %(x)s",
    "\\",
    "$1",
    "{}",
]


@pytest.mark.parametrize("name", ODD)
async def test_odd_but_legal_names_pass_from_end_to_end(dsn: str, name: str) -> None:
    wf = (
        define(name, version=name)
        .step(f"{name} 1", one)
        .parallel("both", {name: one, "other": one})
        .wait_for_signal(f"{name} 2", name)
    )
    async with AsyncDurable(dsn, workflows=[wf]) as app, AsyncHarness(app) as harness:
        run = await app.start(wf, {name: name}, key=name, tags={name: name})
        await harness.drain()
        assert (await run.resume(name, name)).accepted
        await harness.drain()
        assert await run.result(timeout=0) == {f"{name} 1": 1, "both": {name: 1, "other": 1}, f"{name} 2": name}
        assert [found.id for found in await app.list(workflow=name, version=name, tags={name: name})] == [run.id]
        assert (await app.start(wf, {name: name}, key=name)).id == run.id


@pytest.mark.parametrize("name", ["", "x" * 201, "a\0b", "\ud800", "line\nbreak", 17, None, b"bytes"], ids=ascii)
async def test_names_that_can_not_be(door: Door, name: Any) -> None:
    run = (await door.start(plain, {})).id
    error = await refused(door, PayloadError, "signal", run, name)
    says(error, "the signal's name")
    if name is not None:
        says(await refused(door, PayloadError, "resume", run, name, {}), "the name to resume")


@pytest.mark.parametrize("key", ["", "x" * 501, "a\0b", "\udc00", 17, "€" * 501], ids=ascii)
async def test_keys_and_ids_that_can_not_be(door: Door, key: Any) -> None:
    says(await refused(door, PayloadError, "start", plain, {}, key=key), "the key")
    run = (await door.start(plain, {})).id
    says(await refused(door, PayloadError, "signal", run, "go", 1, id=key), "the message's id")
    says(await refused(door, PayloadError, "start", plain, {}, id=key), "the id", "key=")


async def test_a_used_key_with_another_input_names_the_run_that_has_it(door: Door) -> None:
    key = str(uuid.uuid4())
    run = await door.start(plain, {"a": 1, "b": 2}, key=key)
    with door.unchanged():
        assert (await door.start(plain, {"b": 2, "a": 1}, key=key)).id == run.id
    error = await refused(door, RunExists, "start", plain, {"a": 2}, key=key)
    says(error, key, str(run.id), "'plain'", "input", "use another one")
    error = await refused(door, RunExists, "start_many", plain, [Start(1), Start({"a": 2}, key=key)])
    says(error, key, str(run.id))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"priority": 10**9}, ("priority",)),
        ({"priority": "high"}, ("priority", "'high'")),
        ({"delay": -1}, ("delay=-1",)),
        ({"delay": float("nan")}, ("delay=nan",)),
        ({"timeout": "soon"}, ("timeout='soon'",)),
        ({"timeout": 1e300}, ("timeout=1e+300",)),
    ],
)
async def test_options_that_make_no_sense(door: Door, options: dict[str, Any], words: tuple[str, ...]) -> None:
    says(await refused(door, ConfigurationError, "start", plain, {}, **options), *words)


@pytest.mark.parametrize(
    "tags", [{"a": b""}, {"a": float("nan")}, {"a\0": 1}, {"a": "\ud800"}, {1: "a"}, "tags", {"a": [1]}], ids=ascii
)
async def test_tags_that_can_not_be(door: Door, tags: Any) -> None:
    says(await refused(door, PayloadError, "start", plain, {}, tags=tags), "tag")


# ---------------------------------------------------------------- too late, twice, the wrong one


async def test_a_finished_run_takes_nothing_more(door: Door) -> None:
    run = await waiting(door, plain, {})  # needs no signal: it has completed
    assert (await door.status(run)).status is Status.COMPLETED
    with door.unchanged():
        assert await door.signal(run, "go", 1) is False
        assert await door.signal(run, "go", 1, id="once") is False
        assert await door.cancel(run) is False
        assert await door.cancel(run, compensate=True) is False
        assert await door.pause(run) is False
        assert (await door.resume(run)).accepted is False
        resumed = await door.resume(run, "go", 1)
        assert (resumed.accepted, resumed.status) == (False, Status.COMPLETED)


async def test_resume_on_the_wrong_signal_and_twice(door: Door) -> None:
    run = await waiting(door, loose)
    with door.unchanged():
        resumed = await door.resume(run, "stop", 1)
        assert (resumed.accepted, resumed.status) == (False, Status.SUSPENDED)
        assert not await door.resume(run, "answer", 1)  # the node's name, not the signal's
        assert not await door.resume(run)  # it is not paused
    assert (await door.resume(run, "go", 1)).accepted
    with door.unchanged():
        assert not await door.resume(run, "go", 2)
    assert await result_of(door, run) == {"answer": 1}
    with door.unchanged():
        assert not await door.resume(run, "go", 3)


async def test_a_suspended_step_is_resumed_by_its_own_name_once(door: Door) -> None:
    run = await waiting(door, asking)
    with door.unchanged():
        assert not await door.resume(run, "go", 1)
    assert await door.resume(run, "ask", "yes")
    with door.unchanged():
        assert not await door.resume(run, "ask", "no")
    assert await result_of(door, run) == {"ask": "yes"}


async def test_a_run_that_has_not_come_to_its_wait_is_not_resumed(door: Door) -> None:
    run = (await door.start(loose)).id
    with door.unchanged():
        resumed = await door.resume(run, "go", 1)
        assert (resumed.accepted, resumed.status) == (False, Status.PENDING)


async def test_the_same_message_twice_is_one(door: Door) -> None:
    run = (await door.start(loose)).id
    assert await door.signal(run, "go", 1, id="m1") is True
    with door.unchanged():
        assert await door.signal(run, "go", 2, id="m1") is True
    assert await result_of(door, run) == {"answer": 1}


async def test_cancel_and_pause_twice(door: Door) -> None:
    run = await waiting(door, loose)
    assert await door.pause(run) is True
    with door.unchanged():
        assert await door.pause(run) is False
    assert await door.cancel(run, reason="enough") is True
    with door.unchanged():
        assert await door.cancel(run, reason="really") is False
        assert (await door.status(run)).reason == "enough"
        assert (await door.resume(run)).accepted is False


async def test_retry_of_what_has_not_failed_is_refused(door: Door) -> None:
    run = (await door.start(loose)).id
    says(await refused(door, Exception, "retry", run), str(run), "it is pending", "Only a run that has failed")


async def result_of(door: Door, run: uuid.UUID) -> Any:
    async with AsyncDurable(door.dsn, workflows=WORKFLOWS) as app, AsyncHarness(app) as harness:
        await harness.drain()
        return await app.result(run, timeout=0)


# ---------------------------------------------------------------- the database


GARBAGE = [
    ("mysql://app@db/app", "a URL of mysql", "postgresql://user@host/database"),
    ("postgresql://[", "no DSN that libpq can read", "postgresql://user:password@host:5432/database"),
    ("nonsense", "no DSN that libpq can read", "postgresql://"),
    ("postgresql://app:hush%zz@db/app", "no DSN that libpq can read", "percent-encoded"),
]


@pytest.mark.parametrize("facade", [Durable, AsyncDurable])
@pytest.mark.parametrize(("dsn", "what", "cure"), GARBAGE)
def test_a_dsn_that_is_none(facade: Any, dsn: str, what: str, cure: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        facade(dsn)
    says(caught.value, "the dsn argument", what, cure)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("dsn", ["", 17, b"postgresql://db"])
def test_a_dsn_of_another_kind(dsn: Any) -> None:
    with pytest.raises(ConfigurationError, match="dsn= must be a URL"):
        Durable(dsn)


async def unreachable(facade: Any, dsn: str) -> ConfigurationError:
    """The error of every use, the same each time."""
    door = Door(facade(dsn, workflows=WORKFLOWS), dsn)
    uses = [door.connect(), door.start(plain, {}), door.status(uuid.uuid4())]
    errors: list[ConfigurationError] = []
    for use in uses:
        with pytest.raises(ConfigurationError) as caught:
            await use
        says(caught.value, "cannot connect to the database", "the dsn argument")
        errors.append(caught.value)
    await door.close()
    return errors[-1]


@pytest.mark.parametrize("facade", [Durable, AsyncDurable])
async def test_a_host_that_does_not_answer(facade: Any) -> None:
    error = await unreachable(facade, "postgresql://app:hush@127.0.0.1:1/shop")
    says(error, "shop on 127.0.0.1 port 1 as app", "refused")
    assert "hush" not in str(error)


@pytest.mark.parametrize("facade", [Durable, AsyncDurable])
async def test_a_role_or_database_that_is_not_there(facade: Any, empty_dsn: str) -> None:
    nobody = psycopg.conninfo.make_conninfo(empty_dsn, user="nobody_at_all", password="hush")
    error = await unreachable(facade, nobody)
    says(error, "nobody_at_all")
    assert "hush" not in str(error)
    nowhere = psycopg.conninfo.make_conninfo(empty_dsn, dbname="no_such_database")
    says(await unreachable(facade, nowhere), "no_such_database", "does not exist")


@pytest.mark.parametrize("facade", [Durable, AsyncDurable])
async def test_a_database_without_the_schema(facade: Any, empty_dsn: str) -> None:
    door = Door(facade(empty_dsn, workflows=WORKFLOWS), empty_dsn)
    for _ in range(2):
        with pytest.raises(SchemaMismatch) as caught:
            await door.start(plain, {})
        says(caught.value, 'no tables of durable in its schema "durable"', "needs revision", "Run `durable migrate`")
    assert dump(empty_dsn) == {}
    await door.migrate()
    assert (await door.status((await door.start(plain, {})).id)).status is Status.PENDING
    await door.close()


@pytest.mark.parametrize("facade", [Durable, AsyncDurable])
async def test_a_schema_that_is_too_new(facade: Any, dsn: str) -> None:
    set_revision(dsn, "9999")
    door = Door(facade(dsn, workflows=WORKFLOWS), dsn)
    for operation, args in (("start", (plain, {})), ("migrate", ()), ("connect", ())):
        with door.unchanged(), pytest.raises(SchemaMismatch) as caught:
            await getattr(door, operation)(*args)
        says(caught.value, "revision 9999", migrate.HEAD, "Upgrade the package")
        assert caught.value.found == "9999"
    await door.close()


REVISION = """
from alembic import op

revision = "9999"
down_revision = "{head}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("create table news ()")
"""


@pytest.mark.parametrize("facade", [Durable, AsyncDurable])
async def test_a_schema_that_is_too_old(facade: Any, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = shutil.copytree(migrate.scripts(), tmp_path / "migrations")
    (scripts / "versions" / "9999_news.py").write_text(REVISION.format(head=migrate.HEAD))
    before = migrate.HEAD
    monkeypatch.setattr(migrate, "HEAD", "9999")
    monkeypatch.setattr(migrate, "scripts", lambda: scripts)
    door = Door(facade(dsn, workflows=WORKFLOWS), dsn)
    with door.unchanged(), pytest.raises(SchemaMismatch) as caught:
        await door.start(plain, {})
    says(caught.value, f"has revision {before}", "needs revision 9999", "missing: revision 9999", "`durable migrate`")
    assert (caught.value.found, caught.value.needed) == (before, "9999")
    await door.migrate()
    assert (await door.status((await door.start(plain, {})).id)).status is Status.PENDING
    await door.close()


async def test_a_queue_that_is_too_old(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("update durable.queue_schema set version = '3.0.0'")
    async with AsyncDurable(dsn, workflows=WORKFLOWS) as app:
        with pytest.raises(SchemaMismatch) as caught:
            await app.start(plain, {})
    says(caught.value, "missing: procrastinate's", "`durable migrate`")


async def test_a_connection_of_another_database_says_so(door: Door, empty_dsn: str) -> None:
    async def on(connection: Any) -> Any:
        with pytest.raises(SchemaMismatch) as caught:
            if isinstance(door.app, Durable):
                await asyncio.to_thread(door.app.start, plain, {}, connection=connection)
            else:
                await door.app.start(plain, {}, connection=connection)
        says(caught.value, "no functions of durable", "the right database", "`durable migrate`")

    if isinstance(door.app, Durable):
        with psycopg.connect(empty_dsn) as connection:
            await on(connection)
    else:
        async with await psycopg.AsyncConnection.connect(empty_dsn) as async_connection:
            await on(async_connection)


def set_revision(dsn: str, revision: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("update durable.alembic_version set version_num = %s", [revision])


# ---------------------------------------------------------------- handlers


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")

    __repr__ = __str__


class Rude(Exception):
    def __str__(self) -> str:
        return "nul \0 and half a pair \ud800"


def recurse(ctx: Ctx) -> Any:
    return recurse(ctx)


def unstorable(value: Any) -> Callable[[Ctx], Any]:
    def handler(ctx: Ctx) -> Any:
        return value

    return handler


def raising(make: Callable[[], BaseException]) -> Callable[[Ctx], Any]:
    def handler(ctx: Ctx) -> Any:
        raise make()

    return handler


def cutting(ctx: Ctx) -> int:
    ctx.connection().exec_driver_sql("select pg_terminate_backend(pg_backend_pid())")
    return 1


def committing(ctx: Ctx) -> int:
    ctx.connection().commit()
    return 1


def committing_raw(ctx: Ctx) -> int:
    ctx.connection().exec_driver_sql("commit")
    return 1


def rolling_back_raw(ctx: Ctx) -> int:
    ctx.connection().exec_driver_sql("rollback")
    return 1


def swallowing(ctx: Ctx) -> int:
    connection = ctx.connection()
    try:
        connection.execute(text("select 1/0"))
    except Exception:
        return 1
    raise AssertionError


def typed_wrongly(ctx: Ctx) -> int:
    return "one"  # type: ignore[return-value]


def exiting(ctx: Ctx) -> Any:
    sys.exit(3)


BAD_HANDLERS: dict[str, tuple[Callable[[Ctx], Any], str, tuple[str, ...]]] = {
    "an object": (unstorable(object()), "PayloadError", ("the result of step 'bad'", "declare the type")),
    "a set": (unstorable({1}), "PayloadError", ("the result of step 'bad'", "would come back as a list")),
    "a tuple": (unstorable((1, 2)), "PayloadError", ("the result of step 'bad'", "would come back as a list")),
    "int keys": (unstorable({1: 2}), "PayloadError", ("the key 1 would come back as a string",)),
    "nul": (unstorable("\0"), "PayloadError", ("\\u0000",)),
    "surrogate": (unstorable("\ud800"), "PayloadError", ("lone surrogate",)),
    "nan": (unstorable({"x": float("nan")}), "PayloadError", ("at .x", "no JSON number")),
    "64 bits": (unstorable(2**64), "PayloadError", ("64 bits",)),
    "too deep": (unstorable(deep(100_000)), "PayloadError", ("nested too deeply",)),
    "snapshot": (unstorable(Suspend(float("inf"))), "PayloadError", ("the snapshot of step 'bad'",)),
    "wrong type": (typed_wrongly, "PayloadError", ("the result of step 'bad'", "int")),
    "unprintable": (raising(Unprintable), "Unprintable", ("the message can't be printed", "RuntimeError in __str__")),
    "rude": (raising(Rude), "Rude", ("nul \\x00 and half a pair \\ud800",)),
    "exit": (exiting, "SystemExit", ("3",)),
    "interrupt": (raising(KeyboardInterrupt), "KeyboardInterrupt", ()),
    "generator exit": (raising(GeneratorExit), "GeneratorExit", ()),
    "recursion": (recurse, "RecursionError", ("maximum recursion depth",)),
    "stop iteration": (raising(lambda: StopIteration(1)), "StopIteration", ()),
    "commit": (committing, "", ("commit",)),
    "raw commit": (committing_raw, "NonRetryable", ("by SQL of its own", "leave COMMIT and ROLLBACK out")),
    "raw rollback": (rolling_back_raw, "NonRetryable", ("by SQL of its own", "leave COMMIT and ROLLBACK out")),
    "swallowed": (swallowing, "InFailedSqlTransaction", ("was aborted", "division by zero", "begin_nested")),
}


def effect(ctx: Ctx) -> None:
    ctx.connection().execute(text("insert into effects values ('before')"))


SYNC_ONLY = ("commit", "raw commit", "raw rollback", "swallowed")  # of the other: tests/engine/test_borrow.py
IN_COLOUR = [(what, "sync") for what in BAD_HANDLERS]
IN_COLOUR += [(what, "async") for what in BAD_HANDLERS if what not in SYNC_ONLY]


async def test_a_handler_that_always_cuts_its_connection_is_stopped(dsn: str) -> None:
    """A lost connection is no failed attempt, and not counted as one; but it can't repeat for ever."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create table effects (what text)")
        bad = define("bad").step("before", effect).step("bad", cutting, retry=1)
        async with AsyncDurable(dsn, workflows=[bad], max_crashes=3) as app, AsyncHarness(app) as harness:
            run = await app.start(bad)
            for _ in range(3):
                await harness.drain()
                await harness.skip(minutes=1)
            with pytest.raises(RunFailed, match="it was interrupted 3 times"):
                await run.result(timeout=0)
            kinds = [event.kind for event in await run.history()]
        assert connection.execute("select * from effects").fetchall() == [("before",)]
    assert kinds.count("attempt_interrupted") == 3


@pytest.mark.parametrize(("what", "colour"), IN_COLOUR)
async def test_whatever_a_handler_does_fails_its_own_step(dsn: str, what: str, colour: str) -> None:
    """The step's error says what and where; steps before it stand, and other runs go on in the same worker."""
    handler, kind, words = BAD_HANDLERS[what]

    async def in_colour(ctx: Ctx) -> Any:
        return handler(ctx)

    if colour == "async" and what == "stop iteration":  # a coroutine can't raise it
        kind = "RuntimeError"
    if what == "wrong type":
        in_colour.__annotations__["return"] = int
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create table effects (what text)")
        bad = define("bad").step("before", effect).step("bad", in_colour if colour == "async" else handler, retry=1)
        async with AsyncDurable(dsn, workflows=[bad, plain]) as app, AsyncHarness(app) as harness:
            run, innocent = await app.start(bad), await app.start(plain, 1)
            await harness.drain()
            status = await run.status()
            with pytest.raises(RunFailed) as caught:
                await run.result(timeout=0)
            assert await innocent.result(timeout=0) == {"echo": 1}
            kinds = [event.kind for event in await run.history()]
        assert connection.execute("select * from effects").fetchall() == [("before",)]
    assert status.error is not None
    assert status.error.step == "bad"
    assert kind in status.error.type
    says(status.error.message, *words)
    says(caught.value, "workflow 'bad'", str(run.id), "step 'bad'", "durable history")
    assert status.results == {"before": None}
    assert kinds[0] == "created"
    assert kinds[-1] == "failed"


async def test_closing_the_connection_is_harmless(dsn: str) -> None:
    """``with ctx.connection() as conn:`` is what people write."""

    def closing(ctx: Ctx) -> int:
        effect(ctx)
        with ctx.connection() as connection:
            connection.execute(text("insert into effects values ('within')"))
        raw = ctx.connection().connection.driver_connection
        assert raw is not None
        raw.close()
        effect(ctx)
        return 1

    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create table effects (what text)")
        wf = define("closing").step("closing", closing)
        async with AsyncDurable(dsn, workflows=[wf]) as app, AsyncHarness(app) as harness:
            run = await app.start(wf)
            await harness.drain()
            assert await run.result(timeout=0) == {"closing": 1}
        assert connection.execute("select * from effects").fetchall() == [("before",), ("within",), ("before",)]


async def test_an_unprintable_error_is_retried_like_any_other(app: AsyncDurable, harness: AsyncHarness) -> None:
    seen: list[int] = []

    def flaky(ctx: Ctx) -> int:
        seen.append(ctx.attempt)
        if ctx.attempt < 3:
            raise Unprintable
        return ctx.attempt

    wf = define("flaky").step("flaky", flaky)
    app.register(wf)
    run = await app.start(wf)
    for _ in range(3):
        await harness.drain()
        await harness.skip(minutes=2)
    assert await run.result(timeout=0) == {"flaky": 3}
    assert seen == [1, 2, 3]


async def test_an_error_that_is_final_is_not_tried_again(app: AsyncDurable, harness: AsyncHarness) -> None:
    wf = define("final").step("final", raising(lambda: NonRetryable("no use")))
    app.register(wf)
    run = await app.start(wf)
    await harness.drain()
    status = await run.status()
    assert status.error is not None
    assert (status.error.message, status.error.attempts) == ("no use", 1)
