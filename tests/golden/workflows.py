"""The workflows of the golden set, as the code is today. Handlers only return: what they did stands in the recordings.

What a change makes of a run that is recorded here, it makes of the runs of those who upgrade. Add workflows, but leave
those that there are: a recording of old must be replayed by the code that it was made for.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel

from durable import (
    Break,
    Builder,
    ChildFailed,
    Context,
    First,
    JoinFailed,
    NonRetryable,
    Retry,
    Rollback,
    StepContext,
    StepFailed,
    Suspend,
    WorkflowFunction,
    define,
    workflow,
)


class Order(BaseModel):
    id: int
    items: list[str] = []


class Payment(BaseModel):
    amount: int


def charge(ctx: StepContext[Any], order: Order) -> Payment:
    if ctx.attempt == 1:
        raise ConnectionError("try again")
    return Payment(amount=order.id * 10)


async def refund(payment: Payment, order: Order) -> None: ...


async def note(what: Any) -> Any:
    return what


async def forget(output: Any, what: Any) -> None: ...


async def refuse(what: str) -> None:
    raise NonRetryable(f"never {what}")


def review(ctx: StepContext[Any]) -> Any:
    return ctx.resume_data if ctx.resume_data is not None else Suspend({"please": "look"})


@workflow
async def steps(ctx: Context, order: Order) -> dict[str, Any]:
    """Steps with models, retries, compensators; a tried one, a retried block, a sleep, a wait; what needs no await."""
    payment = await ctx.step(charge, order, compensate=refund, retry=Retry(initial=1, jitter=False))
    tried = await ctx.try_step(refuse, "this")
    await ctx.sleep(60)

    async def packing(c: Context) -> list[str]:
        return [await c.step(note, item) for item in order.items]

    packed = await ctx.block("packing", packing, retry=3)
    seen = ctx.random.randint(1, 6), ctx.uuid4(), ctx.now()
    looked = await ctx.step(review)
    signed = await ctx.wait_for_signal("signoff", type=bool, timeout=3600, on_timeout=False)
    assert seen is not None
    return {"amount": payment.amount, "tried": tried.ok, "packed": packed, "looked": looked, "signed": signed}


@workflow
async def joins(ctx: Context) -> Any:
    """Joins in joins and blocks, with a branch that fails and one that waits."""

    async def inner(c: Context) -> Any:
        async def slow(b: Context) -> str:
            await b.sleep(10)
            return str(await b.step(note, "slow"))

        return await c.join("inner", {"slow": slow, "quick": lambda b: b.step(note, "quick")})

    both = await ctx.join("outer", {"left": inner, "right": lambda c: c.block("deep", inner)})
    try:
        await ctx.join("failing", {"good": lambda c: c.step(note, 1), "bad": lambda c: c.step(refuse, "that")})
    except JoinFailed as error:
        return [both, sorted(error.failures)]
    return both


@workflow
async def races(ctx: Context) -> Any:
    """A race that a step wins against a sleep, and one that a sleep wins; a loser had something to undo."""

    async def slow(c: Context) -> str:
        await c.step(note, "begun", compensate=forget)
        await c.sleep(1000)
        return "slow"

    first = await ctx.race("first", {"slow": slow, "quick": lambda c: c.step(note, "quick")})
    second = await ctx.race("second", {"signal": lambda c: c.wait_for_signal("never"), "clock": lambda c: c.sleep(5)})
    return [first.winner, second.winner]


class Tally(BaseModel):
    count: int = 0
    sum: int = 0


@workflow
async def loops(ctx: Context, top: int) -> int:
    """A loop far beyond what the journal keeps of it, with a wait in one of its iterations."""

    async def turn(c: Context, tally: Tally) -> Tally | Break[int]:
        if tally.count == 7:
            await c.sleep(30)
        added = await c.step(note, tally.count)
        if tally.count == top:
            return Break(tally.sum)
        return Tally(count=tally.count + 1, sum=tally.sum + added)

    return int(await ctx.loop("count", turn, Tally(), history=4))


@workflow
async def going_back(ctx: Context) -> Any:
    """Twice back to a checkpoint, once past a loop and a block."""
    await ctx.step(note, "before", compensate=forget)
    times = await ctx.checkpoint("here")
    done = await ctx.step(note, f"after {times}", compensate=forget)

    async def turn(c: Context) -> Any:
        return Break(await c.step(note, "in a loop", compensate=forget))

    await ctx.block("around", lambda c: c.loop("once", lambda i, _: turn(i)))
    if times < 2:
        raise Rollback(to="here")
    return [times, done]


@workflow
async def rolled_back(ctx: Context) -> None:
    """Fails, and is undone."""
    await ctx.step(note, "one", compensate=forget)
    await ctx.join("both", {"a": lambda c: c.step(note, "two", compensate=forget), "b": lambda c: c.step(note, 3)})
    await ctx.step(refuse, "more")


@workflow
async def messages(ctx: Context) -> list[Any]:
    """Receives one at a time and answers, then several at once."""
    answered = []
    for _ in range(2):
        (message,) = await ctx.receive("quote", completable=True, type=int)
        price = await ctx.step(note, message.body * 3)
        await message.complete({"price": price})
        answered.append(price)
    batch = await ctx.receive("line", "note", limit=10)
    nobody = await ctx.receive("nothing", timeout=20)
    return [answered, [m.body for m in batch], nobody]


@workflow
async def doubled(ctx: Context, number: int) -> int:
    if number == 4:
        await ctx.step(refuse, "four")
    return int(await ctx.step(note, number * 2))


@workflow
async def children(ctx: Context) -> Any:
    """A child, one that fails, a map, a map that is over before all its items are."""
    one = await ctx.child(doubled, 21)
    try:
        failed = await ctx.child(doubled, 4, name="failing")
    except ChildFailed as error:
        failed = error.status
    many = await ctx.map("many", doubled, range(4), concurrency=2)
    some = await ctx.map("some", doubled, [4, 5, 6, 7], concurrency=4, policy=First(2))
    started = await ctx.start(doubled, 8)
    assert started is not None
    return [one, failed, list(many), len([r for r in some if r is not None])]


@workflow
async def patched(ctx: Context) -> Any:
    """Changed code, for runs of before and of after the change. What it was is in `before.py`."""
    first = await ctx.step(note, "first")
    if ctx.patched("checked"):
        await ctx.step(note, "checked")
    await ctx.removed("obsolete", "step")

    async def turn(c: Context, state: int) -> Any:
        value = await c.step(note, state)
        if c.patched("twice"):
            value = await c.step(note, value, name="again")
        return Break(value) if state == 2 else state + 1

    await ctx.loop("turns", turn, 0)
    last = await ctx.wait_for_signal("go")
    if ctx.patched("at the end"):
        await ctx.step(note, "the end")
    return [first, last]


@workflow
async def renewed(ctx: Context, left: int) -> int:
    """Goes on as new until nothing is left."""
    await ctx.step(note, left)
    if left:
        ctx.continue_as_new(left - 1)
    return left


@workflow
async def cleaning(ctx: Context) -> None:
    """Is canceled, and cleans up."""
    try:
        await ctx.step(note, "begun")
        await ctx.wait_for_signal("never")
    finally:
        await ctx.step(note, "swept", name="sweep", on_cancel=True)


@workflow
async def caught(ctx: Context) -> Any:
    """A step fails after its last attempt; the body goes on."""
    try:
        await ctx.step(refuse, "it", compensate=forget)
    except StepFailed as error:
        return await ctx.step(note, error.kind)


def number(ctx: StepContext[int]) -> int:
    return ctx.input


built = (
    define("built", input=int)
    .step("one", number)
    .parallel("two", {"a": number, "b": number})
    .loop("three", number, max_iterations=3)
    .route("either", lambda ctx: "odd" if ctx.input % 2 else "even", {"odd": number, "even": number})
    .wait_for_signal("four", "go")
    .step("five", number)
)

WORKFLOWS: Final[list[Builder[int] | WorkflowFunction[Any, Any]]] = [
    steps, joins, races, loops, going_back, rolled_back, messages, doubled, children, patched, renewed, cleaning,
    caught, built,
]  # fmt: skip
