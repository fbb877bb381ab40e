"""The demo: orders come in, two workers execute them, one is killed in the middle, and the books are audited.

What happens to the orders is in ``orders.py``, and once more in ``function.py``. This is what happens around them.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import psycopg
from psycopg import sql

from durable.demo import function, orders, shop
from durable.demo.audit import Finding, audit
from durable.demo.crew import Crew, Hand
from durable.demo.look import Look, Standing
from durable.demo.screen import Screen, screen
from durable.durable import AsyncDurable
from durable.errors import ConfigurationError
from durable.handles import Start
from durable.snapshots import RunSnapshot

TOO_LARGE: Final = 5_000_00
"""From this amount on, in cents, an approval is refused."""
IN_THE_MIDDLE: Final = 0.3
"""The share of the work that is done when a worker is killed."""
PATIENCE: Final = 60.0
"""Seconds without any progress after which the orders that have not ended are called stuck."""
TICK: Final = 0.05


@dataclass(frozen=True, slots=True)
class Play:
    """What was asked for."""

    dsn: str | None = None
    schema: str = "durable"
    orders: int = 300
    seed: int = 0
    processes: int = 2
    function: bool = False
    fresh: bool = False
    json: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went."""

    batch: str
    runs: list[RunSnapshot]
    findings: list[Finding]
    interrupted: int
    killed: int | None
    taken_over_after: float | None
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.findings


async def perform(play: Play) -> int:
    """All of it; returns the exit code."""
    async with AsyncDurable(play.dsn, schema=play.schema, workflows=[orders.order, function.order]) as app:
        await _prepare(app, play)
        with screen(json=play.json) as view:
            view.say(f"{app.database}, schema {app.schema}")
            outcome = await _Demo(app, play, view).run()
        view.conclude(outcome)
    return 0 if outcome.ok else 1


async def _prepare(app: AsyncDurable, play: Play) -> None:
    await app.migrate()
    assert app.database is not None
    if play.fresh:
        if app.database.embedded is None:
            raise ConfigurationError("--fresh empties the embedded database only: this is another one")
        await asyncio.to_thread(_empty, app.database.dsn, app.schema)
        await app.migrate()


def _empty(dsn: str, schema: str) -> None:
    with psycopg.connect(dsn) as connection:
        drop = sql.SQL("drop schema if exists {}, orders cascade")
        connection.execute(drop.format(sql.Identifier(schema)))


class _Demo:
    """One batch of orders, from the shelf to the books."""

    def __init__(self, app: AsyncDurable, play: Play, view: Screen) -> None:
        assert app.database is not None
        self._app, self._play, self._view = app, play, view
        self._dsn = app.database.dsn
        self._batch = f"{datetime.now().astimezone():%Y-%m-%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
        self._look = Look(self._dsn, app.schema, self._batch)
        self._crew = Crew(self._dsn, app.schema)
        self._began = time.monotonic()
        self._victim: Hand | None = None
        self._held = 0
        self._killed_at = 0.0
        self._taken_over_after: float | None = None
        self._decided: set[uuid.UUID] = set()

    async def run(self) -> Outcome:
        taken = await self._take_orders()
        self._view.say(f"batch {self._batch}: {taken} orders were taken")
        async with self._look, self._crew:
            for _ in range(self._play.processes):
                await self._hire("starts")
            approvals = asyncio.create_task(self._approve_now_and_then())
            try:
                await self._watch()
            finally:
                approvals.cancel()
                with suppress(asyncio.CancelledError):
                    await approvals
            seconds = time.monotonic() - self._began
            self._view.say("the workers are told to end")
        with psycopg.connect(self._dsn) as connection:
            findings = audit(connection, self._batch, schema=self._app.schema)
        return Outcome(
            batch=self._batch,
            runs=await self._runs(),
            findings=findings,
            interrupted=self._look.interrupted,
            killed=self._victim.pid if self._victim else None,
            taken_over_after=self._taken_over_after,
            seconds=seconds,
        )

    async def _take_orders(self) -> int:
        """The shop opens: tables, stock, orders, and a run for each of them. All runs are started, or none."""
        given = shop.read_orders(self._play.orders)
        random.Random(self._play.seed).shuffle(given)  # noqa: S311  # a toy
        with psycopg.connect(self._dsn) as connection:
            shop.create(connection)
            shop.open_batch(connection, self._batch, given)
        starts = [
            Start(
                {"batch": self._batch} | order,
                key=f"{self._batch}/{order['id']}",
                tags={"batch": self._batch, "customer": order["customer"]},
            )
            for order in given
        ]
        kind = function.order if self._play.function else orders.order
        return len(await self._app.start_many(kind, starts))

    # ---------------------------------------------------------------- the workers

    async def _hire(self, what: str) -> None:
        hand = await self._crew.hire()
        self._view.say(f"worker {hand.number} {what} (process {hand.pid})")

    async def _watch(self) -> None:
        """Until every order has ended: look, show, kill one worker, see its work taken over, start another one."""
        before, changed = None, time.monotonic()
        while True:
            standing, now = await self._look.standing(), time.monotonic()
            self._view.show(standing, self._crew.alive, now - self._began)
            if standing != before:
                before, changed = standing, now
            if standing.ended == standing.total or now - changed > PATIENCE:
                return
            self._crew.must_be_alive()
            if self._victim is None:
                await self._kill_in_the_middle(standing)
            elif self._taken_over_after is None:
                await self._see_it_taken_over(self._victim)
            await asyncio.sleep(TICK)

    async def _kill_in_the_middle(self, standing: Standing) -> None:
        if standing.share < IN_THE_MIDDLE:
            return
        busy = {hand: await self._look.held_by(hand.pid) for hand in self._crew.alive}
        victim = max(busy, key=lambda hand: busy[hand])
        if busy[victim] == 0:
            return
        self._crew.kill(victim)
        self._victim, self._held, self._killed_at = victim, busy[victim], time.monotonic()
        self._view.say(
            f"kill -9 {victim.pid}: worker {victim.number} dies with {self._held} runs in its hands", alarm=True
        )

    async def _see_it_taken_over(self, victim: Hand) -> None:
        if await self._look.held_by(victim.pid):
            return
        self._taken_over_after = time.monotonic() - self._killed_at
        others = ", ".join(str(hand.number) for hand in self._crew.alive)
        self._view.say(f"worker {others} took them over after {self._taken_over_after:.1f} s")
        await self._hire("starts in its place")

    # ---------------------------------------------------------------- somebody who approves

    async def _approve_now_and_then(self) -> None:
        """What a person would do with ``durable list --status waiting-for-signal`` and ``durable signal``."""
        while True:
            page = await self._app.list(
                status="waiting_for_signal", workflow="order", tags={"batch": self._batch}, limit=500
            )
            for run in page:
                if run.id not in self._decided:
                    await self._app.signal(run.id, "approval", _decide(run), id="the boss")
                    self._decided.add(run.id)
            await asyncio.sleep(0.3)

    async def _runs(self) -> list[RunSnapshot]:
        found: list[RunSnapshot] = []
        after: str | None = None
        while True:
            page = await self._app.list(workflow="order", tags={"batch": self._batch}, limit=500, after=after)
            found += page
            after = page.next
            if after is None:
                return found


def _decide(run: RunSnapshot) -> dict[str, Any]:
    prices = {sku: cents for sku, _, cents, _ in shop.STOCK}
    total = sum(prices.get(line["sku"], 0) * line["quantity"] for line in run.input["lines"])
    return orders.Decision(approved=total < TOO_LARGE, by="the boss").model_dump()
