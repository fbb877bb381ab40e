"""The model held to reality: a few programs, run by the engine on PostgreSQL, come to what the model says.

The worker dies after each step that it has journaled, and another one takes over.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

from hypothesis import HealthCheck, Phase, given, seed, settings
from tests import invariants
from tests.engine.kit import Facts
from tests.properties.functions.interpreter import LOG, program
from tests.properties.functions.playing import ENDS, Record
from tests.properties.functions.programs import Op, Program, Seen, every, programs
from tests.properties.functions.world import LIMIT, RESUMED, answers, begin, journals, play, recorded, sent_before

from durable import AsyncDurable
from durable.core.state import Begun
from durable.store import codec
from durable.store.connection import Connection
from durable.store.journal import load_journal
from durable.testing import AsyncHarness
from durable.values import WaitingFor

PROGRAMS: Final = 10
OPERATIONS: Final = range(3, 9)
"""How many a program may have: each costs a worker its life."""
NEW: Final = 3


async def test_the_engine_comes_to_what_the_model_says(dsn: str, record_property: Record) -> None:
    seen = Seen()
    app = AsyncDurable(dsn, workflows=[program], detach_after=1_000.0, max_crashes=1_000)
    async with app, await Connection.connect(dsn, autocommit=True) as connection:
        for number, chosen in enumerate(some_programs()):
            seen.add(chosen)
            LOG.clear()
            run = uuid.uuid5(uuid.NAMESPACE_OID, f"program {number}")
            world, _ = begin(chosen, id=run)
            play(world)
            async with AsyncHarness(app) as harness:
                await Reality(app, dsn, harness).play(chosen, run)
                assert await recorded_by(app, connection, list(world.runs)) == journals(world)
    invariants.check(dsn)
    for line in seen.tell("on PostgreSQL"):
        record_property("measured", line)


def some_programs() -> list[Program]:
    """Always the same: each with operations that none before it has."""
    found: list[Program] = []
    known: set[str] = set()

    @seed(20260101)
    @settings(max_examples=1_000, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(programs(ends=ENDS, decided=True))
    def choose(program: Program) -> None:
        its = [f"{op.do} {op.how}" for _, op in every(program.ops)]
        if len(found) < PROGRAMS and len(its) in OPERATIONS and len({*its} - known) >= NEW:
            known.update(its)
            found.append(replace(program, ops=timeless(program.ops)))

    choose()
    return found


def timeless(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """Without what the clock says."""
    return tuple(
        replace(op, how="random" if op.how == "now" else op.how, parts=tuple(map(timeless, op.parts))) for op in ops
    )


class Reality:
    """What `world.play` is for the model."""

    def __init__(self, app: AsyncDurable, dsn: str, harness: AsyncHarness) -> None:
        self._app, self._harness, self._facts = app, harness, Facts(dsn)

    async def play(self, given: Program, run: uuid.UUID) -> None:
        await self._app.start(program, given, id=run)
        for name, body, message in sent_before(given):
            await self._app.signal(run, name, body, id=message)
        try:
            for _ in range(LIMIT):
                if await self._harness.drain(max_steps=1) or await self._answer() or await self._pass_time():
                    continue
                break
        finally:
            self._facts.close()

    async def _answer(self) -> bool:
        query = "select id, frame::text as frame from durable.runs where status = 'suspended'"
        payloads = self._app.store.payloads
        frames = [(row["id"], codec.frame(row["frame"], payloads)) for row in self._facts.rows(query)]
        asked = [(run, begun) for run, frame in frames for begun in frame.values()]
        return sum([await self._reply(run, begun) for run, begun in asked]) > 0

    async def _reply(self, run: uuid.UUID, begun: Begun) -> bool:
        if begun.waits is WaitingFor.RESUME:
            return (await self._app.resume(run, begun.name, RESUMED)).accepted
        query = "select message_id from durable.inbox where run_id = %s and message_id is not null"
        sent = answers(begun, [row["message_id"] for row in self._facts.rows(query, run)])
        for name, body, message in sent:
            await self._app.signal(run, name, body, id=message)
        return bool(sent)

    async def _pass_time(self) -> bool:
        query = "select min(wake_at) - durable.engine_now() from durable.runs"
        rest: timedelta | None = self._facts.value(query)
        if rest is not None and rest > timedelta(0):
            await self._harness.skip(rest)
        return rest is not None


async def recorded_by(app: AsyncDurable, connection: Connection, runs: list[uuid.UUID]) -> dict[uuid.UUID, Any]:
    """As `world.journals`."""
    found = {}
    for run in runs:
        row = await app.status(run)
        error = (row.error.type, row.error.message) if row.error is not None else None
        found[run] = recorded(row.status, error, row.successor, await load_journal(app.store, connection, run))
    return found
