"""``result()``: woken by the end of the run, and right when nothing wakes it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from durable import (
    AsyncDurable,
    Durable,
    NonRetryable,
    PayloadError,
    RunCanceled,
    RunFailed,
    RunNotFound,
    StepContext,
    define,
    waiting,
)


@dataclass
class Receipt:
    id: int


def pay(ctx: StepContext[int]) -> Receipt:
    return Receipt(ctx.input)


def fail(ctx: StepContext[Any]) -> None:
    raise NonRetryable("no funds")


def stuck(ctx: StepContext[Any]) -> None:
    raise NonRetryable("the warehouse is closed")


paying = define("paying", input=int).step("pay", pay)
receipt = define("receipt", input=int, result=pay).step("pay", pay)
patient = define("patient").wait_for_signal("go", "go")
failing = define("failing").step("work", lambda ctx: 1, compensate=stuck).step("fail", fail)


@pytest.fixture
def app(dsn: str) -> Iterator[Durable]:
    with Durable(dsn, workflows=[paying, receipt, patient, failing]) as app:
        yield app


def until(true: Any, what: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what


def rows(dsn: str, query: str) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return int(row[0])


def waits(dsn: str) -> None:
    """Until somebody waits for the end of a run, and has registered."""
    until(lambda: rows(dsn, "select count(*) from durable.waiters"), "nobody waits")


# ---------------------------------------------------------------- what it returns and raises


def test_a_typed_result_where_the_workflow_is_known(app: Durable, dsn: str) -> None:
    run, other = app.start(paying, 7), app.start(receipt, 8)
    app.run_worker(until_idle=True)
    assert run.result() == {"pay": Receipt(7)}
    assert other.result() == app.result(other.id) == app.get(other.id).result(timeout=0) == Receipt(8)
    with Durable(dsn) as stranger:
        assert stranger.result(run.id) == {"pay": {"id": 7}}
        assert stranger.result(other.id) == {"id": 8}


def test_a_result_of_a_type_that_has_changed(app: Durable, dsn: str) -> None:
    run = app.start(paying, 7)
    app.run_worker(until_idle=True)

    def changed(ctx: StepContext[Any]) -> str:
        return ""

    with (
        Durable(dsn, workflows=[define("paying").step("pay", changed)]) as other,
        pytest.raises(PayloadError, match=rf"the result of workflow 'paying', run '{run.id}'"),
    ):
        other.result(run.id)


def test_a_failed_run_says_what_failed_and_what_was_left(app: Durable) -> None:
    run = app.start(failing)
    app.run_worker(until_idle=True)
    with pytest.raises(RunFailed, match=r"step 'fail' failed: .*no funds; could not be undone: work") as error:
        run.result()
    assert error.value.run_id == run.id
    assert error.value.error["kind"] == "critical"
    assert "no funds" in error.value.error["traceback"]
    assert error.value.not_undone == ["work"]


def test_a_canceled_run_says_why(app: Durable) -> None:
    run = app.start(paying, 1)
    run.cancel(reason="changed my mind")
    with pytest.raises(RunCanceled, match="changed my mind"):
        run.result()


def test_an_unknown_run_is_not_waited_for(app: Durable) -> None:
    with pytest.raises(RunNotFound):
        app.result(uuid.uuid4(), timeout=60)


def test_a_timeout_says_what_the_run_does(app: Durable) -> None:
    run = app.start(patient)
    app.run_worker(until_idle=True)
    with pytest.raises(TimeoutError, match="is suspended, waiting for signal 'go'"):
        run.result(timeout=0)
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        run.result(timeout=0.01)


# ---------------------------------------------------------------- being woken


def test_the_end_of_the_run_wakes_it(app: Durable, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOOK", 3600.0)  # nobody looks
    run = app.start(paying, 1)
    with ThreadPoolExecutor() as threads:
        waiter = threads.submit(run.result, 60)
        waits(dsn)
        app.run_worker(until_idle=True)
        assert waiter.result(20) == {"pay": Receipt(1)}


def test_a_cancel_by_another_app_wakes_it(app: Durable, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOOK", 3600.0)
    run = app.start(paying, 1)
    with ThreadPoolExecutor() as threads, Durable(dsn) as other:
        waiter = threads.submit(run.result, 60)
        waits(dsn)
        other.cancel(run.id)
        with pytest.raises(RunCanceled):
            waiter.result(20)


async def test_many_wait_on_one_connection(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOOK", 3600.0)
    async with AsyncDurable(dsn, workflows=[paying], pool_size=2) as app:
        runs = [await app.start(paying, n) for n in range(30)]
        results = [asyncio.create_task(run.result(60)) for run in runs for _ in range(2)]
        async with app.worker():
            found = await asyncio.gather(*results)
        assert [one["pay"].id for one in found] == [n for n in range(30) for _ in range(2)]
        listening = "select count(*) from pg_stat_activity where application_name = 'durable result'"
        assert rows(dsn, listening + " and datname = current_database()") == 1
    until(lambda: rows(dsn, listening + " and datname = current_database()") == 0, "it still listens")


def test_lost_notifications_are_made_up_for(app: Durable, dsn: str) -> None:
    run = app.start(paying, 1)
    with ThreadPoolExecutor() as threads, psycopg.connect(dsn, autocommit=True) as thief:
        waiter = threads.submit(run.result, 60)
        waits(dsn)
        thief.execute("create rule deaf as on insert to durable.waiters do instead nothing")
        thief.execute("delete from durable.waiters")  # as a crash of the server does: the table is unlogged
        app.run_worker(until_idle=True)
        assert waiter.result(20) == {"pay": Receipt(1)}


def test_it_outlasts_lost_connections(app: Durable, dsn: str) -> None:
    run = app.start(paying, 1)
    kill = (
        "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name like 'durable %'"
        " and datname = current_database()"
    )
    with ThreadPoolExecutor() as threads:
        waiter = threads.submit(run.result, 60)
        waits(dsn)
        assert rows(dsn, kill) >= 2
        app.run_worker(until_idle=True)
        assert waiter.result(20) == {"pay": Receipt(1)}


# ---------------------------------------------------------------- saying why it takes long


class Heard(logging.Handler):
    """Waits for a record instead of for a time."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.heard = part, threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.part in record.getMessage():
            self.heard.set()


@pytest.fixture
def heard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)
    handler = Heard(request.param)
    waiting.log.addHandler(handler)
    yield handler.heard
    waiting.log.removeHandler(handler)


@pytest.mark.parametrize("heard", ["no worker serves the queue 'durable'"], indirect=True)
def test_a_hint_that_no_worker_serves_the_queue(app: Durable, heard: threading.Event) -> None:
    run = app.start(paying, 1)
    with ThreadPoolExecutor() as threads:
        waiter = threads.submit(run.result, 60)
        assert heard.wait(20)
        run.cancel()
        with pytest.raises(RunCanceled):
            waiter.result(20)


@pytest.mark.parametrize("heard", ["its start is not committed yet"], indirect=True)
def test_an_uncommitted_start_is_waited_for(app: Durable, dsn: str, heard: threading.Event) -> None:
    with ThreadPoolExecutor() as threads, psycopg.connect(dsn) as connection:
        run = app.start(paying, 1, connection=connection)
        waiter = threads.submit(run.result, 60)
        assert heard.wait(20)
        with pytest.raises(RunNotFound):
            app.result(run.id)  # a mere id may be wrong
        with pytest.raises(TimeoutError, match="not committed yet, or was rolled back"):
            run.result(timeout=0)
        connection.commit()
        with app.worker():
            assert waiter.result(20) == {"pay": Receipt(1)}
