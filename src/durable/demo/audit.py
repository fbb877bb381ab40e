"""Do the books add up? Read from the tables alone; what the engine says of itself is one side of each comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

CHECKS: Final = {
    "runs": "every order has a run, and every run has ended",
    "payments": "every order was charged exactly once, or charged and refunded exactly once, or never",
    "ledger": "every payment has two entries that cancel out, and bank + sales = 0",
    "stock": "initial - shipped = left, and nothing is still reserved",
    "shipments": "every completed order was shipped exactly once, every other has nothing on the road",
    "mails": "every completed order was notified, under one idempotency key",
}
"""What is checked, in the order in which it is shown."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that does not add up. `check` is one of CHECKS; `subject` an order, a product or an account."""

    check: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.check}: {self.subject}: {self.text}"


def audit(connection: psycopg.Connection[Any], batch: str, *, schema: str = "durable") -> list[Finding]:
    """Everything that is wrong with a batch; empty if nothing. Changes nothing, and reads at one moment, unless the
    connection is in a transaction already.

    `schema` is the engine's. Runs that are still going are findings too: ask when they have ended.
    """
    alone = connection.info.transaction_status is TransactionStatus.IDLE
    with connection.transaction(), connection.cursor(row_factory=dict_row) as cursor:
        if alone:
            cursor.execute("set transaction isolation level repeatable read, read only")
        orders = cursor.execute(sql.SQL(_ORDERS).format(schema=sql.Identifier(schema)), {"batch": batch}).fetchall()
        strays = cursor.execute(_STRAYS, {"batch": batch}).fetchall()
        ledger = cursor.execute(_LEDGER, {"batch": batch}).fetchall()
        accounts = cursor.execute(_ACCOUNTS, {"batch": batch}).fetchall()
        stock = cursor.execute(_STOCK, {"batch": batch}).fetchall()
    return [
        *(finding for order in orders for finding in _order(order)),
        *(Finding("payments", row["order_id"], "paid, but nobody has ordered it") for row in strays),
        *(Finding("ledger", f"payment {row['id']}", row["wrong"]) for row in ledger),
        *_accounts(accounts),
        *(finding for product in stock for finding in _product(product)),
    ]


def _order(row: dict[str, Any]) -> Iterator[Finding]:
    def found(check: str, text: str) -> Finding:
        return Finding(check, row["id"], text)

    status, completed = row["status"], row["status"] == "completed"
    if status is None:
        yield found("runs", "has no run")
    elif status not in ("completed", "failed", "canceled"):
        yield found("runs", f"its run {row['run']} has not ended: {status}")
        return
    charges, refunds = row["charges"], row["refunds"]
    if completed and (charges, refunds) != (1, 0):
        yield found("payments", f"completed with {charges} charges and {refunds} refunds")
    elif not completed and (charges > 1 or charges != refunds):
        yield found("payments", f"{status} with {charges} charges and {refunds} refunds")
    if completed and row["charged"] != row["total"]:
        yield found("payments", f"{row['charged']} cents were charged for {row['total']}")
    if not completed and row["charged"] != row["refunded"]:
        yield found("payments", f"{row['charged']} cents were charged and {row['refunded']} refunded")
    if row["shipped"] != (1 if completed else 0):
        yield found("shipments", f"{status} with {row['shipped']} shipments")
    if completed and row["mails"] != 1:
        yield found("mails", f"notified under {row['mails']} keys")


def _accounts(rows: list[dict[str, Any]]) -> Iterator[Finding]:
    balance = {row["account"]: row["cents"] for row in rows}
    bank, sales, paid = balance.get("bank", 0), balance.get("sales", 0), balance.get("paid", 0)
    if bank + sales != 0:
        yield Finding("ledger", "bank + sales", f"{bank} + {sales} is not 0")
    if bank != paid:
        yield Finding("ledger", "bank", f"{bank} cents, but charges less refunds are {paid}")


def _product(row: dict[str, Any]) -> Iterator[Finding]:
    if row["initial"] - row["shipped"] != row["on_hand"]:
        left = row["initial"] - row["shipped"]
        text = f"{row['initial']} - {row['shipped']} shipped = {left}, but {row['on_hand']} are left"
        yield Finding("stock", row["sku"], text)
    if row["reserved"]:
        yield Finding("stock", row["sku"], f"{row['reserved']} are still reserved")


_ORDERS: Final = """
select o.id, r.id as run, r.status,
  (select sum(line.quantity * s.cents)
     from jsonb_to_recordset(o.lines) as line(sku text, quantity bigint)
     join orders.stock s on s.batch = o.batch and s.sku = line.sku) as total,
  count(p.id) filter (where p.kind = 'charge') as charges,
  count(p.id) filter (where p.kind = 'refund') as refunds,
  coalesce(sum(p.cents) filter (where p.kind = 'charge'), 0) as charged,
  coalesce(sum(p.cents) filter (where p.kind = 'refund'), 0) as refunded,
  (select count(*) from orders.shipments s where s.batch = o.batch and s.order_id = o.id and not s.recalled) as shipped,
  (select count(*) from orders.mails m where m.batch = o.batch and m.order_id = o.id) as mails
from orders.orders o
left join {schema}.runs r on r.workflow = 'order' and r.key = o.batch || '/' || o.id
left join orders.payments p on p.batch = o.batch and p.order_id = o.id
where o.batch = %(batch)s
group by o.batch, o.id, r.id, r.status
order by o.id
"""

_STRAYS: Final = """
select distinct p.order_id from orders.payments p
where p.batch = %(batch)s
  and not exists (select from orders.orders o where o.batch = p.batch and o.id = p.order_id)
"""

_LEDGER: Final = """
select p.id, format('%%s entries, which sum up to %%s', count(l.id), coalesce(sum(l.cents), 0)) as wrong
from orders.payments p left join orders.ledger l on l.batch = p.batch and l.payment_id = p.id
where p.batch = %(batch)s
group by p.id, p.kind, p.cents
having count(l.id) <> 2 or sum(l.cents) <> 0
  or sum(l.cents) filter (where l.account = 'bank')
    is distinct from case p.kind when 'charge' then p.cents else -p.cents end
"""

_ACCOUNTS: Final = """
select account, sum(cents)::bigint as cents from orders.ledger where batch = %(batch)s group by account
union all
select 'paid', coalesce(sum(case kind when 'charge' then cents else -cents end), 0)::bigint
from orders.payments where batch = %(batch)s
"""

_STOCK: Final = """
select s.sku, s.initial, s.on_hand, s.reserved,
  (select coalesce(sum((h.goods ->> s.sku)::integer), 0) from orders.shipments h
   where h.batch = s.batch and not h.recalled) as shipped
from orders.stock s where s.batch = %(batch)s order by s.sku
"""
