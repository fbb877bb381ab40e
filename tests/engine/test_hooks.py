"""Hooks: what they are told of a run, when, how often, and that nothing of it ever touches the run."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from tests.engine.kit import Bench, Ctx, Facts, an_app, bench, soon, until, working

from durable import (
    AsyncDurable,
    Context,
    DefinitionError,
    ErrorReport,
    NonRetryable,
    Retry,
    Start,
    Status,
    StatusChange,
    StepFailed,
    branch,
    define,
    workflow,
)
from durable.define.builder import Builder
from durable.engine.deliverer import CONCURRENCY, MAX_ATTEMPTS, backoff
from durable.engine.points import Point
from durable.testing.harness import SimulatedCrash
from durable.worker import Worker

S = Status
AGAIN = Retry(max_attempts=3, initial=1.0, jitter=False)


class Told:
    """A hook that keeps what it is told, and raises as often as it was asked to."""

    def __init__(self, raises: int = 0) -> None:
        self.reports: list[Any] = []
        self.raises = raises

    def __call__(self, report: Any) -> None:
        self.reports.append(report)
        if len(self.reports) <= self.raises:
            raise RuntimeError("the mail server is down")

    def changes(self) -> list[tuple[Status, Status]]:
        return [(report.before, report.status) for report in self.reports]

    def errors(self) -> list[tuple[str | None, int | None, str]]:
        """(step, attempt, what the error says)."""
        return [(report.step, report.attempt, report.error.message) for report in self.reports]


class Hanging:
    """An async hook that hangs until it is let go."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.go_on = asyncio.Event()

    async def __call__(self, report: StatusChange) -> None:
        self.ids.append(report.id)
        await self.go_on.wait()


def rows(facts: Facts) -> list[dict[str, Any]]:
    return facts.rows("select *, due > durable.engine_now() as later from durable.deliveries order by seq")


def listening(app: AsyncDurable, raises: int = 0) -> tuple[Told, Told]:
    status, error = Told(raises), Told()
    app.on_status_change(status)
    app.on_error(error)
    return status, error


async def drain(made: Bench, *, skip: float = 0) -> None:
    """Run all that can run, and tell the hooks."""
    if skip:
        await made.skip(seconds=skip)
    await made.drain()
    await soon(made.engine.deliverer.deliver_due())


def fails(times: int = 1_000, error: Callable[[], Exception] = lambda: ValueError("no")) -> Callable[[Ctx], int]:
    """A handler that fails so many times."""
    called: list[int] = []

    def handler(ctx: Ctx) -> int:
        called.append(1)
        if len(called) <= times:
            raise error()
        return len(called)

    return handler


# ---------------------------------------------------------------- status changes


@pytest.mark.behaviour("WF-47")
async def test_without_a_hook_nothing_is_written(dsn: str, facts: Facts) -> None:
    flow = define("w").step("a", fails(1), retry=Retry(initial=0)).step("b", fails())
    async with working(dsn, flow) as made:
        run = await made.app.start(flow)
        await drain(made)
        assert (await run.status()).status is S.SUSPENDED  # the second failure waits for its next attempt
        assert rows(facts) == []
        assert not facts.value("select is_called from durable.deliveries_seq_seq")  # nor was there ever one


async def test_each_change_is_told_once_and_in_order(dsn: str, facts: Facts) -> None:
    flow = define("w", version="7").step("a", lambda ctx: 1).sleep("nap", 60).step("b", fails(), retry=1)
    async with working(dsn, flow) as made:
        status, error = listening(made.app)
        run = await made.app.start(flow, key="k")
        await drain(made)
        assert status.changes() == [(S.PENDING, S.RUNNING), (S.RUNNING, S.SUSPENDED)]
        await drain(made, skip=61)
        for was, now in zip(status.reports, status.reports[1:], strict=False):
            assert now.before is was.status
        last = status.reports[-1]
        assert (last.status, last.workflow, last.version, last.key, last.run_id) == (S.FAILED, "w", "7", "k", run.id)
        assert last.error.type == "ValueError"
        assert last.error.step == "b"
        ids = [report.id for report in status.reports]
        assert len({*ids}) == len(ids)
        assert all(i.startswith(f"{run.id}:") for i in ids)
        assert last.at == facts.run(run)["finished_at"]
        assert rows(facts) == []
        assert len(error.reports) == 1


async def test_a_status_that_stays_is_no_change(dsn: str) -> None:
    flow: Builder[Any] = define("w")
    for name in "abcdef":
        flow.step(name, lambda ctx: 1)
    async with working(dsn, flow) as made:
        status, _ = listening(made.app)
        await made.app.start(flow)
        await drain(made)
        assert status.changes() == [(S.PENDING, S.RUNNING), (S.RUNNING, S.COMPLETED)]


@pytest.mark.behaviour("WF-56")
async def test_pause_and_cancel_by_the_apps_own_process_are_told(dsn: str) -> None:
    flow = define("w").wait_for_signal("s", "s")
    async with working(dsn, flow) as made:
        status, _ = listening(made.app)
        run = await made.app.start(flow)
        await drain(made)
        status.reports.clear()
        await made.app.pause(run.id)
        await drain(made)
        assert status.changes() == [(S.SUSPENDED, S.PAUSED)]
        await made.app.cancel(run.id, reason="no need")
        await drain(made)
        assert status.changes()[1:] == [(S.PAUSED, S.CANCELED)]
        assert status.reports[1].reason == "no need"
        assert status.reports[1].error is None


async def test_a_rollback_is_told(dsn: str) -> None:
    flow = define("w").step("a", lambda ctx: 1, compensate=lambda ctx: None).step("b", fails(), retry=1)
    async with working(dsn, flow) as made:
        status, error = listening(made.app)
        await made.app.start(flow)
        await drain(made)
        assert status.changes()[1:] == [(S.RUNNING, S.COMPENSATING), (S.COMPENSATING, S.FAILED)]
        assert [report.error.message for report in status.reports[1:]] == ["no", "no"]
        assert error.errors() == [("b", 1, "no")]


@pytest.mark.parametrize(("point", "committed"), [(Point.BEFORE_COMMIT, 0), (Point.AFTER_COMMIT, 1)])
async def test_all_that_is_committed_is_told_and_nothing_else(
    dsn: str, facts: Facts, point: Point, committed: int
) -> None:
    flow = define("w").step("a", lambda ctx: 1)
    async with an_app(dsn, flow) as app:
        status, _ = listening(app)
        run = await app.start(flow)
        async with bench(app) as made:
            made.points.on(point, made.points.die)
            (job,) = await made.start_jobs()
            with pytest.raises(SimulatedCrash):
                await job
            await made.crash()
        assert [row["run_id"] for row in rows(facts)] == [run.id] * committed
        assert status.reports == []
        async with bench(app) as made:  # another process tells of it
            await drain(made)
        assert status.changes()[-1][1] is S.COMPLETED
        assert len(status.reports) == 2 - committed  # the crash is charged to a run that is running, from then on


# ---------------------------------------------------------------- a hook that raises, hangs, dies


@pytest.mark.behaviour("WF-49")
async def test_a_hook_that_raises_is_called_again_later(dsn: str, facts: Facts, caplog: Any) -> None:
    flow = define("w").step("a", lambda ctx: 1)
    async with an_app(dsn, flow) as app:
        status, _ = listening(app, raises=1)
        async with bench(app) as made:
            run = await app.start(flow)
            await drain(made)
            (row,) = rows(facts)
            assert (row["attempts"], row["later"]) == (1, True)
            assert [*row["error"].values()] == ["RuntimeError: the mail server is down"]
            assert "the mail server is down" in caplog.text
            assert facts.run(run)["status"] == "completed"
        async with bench(app) as made:
            assert await made.engine.deliverer.sweep() == 0
            await drain(made, skip=1.1)
        first, second = status.reports
        assert first == second
        assert rows(facts) == []


async def test_only_the_hook_that_raised_is_called_again(dsn: str) -> None:
    flow = define("w").step("a", lambda ctx: 1)
    async with working(dsn, flow) as made:
        good: list[str] = []
        made.app.on_status_change(lambda change: good.append(change.id))
        bad, _ = listening(made.app, raises=2)
        await made.app.start(flow)
        await drain(made)
        for seconds in (1.1, 2.1, 9):
            await drain(made, skip=seconds)
        assert len(good) == 1
        assert [report.id for report in bad.reports] == good * 3


async def test_a_hook_may_raise_whatever_it_likes(dsn: str, facts: Facts) -> None:
    flow = define("w").step("a", lambda ctx: 1)
    async with working(dsn, flow) as made:

        async def gives_up(change: StatusChange) -> None:
            raise asyncio.CancelledError

        def leaves(change: StatusChange) -> None:
            raise SystemExit(3)

        class Mute(Exception):
            def __str__(self) -> str:
                raise ValueError

        def says_nothing(change: StatusChange) -> None:
            raise Mute

        for hook in (gives_up, leaves, says_nothing):
            made.app.on_status_change(hook)
        await made.app.start(flow)
        await drain(made)
        (row,) = rows(facts)
        first, second, third = row["error"].values()
        assert first == "asyncio.exceptions.CancelledError: "
        assert second == "SystemExit: 3"
        assert "Mute: <the message can't be printed" in third


async def test_a_hook_that_always_raises_is_given_up(dsn: str, facts: Facts, caplog: Any) -> None:
    flow = define("w").step("a", lambda ctx: 1)
    async with working(dsn, flow) as made:
        status, _ = listening(made.app, raises=1_000)
        await made.app.start(flow)
        await drain(made)
        for _ in range(MAX_ATTEMPTS + 5):
            await drain(made, skip=301)
        assert len(status.reports) == MAX_ATTEMPTS
        assert "giving up delivery" in caplog.text
        assert rows(facts) == []


async def test_a_hook_that_kills_its_process_is_given_up(dsn: str, facts: Facts, caplog: Any) -> None:
    flow = define("w").step("a", lambda ctx: 1)
    async with working(dsn, flow) as made:
        status, _ = listening(made.app)
        await made.app.start(flow)
        await made.drain()
        facts.execute("update durable.deliveries set attempts = %s", MAX_ATTEMPTS)
        await drain(made)
        assert status.reports == []
        assert "it never ended" in caplog.text
        assert rows(facts) == []


def test_backoff_grows_up_to_five_minutes() -> None:
    assert [backoff(n).total_seconds() for n in (1, 2, 3, 9, 10, MAX_ATTEMPTS)] == [1, 2, 4, 256, 300, 300]


@pytest.mark.behaviour("WF-50")
async def test_what_a_dead_process_was_telling_is_told_again(dsn: str, facts: Facts) -> None:
    flow = define("w").step("a", lambda ctx: 1)
    async with an_app(dsn, flow) as app, an_app(dsn, flow) as other:
        hanging = Hanging()
        app.on_status_change(hanging)
        status, _ = listening(other)
        async with bench(app) as made, bench(other) as second:
            await app.start(flow)
            await made.drain()
            assert await made.engine.deliverer.sweep() == 1
            await until(lambda: hanging.ids)
            assert await second.engine.deliverer.sweep() == 0  # it is in other hands
            await second.skip(seconds=29)
            assert await second.engine.deliverer.sweep() == 0
            await second.skip(seconds=2)  # nobody has renewed it
            await second.engine.deliverer.deliver_due()
            assert [report.id for report in status.reports] == hanging.ids
            assert rows(facts) == []
            hanging.go_on.set()  # it was no more than slow: nothing comes of it
            await soon(made.engine.deliverer.deliver_due())
            assert len(status.reports) == len(hanging.ids) == 1
            assert rows(facts) == []


async def test_a_slow_hook_keeps_its_delivery(dsn: str) -> None:
    flow = define("w").step("a", lambda ctx: 1)
    async with an_app(dsn, flow) as app, an_app(dsn, flow) as other:
        hanging = Hanging()
        app.on_status_change(hanging)
        status, _ = listening(other)
        async with bench(app) as made, bench(other) as second:
            await app.start(flow)
            await made.drain()
            await made.engine.deliverer.sweep()
            for _ in range(5):
                await made.skip(seconds=20)
                await made.engine.deliverer.sweep()
                assert await second.engine.deliverer.sweep() == 0
            hanging.go_on.set()
            await soon(made.engine.deliverer.deliver_due())
            assert len(hanging.ids) == 1
            assert status.reports == []


# ---------------------------------------------------------------- beside the engine


async def test_a_hook_that_hangs_holds_up_no_run(dsn: str, facts: Facts) -> None:
    flow = define("w").step("a", lambda ctx: 1).sleep("s", 1).step("b", lambda ctx: 2)
    async with working(dsn, flow) as made:
        hanging = Hanging()
        made.app.on_status_change(hanging)
        runs = [await made.app.start(flow) for _ in range(CONCURRENCY + 5)]
        await made.drain()
        for _ in range(3):
            assert await made.engine.deliverer.sweep() == CONCURRENCY  # the others wait for room
        await made.skip(seconds=2)
        await made.drain()
        assert {facts.run(run)["status"] for run in runs} == {"completed"}
        assert len(hanging.ids) == CONCURRENCY
        hanging.go_on.set()
        await soon(made.engine.deliverer.deliver_due())
        assert rows(facts) == []
        assert len(hanging.ids) == len({*hanging.ids})


async def test_of_one_run_one_thing_after_the_other(dsn: str, facts: Facts) -> None:
    flow = define("w").step("a", lambda ctx: 1).sleep("s", 1).step("b", lambda ctx: 2)
    async with an_app(dsn, flow) as app, an_app(dsn, flow) as other:
        flying: dict[Any, int] = {}
        told: dict[Any, list[int]] = {}
        lock = threading.Lock()

        def hook(change: StatusChange) -> None:
            with lock:
                flying[change.run_id] = flying.get(change.run_id, 0) + 1
                assert flying[change.run_id] == 1
            told.setdefault(change.run_id, []).append(int(change.id.partition(":")[2]))
            with lock:
                flying[change.run_id] -= 1

        app.on_status_change(hook)
        other.on_status_change(hook)
        async with bench(app) as made, bench(other) as second:
            await app.start_many(flow, [Start() for _ in range(30)])
            await made.drain()
            await made.skip(seconds=2)
            await made.drain()
            await soon(asyncio.gather(*(each.engine.deliverer.deliver_due() for each in (made, second))))
        assert rows(facts) == []
        assert len(told) == 30
        assert all(seqs == sorted({*seqs}) and len(seqs) >= 2 for seqs in told.values())


async def test_what_a_hook_refuses_steps_aside(dsn: str, facts: Facts) -> None:
    flow = define("w").step("a", lambda ctx: 1).sleep("s", 1).step("b", lambda ctx: 2)
    async with working(dsn, flow) as made:
        status, _ = listening(made.app, raises=1)
        await made.app.start(flow)
        await made.drain()
        facts.execute("update durable.clock set ahead = ahead + interval '2 s'")
        await made.drain()
        await soon(made.engine.deliverer.deliver_due())
        assert status.reports[-1].status is S.COMPLETED
        await drain(made, skip=2)
        assert status.reports[-1] == status.reports[0]


async def test_a_worker_without_hooks_of_that_kind_leaves_it_alone(dsn: str, facts: Facts) -> None:
    flow = define("w").step("a", fails(), retry=1)
    async with an_app(dsn, flow) as app, an_app(dsn, flow, queue="other") as elsewhere, an_app(dsn, flow) as plain:
        _, error = listening(app)
        status = Told()
        plain.on_status_change(status)
        listening(elsewhere)
        async with bench(app) as made, bench(elsewhere) as far, bench(plain) as second:
            await app.start(flow)
            await made.drain()
            assert await far.engine.deliverer.sweep() == 0
            await second.engine.deliverer.deliver_due()
            assert len(status.reports) == 1
            assert [row["kind"] for row in rows(facts)] == ["error"]
            await made.engine.deliverer.deliver_due()
            assert len(error.reports) == 1


async def test_a_worker_calls_them_by_itself(dsn: str) -> None:
    flow = define("w").step("a", lambda ctx: 1).wait_for_signal("s", "s")
    async with an_app(dsn, flow) as app:
        status, _ = listening(app)
        worker = Worker(app)
        working = asyncio.create_task(worker.run())
        await soon(worker.started.wait())
        run = await app.start(flow)
        await until(lambda: status.reports and status.reports[-1].status is S.SUSPENDED)
        await run.cancel()  # written by the app, told by the worker
        await until(lambda: status.reports[-1].status is S.CANCELED)
        worker.stop()
        await soon(working)


async def test_until_idle_waits_for_the_hooks_and_for_what_they_start(dsn: str, facts: Facts) -> None:
    first, second = define("first").step("a", lambda ctx: 1), define("second").step("a", lambda ctx: 1)
    async with an_app(dsn, first, second) as app:

        @app.on_status_change
        async def chain(change: StatusChange) -> None:
            if change.workflow == "first" and change.status is S.COMPLETED:
                await app.start(second, key=change.id)

        await app.start(first)
        await soon(app.run_worker(until_idle=True))
        assert facts.value("select status from durable.runs where workflow = 'second'") == "completed"
        assert rows(facts) == []


async def test_a_worker_that_ends_tells_what_is_left(dsn: str, facts: Facts) -> None:
    flow = define("w").step("a", lambda ctx: 1)
    async with an_app(dsn, flow) as app:
        status, _ = listening(app)
        async with app.worker():
            run = await app.start(flow)
            await run.result()
        assert status.changes() == [(S.PENDING, S.COMPLETED)]
        assert rows(facts) == []


async def test_what_a_cancelled_sweep_has_taken_is_told(dsn: str, facts: Facts) -> None:
    flow = define("w").step("a", lambda ctx: 1)
    async with working(dsn, flow) as made:
        status, _ = listening(made.app)
        await made.app.start(flow)
        await made.drain()
        with facts.connection.transaction():
            facts.execute("lock table durable.deliveries")
            sweep = asyncio.create_task(made.engine.deliverer.sweep())
            waits = "select 1 from pg_locks where relation = 'durable.deliveries'::regclass and not granted"
            await until(lambda: facts.rows(waits))
            sweep.cancel()  # as the end of a worker does
        await asyncio.wait({sweep})
        await soon(made.engine.deliverer.deliver_due())
        assert sweep.cancelled()
        assert status.changes() == [(S.PENDING, S.COMPLETED)]


async def test_a_worker_that_ends_waits_for_no_hook_for_long(dsn: str, facts: Facts, monkeypatch: Any) -> None:
    monkeypatch.setattr("durable.engine.deliverer.GRACE", 0.0)
    flow = define("w").step("a", lambda ctx: 1)
    async with an_app(dsn, flow) as app:
        hanging = Hanging()
        app.on_status_change(hanging)
        async with app.worker():
            await app.start(flow)
            await until(lambda: hanging.ids)
        (row,) = rows(facts)  # not lost: due again
        assert (row["attempts"], row["error"]) == (1, None)


async def test_a_thread_that_hangs_keeps_no_worker_from_its_end(dsn: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("durable.engine.deliverer.GRACE", 0.0)
    flow = define("w").step("a", lambda ctx: 1)
    entered, go_on = threading.Event(), threading.Event()

    def hook(change: StatusChange) -> None:
        entered.set()
        go_on.wait()

    async with an_app(dsn, flow) as app:
        app.on_status_change(hook)
        async with app.worker():
            await app.start(flow)
            await until(entered.is_set)
        go_on.set()


async def test_the_database_may_go_away_meanwhile(dsn: str, facts: Facts) -> None:
    flow = define("w").step("a", lambda ctx: 1)
    async with working(dsn, flow) as made:
        hanging = Hanging()
        made.app.on_status_change(hanging)
        await made.app.start(flow)
        await made.drain()
        await made.engine.deliverer.sweep()
        await until(lambda: hanging.ids)
        facts.terminate("durable worker%")
        hanging.go_on.set()

        async def told() -> bool:
            with made.engine.database_errors_only():
                await made.engine.deliverer.deliver_due()
                return True
            return False

        await until(told)
        await made.skip(seconds=31)
        with made.engine.database_errors_only():
            await made.engine.deliverer.deliver_due()
        assert len({*hanging.ids}) == 1  # at least once, and with the same id
        assert rows(facts) == []


# ---------------------------------------------------------------- errors


@pytest.mark.behaviour("RA-12", "RA-19")
async def test_a_failed_attempt_is_told_once(dsn: str) -> None:
    flaky = fails(1, lambda: ValueError("not yet"))
    flow = define("w").step("flaky", flaky, retry=Retry(max_attempts=4, initial=0.001, jitter=False)).sleep("s", 60)
    async with an_app(dsn, flow) as app:
        _, error = listening(app)
        async with bench(app) as made:
            run = await app.start(flow, key="k")
            await drain(made)
            await drain(made, skip=1)
        async with bench(app) as made:  # the run sleeps; another worker takes it up
            await drain(made, skip=61)
        assert await run.result() == {"flaky": 2, "s": None}
        (report,) = error.reports
        assert isinstance(report, ErrorReport)
        assert (report.step, report.attempt, report.will_retry, report.delay) == ("flaky", 1, True, 0.001)
        assert (report.limit, report.remaining) == (4, 3)
        assert (report.error.type, report.error.message, report.kind) == ("ValueError", "not yet", "error")
        assert (report.run_id, report.workflow, report.version, report.key) == (run.id, "w", "1", "k")


@pytest.mark.behaviour("RV-10")
async def test_attempts_up_to_the_last_are_told_once_each(dsn: str) -> None:
    flow = define("w").step("a", fails(), retry=AGAIN)
    async with working(dsn, flow) as made:
        status, error = listening(made.app)
        run = await made.app.start(flow, key="k")
        for _ in range(3):
            await drain(made, skip=10)
        assert [(r.attempt, r.remaining, r.will_retry, r.delay, r.kind) for r in error.reports] == [
            (1, 2, True, 1.0, "error"),
            (2, 1, True, 2.0, "error"),
            (3, 0, False, None, "exhausted"),
        ]
        assert status.reports[-1].status is S.FAILED
        again = await made.app.start(flow, key="k")  # it is the run that has failed
        assert again.id == run.id
        await drain(made, skip=10)
        assert len(error.reports) == 3
        await made.app.retry(run.id)  # what failed is forgotten, not told anew; what fails then is
        await drain(made)
        assert [r.attempt for r in error.reports[3:]] == [1]


async def test_no_attempts_are_left_after_an_error_that_is_final(dsn: str) -> None:
    flow = define("w").step("a", fails(error=lambda: NonRetryable("never")), retry=Retry(max_attempts=None))
    async with working(dsn, flow) as made:
        _, error = listening(made.app)
        await made.app.start(flow)
        await drain(made)
        (report,) = error.reports
        assert (report.limit, report.remaining, report.will_retry, report.kind) == (None, 0, False, "critical")


async def test_attempts_without_limit(dsn: str) -> None:
    flow = define("w").step("a", fails(), retry=Retry(max_attempts=None, initial=9))
    async with working(dsn, flow) as made:
        _, error = listening(made.app)
        await made.app.start(flow)
        await drain(made)
        (report,) = error.reports
        assert (report.limit, report.remaining, report.will_retry) == (None, None, True)


async def test_out_of_attempts_and_paused(dsn: str) -> None:
    flow = define("w").step("a", fails(), retry=Retry(max_attempts=1, on_exhausted="pause"))
    async with working(dsn, flow) as made:
        status, error = listening(made.app)
        await made.app.start(flow)
        await drain(made)
        assert error.errors() == [("a", 1, "no")]
        assert not error.reports[0].will_retry
        assert status.reports[-1].status is S.PAUSED


def sad(say: str) -> Callable[..., Any]:
    def handler(*given: object) -> Any:
        raise NonRetryable(say)

    return handler


WHERE: dict[str, tuple[Builder[Any], list[tuple[str | None, str]]]] = {
    "branches": (
        define("w").parallel("p", {"x": sad("1"), "y": sad("2"), "z": lambda ctx: 3}),
        [("p/x", "1"), ("p/y", "2")],
    ),
    "selector": (define("w").route("r", sad("s"), {"x": lambda ctx: 1}), [("choice:r", "s")]),
    "route": (define("w").route("r", lambda ctx: "x", {"x": sad("b")}), [("r/x", "b")]),
    "no such branch": (define("w").route("r", lambda ctx: "q", {"x": lambda ctx: 1}), [("choice:r", "route")]),
    "iteration": (define("w").loop("l", sad("i"), max_iterations=2), [("l[0]", "i")]),
    "limit": (define("w").loop("l", lambda ctx: 1, until=lambda r, i: False, max_iterations=2), [(None, "loop 'l'")]),
    "sleep": (define("w").sleep("s", sad("t")), [("s", "t")]),
    "wait": (define("w").wait_for_signal("s", sad("n")), [("s", "n")]),
    "timeout": (define("w").wait_for_signal("s", "s", timeout=0), [(None, "")]),
    "child's name": (define("w").child_workflow("c", sad("c")), [("choice:c", "c")]),
    "child's input": (define("w").child_workflow("c", "w", map_input=sad("m")), [("input:c", "m")]),
    "result": (define("w", result=sad("r")).step("a", lambda ctx: 1), [("run:result", "r")]),
    "undo": (
        define("w")
        .parallel("p", {"x": branch(lambda ctx: 1, compensate=sad("u"))})
        .loop("l", lambda ctx: 1, max_iterations=1, compensate=sad("v"))
        .step("a", sad("a")),
        [("a", "a"), ("undo:l[0]", "v"), ("undo:p/x", "u")],
    ),
}


@pytest.mark.parametrize("where", WHERE)
async def test_once_per_failure_wherever_it_is(dsn: str, where: str) -> None:
    flow, expected = WHERE[where]
    async with working(dsn, flow) as made:
        _, error = listening(made.app)
        run = await made.app.start(flow)
        await drain(made)
        assert (await run.status()).status is S.FAILED
        found = sorted(((r.step, r.error.message) for r in error.reports), key=str)
        assert len(found) == len(expected), found
        for (step, message), (expected_step, say) in zip(found, sorted(expected, key=str), strict=True):
            assert step == expected_step
            assert message.startswith(say)
        for report in error.reports:
            assert (report.limit, report.attempt) == ((None, None) if report.step is None else (3, 1))
            assert not report.will_retry


async def test_a_failed_child_is_told_of_it_and_of_its_parent(dsn: str) -> None:
    child = define("child").step("a", fails(), retry=1)
    flow = define("w").child_workflow("c", child)
    async with working(dsn, flow, child) as made:
        _, error = listening(made.app)
        await made.app.start(flow)
        await drain(made)
        assert [(r.workflow, r.step, r.error.type) for r in error.reports] == [
            ("child", "a", "ValueError"),
            ("w", None, "durable.errors.ChildFailed"),
        ]


async def test_a_deadline_is_an_error_of_the_run(dsn: str) -> None:
    flow = define("w").sleep("s", 60)
    async with working(dsn, flow) as made:
        _, error = listening(made.app)
        await made.app.start(flow, timeout=5)
        await drain(made)
        await drain(made, skip=6)
        (report,) = error.reports
        assert (report.step, report.attempt, report.limit, report.delay) == (None, None, None, None)
        assert (report.remaining, report.will_retry) == (0, False)


async def test_cancel_is_no_error(dsn: str) -> None:
    flow = define("w").step("a", lambda ctx: 1, compensate=lambda ctx: None).sleep("s", 60)
    async with working(dsn, flow) as made:
        status, error = listening(made.app)
        run = await made.app.start(flow)
        await drain(made)
        await made.app.cancel(run.id, compensate=True)
        await drain(made)
        assert status.reports[-1].status is S.CANCELED
        assert error.reports == []


async def test_a_step_that_kills_its_worker_is_told_when_it_is_given_up(dsn: str) -> None:
    flow = define("w").step("a", lambda ctx: 1, retry=2)
    async with an_app(dsn, flow, max_crashes=1) as app:
        _, error = listening(app)
        async with bench(app) as made:
            await app.start(flow)
            made.points.on(Point.BEFORE_HANDLER, made.points.die)
            await made.start_jobs()
            await until(lambda: made.points.dead)
            await made.crash()
        async with bench(app) as made:
            await drain(made)
        (report,) = error.reports
        assert (report.step, report.kind, report.will_retry, report.limit) == ("a", "interrupted", False, 2)


# ---------------------------------------------------------------- what a hook may do


@pytest.mark.behaviour("RA-13", "RA-14")
async def test_a_hook_may_write_and_notify(dsn: str, facts: Facts) -> None:
    facts.execute("create table seen (id text primary key, said text)")
    facts.execute("listen failures")
    flow = define("w").step("a", fails(1), retry=Retry(initial=0))
    async with working(dsn, flow) as made:

        @made.app.on_error
        async def keep(report: ErrorReport) -> None:
            async with made.app.pool.connection() as connection:
                query = b"insert into seen values (%s, %s) on conflict do nothing"
                await connection.execute(query, [report.id, report.error.message])
                await connection.execute("select pg_notify('failures', %s)", [report.step])

        await made.app.start(flow)
        await drain(made)
        assert [row["said"] for row in facts.rows("select * from seen")] == ["no"]
        (heard,) = facts.connection.notifies(timeout=30, stop_after=1)
        assert heard.payload == "a"


@pytest.mark.behaviour("RA-15")
async def test_a_hook_may_send_a_message(dsn: str) -> None:
    flow = define("w").step("a", fails(), retry=1)
    waiter = define("waiter").wait_for_signal("news", "news")
    async with working(dsn, flow, waiter) as made:
        waiting = await made.app.start(waiter)

        @made.app.on_error
        async def tell(report: ErrorReport) -> None:
            await made.app.signal(waiting.id, "news", report.error.message, id=report.id)

        await made.app.start(flow)
        await drain(made)
        await made.drain()
        assert await waiting.result() == {"news": "no"}


async def test_what_is_logged_in_a_hook_names_the_run(dsn: str) -> None:
    from durable.logs import RunFilter

    flow = define("w").step("a", lambda ctx: 1)
    seen: list[Any] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(getattr(record, "run", None))

    handler, logger = Keep(), logging.getLogger("tests.of.hooks")
    handler.addFilter(RunFilter())
    logger.addHandler(handler)
    async with working(dsn, flow) as made:
        made.app.on_status_change(lambda change: logger.warning("told"))
        run = await made.app.start(flow)
        await drain(made)
    logger.removeHandler(handler)
    assert seen == [str(run.id)]


async def test_a_sync_function_may_return_something_to_await(dsn: str) -> None:
    flow = define("w").step("a", lambda ctx: 1)
    async with working(dsn, flow) as made:
        told: list[Status] = []

        async def later(change: StatusChange) -> None:
            told.append(change.status)

        made.app.on_status_change(lambda change: later(change))
        await made.app.start(flow)
        await drain(made)
        assert told == [S.COMPLETED]


# ---------------------------------------------------------------- what is stored


class Rot:
    """Not JSON any more, and back."""

    def encode(self, plain: bytes, /) -> bytes:
        return bytes(byte ^ 1 for byte in plain)

    decode = encode


async def test_deliveries_go_through_the_codec(dsn: str, facts: Facts) -> None:
    flow = define("w").step("a", fails(error=lambda: NonRetryable("the secret")))
    async with an_app(dsn, flow, codec=Rot()) as app, an_app(dsn, flow) as without:
        status, _ = listening(app)
        deaf, _ = listening(without)
        async with bench(app) as made, bench(without) as second:
            await app.start(flow)
            await made.drain()
            text = facts.value("select string_agg(body::text, '') from durable.deliveries")
            assert "secret" not in text
            await second.engine.deliverer.deliver_due()  # it can't read them, and says so
            assert deaf.reports == []
            assert "codec" in str([row["error"] for row in rows(facts)])
            facts.execute("update durable.deliveries set error = null")  # of that, too, each could read only its own
            await drain(made, skip=2)
        assert status.reports[-1].error.message == "the secret"


async def test_purge_takes_deliveries_with_it(dsn: str, facts: Facts) -> None:
    flow = define("w").step("a", lambda ctx: 1)
    async with working(dsn, flow) as made:
        listening(made.app, raises=1_000)
        await made.app.start(flow)
        await drain(made)
        assert len(rows(facts)) == 1
        await made.skip(days=2)
        assert await made.app.purge(older_than=timedelta(days=1)) == 1
        assert rows(facts) == []


# ---------------------------------------------------------------- registering


def test_decorators_give_the_function_back() -> None:
    app = AsyncDurable()

    @app.on_status_change
    def changed(change: StatusChange) -> None: ...

    @app.on_error
    async def failed(report: ErrorReport) -> None: ...

    app.on_status_change(changed)  # the same one again
    assert app.hooks.of("status") == (changed,)
    assert app.hooks.of("error") == (failed,)
    assert {*app.hooks.kinds} == {"status", "error"}


@pytest.mark.parametrize("hook", [None, "name", lambda: None, lambda a, b: None])
def test_what_is_no_hook_is_refused(hook: Any) -> None:
    with pytest.raises(DefinitionError):
        AsyncDurable().on_error(hook)


# ---------------------------------------------------------------- function workflows


def declined(number: int) -> int:
    raise NonRetryable(f"card {number}")


async def passes_on(ctx: Context) -> int:
    return await ctx.step(declined, 1)


async def raises_its_own(ctx: Context) -> int:
    try:
        return await ctx.step(declined, 1)
    except StepFailed:
        raise KeyError("order") from None


async def joins(ctx: Context) -> Any:
    return await ctx.join("both", {"a": lambda c: c.step(declined, 1), "b": lambda c: c.step(declined, 2)})


async def waits(ctx: Context) -> Any:
    return await ctx.wait_for_signal("s", timeout=0)


BODIES: dict[Any, list[tuple[str | None, int | None, str]]] = {
    passes_on: [("declined", 1, "card 1")],
    raises_its_own: [("declined", 1, "card 1"), (None, None, "'order'")],
    joins: [("both/a/declined", 1, "card 1"), ("both/b/declined", 1, "card 2")],
    waits: [(None, None, "no signal 's' came")],
}


@pytest.mark.behaviour("RV-11")
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
async def test_once_per_failure_of_a_body(dsn: str, body: Any) -> None:
    flow = workflow()(body)
    async with working(dsn, flow) as made:
        status, error = listening(made.app)
        await made.app.start(flow)
        await drain(made)
        assert status.reports[-1].status is S.FAILED
        found, expected = (sorted(told, key=lambda one: one[2]) for told in (error.errors(), BODIES[body]))
        assert [one[:2] for one in found] == [one[:2] for one in expected]
        assert all(one[2].startswith(other[2]) for one, other in zip(found, expected, strict=True))
