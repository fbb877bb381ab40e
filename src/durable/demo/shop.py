"""The shop's own tables, in a schema of their own beside the engine's, and what the steps do there.

They have no unique constraint on purpose where one would hide a mistake: a payment taken twice would be there, and the
audit would find it. Amounts are whole cents. Orders are kept in batches, one for each time that the demo is run.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any, Final, Literal

import psycopg
from sqlalchemy import Connection, text

TABLES: Final = """
create schema if not exists orders;
create table if not exists orders.orders (
  batch text, id text, customer text not null, lines jsonb not null, primary key (batch, id));
create table if not exists orders.stock (
  batch text, sku text, name text not null, cents bigint not null,
  initial integer not null, on_hand integer not null, reserved integer not null default 0,
  primary key (batch, sku), check (reserved between 0 and on_hand));
create table if not exists orders.payments (
  id bigint generated always as identity primary key, batch text not null, order_id text not null,
  kind text not null check (kind in ('charge', 'refund')), cents bigint not null,
  at timestamptz not null default now());
create index if not exists payments_order_idx on orders.payments (batch, order_id);
create table if not exists orders.ledger (
  id bigint generated always as identity primary key, payment_id bigint not null, batch text not null,
  account text not null check (account in ('bank', 'sales')), cents bigint not null);
create index if not exists ledger_payment_idx on orders.ledger (batch, payment_id);
create table if not exists orders.shipments (
  id bigint generated always as identity primary key, batch text not null, order_id text not null,
  carrier text not null, goods jsonb not null, recalled boolean not null default false);
create index if not exists shipments_order_idx on orders.shipments (batch, order_id);
create table if not exists orders.mails (
  key text primary key, batch text not null, order_id text not null, calls integer not null default 1);
create index if not exists mails_order_idx on orders.mails (batch, order_id);
"""

STOCK: Final = (
    # sku, name, price in cents, how many there are
    ("kettle", "kettle, 1.7 l", 34_90, 2_000),
    ("teapot", "teapot, cast iron", 79_00, 1_500),
    ("cup", "cup, hand thrown", 18_50, 5_000),
    ("tray", "tray, bamboo", 27_00, 1_500),
    ("tea-green", "sencha, 500 g", 42_00, 2_500),
    ("tea-black", "assam, 1 kg", 38_75, 2_500),
    ("samovar", "samovar, brass", 649_00, 400),
    ("grinder", "grinder, steel burrs", 189_00, 600),
    ("machine", "espresso machine", 1_249_00, 300),
    ("lantern", "lantern, last of its kind", 149_00, 12),  # fewer than are ordered
)


# ---------------------------------------------------------------- the demo's side: plain psycopg


def create(connection: psycopg.Connection[Any]) -> None:
    """Make the tables, if they are not there."""
    with connection.transaction():
        connection.execute("select pg_advisory_xact_lock(hashtext('durable.demo.orders'))")
        connection.execute(TABLES)


def open_batch(connection: psycopg.Connection[Any], batch: str, orders: Iterable[Mapping[str, Any]]) -> None:
    """A full shelf, and the orders that will come."""
    with connection.transaction(), connection.cursor() as cursor:
        cursor.executemany(
            "insert into orders.stock (batch, sku, name, cents, initial, on_hand) values (%s, %s, %s, %s, %s, %s)",
            [(batch, sku, name, cents, count, count) for sku, name, cents, count in STOCK],
        )
        cursor.executemany(
            "insert into orders.orders (batch, id, customer, lines) values (%s, %s, %s, %s)",
            [(batch, order["id"], order["customer"], json.dumps(order["lines"])) for order in orders],
        )


def read_orders(count: int | None = None) -> list[dict[str, Any]]:
    """The orders of ``orders.jsonl``; more than it has are made by counting on from its end with the same orders."""
    lines = (files("durable.demo") / "orders.jsonl").read_text(encoding="utf-8").splitlines()
    known: list[dict[str, Any]] = [json.loads(line) for line in lines]
    wanted = len(known) if count is None else count
    return [known[i % len(known)] | {"id": f"A-{i + 1:04}"} for i in range(wanted)]


# ---------------------------------------------------------------- the steps' side: SQLAlchemy, in the run's transaction


def prices(connection: Connection, batch: str) -> dict[str, int]:
    """What each product costs, in cents."""
    rows = connection.execute(text("select sku, cents from orders.stock where batch = :batch"), {"batch": batch})
    return {row.sku: row.cents for row in rows}


def reserve(connection: Connection, batch: str, sku: str, quantity: int) -> bool:
    """Keep goods for an order; False if there are not enough."""
    query = """
        update orders.stock set reserved = reserved + :quantity
        where batch = :batch and sku = :sku and on_hand - reserved >= :quantity
    """
    return connection.execute(text(query), {"batch": batch, "sku": sku, "quantity": quantity}).rowcount == 1


def release(connection: Connection, batch: str, sku: str, quantity: int) -> None:
    """They are free again."""
    query = "update orders.stock set reserved = reserved - :quantity where batch = :batch and sku = :sku"
    connection.execute(text(query), {"batch": batch, "sku": sku, "quantity": quantity})


def book(connection: Connection, batch: str, order_id: str, kind: Literal["charge", "refund"], cents: int) -> None:
    """A payment, and its two entries in the ledger."""
    query = """
        with paid as (
          insert into orders.payments (batch, order_id, kind, cents) values (:batch, :order, :kind, :cents) returning id
        )
        insert into orders.ledger (payment_id, batch, account, cents)
        select id, :batch, 'bank', :bank from paid union all select id, :batch, 'sales', - :bank from paid
    """
    bank = cents if kind == "charge" else -cents
    connection.execute(text(query), {"batch": batch, "order": order_id, "kind": kind, "cents": cents, "bank": bank})


def ship(connection: Connection, batch: str, order_id: str, carrier: str, goods: Mapping[str, int]) -> None:
    """A parcel, out of what was reserved."""
    query = "insert into orders.shipments (batch, order_id, carrier, goods) values (:batch, :order, :carrier, :goods)"
    values = {"batch": batch, "order": order_id, "carrier": carrier, "goods": json.dumps(goods)}
    connection.execute(text(query), values)
    _move(connection, batch, goods, -1)


def recall(connection: Connection, batch: str, order_id: str, goods: Mapping[str, int]) -> None:
    """It comes back, and is still reserved."""
    query = "update orders.shipments set recalled = true where batch = :batch and order_id = :order"
    connection.execute(text(query), {"batch": batch, "order": order_id})
    _move(connection, batch, goods, 1)


def signal(connection: Connection, schema: str, run_id: uuid.UUID, name: str, body: str) -> None:
    """A signal by durable's own SQL function: it is sent exactly if this transaction commits. (``app.signal`` with
    ``connection=`` does the same; but this serves a Durable and an AsyncDurable alike.)"""
    query = f"select \"{schema}\".send_message(:run, 'signal', :name, cast(:body as json))"
    connection.execute(text(query), {"run": run_id, "name": name, "body": body})


def _move(connection: Connection, batch: str, goods: Mapping[str, int], sign: int) -> None:
    query = """
        update orders.stock set on_hand = on_hand + :quantity, reserved = reserved + :quantity
        where batch = :batch and sku = :sku
    """
    for sku, quantity in goods.items():
        connection.execute(text(query), {"batch": batch, "sku": sku, "quantity": sign * quantity})


# ---------------------------------------------------------------- somebody else's service


async def mail(dsn: str, key: str, batch: str, order_id: str) -> None:
    """The mail server, which happens to keep its list in the same database: but in a transaction of its own, so that a
    worker that dies after this call and before its journal entry makes the call again. It knows the key then."""
    query = """
        insert into orders.mails (key, batch, order_id) values (%s, %s, %s)
        on conflict (key) do update set calls = orders.mails.calls + 1
    """
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute(query, (key, batch, order_id))
