"""The app object: what app code does to runs, and what it is told when it does something wrong."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel

import durable
from durable import (
    AsyncDurable,
    ConfigurationError,
    DefinitionError,
    Durable,
    PayloadError,
    ResumeResult,
    RetryRefused,
    RunExists,
    RunNotFound,
    Start,
    Status,
    StepContext,
    Suspend,
    WorkflowNotRegistered,
    define,
)
from durable.handles import AsyncRun, Run
from durable.testing import History, assert_history


class Order(BaseModel):
    id: int
    note: str = ""


@dataclass
class Signoff:
    ok: bool


def charge(ctx: StepContext[Order]) -> int:
    return ctx.input.id


def fails(ctx: StepContext[Any]) -> None:
    raise durable.NonRetryable("no funds")


order = define("order", input=Order).step("charge", charge)
anything = define("anything").step("nothing", lambda ctx: None).step("nothing more", lambda ctx: None)
approval = define("approval").wait_for_signal("signoff", "founder-signoff", type=Signoff)
failing = define("failing").step("work", lambda ctx: 1).step("fails", fails)
undoing = define("undoing").step("work", lambda ctx: 1, compensate=lambda ctx: None).step("fails", fails)
asking = define("asking").step("ask", lambda ctx: ctx.resume_data or Suspend({"question": 1}))

WORKFLOWS = (order, anything, approval, failing, undoing, asking)


@pytest.fixture
def app(module_dsn: str) -> Iterator[Durable]:
    with Durable(module_dsn, workflows=WORKFLOWS) as app:
        yield app


def key() -> str:
    return f"key-{uuid.uuid4()}"


def count(dsn: str, table: str, run: Run[Any]) -> int:
    column = "id" if table == "runs" else "run_id"
    with psycopg.connect(dsn) as connection:
        row = connection.execute(
            f"select count(*) from durable.{table} where {column} = %s".encode(), [run.id]
        ).fetchone()
    assert row is not None
    return int(row[0])


# ---------------------------------------------------------------- start


def test_a_start_is_a_pending_run(app: Durable) -> None:
    mine = key()
    run = app.start(order, Order(id=1), key=mine, tags={"tenant": "acme", "n": 1}, priority=3, timeout=60)
    assert run.id.version == 7
    status = run.status()
    assert (status.workflow, status.version, status.status) == ("order", "1", Status.PENDING)
    assert (status.key, status.tags, status.priority) == (mine, {"tenant": "acme", "n": 1}, 3)
    assert status.input == {"id": 1, "note": ""}
    assert status.deadline == status.created_at + timedelta(seconds=60)
    assert status.total_steps == 1


@pytest.mark.parametrize("given", [Order(id=7), {"id": 7}])
def test_the_input_may_be_of_the_type_or_match_it(app: Durable, given: Any) -> None:
    assert app.start("order", given).status().input == {"id": 7, "note": ""}


def test_a_delayed_start_waits(app: Durable) -> None:
    status = app.start(anything, delay=timedelta(hours=1)).status()
    assert (status.derived, status.wake_at) == ("delayed", status.created_at + timedelta(hours=1))


def test_ids_are_uuids_or_their_text(app: Durable) -> None:
    given = uuid.uuid4()
    run = app.start(anything, id=str(given))
    assert run.id == given
    assert app.start(anything, id=given) == run
    assert app.get(str(given)) == run == app.get(run)
    assert app.status(run).id == app.status(str(given)).id == given


def test_a_used_key_or_id_is_the_same_run_or_an_error(app: Durable) -> None:
    mine = key()
    run = app.start(order, {"id": 1}, key=mine)
    assert app.start("order", Order(id=1), key=mine) == run
    with pytest.raises(RunExists, match=mine) as error:
        app.start(order, {"id": 2}, key=mine)
    assert error.value.run_id == run.id
    with pytest.raises(RunExists, match="the id is taken"):
        app.start(anything, 1, id=run.id)


def test_start_many_keeps_the_order_and_is_one_statement(app: Durable) -> None:
    first = app.start(order, {"id": 0}, key=key())
    mine = key()
    many = [Start({"id": n}, key=f"{mine}-{n}", tags={"batch": mine}) for n in range(100)]
    runs = app.start_many("order", [Start({"id": 0}, key=first.status().key), *many])
    assert runs[0] == first
    assert [run.status().input["id"] for run in runs[1:4]] == [0, 1, 2]
    assert len(app.list(tags={"batch": mine}, limit=1000)) == 100


def test_start_many_is_all_or_none(app: Durable) -> None:
    taken, mine = key(), key()
    app.start(order, {"id": 1}, key=taken)
    with pytest.raises(RunExists, match=taken):
        app.start_many(order, [Start({"id": 1}, tags={"batch": mine}), Start({"id": 2}, key=taken)])
    assert len(app.list(tags={"batch": mine})) == 0
    assert app.start_many(order, []) == []


def test_versions(module_dsn: str) -> None:
    with Durable(module_dsn) as app:
        one = app.define("versioned", version="1").step("a", lambda ctx: None)
        app.define("versioned", version="2").step("a", lambda ctx: None)
        assert app.start("versioned").status().version == "2"
        assert app.start("versioned", version="1").status().version == "1"
        assert app.start(one).status().version == "1"
        assert app.start(one, version="2").status().version == "2"
        with pytest.raises(WorkflowNotRegistered, match="known versions of it: 1, 2"):
            app.start("versioned", version="3")


# ---------------------------------------------------------------- what can't be started


def test_an_unknown_workflow(app: Durable) -> None:
    with pytest.raises(WorkflowNotRegistered, match="known workflows: anything, approval"):
        app.start("ordre")
    with pytest.raises(WorkflowNotRegistered, match="stranger"):
        app.start(define("stranger").step("a", charge))
    with pytest.raises(WorkflowNotRegistered):
        app.start(charge)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (float("nan"), "NaN|nan"),
        ("a\0b", "u0000"),
        ({"a": "\ud800"}, "lone surrogate"),
        (2**63, "64 bits"),
        ((1, 2), "would come back as a list"),
        (object(), "can't be stored"),
        ("x" * (8 * 1024**2), "max_payload=8,388,608"),
    ],
)
def test_an_input_that_can_not_be_stored(app: Durable, given: Any, says: str) -> None:
    mine = key()
    with pytest.raises(PayloadError, match=says) as error:
        app.start(anything, given, key=mine)
    assert str(error.value).startswith("the input of workflow 'anything': ")
    assert len(app.list(key=mine)) == 0


def test_an_input_of_the_wrong_type(app: Durable) -> None:
    with pytest.raises(PayloadError, match=r"the input of workflow 'order': .*id: Field required"):
        app.start("order", {"nr": 1})
    with pytest.raises(PayloadError, match="the input of workflow 'order'"):
        app.start("order")


def test_the_limit_is_configurable(module_dsn: str) -> None:
    with Durable(module_dsn, workflows=[anything], max_payload=20 * 1024**2 + 100) as app:
        assert len(app.start(anything, "x" * 20 * 1024**2).status().input) == 20 * 1024**2
    with (
        Durable(module_dsn, workflows=[anything], max_payload=10) as app,
        pytest.raises(PayloadError, match="max_payload=10"),
    ):
        app.start_many(anything, [Start("x" * 20)])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"id": "order-17"}, PayloadError, "the id: 'order-17' is no UUID"),
        ({"key": ""}, PayloadError, "the key: is empty"),
        ({"key": "x" * 501}, PayloadError, "the key: .* 501 characters"),
        ({"key": "\0"}, PayloadError, "the key: .*u0000"),
        ({"key": "\U0001f600" * 500}, PayloadError, "1,500 bytes"),
        ({"key": 17}, PayloadError, "the key: must be a string"),
        ({"tags": ["a"]}, PayloadError, "the tags: must be a mapping"),
        ({"tags": {"a": [1]}}, PayloadError, r"the tags: at \.a: \[1\] must be"),
        ({"tags": {"a": float("inf")}}, PayloadError, "the tags"),
        ({"tags": {1: "a"}}, PayloadError, "a tag's name"),
        ({"tags": {str(n): n for n in range(51)}}, PayloadError, "at most 50"),
        ({"tags": {"a": "x" * 501}}, PayloadError, "at most 500"),
        ({"priority": 500_000}, ConfigurationError, "priority=500000"),
        ({"priority": True}, ConfigurationError, "priority=True"),
        ({"priority": 1.5}, ConfigurationError, "priority=1.5"),
        ({"delay": -1}, ConfigurationError, "delay=-1"),
        ({"timeout": timedelta(seconds=-1)}, ConfigurationError, "timeout="),
        ({"timeout": float("nan")}, ConfigurationError, "timeout=nan"),
        ({"timeout": "1 h"}, ConfigurationError, "timeout='1 h'"),
    ],
)
def test_options_that_make_no_sense(app: Durable, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        app.start(anything, **options)
    with pytest.raises(error, match=says):
        app.start_many(anything, [Start(**options)])


def test_odd_but_legal_text(app: Durable) -> None:
    odd = f'Ünï "cødé"\n\t%s {{}} \\ \x7f {uuid.uuid4()}'
    run = app.start(anything, {odd: odd}, key=odd, tags={odd: odd})
    status = run.status()
    assert (status.key, status.tags, status.input) == (odd, {odd: odd}, {odd: odd})
    assert app.list(key=odd).items[0].id == run.id
    assert app.list(tags={odd: odd}).items[0].id == run.id


# ---------------------------------------------------------------- unknown runs


@pytest.mark.parametrize("unknown", [uuid.UUID(int=1), "0190fd8e-0000-7000-8000-000000000000", "no-uuid", 17, ""])
def test_an_unknown_id_is_run_not_found_everywhere(app: Durable, unknown: Any) -> None:
    for ask in (
        lambda: app.status(unknown),
        lambda: app.history(unknown),
        lambda: app.result(unknown, timeout=60),
        lambda: app.signal(unknown, "name"),
        lambda: app.resume(unknown, "name"),
        lambda: app.resume(unknown),
        lambda: app.pause(unknown),
        lambda: app.cancel(unknown),
        lambda: app.retry(unknown),
    ):
        with pytest.raises(RunNotFound, match="there is no run"):
            ask()


# ---------------------------------------------------------------- messages


def test_a_signal_is_kept_and_the_same_id_is_one(app: Durable, module_dsn: str) -> None:
    run = app.start(anything)
    assert run.signal("early", {"n": 1}, id="m-1")
    assert app.signal(run.id, "early", {"n": 2}, id="m-1")
    assert run.signal("early", Signoff(True))
    assert count(module_dsn, "inbox", run) == 2
    received = [event.payload for event in run.history() if event.kind == "message_received"]
    assert received == [{"n": 1}, {"ok": True}]


@pytest.mark.parametrize(
    ("name", "payload", "id_", "says"),
    [
        ("", None, None, "the signal's name: the name is empty"),
        ("a\0", None, None, "the signal's name: the name"),
        ("x" * 201, None, None, "201 characters"),
        (5, None, None, "must be a string"),
        ("name", float("nan"), None, "the payload of signal 'name'"),
        ("name", object(), None, "the payload of signal 'name'"),
        ("name", "x" * (8 * 1024**2), None, "max_payload"),
        ("name", None, "", "the message's id: is empty"),
    ],
)
def test_a_signal_that_can_not_be_sent(
    app: Durable, module_dsn: str, name: Any, payload: Any, id_: Any, says: str
) -> None:
    run = app.start(anything)
    with pytest.raises(PayloadError, match=says):
        run.signal(name, payload, id=id_)
    assert count(module_dsn, "inbox", run) == 0


def test_a_signal_to_a_finished_run_is_false(app: Durable, module_dsn: str) -> None:
    run = app.start(anything)
    run.cancel()
    assert run.signal("late") is False
    assert count(module_dsn, "inbox", run) == 0


# ---------------------------------------------------------------- cancel, pause, resume, retry


def test_cancel_is_applied_at_once_without_a_worker(app: Durable) -> None:
    run = app.start(anything)
    assert run.cancel(reason="changed my mind") is True
    status = run.status()
    assert (status.status, status.reason) == (Status.CANCELED, "changed my mind")
    assert run.cancel() is False
    assert run.status().reason == "changed my mind"


def test_a_reason_that_can_not_be_stored(app: Durable) -> None:
    run = app.start(anything)
    for reason in ("\0", 5):
        with pytest.raises(PayloadError, match="the reason"):
            run.cancel(reason=reason)  # type: ignore[arg-type]
    assert run.status().status is Status.PENDING


def test_pause_and_its_other_half(app: Durable) -> None:
    run = app.start(anything)
    assert run.pause() is True
    assert run.status().status is Status.PAUSED
    assert run.pause() is False
    assert run.resume() == ResumeResult(True, Status.RUNNING)
    assert not run.resume()
    run.cancel()
    assert run.pause() is False
    assert run.resume() == ResumeResult(False, Status.CANCELED)


def waiting(app: Durable, workflow: Any) -> Run[Any]:
    run = app.start(workflow)
    app.run_worker(until_idle=True)
    return run


def test_resume_is_strict(app: Durable, module_dsn: str) -> None:
    run = waiting(app, approval)
    assert run.status().derived == "waiting_for_signal"
    assert run.resume("another", {"ok": True}) == ResumeResult(False, Status.SUSPENDED)
    assert count(module_dsn, "inbox", run) == 0
    assert run.resume("founder-signoff", {"ok": True}).accepted
    assert not run.resume("founder-signoff", {"ok": True})  # it has its answer
    assert count(module_dsn, "inbox", run) == 1
    app.run_worker(until_idle=True)
    assert run.result() == {"signoff": Signoff(True)}
    assert run.resume("founder-signoff", {"ok": True}) == ResumeResult(False, Status.COMPLETED)


@pytest.mark.parametrize("data", [{"ok": "perhaps"}, None, 5, {}])
def test_resume_with_data_of_the_wrong_type_changes_nothing(app: Durable, module_dsn: str, data: Any) -> None:
    run = waiting(app, approval)
    with pytest.raises(PayloadError, match="the data of resume 'founder-signoff', for node 'signoff'"):
        run.resume("founder-signoff", data)
    assert count(module_dsn, "inbox", run) == 0
    assert run.resume("founder-signoff", Signoff(ok=False)).accepted


def test_resume_takes_data_with_a_name_only(app: Durable) -> None:
    with pytest.raises(TypeError, match="only with the name"):
        app.resume(uuid.uuid4(), data=1)


def test_resume_of_a_suspended_step(app: Durable) -> None:
    run = waiting(app, asking)
    assert run.status().steps[0].snapshot == {"question": 1}
    assert run.resume("ask", {"answer": 42}).accepted
    app.run_worker(until_idle=True)
    assert run.result() == {"ask": {"answer": 42}}


def test_retry_goes_on_at_the_failed_step(app: Durable) -> None:
    run = waiting(app, failing)
    assert run.status().status is Status.FAILED
    assert app.retry(run.id) == run
    assert run.status().status is Status.RUNNING
    app.run_worker(until_idle=True)
    attempts = History(run.history()).of("attempt_started")
    assert [event.step for event in attempts] == ["work", "fails", "fails"]


def test_retry_is_refused_with_a_reason(app: Durable) -> None:
    run = app.start(anything)
    with pytest.raises(RetryRefused, match=r"it is pending\. Only a run that has failed"):
        run.retry()
    run.cancel()
    with pytest.raises(RetryRefused, match="it is canceled"):
        run.retry()
    with pytest.raises(RetryRefused, match="were undone"):
        waiting(app, undoing).retry()


# ---------------------------------------------------------------- looking


def test_list_pages_and_filters(app: Durable) -> None:
    batch = key()
    runs = app.start_many(anything, [Start(n, tags={"batch": batch}) for n in range(5)])
    runs[0].cancel()
    pages: list[uuid.UUID] = []
    after: str | None = None
    while True:
        page = app.list(tags={"batch": batch}, workflow=anything, limit=2, after=after)
        pages += [run.id for run in page]
        if (after := page.next) is None:
            break
    assert sorted(pages) == sorted(run.id for run in runs)
    assert [run.id for run in app.list(tags={"batch": batch}, status="canceled")] == [runs[0].id]
    assert len(app.list(tags={"batch": batch}, status=[Status.PENDING, "failed"])) == 4
    assert len(app.list(tags={"batch": batch}, started_after=datetime.now(UTC))) == 0
    assert app.list(key="there is none").items == ()


@pytest.mark.parametrize(
    "filters",
    [
        {"status": "lost"},
        {"status": []},
        {"limit": 0},
        {"limit": 100_000},
        {"limit": "10"},
        {"after": "???"},
        {"started_after": datetime(2026, 1, 1)},  # noqa: DTZ001  # the mistake
    ],
)
def test_filters_that_make_no_sense(app: Durable, filters: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(filters)) if "status" not in filters else "status"):
        app.list(**filters)


def test_total_steps_where_the_workflow_is_known(app: Durable, module_dsn: str) -> None:
    run = app.start(anything)
    assert run.status().total_steps == 2
    with Durable(module_dsn) as stranger:
        assert stranger.status(run.id).total_steps is None
        assert stranger.status(run.id, children=0).children == ()


def test_history_tells_what_happened(app: Durable) -> None:
    run = app.start(anything)
    run.pause()
    assert_history(run.history(), ["created", ..., "paused", ...])


def test_purge_and_keys_after_it(app: Durable) -> None:
    mine = key()
    run = app.start(anything, 1, key=mine)
    run.cancel()
    assert app.purge(older_than=timedelta(hours=1)) == 0
    assert app.purge(older_than=0) >= 1
    with pytest.raises(RunNotFound):
        run.status()
    assert app.start(anything, 2, key=mine) != run
    with pytest.raises(ConfigurationError, match="older_than"):
        app.purge(older_than=-1)


def test_recover_puts_back_runs_without_a_job(app: Durable, module_dsn: str) -> None:
    run = app.start(anything)
    with psycopg.connect(module_dsn) as connection:
        connection.execute("delete from durable.procrastinate_jobs where args ->> 'run_id' = %s", [str(run.id)])
    assert app.recover() >= 1
    app.run_worker(until_idle=True)
    assert run.result() == {"nothing": None, "nothing more": None}


# ---------------------------------------------------------------- definitions


def test_workflows_is_a_read_only_view(module_dsn: str) -> None:
    app = Durable(module_dsn)
    shown = app.workflows
    assert dict(shown) == {}
    app.register(order)
    growing = app.define("growing").step("a", charge)
    assert list(shown) == ["order", "growing"]
    assert "order" in shown
    assert "other" not in shown
    growing.step("b", charge)
    assert [node.name for node in shown["growing"].nodes] == ["a", "b"]
    with pytest.raises(KeyError):
        shown["other"]
    with pytest.raises(TypeError):
        shown["other"] = order.workflow  # type: ignore[index]
    assert "'order': 1" in repr(shown)


def test_the_same_name_twice_names_both_places(module_dsn: str) -> None:
    app = AsyncDurable(module_dsn, workflows=[order])
    app.register(order)  # the same again
    with pytest.raises(DefinitionError, match=r"test_facade.py:\d+ and at .*test_facade.py:\d+"):
        app.define("order")
    with pytest.raises(DefinitionError, match="no workflow"):
        app.register(charge)  # type: ignore[arg-type]


def test_imports_are_loaded_when_a_workflow_is_looked_for(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, module_dsn: str
) -> None:
    (tmp_path / "shop_flows.py").write_text(
        "from durable import define\n"
        "from shop_app import app\n"  # the app's module, which names this one
        "imported = app.define('imported').step('a', lambda ctx: None)\n"
        "other = define('other').step('a', lambda ctx: None)\n"
        "again = other\n"
    )
    (tmp_path / "shop_app.py").write_text(
        f"from durable import Durable\napp = Durable({module_dsn!r}, imports=['shop_flows'])\n"
    )
    (tmp_path / "shop_empty.py").write_text("")
    (tmp_path / "shop_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    import shop_app  # type: ignore[import-not-found]

    assert list(shop_app.app.workflows) == ["imported", "other"]
    for module, says in {
        "shop_empty": "no workflow at its top level",
        "shop_broken": "cannot import 'shop_broken'.*ZeroDivisionError",
        "shop_missing": "cannot import 'shop_missing'.*No module named",
    }.items():
        app = Durable(module_dsn, imports=[module])
        for _ in range(2):  # an error does not go away by itself
            with pytest.raises(ConfigurationError, match=says):
                app.start("order")


# ---------------------------------------------------------------- what a type checker sees


def test_inputs_are_typed(app: Durable) -> None:
    run: Run[dict[str, Any]] = app.start(order, Order(id=1))
    app.start(order, {"id": 1})
    app.start(order.workflow, {"id": 1})
    app.start("order", {"id": 1})
    app.start(anything, [1, 2])
    with pytest.raises(PayloadError):
        app.start(order, 17)  # type: ignore[misc]
    with pytest.raises(PayloadError):
        app.start(order, Signoff(ok=True))  # type: ignore[misc]
    assert run.status().input == {"id": 1, "note": ""}


# ---------------------------------------------------------------- the two facades are one


def public(cls: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers(cls) if not name.startswith("_")}


@pytest.mark.parametrize(("sync", "asynchronous"), [(Durable, AsyncDurable), (Run, AsyncRun)])
def test_the_same_methods_with_the_same_parameters(sync: type, asynchronous: type) -> None:
    ours, theirs = public(sync), public(asynchronous)
    assert theirs.keys() - ours.keys() <= {"pool"}
    assert ours.keys() <= theirs.keys()
    for name, method in ours.items():
        if callable(method):
            assert inspect.signature(method).parameters.keys() == inspect.signature(theirs[name]).parameters.keys(), (
                name
            )
            for given, other in zip(
                inspect.signature(method).parameters.values(),
                inspect.signature(theirs[name]).parameters.values(),
                strict=True,
            ):
                assert (given.kind, given.default) == (other.kind, other.default), f"{name}({given})"
    init = [list(inspect.signature(cls.__init__).parameters) for cls in (sync, asynchronous)]  # type: ignore[misc]
    assert init[0] == init[1]


def test_every_operation_says_what_it_does() -> None:
    for name, method in public(Durable).items():
        if callable(method):
            assert method.__doc__, name


async def test_async_is_the_same_awaited(module_dsn: str) -> None:
    async with AsyncDurable(module_dsn, workflows=WORKFLOWS) as app:
        run = await app.start(order, Order(id=1))
        assert await run.pause()
        assert (await run.resume()).accepted
        assert await run.signal("x")
        assert (await run.status()).status is Status.RUNNING
        assert await run.cancel(reason="enough")
        with pytest.raises(RetryRefused):
            await run.retry()
        assert "canceled" in [event.kind for event in await run.history()]
        assert (await app.list(limit=1)).items
        [one] = await app.start_many(order, [Start({"id": 2})])
        assert (await app.status(one)).input == {"id": 2, "note": ""}
        assert app.get(one.id) == one
        assert repr(one) == f"<AsyncRun {one.id}>"


async def test_the_sync_app_in_a_running_loop_names_the_other(module_dsn: str) -> None:
    app = Durable(module_dsn, workflows=[anything])
    for ask in (
        lambda: app.start(anything),
        lambda: app.list(),
        lambda: app.get(uuid.uuid4()).result(),
        lambda: app.run_worker(),
        lambda: app.worker().__enter__(),
    ):
        with pytest.raises(ConfigurationError, match="use AsyncDurable"):
            ask()


def test_everything_that_is_exported_is_there() -> None:
    for name in durable.__all__:
        assert getattr(durable, name) is not None
        assert name in dir(durable)
    with pytest.raises(AttributeError, match="NoSuchName"):
        durable.NoSuchName  # noqa: B018
