"""The one workflow of these tests: its body walks a program, and yields what each operation yielded.

What was seen so far goes, as a digest, into every step: a replay that sees anything else makes another journal.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any, Final

from tests.properties.functions.programs import Op, Program

from durable import (
    Break,
    ChildFailed,
    Context,
    JoinFailed,
    NonRetryable,
    RaceFailed,
    Retry,
    Rollback,
    SignalTimeout,
    StepContext,
    StepFailed,
    Suspend,
    workflow,
)
from durable.core.functions.values import All, Failures, First, Policy, Result

TWICE: Final = Retry(max_attempts=2, initial=1.0, jitter=False)
THRICE: Final = Retry(max_attempts=3, initial=1.0, jitter=False)


class Broken(Exception):
    """How a program ends that is to fail."""


class Log:
    """What handlers did: (run, step id) of every call; of compensators with what they were told."""

    def __init__(self) -> None:
        self.called: list[tuple[uuid.UUID, str]] = []
        self.undone: list[tuple[uuid.UUID, str, Any]] = []

    def clear(self) -> None:
        self.called.clear()
        self.undone.clear()


LOG: Final = Log()


# ---------------------------------------------------------------- handlers


def work(ctx: StepContext[Any], how: str, seen: str) -> Any:
    """The step of all variants: what it does depends on what is journaled alone."""
    LOG.called.append((ctx.run_id, ctx.step_id))
    if "flaky" in how and ctx.attempt < 3:
        raise ValueError(f"{ctx.step_id} {ctx.attempt}")
    if how in ("fails", "caught", "raises") or (how == "unlucky" and _failures_of_block(ctx) < 2):
        raise ValueError(f"{ctx.step_id} fails")
    if how == "fatal":
        raise NonRetryable(f"{ctx.step_id} is fatal")
    if how == "suspends" and ctx.snapshot is None:
        return Suspend({"at": ctx.step_id})
    return {"step": ctx.step_id, "seen": seen, "attempt": ctx.attempt, "resumed": ctx.resume_data}


def _failures_of_block(ctx: StepContext[Any]) -> int:
    """How often the block around the step has failed: a fact of the run that no attempt of the step itself knows."""
    begun = ctx._view.run.frame.get(ctx.step_id.rpartition("/")[0])
    return begun.attempts if begun is not None else 0


def undo(ctx: StepContext[Any], output: Any, how: str, seen: str) -> None:
    if "flaky" in how and ctx.attempt < 2:
        raise ValueError("busy")
    assert (output["step"], output["seen"]) == (ctx.step_id.removeprefix("undo:"), seen)
    LOG.undone.append((ctx.run_id, ctx.step_id.removeprefix("undo:"), output))


async def place(ctx: StepContext[Any]) -> str:
    """Which iteration this is: known by the key alone."""
    return ctx.step_id.rpartition("[")[2].partition("]")[0]


async def echo(value: Any) -> Any:
    return value


# ---------------------------------------------------------------- the body


@workflow(name="program")
async def program(ctx: Context, program: Program) -> list[Any]:
    values = await walk(ctx, program.ops)
    match program.end:
        case "raise":
            raise Broken(digest(values))
        case "rollback":
            raise Rollback
        case "again":
            ctx.continue_as_new(Program(program.again or ()))
    return values


async def walk(c: Context, ops: tuple[Op, ...]) -> list[Any]:
    values: list[Any] = []
    for op in ops:
        values.append(await OPERATIONS[op.do](c, op, digest(values)))
    return values


def digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


async def step(c: Context, op: Op, seen: str) -> Any:
    options: dict[str, Any] = {"retry": THRICE if "flaky" in op.how else TWICE}
    if op.how in ("unlucky", "raises"):
        options["retry"] = 1
    if "compensated" in op.how:
        options["compensate"] = undo
    if op.how == "ephemeral":
        options["ephemeral"] = True
    name = None if op.how == "unnamed" else f"s{op.id}"
    try:
        return await c.step(work, op.how, seen, name=name, **options)
    except StepFailed as error:
        if op.how != "caught":
            raise
        return [error.step, error.kind, error.attempts]


async def try_step(c: Context, op: Op, seen: str) -> Any:
    return _told(await c.try_step(work, op.how, seen, name=f"s{op.id}", retry=TWICE))


def _told(result: Result[Any]) -> Any:
    failure = result.failure
    return result.value if failure is None else [failure.kind, failure.source, failure.step, failure.attempts]


async def sleep(c: Context, op: Op, seen: str) -> Any:
    await c.sleep(2 if op.how == "short" else 0)


async def sleep_until(c: Context, op: Op, seen: str) -> Any:
    await c.sleep_until(c.now() + timedelta(seconds=3 if op.how == "later" else -3), name=f"t{op.id}")


async def signal(c: Context, op: Op, seen: str) -> Any:
    """The name says when it is sent: `world.py`."""
    options: dict[str, Any] = {"timeout": 4} if op.how in ("timeout", "default") else {}
    if op.how == "default":
        options["on_timeout"] = ["nothing", op.id]
    try:
        return await c.wait_for_signal(name_of(op), **options)
    except SignalTimeout as error:
        return ["timed out", error.step]


async def receive(c: Context, op: Op, seen: str) -> Any:
    timeout = 4 if op.how == "timeout" else None
    messages = await c.receive(
        name_of(op), limit=2, timeout=timeout, completable=op.how == "complete", name=f"r{op.id}", type=dict[str, Any]
    )
    for message in messages:
        if op.how == "complete":
            await message.complete({"to": message.id, "seen": seen})
    return [[message.name, message.body, message.id] for message in messages]


def name_of(op: Op) -> str:
    return f"{op.how}.{op.id}"


async def facts(c: Context, op: Op, seen: str) -> Any:
    match op.how:
        case "now":
            value: Any = c.now().isoformat()
        case "random":
            value = c.random.random()
        case _:
            value = str(c.uuid4())
    return await c.step(echo, value, name=f"f{op.id}")


async def patched(c: Context, op: Op, seen: str) -> Any:
    if not c.patched(f"p{op.id}"):
        return "old"
    return await c.step(echo, [op.id], name=f"new{op.id}")


async def send(c: Context, op: Op, seen: str) -> Any:
    """To itself."""
    sent = await c.send(c.run_id, f"own.{op.id}", {"seen": seen}, name=f"send{op.id}")
    return [sent, await c.wait_for_signal(f"own.{op.id}")]


async def start(c: Context, op: Op, seen: str) -> Any:
    return str(await c.start("program", Program((Op("step", 1, "ok"),)), name=f"start{op.id}"))


async def block(c: Context, op: Op, seen: str) -> Any:
    retry = None if op.how == "plain" else THRICE
    try:
        return await c.block(f"b{op.id}", partial(walk, ops=op.parts[0]), retry=retry)
    except ChildFailed as error:
        return [error.step, error.status]


async def try_block(c: Context, op: Op, seen: str) -> Any:
    return _told(await c.try_block(f"b{op.id}", partial(walk, ops=op.parts[0])))


async def join(c: Context, op: Op, seen: str) -> Any:
    try:
        return await c.join(f"j{op.id}", _branches(op))
    except JoinFailed as error:
        return [error.step, sorted(error.failures)]


async def race(c: Context, op: Op, seen: str) -> Any:
    branches = _branches(op)
    for number, name in enumerate(branches):
        if op.how == "decided" and number:
            branches[name] = partial(_late, ops=op.parts[number], seconds=number * op.size)
    try:
        won = await c.race(f"race{op.id}", branches)
        return [won.winner, won.value]
    except RaceFailed as error:
        return [error.step, sorted(error.failures)]


async def _late(c: Context, ops: tuple[Op, ...], seconds: int) -> Any:
    await c.sleep(seconds, name="late")
    return await walk(c, ops)


def _branches(op: Op) -> dict[str, Callable[[Context], Awaitable[Any]]]:
    return {"xyz"[number]: partial(walk, ops=part) for number, part in enumerate(op.parts)}


async def loop(c: Context, op: Op, seen: str) -> Any:
    async def counting(inner: Context, state: list[Any]) -> Any:
        values = await walk(inner, op.parts[0])
        state = [*state, digest(values)]
        return Break(state) if len(state) == op.size else state

    async def unknowing(inner: Context, state: None) -> Any:
        values = await walk(inner, op.parts[0])
        number = int(await inner.step(place))
        return Break([number, digest(values)]) if number + 1 == op.size else None

    history = 1 if op.how == "short" else 20
    if op.how == "stateless":
        return await c.loop(f"l{op.id}", unknowing, history=history)
    return await c.loop(f"l{op.id}", counting, [], history=history)


async def child(c: Context, op: Op, seen: str) -> Any:
    try:
        return await c.child("program", Program(op.parts[0]), name=f"c{op.id}", compensate=op.how == "compensated")
    except ChildFailed as error:
        if op.how == "uncaught":
            raise
        return [error.step, error.status]


async def map_(c: Context, op: Op, seen: str) -> Any:
    policies: dict[str, Policy] = {"all": All(), "failures": Failures(1), "narrow": Failures(1.0), "first": First(1)}
    at_once = {"all": 3, "failures": 3, "narrow": 1, "first": 2}  # it must not matter whether the last one has started
    items = [Program(part) for part in op.parts]
    if op.how == "first":  # one after the other, so that it does not matter who is faster
        items = [Program((Op("late", 0, size=n * op.size), *item.ops)) for n, item in enumerate(items)]
    try:
        return list(await c.map(f"m{op.id}", "program", items, concurrency=at_once[op.how], policy=policies[op.how]))
    except JoinFailed as error:
        return [error.step, sorted(error.failures)]


async def late(c: Context, op: Op, seen: str) -> Any:
    await c.sleep(op.size, name="late")


async def back(c: Context, op: Op, seen: str) -> Any:
    times = await c.checkpoint(f"k{op.id}")
    values = await walk(c, op.parts[0])
    if times < op.size:
        raise Rollback(to=f"k{op.id}")
    return [times, values]


OPERATIONS: Final[dict[str, Callable[[Context, Op, str], Awaitable[Any]]]] = {
    "step": step,
    "try_step": try_step,
    "sleep": sleep,
    "sleep_until": sleep_until,
    "signal": signal,
    "receive": receive,
    "facts": facts,
    "patched": patched,
    "send": send,
    "start": start,
    "block": block,
    "try_block": try_block,
    "join": join,
    "race": race,
    "loop": loop,
    "child": child,
    "map": map_,
    "late": late,
    "back": back,
}
