"""An order, from the shop's door to the customer's: the workflow that the demo runs.

Steps that only write to the database (stock, payments, shipments) use the connection of their context: what they write
commits together with the step's journal entry, or not at all. That is exactly once, whatever crashes when. Steps that
talk to somebody else (carriers, the mail server) may run again after a crash: they hand over ``ctx.idempotency_key``,
so that the other side can tell.

If a step fails for good, what was done before is undone, newest first: the parcel is recalled, the payment refunded,
the goods go back to the shelf.
"""

from __future__ import annotations

import asyncio
import zlib
from datetime import timedelta
from typing import Literal

from pydantic import BaseModel

from durable import NonRetryable, Retry, StepContext, define
from durable.demo import shop

LARGE = 1_000_00
"""From this amount on, in cents, somebody must approve the order."""


# ---------------------------------------------------------------- what goes in and out


class Line(BaseModel):
    sku: str
    quantity: int


class Order(BaseModel):
    batch: str
    id: str
    customer: str
    email: str
    country: str
    card: str
    lines: list[Line]


class Bill(BaseModel):
    cents: int


class Quote(BaseModel):
    carrier: str
    cents: int
    days: int


class Decision(BaseModel):
    approved: bool
    by: str


class Receipt(BaseModel):
    order: str
    cents: int
    carrier: str
    approved_by: str


class InvalidOrder(NonRetryable):
    pass


class Rejected(NonRetryable):
    pass


class NoCarrier(NonRetryable):
    pass


class OutOfStock(NonRetryable):
    pass


class CardDeclined(NonRetryable):
    pass


class MailRefused(NonRetryable):
    pass


# ---------------------------------------------------------------- the steps


def validate(ctx: StepContext[Order]) -> Bill:
    order = ctx.input
    if not order.lines:
        raise InvalidOrder("nothing was ordered")
    prices = shop.prices(ctx.connection(), order.batch)
    for line in order.lines:
        if line.sku not in prices:
            raise InvalidOrder(f"there is no product {line.sku!r}")
        if line.quantity < 1:
            raise InvalidOrder(f"{line.quantity} of {line.sku!r} cannot be delivered")
    return Bill(cents=sum(prices[line.sku] * line.quantity for line in order.lines))


def reserve(ctx: StepContext[Order]) -> None:
    for sku, quantity in goods(ctx.input).items():
        if not shop.reserve(ctx.connection(), ctx.input.batch, sku, quantity):
            raise OutOfStock(f"fewer than {quantity} of {sku!r} are left")


def release(ctx: StepContext[Order]) -> None:
    for sku, quantity in goods(ctx.input).items():
        shop.release(ctx.connection(), ctx.input.batch, sku, quantity)


def pay(ctx: StepContext[Order]) -> None:
    if ctx.input.card.endswith("0002"):
        raise CardDeclined("the bank says no")
    shop.book(ctx.connection(), ctx.input.batch, ctx.input.id, "charge", ctx.results["validate"].cents)


def refund(ctx: StepContext[Order]) -> None:
    shop.book(ctx.connection(), ctx.input.batch, ctx.input.id, "refund", ctx.results["validate"].cents)


async def ask_swift(ctx: StepContext[Order]) -> Quote | None:
    """Fast and dear. It does not go overseas."""
    await asyncio.sleep(0.02 + chance(ctx.input.id, "swift") * 0.08)
    if ctx.input.country in ("AQ", "AU", "NZ"):
        return None
    return Quote(carrier="swift", cents=990 + 150 * len(ctx.input.lines), days=1)


async def ask_polar(ctx: StepContext[Order]) -> Quote | None:
    """Slow and cheap. Its service is down now and then: the step is tried again."""
    await asyncio.sleep(0.05 + chance(ctx.input.id, "polar") * 0.15)
    if ctx.attempt == 1 and chance(ctx.input.id, "polar is down") < 0.15:
        raise ConnectionError("polar does not answer")
    if ctx.input.country in ("AQ", "BR"):
        return None
    return Quote(carrier="polar", cents=590 + 90 * len(ctx.input.lines), days=5)


def size(ctx: StepContext[Order]) -> Literal["small", "large"]:
    return "large" if ctx.results["validate"].cents >= LARGE else "small"


def approve_small(ctx: StepContext[Order]) -> str:
    """Nobody needs to look: the signal that the order waits for next is sent here, in this step's own transaction."""
    decision = Decision(approved=True, by="the rule for small orders")
    shop.signal(ctx.connection(), ctx.app.schema, ctx.run_id, "approval", decision.model_dump_json())
    return "approved by rule"


def ask_somebody(ctx: StepContext[Order]) -> str:
    """``durable list --status waiting_for_signal`` is the list of what somebody has to look at."""
    return f"{ctx.results['validate'].cents / 100:.2f} needs an approval"


def heed(ctx: StepContext[Order]) -> str:
    decision: Decision = ctx.results["decision"]
    if not decision.approved:
        raise Rejected(f"by {decision.by}")
    return decision.by


def packing_time(ctx: StepContext[Order]) -> float:
    return 0.2 + 0.1 * len(ctx.input.lines)


def ship(ctx: StepContext[Order]) -> Quote:
    quotes: list[Quote] = [quote for quote in ctx.results["quotes"].values() if quote is not None]
    if not quotes:
        raise NoCarrier(f"no carrier goes to {ctx.input.country}")
    cheapest = min(quotes, key=lambda quote: quote.cents)
    shop.ship(ctx.connection(), ctx.input.batch, ctx.input.id, cheapest.carrier, goods(ctx.input))
    return cheapest


def recall(ctx: StepContext[Order]) -> None:
    shop.recall(ctx.connection(), ctx.input.batch, ctx.input.id, goods(ctx.input))


async def notify(ctx: StepContext[Order]) -> None:
    """The mail server is somebody else's: it may be called twice for one order, and delivers once."""
    if ctx.input.email.endswith("@bounce.example"):
        raise MailRefused(f"the mail server refuses {ctx.input.email}")
    await shop.mail(ctx.app.store.dsn, ctx.idempotency_key, ctx.input.batch, ctx.input.id)


def receipt(ctx: StepContext[Order]) -> Receipt:
    return Receipt(
        order=ctx.input.id,
        cents=ctx.results["validate"].cents,
        carrier=ctx.results["ship"].carrier,
        approved_by=ctx.results["heed"],
    )


# ---------------------------------------------------------------- the workflow

order = (
    define("order", version="1", input=Order, result=receipt)
    .step("validate", validate)
    .step("reserve", reserve, compensate=release)
    .step("pay", pay, compensate=refund)
    .parallel("quotes", {"swift": ask_swift, "polar": ask_polar}, retry=Retry(5, initial=0.2, maximum=2.0))
    .route("approval", size, {"small": approve_small, "large": ask_somebody})
    .wait_for_signal("decision", "approval", type=Decision, timeout=timedelta(days=3))
    .step("heed", heed)
    .sleep("packing", packing_time)
    .step("ship", ship, compensate=recall)
    .step("notify", notify, transactional=False, timeout=30)
)


# ---------------------------------------------------------------- small helpers


def goods(order: Order) -> dict[str, int]:
    """How many of which product, in the order of their names: two orders that lock stock never wait crosswise."""
    total: dict[str, int] = {}
    for line in sorted(order.lines, key=lambda line: line.sku):
        total[line.sku] = total.get(line.sku, 0) + line.quantity
    return total


def chance(order_id: str, what: str) -> float:
    """A number from 0 to 1, always the same for this order and purpose."""
    return zlib.crc32(f"{order_id} {what}".encode()) / 2**32
