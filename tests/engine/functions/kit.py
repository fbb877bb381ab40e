"""For tests of function workflows: a worker that remembers bodies or replays them, and what handlers did."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from tests.engine.kit import Bench, an_app, bench

from durable import AsyncDurable, NonRetryable, RunFailed
from durable.engine.bodies import Bodies
from durable.testing.harness import AsyncHarness

ONCE: Final[dict[str, Any]] = {"retry": 1}
"""Options of a step that has one attempt."""


class Log(list[Any]):
    """What handlers did, in order."""

    async def do(self, what: Any, value: Any = None) -> Any:
        """A handler: it was here; `value`, or else `what`, is the result."""
        self.append(what)
        return what if value is None else value

    async def undo(self, output: Any, *args: Any) -> None:
        """Its compensator."""
        self.append(("undo", output))

    async def fail(self, what: Any = "fail") -> Any:
        """A handler whose every attempt fails."""
        self.append(what)
        raise ValueError(f"no {what}")

    async def refuse(self, what: Any = "refuse") -> Any:
        """A handler that fails for good at once."""
        self.append(what)
        raise NonRetryable(f"never {what}")

    def flaky(self, what: Any, fails: int, value: Any = None) -> Any:
        """A handler whose first `fails` attempts fail."""

        async def flaky() -> Any:
            self.append(what)
            if self.count(what) <= fails:
                raise ValueError(f"not yet: {self.count(what)}")
            return what if value is None else value

        return flaky


@dataclass(frozen=True)
class Place:
    """Where the runs of a test are executed. `replays`: each transition and each job begins with a replay, as after a
    restart of the worker; else bodies are kept from step to step and from wait to wait."""

    dsn: str
    replays: bool

    @asynccontextmanager
    async def working(self, *workflows: Any, concurrency: int = 20, **arguments: Any) -> AsyncIterator[Bench]:
        """A bench of an app of its own."""
        async with self.app(*workflows, **arguments) as app, self.bench(app, concurrency) as made:
            yield made

    @asynccontextmanager
    async def app(self, *workflows: Any, **arguments: Any) -> AsyncIterator[AsyncDurable]:
        async with an_app(self.dsn, *workflows, **arguments) as app:
            if self.replays:
                app.options = replace(app.options, burst_steps=1)
            yield app

    @asynccontextmanager
    async def bench(self, app: AsyncDurable, concurrency: int = 20) -> AsyncIterator[Bench]:
        """One worker of it; another may follow, as after a crash."""
        async with bench(app, concurrency=concurrency) as made:
            if self.replays:
                forget_bodies(made)
            yield made


def forget_bodies(b: Bench) -> None:
    """From now on every job replays."""
    b.engine.bodies.close()
    b.engine.bodies = Bodies(0)


async def crashing(dsn: str, workflow: Any, given: Any = None, *more: Any, most: int = 300, hours: int = 30) -> Any:
    """Run to the end, with a worker that dies after each journaled step; returns the run's handle.

    Whenever all is parked the clock is moved on by an hour, `hours` times at most.
    """
    async with an_app(dsn, workflow, *more) as app, AsyncHarness(app) as t:
        run = await app.start(workflow, given)
        for _ in range(most):
            if await t.drain(max_steps=1):
                continue
            if (await run.status()).ended or not hours:
                return run
            hours -= 1
            await t.skip(hours=1)
        raise AssertionError(f"it takes more than {most} steps: {await run.status()}")


async def failure(run: Any) -> Any:
    """The recorded error of a run that has failed."""
    status = await run.status()
    assert status.status == "failed", status
    return status.error


async def fault(run: Any) -> str:
    """The message of a run that broke a rule of bodies."""
    error = await failure(run)
    assert error.kind == "critical", error
    assert error.type in ("durable.errors.DefinitionError", "durable.errors.DuplicateStepName")
    return str(error.message)


async def told(run: Any) -> list[str]:
    """The run's history: kinds, with the step where there is one."""
    return [f"{event.kind} {event.step}" if event.step else event.kind for event in await run.history()]


async def diverged(run: Any) -> dict[str, Any]:
    """How the journal and the code of a run differ that is parked for that."""
    status = await run.status()
    assert (status.status, status.waiting_for, status.waiting_name) == ("suspended", "person", "HistoryDiverged"), (
        status
    )
    assert status.error is not None
    assert status.error.type == "durable.errors.HistoryDiverged"
    return dict(status.error.details)


async def failed_with(run: Any) -> RunFailed:
    """What ``result()`` of a failed run raises."""
    try:
        value = await run.result(timeout=10)
    except RunFailed as error:
        return error
    raise AssertionError(f"it did not fail: {value!r}")
