"""What the crash suite runs of function workflows: every operation of a body, with the handlers of `workflows.py`.

Compensators are functions of their own here: they are given what the step returned.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from tests.chaos.workflows import (
    CHILD,
    Ctx,
    ask,
    begin_disaster,
    flaky,
    kill_own_worker,
    late_failure,
    note,
    patient,
    slowly,
    tell,
    until_disaster,
    write,
    write_late,
    write_late_sync,
    write_sync,
)

from durable.core.functions.context import Context
from durable.core.functions.values import First
from durable.define.function import WorkflowFunction, workflow
from durable.define.options import step
from durable.define.retry import Retry
from durable.values import Break, Canceled, Rollback

Given = dict[str, Any]

TURNS: Final = 8
"""Iterations of the script's loop; two of them are remembered."""
EVER: Final = Retry(max_attempts=None, initial=0.01, maximum=0.1)

# ---------------------------------------------------------------- handlers


@patient
async def unwrite(ctx: Ctx, output: str) -> None:
    assert ctx.step_id == f"undo:{output}"
    await slowly(ctx)
    await write(ctx)


@patient
def unwrite_sync(ctx: Ctx, output: str) -> None:
    assert ctx.step_id == f"undo:{output}"
    write_sync(ctx)


@step(transactional=False, retry=EVER)
async def unnote(ctx: Ctx, output: str) -> None:
    assert ctx.step_id == f"undo:{output}"
    await note(ctx)


@patient
async def linger(ctx: Ctx) -> str:
    """Loses every race: it does not end by itself."""
    tell(ctx)
    await asyncio.Event().wait()
    return ctx.step_id


@patient
async def reply_to(ctx: Ctx, question: Any) -> Any:
    await write_late(ctx)
    return {"to": question}


@step(retry=1)
async def fails(ctx: Ctx) -> str:
    """Its only attempt fails, the first time that it is made: the block around it is taken up anew."""
    await write_late(ctx)
    raise RuntimeError("it is the block that is retried")


# ---------------------------------------------------------------- all operations


@workflow(name="script")
async def script(ctx: Context, given: Given) -> list[Any]:
    await ctx.step(write, name="attached", compensate=unwrite)
    await ctx.step(write_sync, name="sync", compensate=unwrite_sync)
    await ctx.step(note, name="note", compensate=unnote)
    await ctx.step(write_late, name="late", compensate=unwrite)
    await ctx.step(write_late_sync, name="late-sync", compensate=unwrite_sync)
    await ctx.step(flaky, name="flaky", compensate=unwrite)
    await ctx.step(write, name="long", transactional=True, compensate=unwrite)
    await ctx.step(note, name="claimed", transactional=False, compensate=unnote)
    await ctx.step(note, name="cheap", ephemeral=True)
    rounds = await ctx.block("rounds", there_and_back)
    caught = await ctx.try_block("tries", tried)
    parts = await ctx.join("join", {"tx": written, "note": noted, "nested": nested})
    won = await ctx.race("race", {"slow": slow, "fast": lambda c: c.step(write_late, name="run", compensate=unwrite)})
    turns = await ctx.loop("loop", turn, 0, history=2)
    inner = {"slow": given["slow"], "fail": False}
    kids = await ctx.map("map", CHILD, [inner] * 3, concurrency=2)
    first = await ctx.map("some", CHILD, [inner] * 2, policy=First(1))
    await ctx.child(CHILD, inner, name="child", compensate=True)
    (question,) = await ctx.receive("question", completable=True)
    answer = await ctx.step(reply_to, question.body, name="answer")
    await question.complete(answer)
    await ctx.wait_for_signal("gate")
    await ctx.sleep(0.02)
    await ctx.step(ask, name="ask", compensate=unwrite_any)
    await ctx.step(late_failure, name="end")
    return [rounds, caught.ok, sorted(parts), won.winner, turns, len(kids), len(first)]


@patient
async def unwrite_any(ctx: Ctx, output: Any) -> None:
    await write(ctx)


async def there_and_back(ctx: Context) -> int:
    """Goes back to a checkpoint, once."""
    times = await ctx.checkpoint("mark")
    await ctx.step(write_late, name="again", compensate=unwrite)
    await ctx.step(note, name="again-note", compensate=unnote)
    if not times:
        raise Rollback(to="mark")
    return times


async def tried(ctx: Context) -> None:
    """A block is retried, and fails for good; what has succeeded in it is not done again."""

    async def part(c: Context) -> None:
        await c.step(write, name="kept")
        await c.step(fails, name="fails")

    await ctx.block("part", part, retry=Retry(max_attempts=2, initial=0.01))


async def written(ctx: Context) -> None:
    await ctx.step(write, name="one", compensate=unwrite)
    await ctx.step(write_late, name="two", compensate=unwrite)


async def noted(ctx: Context) -> None:
    await ctx.step(note, name="one", compensate=unnote)
    await ctx.sleep(0.01)


async def nested(ctx: Context) -> None:
    async def within(c: Context) -> None:
        await c.step(flaky, name="one", compensate=unwrite)
        await c.step(write_sync, name="two")

    await ctx.block("block", within)


async def slow(ctx: Context) -> None:
    await ctx.step(write, name="begin", compensate=unwrite)
    await ctx.step(linger, name="linger")


async def turn(ctx: Context, place: int) -> int | Break[int]:
    """Iteration 1 has something to undo: it is never pruned."""
    await ctx.step(write_late, name="do")
    if place == 1:
        await ctx.step(write, name="undoable", compensate=unwrite)
    return Break(place) if place == TURNS - 1 else place + 1


# ---------------------------------------------------------------- requests, over a chain of runs


@workflow(name="relay")
async def relay(ctx: Context, given: Given) -> int:
    """Answers one question, and goes on as new."""
    (question,) = await ctx.receive("question", completable=True)
    await ctx.step(write_late, name="answer")
    await question.complete({"to": question.body, "left": given["left"]})
    if given["left"]:
        ctx.continue_as_new({**given, "left": given["left"] - 1})
    return 0


# ---------------------------------------------------------------- cancel with clean-up


@workflow(name="cleaning")
async def cleaning(ctx: Context, given: Given) -> None:
    await ctx.step(write, name="book", compensate=unwrite)
    try:
        await ctx.join("wait", {"hold": lambda c: c.step(linger, name="hold"), "gate": gate})
    except Canceled:
        await ctx.step(write_late, name="tidy", on_cancel=True)
        await ctx.step(note, name="tell", on_cancel=True)
        raise


async def gate(ctx: Context) -> None:
    await ctx.wait_for_signal("never")


# ---------------------------------------------------------------- what kills a worker


@workflow(name="killing")
async def killing(ctx: Context, given: Given) -> str:
    await ctx.step(write, name="before")
    await ctx.step(note, name="cheap", ephemeral=True)
    tried = await ctx.try_step(kill_own_worker, name="kill", catch=["interrupted"])
    await ctx.step(write, name="after")
    return tried.failure.kind if tried.failure is not None else "it survived"


@workflow(name="blocking")
async def blocking(ctx: Context, given: Given) -> None:
    await ctx.step(write, name="before")
    begin_disaster()
    time.sleep(1_000)  # noqa: ASYNC251 - the mistake that is tested


@workflow(name="spinning")
async def spinning(ctx: Context, given: Given) -> None:
    await ctx.step(write, name="before")
    begin_disaster()
    while True:
        pass


@workflow(name="neighbour")
async def neighbour(ctx: Context, given: Given) -> None:
    await ctx.step(note, name="first")
    await ctx.join("both", {name: lambda c: c.step(until_disaster, name="second") for name in ("a", "b")})
    await ctx.step(write, name="third")


ALL: Final[tuple[WorkflowFunction[Any, Any], ...]] = (
    script,
    relay,
    cleaning,
    killing,
    blocking,
    spinning,
    neighbour,
)

# ---------------------------------------------------------------- what is to be seen of a run of `script`

UNDONE_WRITTEN: Final = (
    *("attached", "sync", "late", "late-sync", "flaky", "long", "rounds/again:r1"),
    *("join/tx/one", "join/tx/two", "join/nested/block/one", "race/fast/run", "loop[1]/undoable", "ask"),
)
"""Steps that write, and whose compensator writes."""
WRITTEN: Final = (
    *UNDONE_WRITTEN,
    *("rounds/again", "undo:rounds/again", "tries/part/kept", "join/nested/block/two", "answer"),
    *(f"loop[{place}]/do" for place in range(TURNS)),
)
"""Steps that write, once; what fails, and is rolled back with its attempt, is not among them."""
UNDONE_NOTED: Final = ("note", "claimed", "rounds/again-note:r1", "join/note/one")
NOTED: Final = (*UNDONE_NOTED, "cheap", "rounds/again-note", "undo:rounds/again-note")
"""Steps that append a line, at least once."""
LOSER: Final = "race/slow/begin"
"""Perhaps it was done before its race was over: then it is journaled, and undone with the run."""
CHILDREN: Final = ("map[0]", "map[1]", "map[2]", "child")
RESULT: Final = [1, False, ["nested", "note", "tx"], "fast", TURNS - 1, 3, 1]
