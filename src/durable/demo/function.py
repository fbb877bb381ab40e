"""The same order as in ``orders.py``, written as an async function: ``durable demo --function``.

It is version 2 of the same workflow, with the same steps on the same tables, and the same audit. What differs is the
way it reads: a step is handed what it needs as arguments, the choice between a rule and a person is an ``if``, and what
a step has found out is a variable.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from durable import Context, Retry, StepContext, step, workflow
from durable.demo import orders, shop
from durable.demo.orders import (
    LARGE,
    Bill,
    CardDeclined,
    Decision,
    InvalidOrder,
    MailRefused,
    NoCarrier,
    Order,
    OutOfStock,
    Quote,
    Receipt,
    Rejected,
    goods,
)

ASK: Final = Retry(5, initial=0.2, maximum=2.0)
"""How often a carrier is asked."""


@workflow(name="order", version="2")
async def order(ctx: Context, order: Order) -> Receipt:
    bill = await ctx.step(validate, order)
    await ctx.step(reserve, order)
    await ctx.step(pay, order, bill)
    quotes = await ctx.join(
        "quotes",
        {
            "swift": lambda c: c.step(orders.ask_swift, retry=ASK),
            "polar": lambda c: c.step(orders.ask_polar, retry=ASK),
        },
    )
    approved_by = "the rule for small orders" if bill.cents < LARGE else await approval(ctx)
    await ctx.sleep(0.2 + 0.1 * len(order.lines), name="packing")
    shipped = await ctx.step(ship, order, [quote for quote in quotes.values() if quote is not None])
    await ctx.step(notify, order)
    return Receipt(order=order.id, cents=bill.cents, carrier=shipped.carrier, approved_by=approved_by)


async def approval(ctx: Context) -> str:
    """Somebody has to look; ``durable list --status waiting_for_signal`` shows at what."""
    decision: Decision = await ctx.wait_for_signal(
        "approval", name="decision", type=Decision, timeout=timedelta(days=3)
    )
    if not decision.approved:
        raise Rejected(f"by {decision.by}")
    return decision.by


# ---------------------------------------------------------------- the steps, each with how it is undone


def validate(ctx: StepContext[Order], order: Order) -> Bill:
    if not order.lines:
        raise InvalidOrder("nothing was ordered")
    prices = shop.prices(ctx.connection(), order.batch)
    for line in order.lines:
        if line.sku not in prices:
            raise InvalidOrder(f"there is no product {line.sku!r}")
        if line.quantity < 1:
            raise InvalidOrder(f"{line.quantity} of {line.sku!r} cannot be delivered")
    return Bill(cents=sum(prices[line.sku] * line.quantity for line in order.lines))


def release(ctx: StepContext[Order], output: None, order: Order) -> None:
    for sku, quantity in goods(order).items():
        shop.release(ctx.connection(), order.batch, sku, quantity)


@step(compensate=release)
def reserve(ctx: StepContext[Order], order: Order) -> None:
    for sku, quantity in goods(order).items():
        if not shop.reserve(ctx.connection(), order.batch, sku, quantity):
            raise OutOfStock(f"fewer than {quantity} of {sku!r} are left")


def refund(ctx: StepContext[Order], output: None, order: Order, bill: Bill) -> None:
    shop.book(ctx.connection(), order.batch, order.id, "refund", bill.cents)


@step(compensate=refund)
def pay(ctx: StepContext[Order], order: Order, bill: Bill) -> None:
    if order.card.endswith("0002"):
        raise CardDeclined("the bank says no")
    shop.book(ctx.connection(), order.batch, order.id, "charge", bill.cents)


def recall(ctx: StepContext[Order], output: Quote, order: Order, quotes: Sequence[Quote]) -> None:
    shop.recall(ctx.connection(), order.batch, order.id, goods(order))


@step(compensate=recall)
def ship(ctx: StepContext[Order], order: Order, quotes: Sequence[Quote]) -> Quote:
    if not quotes:
        raise NoCarrier(f"no carrier goes to {order.country}")
    cheapest = min(quotes, key=lambda quote: quote.cents)
    shop.ship(ctx.connection(), order.batch, order.id, cheapest.carrier, goods(order))
    return cheapest


@step(transactional=False, timeout=30)
async def notify(ctx: StepContext[Order], order: Order) -> None:
    """The mail server is somebody else's: it may be called twice for one order, and delivers once."""
    if order.email.endswith("@bounce.example"):
        raise MailRefused(f"the mail server refuses {order.email}")
    await shop.mail(ctx.app.store.dsn, ctx.idempotency_key, order.batch, order.id)
