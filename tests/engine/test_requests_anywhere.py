"""What is asked of a run while any one of its handlers is at work, and a doorbell waits for the row: nothing is done
twice, nothing is left out, and what was done is undone if that was asked for.

One run for each handler call of a workflow: that call is held until the request has been committed and whoever is to
deliver it stands at the row, or has told the owner of the claim. Nobody crashes here, so nothing may happen twice.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import pytest
from tests.engine.kit import Bench, Ctx, Facts, soon, until, working

from durable import Break, Context, NonRetryable, branch, define, workflow
from durable.define.builder import Builder
from durable.define.function import WorkflowFunction

AnyFlow = Builder[Any] | WorkflowFunction[Any, Any]

ASKED: Final[dict[str, tuple[str, Any]]] = {
    "signal": ("signal", 1),
    "pause": ("pause", None),
    "cancel": ("cancel", {"reason": "enough", "compensate": False}),
    "roll back": ("cancel", {"reason": "enough", "compensate": True}),
}
UNDO: Final = "undo:"
NOT_UNDONE: Final = {"cheap", "cheap-too", "choice:pick"}


class Handlers:
    """Handlers that note that they were called. The call number `held` ends when it is told to, and not before."""

    def __init__(self) -> None:
        self.writing: set[str] = set()  # steps that write to the database
        self.hold(-1)

    def hold(self, number: int) -> None:
        """For the next run."""
        self._held = number
        self.calls: list[str] = []
        self.began, self.go_on = threading.Event(), threading.Event()

    def _begins(self, ctx: Ctx) -> bool:
        self.calls.append(ctx.step_id)
        if len(self.calls) - 1 != self._held:
            return False
        self.began.set()
        return True

    async def do(self, ctx: Ctx) -> str:
        if self._begins(ctx):
            while not self.go_on.is_set():
                with suppress(asyncio.CancelledError):  # a cancel interrupts it, and it ends all the same
                    await asyncio.sleep(0.002)
        return ctx.step_id

    def do_in_thread(self, ctx: Ctx) -> str:
        if self._begins(ctx):
            self.go_on.wait()
        return ctx.step_id

    async def write(self, ctx: Ctx) -> str:
        self.writing.add(ctx.step_id)
        connection = await ctx.async_connection()
        await connection.exec_driver_sql(f"insert into books values ('{ctx.run_id}', '{ctx.step_id}')")
        return await self.do(ctx)

    async def undo(self, ctx: Ctx, output: str) -> None:
        assert ctx.step_id == f"undo:{output}"
        await self.do(ctx)

    async def choose(self, ctx: Ctx) -> str:
        await self.do(ctx)
        return "one"

    async def refuse(self, ctx: Ctx) -> None:
        await self.do(ctx)
        raise NonRetryable("no")


def nodes(handlers: Handlers, *, fails: bool) -> Builder[Any]:
    do, write, in_thread = handlers.do, handlers.write, handlers.do_in_thread
    return (
        define("w")
        .step("first", do, compensate=do)
        .step("written", write, compensate=write)
        .step("thread", in_thread, compensate=in_thread)
        .step("claimed", do, transactional=False, compensate=do)
        .parallel("fork", {"x": branch(do, compensate=do), "y": branch(write, compensate=write)})
        .route("pick", handlers.choose, {"one": branch(do, compensate=do)})
        .loop("turns", do, max_iterations=2, compensate=do)
        .step("last", handlers.refuse if fails else do, compensate=do)
    )


def function(handlers: Handlers, *, fails: bool) -> WorkflowFunction[Any, Any]:
    do, write, undo = handlers.do, handlers.write, handlers.undo

    @workflow(name="w")
    async def body(ctx: Context) -> str:
        await ctx.step(do, name="first", compensate=undo)
        await ctx.step(write, name="written", compensate=undo)
        await ctx.step(do, name="cheap", ephemeral=True)
        await ctx.step(handlers.do_in_thread, name="thread", compensate=undo)
        await ctx.step(do, name="claimed", transactional=False, compensate=undo)

        async def part(c: Context) -> None:
            await c.step(do, name="one", compensate=undo)
            await c.step(write, name="two", compensate=undo)

        async def turn(c: Context, number: int) -> int | Break[None]:
            await c.step(do, name="do", compensate=undo)
            return number + 1 if number < 1 else Break(None)

        await ctx.block("block", part)
        await ctx.join("join", {"x": part, "y": lambda c: c.step(do, name="three", compensate=undo)})
        await ctx.loop("loop", turn, 0)
        await ctx.step(do, name="cheap-too", ephemeral=True)
        await ctx.step(handlers.refuse if fails else do, name="last", compensate=undo)
        await ctx.sleep(0)
        return "done"

    return body


async def ask_while_held(b: Bench, facts: Facts, run: Any, handlers: Handlers, asked: str) -> None:
    """The request is committed while the handler runs; it goes on when the doorbell has come as far as it can."""
    kind, body = ASKED[asked]
    sent = facts.value("select durable.send_message(%s, %s, 'go', %s)", run.id, kind, json.dumps(body))
    assert sent == "sent"
    doorbell = b.deliver(run)
    await until(lambda: doorbell.done() or facts.blocked() == 1, "the doorbell waits for the row, or told the owner")
    handlers.go_on.set()


async def play(b: Bench, facts: Facts, handlers: Handlers, held: int, asked: str) -> Any:
    """The run whose call number `held` was at work when something was asked; None if there is no such call."""
    handlers.hold(held)
    run = await b.app.start("w")
    played = asyncio.create_task(b.drain())
    await until(lambda: played.done() or handlers.began.is_set())
    if handlers.began.is_set():
        await ask_while_held(b, facts, run, handlers, asked)
    await soon(played)
    if facts.run(run)["status"] == "paused":
        assert asked == "pause"
        assert await run.resume()
        await b.drain()
    return run if handlers.began.is_set() else None


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("fails", [False, True], ids=["completes", "fails"])
@pytest.mark.parametrize("make", [nodes, function], ids=["nodes", "function"])
async def test_asked_while_any_handler_is_at_work(
    dsn: str, facts: Facts, make: Callable[..., AnyFlow], asked: str, fails: bool
) -> None:
    facts.execute("create table books (run uuid, step text)")
    handlers = Handlers()
    async with working(dsn, make(handlers, fails=fails)) as b:
        assert await play(b, facts, handlers, -1, asked) is None
        whole = handlers.calls
        assert len(whole) > (18 if fails else 10)
        for held, during in enumerate(whole):
            if not fails and during != whole[-1]:
                continue  # it is as in the run that fails
            run = await play(b, facts, handlers, held, asked)
            assert run is not None
            check(facts, run, handlers, whole, asked, during, fails=fails)
        facts.check_rest()


def check(
    facts: Facts, run: Any, handlers: Handlers, whole: list[str], asked: str, during: str, *, fails: bool
) -> None:
    """`whole`: all calls of a run of which nothing was asked."""
    status, journal, calls = facts.run(run)["status"], facts.journal(run), handlers.calls
    said = f"asked to {asked} during {during}: {status}; called: {calls}; journal: {journal}"
    assert max(Counter(calls).values()) == 1, said
    written = [row["step"] for row in facts.rows("select step from books where run = %s", run.id)]
    assert sorted(written) == sorted(handlers.writing.intersection(journal)), said
    done, undone = [c for c in calls if not c.startswith(UNDO)], [c for c in calls if c.startswith(UNDO)]
    match asked:
        case "signal" | "pause":
            assert status == ("failed" if fails else "completed"), said
            assert facts.attempts(run) == [], said
            assert sorted(calls) == sorted(whole), said
        case "cancel":
            assert status == "canceled", said
            assert undone[-1:] == ([during] if during.startswith(UNDO) else []), said
        case "roll back":
            assert status == "canceled", said
            stays = {*NOT_UNDONE, "last"} if fails else NOT_UNDONE
            assert set(done) <= set(journal), said
            assert undone == [f"{UNDO}{step}" for step in reversed(journal) if step in done and step not in stays], said
