"""What the crash suite runs of builder workflows: every kind of node, with effects that tell how often they happened.

Effects in the database (`write`) go through the step's own transaction into a table without any unique key: doubles are
seen. Effects outside of it (`note`) are lines appended to a file, which survive whatever happens to the process.
Input: {"slow": kind, "fail": bool}. The handlers of nodes of that kind (``undo``: compensators; ``-``: what comes after
the last node; ``all``) go on only when they have been detached.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection
from tests.chaos.witness import Witness

from durable.define.builder import Builder, define
from durable.define.options import branch, step
from durable.define.retry import Retry
from durable.engine.context import StepContext
from durable.errors import NonRetryable
from durable.values import Suspend

Ctx = StepContext[Any]

patient = step(retry=Retry(max_attempts=None, initial=0.01, maximum=0.1))
"""A step whose transaction is lost with its connection has failed: here that may happen any number of times."""

folder = Path()
"""Where notes go; set by the worker's process."""
witness = Witness()
"""What the engine of this process has done."""

SCHEMA: Final = """
create schema app;
create table app.effects (
  id bigint generated always as identity, run_id uuid not null, step text not null, attempt int not null, pid int
);
"""
_DELIVERED: Final = text("select 1 from durable.inbox where run_id = :run and name = 'gate' and state <> 'new'")
_WRITE: Final = text("insert into app.effects (run_id, step, attempt, pid) values (:run, :step, :attempt, :pid)")


def _effect(ctx: Ctx) -> dict[str, Any]:
    return {"run": ctx.run_id, "step": ctx.step_id, "attempt": ctx.attempt, "pid": os.getpid()}


def tell(ctx: Ctx) -> None:
    """An effect outside of the database."""
    line = f"{ctx.run_id} {ctx.step_id} {ctx.attempt} {os.getpid()}\n"
    file = os.open(folder / "notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def is_slow(ctx: Ctx) -> bool:
    """Whether this handler is to be detached."""
    return ctx.input["slow"] in ("all", kind_of(ctx.step_id))


def kind_of(step_id: str) -> str:
    """What is executing there, in the words of the kill points; what no builder knows is a function's."""
    if step_id.startswith("undo:"):
        return "undo"
    if step_id == "run:result":
        return "-"
    name = step_id.removeprefix("choice:").removeprefix("input:").partition("/")[0].partition("[")[0]
    return next((node.kind for node in (*EVERYTHING.nodes, *CHILD.nodes) if node.name == name), "function")


async def slowly(ctx: Ctx) -> None:
    if is_slow(ctx):
        await be_detached(ctx)


def slowly_sync(ctx: Ctx) -> None:
    if is_slow(ctx):
        detached = witness.detached(ctx.run_id)
        while not detached.wait(0.01) and not ctx.cancelled:
            pass


async def be_detached(ctx: Ctx) -> None:
    """Wait until the run is claimed, and its row free."""
    detached = witness.detached(ctx.run_id)
    while not detached.is_set():
        await asyncio.sleep(0.005)


# ---------------------------------------------------------------- handlers


@patient
async def write(ctx: Ctx) -> str:
    """In the transaction that locked the run; it is lent at once, so that it never detaches."""
    conn: AsyncConnection = await ctx.async_connection()
    await conn.execute(_WRITE, _effect(ctx))
    return ctx.step_id


@patient
def write_sync(ctx: Ctx) -> str:
    ctx.connection().execute(_WRITE, _effect(ctx))
    return ctx.step_id


@patient
async def write_late(ctx: Ctx) -> str:
    """A slow one has been detached when it asks: a second transaction begins then."""
    await slowly(ctx)
    return await write(ctx)


@patient
def write_late_sync(ctx: Ctx) -> str:
    slowly_sync(ctx)
    return write_sync(ctx)


@patient
async def note(ctx: Ctx) -> str:
    tell(ctx)
    await slowly(ctx)
    return ctx.step_id


@step(transactional=False, retry=Retry(max_attempts=None, initial=0.01, maximum=0.1))
async def undo_claimed(ctx: Ctx) -> None:
    await note(ctx)


@patient
def note_sync(ctx: Ctx) -> str:
    tell(ctx)
    slowly_sync(ctx)
    return ctx.step_id


@patient
async def flaky(ctx: Ctx) -> str:
    """What its failed attempt wrote is rolled back."""
    await write(ctx)
    if ctx.attempt == 1:
        raise RuntimeError("the first attempt")
    return ctx.step_id


@patient
async def late_failure(ctx: Ctx) -> str:
    await slowly(ctx)
    if ctx.input["fail"]:
        raise NonRetryable("late, on purpose")
    return ctx.step_id


@patient
async def ask(ctx: Ctx) -> Any:
    if ctx.resume_data is None:
        return Suspend({"question": ctx.step_id})
    await write(ctx)
    return ctx.resume_data


@patient
async def choose(ctx: Ctx) -> str:
    await slowly(ctx)
    return "taken"


@patient
async def nap(ctx: Ctx) -> float:
    await slowly(ctx)
    return 0.02


@patient
async def signal_name(ctx: Ctx) -> str:
    await slowly(ctx)
    return "gate"


@patient
async def for_the_child(ctx: Ctx) -> dict[str, Any]:
    await slowly(ctx)
    return {"slow": ctx.input["slow"], "fail": False}


@patient
async def iterate(ctx: Ctx) -> int:
    await write_late(ctx)
    assert ctx.iteration is not None
    return ctx.iteration


@patient
async def summary(ctx: Ctx) -> list[str]:
    await slowly(ctx)
    return sorted(ctx.results)


def begin_disaster() -> None:
    """Who is in flight beside what takes the worker down waits for this."""
    (folder / "disaster").touch()


async def kill_own_worker(ctx: Ctx) -> None:
    tell(ctx)
    begin_disaster()
    os.kill(os.getpid(), signal.SIGKILL)


@patient
async def hold_on(ctx: Ctx) -> str:
    """Runs until the test says so, or until it is interrupted."""
    tell(ctx)
    while not (folder / "go").exists():
        await asyncio.sleep(0.01)
    return ctx.step_id


@patient
def hold_on_sync(ctx: Ctx) -> str:
    tell(ctx)
    while not (folder / "go").exists() and not ctx.cancelled:
        time.sleep(0.01)
    return ctx.step_id


@patient
async def hold_attached(ctx: Ctx) -> str:
    """As `hold_on`, with the run's row locked all the time."""
    await write(ctx)
    return await hold_on(ctx)


@patient
async def hold_row(ctx: Ctx) -> str:
    """Keeps the row locked until a doorbell has given up; if the signal was not delivered before it was locked."""
    await write(ctx)
    tell(ctx)
    conn: AsyncConnection = await ctx.async_connection()
    gave_up = witness.gave_up
    while witness.gave_up == gave_up and not (await conn.execute(_DELIVERED, {"run": ctx.run_id})).first():
        await asyncio.sleep(0.01)
    return ctx.step_id


@patient
async def unhurried(ctx: Ctx) -> str:
    """Its effect is written when it has been detached."""
    tell(ctx)
    await be_detached(ctx)
    return await write(ctx)


@patient
async def until_disaster(ctx: Ctx) -> str:
    """In flight when a worker is taken down for the first time."""
    while not (folder / "disaster").exists():
        await asyncio.sleep(0.005)
    return await write(ctx)


@patient
async def until_told_to_end(ctx: Ctx) -> str:
    """In flight when its worker is told to end."""
    tell(ctx)
    while not witness.told_to_end.is_set():
        await asyncio.sleep(0.005)
    return await write(ctx)


# ---------------------------------------------------------------- workflows

CHILD: Final = (
    define("chaos-child")
    .step("inner", write, compensate=write)
    .step("inner-note", note, compensate=note)
    .step("inner-late", write_late, compensate=write_late)
)

EVERYTHING: Final = (
    define("everything", result=summary)
    .step("attached", write, compensate=write)
    .step("sync", write_sync, compensate=write_sync)
    .step("note", note, compensate=note)
    .step("note-sync", note_sync, compensate=note_sync)
    .step("late", write_late, compensate=write_late)
    .step("late-sync", write_late_sync, compensate=write_late_sync)
    .step("flaky", flaky, compensate=flaky)
    .step("long", write, transactional=True, compensate=write)
    .step("claimed", note, transactional=False, compensate=undo_claimed)
    .parallel(
        "fork", {"tx": branch(write, compensate=write), "note": branch(note, compensate=note), "sync": write_sync}
    )
    .route("pick", choose, {"taken": branch(write_late, compensate=write_late), "other": note})
    .loop("poll", iterate, max_iterations=3, compensate=write_late)
    .sleep("nap", nap)
    .wait_for_signal("early", signal_name)
    .wait_for_signal("gate", signal_name)
    .child_workflow("child", CHILD, map_input=for_the_child, compensate=True)
    .step("ask", ask, compensate=write)
    .step("end", late_failure)
)

ONCE: Final = (
    define("once").step("before", write, compensate=write).step("once", note, at_most_once=True).step("after", write)
)
KILLER: Final = define("killer").step("before", write, compensate=write).step("kill", kill_own_worker)
BRIEF: Final = define("brief").step("first", note).step("second", until_told_to_end).step("third", write)
INNOCENT: Final = define("innocent").step("first", note).step("second", unhurried).step("third", write)
HOLDING: Final = define("holding").step("hold", hold_on).step("after", write)
HOLDING_SYNC: Final = define("holding-sync").step("hold", hold_on_sync).step("after", write)
HOLDING_ATTACHED: Final = (
    define("holding-attached").step("hold", hold_attached, transactional=True).step("after", write)
)
BUSY: Final = (
    define("busy").step("hold", hold_row, transactional=True).wait_for_signal("gate", "gate").step("after", write)
)
WAITING: Final = define("waiting").wait_for_signal("gate", "gate").step("after", write)

ALL: Final[tuple[Builder[Any], ...]] = (
    CHILD,
    EVERYTHING,
    ONCE,
    KILLER,
    BRIEF,
    INNOCENT,
    HOLDING,
    HOLDING_SYNC,
    HOLDING_ATTACHED,
    BUSY,
    WAITING,
)

# ---------------------------------------------------------------- what is to be seen of a run of `everything`

WRITTEN: Final = (
    *("attached", "sync", "late", "late-sync", "flaky", "long", "fork/tx", "fork/sync", "pick/taken"),
    *("poll[0]", "poll[1]", "poll[2]", "ask"),
)
"""Steps that write, once."""
NOTED: Final = ("note", "note-sync", "claimed", "fork/note")
"""Steps that append a line, at least once."""
UNDONE_WRITTEN: Final = (
    *("attached", "sync", "late", "late-sync", "flaky", "long", "fork/tx", "pick/taken"),
    *("poll[0]", "poll[1]", "poll[2]", "ask"),
)
"""Steps whose compensator writes."""
UNDONE_NOTED: Final = ("note", "note-sync", "claimed", "fork/note")
CHILD_WRITTEN: Final = ("inner", "inner-late")
CHILD_NOTED: Final = ("inner-note",)
