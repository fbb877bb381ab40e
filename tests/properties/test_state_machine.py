"""Anything that people and crashes do to runs, in any order, against a small model of what a user expects.

The model knows nothing of revisions, jobs or frames: a run is a list of nodes, a position, an inbox and a clock. What a
drain makes of it is a sequence of moments; after a whole drain the run must stand at the last of them, after one that
crashed at any. The runs are in PostgreSQL, driven by the harness; their steps write in the run's own transaction. One
workflow is there twice, built of nodes and written as a function: the model knows no difference.

``DURABLE_EXAMPLES=500`` looks longer than every day's few; ``DURABLE_SHRINK=1`` makes what it found small, which takes
minutes.
"""

from __future__ import annotations

import asyncio
import copy
import os
import uuid
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, TypeVar

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text
from tests import invariants

from durable import (
    AsyncDurable,
    Break,
    Context,
    NonRetryable,
    Retry,
    RetryRefused,
    StepContext,
    branch,
    define,
    workflow,
)
from durable.testing import AsyncHarness

T = TypeVar("T")
Ctx = StepContext[Any]

# Minutes. A skip is 20, and no sum of skips is any of these: what real time adds never matters.
SKIP: Final = 20
DELAY: Final = 30
PAUSE: Final = 10
SLEEP: Final = 50
PATIENCE: Final = 70

RUNS: Final = 3
DEPTH: Final = 15  # so many moves come before the first cancel, or little else would be seen
ENDED: Final = ("completed", "failed", "canceled")
MENDED: set[uuid.UUID] = set()


class Broken(Exception):
    """Of a step that is to be tried again."""


async def effect(ctx: Ctx) -> str:
    """Something that happens in the database, in the transaction of the step."""
    connection = await ctx.async_connection()
    values = {"run": ctx.run_id, "step": ctx.step_id}
    await connection.execute(text("insert into effects (run_id, step) values (:run, :step)"), values)
    return ctx.step_id


async def flaky(ctx: Ctx) -> str:
    await effect(ctx)
    if ctx.attempt <= ctx.input["failures"]:
        raise Broken
    return ctx.step_id


async def doomed(ctx: Ctx) -> str:
    await effect(ctx)
    if ctx.input["doomed"] and ctx.run_id not in MENDED:
        raise NonRetryable("doomed")
    return ctx.step_id


AGAIN: Final = Retry(max_attempts=10, backoff="constant", initial=PAUSE * 60, jitter=False, maximum=PAUSE * 60)
saga = (
    define("saga")
    .step("a", effect, compensate=effect)
    .parallel("p", {"x": branch(effect, compensate=effect), "y": branch(effect, compensate=effect)})
    .step("f", flaky, retry=AGAIN)
    .wait_for_signal("w1", "go")
    .sleep("n", timedelta(minutes=SLEEP))
    .loop("l", effect, max_iterations=2, compensate=effect)
    .wait_for_signal("w2", "go", timeout=timedelta(minutes=PATIENCE), on_timeout="nothing came")
    .step("z", doomed)
)
plain = (
    define("plain")
    .wait_for_signal("w1", "go", timeout=timedelta(minutes=PATIENCE))
    .step("f", flaky, retry=AGAIN)
    .step("z", doomed)
    .wait_for_signal("w2", "go")
)


async def uneffect(ctx: Ctx, output: str) -> None:
    assert ctx.step_id == f"undo:{output}"
    await effect(ctx)


@workflow
async def tale(ctx: Context, given: dict[str, Any]) -> None:
    """The saga as a function. Steps within another name are called ``s``."""

    async def one(c: Context) -> None:
        await c.step(effect, name="s", compensate=uneffect)

    async def turn(c: Context, iteration: int) -> int | Break[None]:
        await one(c)
        return Break(None) if iteration == 1 else iteration + 1

    await ctx.step(effect, name="a", compensate=uneffect)
    await ctx.join("p", {"x": one, "y": one})
    await ctx.step(flaky, name="f", retry=AGAIN)
    await ctx.wait_for_signal("go", name="w1")
    await ctx.sleep(timedelta(minutes=SLEEP), name="n")
    await ctx.loop("l", turn, 0)
    await ctx.wait_for_signal("go", name="w2", timeout=timedelta(minutes=PATIENCE), on_timeout="nothing came")
    await ctx.step(doomed, name="z")


WORKFLOWS: Final[dict[str, Any]] = {"saga": saga, "tale": tale, "plain": plain}
_SAGA: Final = ("a", "p", "f", "w1", "n", "l[0]", "l[1]", "w2", "z")
PROGRAMS: Final = {"saga": _SAGA, "tale": _SAGA, "plain": ("w1", "f", "z", "w2")}
UNDONE: Final = frozenset({"a", "p/x", "p/y", "l[0]", "l[1]"})


@dataclass
class Message:
    body: int
    sent_at: int


@dataclass
class Model:
    """What a user expects of one run."""

    program: str
    failures: int
    doomed: bool
    start_at: int
    status: str = "pending"
    position: int = 0
    journal: list[str] = field(default_factory=list)
    inbox: list[Message] = field(default_factory=list)
    taken: dict[str, object] = field(default_factory=dict)
    begun: bool = False  # the node at the position waits
    due: int | None = None
    attempt: int = 1
    ending: str | None = None  # a rollback is under way, or asked for
    stopped: bool = False
    pausing: bool = False

    @property
    def node(self) -> str:
        """Where it is; empty at the end."""
        return (*PROGRAMS[self.program], "")[self.position]

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def to_undo(self) -> list[str]:
        done = [step for step in self.journal if step in UNDONE and f"undo:{step}" not in self.journal]
        return done[::-1] if self.program != "plain" else []

    # ------------------------------------------------ what a drain makes of it, moment by moment

    def moments(self, now: int) -> Iterator[Model]:
        """Every moment from this one until nothing can be done any more."""
        yield copy.deepcopy(self)
        while (branches := self._step(now)) is not None:
            yield from branches
            yield copy.deepcopy(self)

    def _step(self, now: int) -> list[Model] | None:
        """The next moment; or None. Returned are those that may come in its place."""
        if self.ended or self.status == "paused":
            return None
        if self.status == "compensating" or self.ending is not None:
            return self._undo()
        if self.pausing:
            self.status, self.pausing = "paused", False
            return []
        if self.start_at > now:
            return None
        return self._forward(now)

    def _undo(self) -> list[Model]:
        self.status = "compensating"
        if not self.to_undo or self.stopped:
            assert self.ending is not None
            self.status, self.ending = self.ending, None
        else:
            self.journal.append(f"undo:{self.to_undo[0]}")
        return []

    def _forward(self, now: int) -> list[Model] | None:
        node = self.node
        if node.startswith("w"):
            return self._await_signal(node, now)
        if node == "n":
            if not self.begun:
                return self._park(now + SLEEP)
            assert self.due is not None
            return None if now < self.due else self._done(node)
        if node == "f":
            if self.due is not None and now < self.due:
                return None
            if self.attempt <= self.failures:
                self.attempt += 1
                return self._park(now + PAUSE)
            return self._done(node)
        if node == "z" and self.doomed:
            self.status, self.ending = ("compensating", "failed") if self.to_undo else ("failed", None)
            return []
        return self._parallel() if node == "p" else self._done(node)

    def _parallel(self) -> list[Model]:
        """Its branches end in any order."""
        self.status = "running"
        missing = [step for step in ("p/x", "p/y") if step not in self.journal]
        if not missing:
            return self._done("p")
        others = []
        for step in missing[1:]:
            other = copy.deepcopy(self)
            other.journal.append(step)
            others.append(other)
        self.journal.append(missing[0])
        return others

    def _await_signal(self, node: str, now: int) -> list[Model] | None:
        limited = node == ("w1" if self.program == "plain" else "w2")
        due = (self.due if self.begun else now + PATIENCE) if limited else None
        message = next((m for m in self.inbox if due is None or m.sent_at <= due), None)
        if message is not None:
            self.inbox.remove(message)
            self.taken[node] = message.body
            return self._done(node)
        if due is not None and due <= now:
            if self.program != "plain":
                self.taken[node] = "nothing came"
                return self._done(node)
            self.status = "failed"
            return []
        return self._park(due) if not self.begun else self._as("suspended")

    def _as(self, status: str) -> list[Model] | None:
        changed, self.status = self.status != status, status
        return [] if changed else None

    def _park(self, due: int | None) -> list[Model]:
        self.status, self.begun, self.due = "suspended", True, due
        return []

    def _done(self, node: str) -> list[Model]:
        self.journal.append(node)
        if node == "l[1]":
            self.journal.append("l")
        self.position, self.begun, self.due, self.attempt = self.position + 1, False, None, 1
        self.status = "completed" if self.position == len(PROGRAMS[self.program]) else "running"
        return []

    # ------------------------------------------------ what is seen of it

    def looks(self) -> tuple[str, tuple[str, ...], tuple[tuple[str, object], ...]]:
        return self.status, canonical(self.journal), tuple(sorted(self.taken.items()))


def canonical(journal: list[str]) -> tuple[str, ...]:
    """Branches end in any order, and are undone in the reverse of that; what happened is the same."""
    return tuple(sorted(journal))


@dataclass
class Seen:
    """What the database says of a run."""

    status: str
    journal: list[str]
    taken: dict[str, object]
    effects: list[str]
    claimed: bool
    begun: bool  # the node at the cursor
    crash_wait: bool
    suspect: bool  # a crash, of which it is not known yet whether the body or a step did it

    def looks(self) -> tuple[str, tuple[str, ...], tuple[tuple[str, object], ...]]:
        return self.status, canonical(self.journal), tuple(sorted(self.taken.items()))


SEEN: Final = b"""
select r.status, r.claim_token is not null, r.frame <> '{}',
  r.status = 'suspended' and exists (
    select from jsonb_each(r.frame) f (id, begun)
    where (begun ->> 'crashes')::int > 1 and begun ->> 'waits' = 'retry' and begun ->> 'attempts' is null),
  r.frame ? 'run:body',
  array(select regexp_replace(step_id, '/s$', '') from durable.journal j
        where j.run_id = r.id and j.status = 'completed' and step_id <> 'run:result'
          and (kind not in ('branch', 'iteration') or started_at is not null) order by seq),
  coalesce((select json_object_agg(step_id, result) from durable.journal j
            where j.run_id = r.id and j.status = 'completed' and kind = 'signal'), '{}'),
  array(select regexp_replace(step, '/s$', '') from effects e where e.run_id = r.id order by seq)
from durable.runs r where r.id = %s
"""
CLEAR: Final = b"""
truncate durable.runs, durable.journal, durable.inbox, durable.attempts, durable.events, durable.waiters,
  durable.procrastinate_jobs, durable.procrastinate_events, effects cascade;
update durable.clock set ahead = '0';
"""


class Runs(RuleBasedStateMachine):
    """The runs of one database. `dsn`, `runner` and `app` are set by the test."""

    dsn: str
    runner: asyncio.Runner
    app: AsyncDurable
    connection: psycopg.Connection

    runs = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[uuid.UUID, Model] = {}
        self.now = 0
        self.sent = self.moves = 0
        self.at_rest = False
        self.harness = AsyncHarness(self.app)
        MENDED.clear()
        self.connection.execute(CLEAR)

    def teardown(self) -> None:
        self.await_(self.harness.__aexit__(None, None, None))

    def await_(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    # ------------------------------------------------ rules

    @initialize(
        target=runs,
        program=st.sampled_from(sorted(PROGRAMS)),
        failures=st.integers(0, 2),
        doomed=st.booleans(),
        early=st.integers(0, 3),
        crashes=st.lists(st.integers(1, 3), max_size=3),
        done=st.integers(0, 6),
    )
    def first(self, program: str, failures: int, doomed: bool, early: int, crashes: list[int], done: int) -> uuid.UUID:
        """A run that has come some way already, through crashes."""
        run = self._start(program, failures, doomed, delayed=False)
        for _ in range(early):
            self.signal(run, twice=False)
        for steps in crashes:
            self.crash(steps)
        for _ in range(done):
            self.go_on(run)
        return run

    @precondition(lambda self: len(self.models) < RUNS)
    @rule(
        target=runs,
        program=st.sampled_from(sorted(PROGRAMS)),
        failures=st.integers(0, 2),
        doomed=st.booleans(),
        delayed=st.booleans(),
    )
    def start(self, program: str, failures: int, doomed: bool, delayed: bool) -> uuid.UUID:
        return self._start(program, failures, doomed, delayed)

    def _start(self, program: str, failures: int, doomed: bool, delayed: bool) -> uuid.UUID:
        self._rule()
        given = {"failures": failures, "doomed": doomed}
        delay = timedelta(minutes=DELAY) if delayed else None
        run = self.await_(self.app.start(WORKFLOWS[program], given, delay=delay))
        self.models[run.id] = Model(program, failures, doomed, self.now + DELAY if delayed else self.now)
        return run.id

    @rule(run=runs, twice=st.booleans())
    def signal(self, run: uuid.UUID, twice: bool) -> None:
        self._rule()
        self.sent += 1
        for _ in range(1 + twice):
            accepted = self.await_(self.app.signal(run, "go", self.sent, id=f"m{self.sent}" if twice else None))
            assert accepted is not self.models[run].ended
        if not self.models[run].ended:
            self.models[run].inbox.append(Message(self.sent, self.now))

    @rule(run=runs)
    def resume(self, run: uuid.UUID) -> None:
        """Strictly: only a wait that has begun, whose time is not over, and that nothing has answered yet."""
        self._rule()
        model, seen = self.models[run], self._see(run)
        waits = model.status in ("suspended", "paused") and model.begun and model.node.startswith("w")
        in_time = model.due is None or model.due > self.now
        self.sent += 1
        answer = self.await_(self.app.resume(run, "go", self.sent))
        assert answer.accepted is (waits and in_time and not model.inbox and model.ending is None), (model, seen)
        assert answer.status == (seen.status if seen.suspect else model.status)
        if answer.accepted:
            model.inbox.append(Message(self.sent, self.now))

    @rule(run=runs)
    def pause(self, run: uuid.UUID) -> None:
        self._rule()
        model, seen = self.models[run], self._see(run)
        possible = model.status in ("pending", "running", "suspended") and not model.pausing
        assert self.await_(self.app.pause(run)) is possible
        if possible:
            model.pausing = seen.claimed
            model.status = model.status if seen.claimed else "paused"

    @rule(run=runs)
    def unpause(self, run: uuid.UUID) -> None:
        self._rule()
        model = self.models[run]
        possible = model.status == "paused" or model.pausing
        assert self.await_(self.app.resume(run)).accepted is possible
        if possible and model.status == "paused":
            waits = model.begun or model.start_at > self.now or self._see(run).status == "suspended"
            model.status = "suspended" if waits else "running"
        model.pausing = False

    @precondition(lambda self: self.moves > DEPTH)
    @rule(run=runs, compensate=st.booleans())
    def cancel(self, run: uuid.UUID, compensate: bool) -> None:
        self._rule()
        model, seen = self.models[run], self._see(run)
        assert self.await_(self.app.cancel(run, reason="why not", compensate=compensate)) is not model.ended
        if model.ended:
            return
        if model.status == "compensating":
            model.ending, model.stopped = "canceled", model.stopped or not compensate
        elif compensate and (model.journal or seen.begun):
            model.ending = "canceled"
            model.status = model.status if seen.claimed else "compensating"
        else:
            model.status, model.ending = "canceled", None

    @rule(run=runs)
    def retry(self, run: uuid.UUID) -> None:
        """A failed run goes on at the step that failed, unless anything of it was undone."""
        self._rule()
        model = self.models[run]
        if model.status != "failed" or any(step.startswith("undo:") for step in model.journal):
            with pytest.raises(RetryRefused):
                self.await_(self.app.retry(run))
            return
        self.await_(self.app.retry(run))
        model.status, model.begun, model.due, model.attempt = "running", False, None, 1

    @rule(run=runs)
    def mend(self, run: uuid.UUID) -> None:
        self._rule()
        MENDED.add(run)
        self.models[run].doomed = False

    @rule(skips=st.integers(1, 4))
    def skip(self, skips: int) -> None:
        self._rule()
        self.now += skips * SKIP
        self.await_(self.harness.skip(minutes=skips * SKIP))

    @rule(run=runs)
    def go_on(self, run: uuid.UUID) -> None:
        """Whatever it waits for comes."""
        model = self.models[run]
        if model.begun and model.node.startswith("w"):
            self.signal(run, twice=False)
        else:
            self.skip(4)
        self.advance()

    @rule(run=runs, skips=st.integers(0, 4), signals=st.integers(0, 2))
    def meanwhile(self, run: uuid.UUID, skips: int, signals: int) -> None:
        """Things happen while the run is paused, and are seen by others."""
        self.pause(run)
        for _ in range(signals):
            self.signal(run, twice=False)
        if skips:
            self.skip(skips)
        self.advance()
        self.unpause(run)
        self.advance()

    @rule(run=runs)
    def late(self, run: uuid.UUID) -> None:
        """A signal comes after the time that the run may have waited for it, and before anybody has looked."""
        self.skip(4)
        self.signal(run, twice=False)
        self.advance()

    @rule()
    def advance(self) -> None:
        """All that can be done now is done."""
        self._rule()
        self.await_(self.harness.drain())
        while any(self._see(run).crash_wait for run in self.models):  # the crashed are taken up again more slowly
            self.await_(self.harness.skip(seconds=5))
            self.await_(self.harness.drain())
        for run, model in self.models.items():
            *_, self.models[run] = model.moments(self.now)
        self.at_rest = True

    @rule(steps=st.integers(1, 4))
    def crash(self, steps: int) -> None:
        """A worker dies after some steps, and another one's turn has not come."""
        self._rule()
        self.await_(self.harness.drain(max_steps=steps))
        for run, model in self.models.items():
            seen = self._see(run)
            found = [moment for moment in model.moments(self.now) if self._is(moment, seen)]
            assert found, f"{seen} is none of the moments of {model}"
            self.models[run] = found[-1]

    # ------------------------------------------------ what always holds

    @invariant()
    def the_database_agrees_with_the_model(self) -> None:
        for run, model in self.models.items():
            seen = self._see(run)
            assert self._is(model, seen), f"{seen}\nshould be\n{model}"

    @invariant()
    def what_happened_is_what_is_journaled(self) -> None:
        """Exactly once: a transactional effect for each entry, and none without; undone in reverse."""
        for run in self.models:
            seen = self._see(run)
            real = [step for step in seen.journal if step not in ("p", "l", "n", "w1", "w2")]
            assert seen.effects == real, seen
            undone = [step.removeprefix("undo:") for step in seen.journal if step.startswith("undo:")]
            done = [step for step in seen.journal if step in UNDONE]
            assert undone == done[::-1][: len(undone)]

    @invariant()
    def the_tables_hold_what_they_may(self) -> None:
        invariants.check(self.dsn, at_rest=self.at_rest)

    # ------------------------------------------------ looking

    def _rule(self) -> None:
        self.at_rest = False
        self.moves += 1

    def _see(self, run: uuid.UUID) -> Seen:
        row = self.connection.execute(SEEN, [run]).fetchone()
        assert row is not None
        status, claimed, begun, crash_wait, suspect, journal, taken, effects = row
        return Seen(status, journal, taken, effects, claimed, begun, crash_wait, suspect)

    @staticmethod
    def _is(model: Model, seen: Seen) -> bool:
        status = "running" if seen.crash_wait and model.status == "running" else seen.status
        if seen.suspect and status == "running" and model.status in ("pending", "suspended"):
            status = model.status  # it is being looked into
        return (status, *seen.looks()[1:]) == model.looks()


def test_anything_in_any_order(module_dsn: str) -> None:
    with asyncio.Runner() as runner, psycopg.connect(module_dsn, autocommit=True) as connection:
        connection.execute(
            "create table effects (seq bigint generated always as identity, run_id uuid, step text, "
            "unique (run_id, step))"
        )
        app = AsyncDurable(module_dsn, workflows=WORKFLOWS.values())
        Runs.dsn, Runs.runner, Runs.app, Runs.connection = module_dsn, runner, app, connection
        try:
            run_state_machine_as_test(
                Runs,
                settings=settings(
                    max_examples=int(os.environ.get("DURABLE_EXAMPLES", "15")),
                    stateful_step_count=25,
                    deadline=None,
                    derandomize="CI" in os.environ,
                    database=None,
                    phases=[Phase.generate, *([Phase.shrink] if "DURABLE_SHRINK" in os.environ else [])],
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(app.close())
