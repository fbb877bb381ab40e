"""The demo ends well with its books in order, and the audit finds what is wrong with books that are not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from tests.doors.cli_kit import LIMIT, ROOT, spawn

from durable import ConfigurationError, Durable, RunFailed, Start
from durable.demo import orders, shop, stage
from durable.demo.audit import CHECKS, Finding, audit

ORDERS = 24


def perform(*words: str, dsn: str) -> subprocess.CompletedProcess[str]:
    process = spawn("demo", "--orders", str(ORDERS), *words, dsn=dsn)
    out, err = process.communicate(timeout=3 * LIMIT)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_the_demo_kills_a_worker_its_books_add_up_and_it_can_be_played_again(dsn: str) -> None:
    ended = perform("-o", "json", dsn=dsn)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    facts = json.loads(ended.stdout)
    assert facts["ok"]
    assert facts["findings"] == []
    assert facts["killed"]
    assert facts["taken_over_after"] is not None
    assert sum(facts["endings"].values()) == ORDERS
    assert facts["endings"]["completed"] > ORDERS / 2

    again = perform("--seed", "7", "--function", dsn=dsn)
    assert again.returncode == 0, again.stderr + again.stdout
    assert "The books add up." in again.stdout
    assert "kill -9" in again.stdout

    listing = spawn("list", "--tag", f"batch={facts['batch']}", "--limit", "1000", dsn=dsn)
    out, _ = listing.communicate(timeout=LIMIT)
    assert len(out.splitlines()) == ORDERS
    with psycopg.connect(dsn) as connection:
        versions = "select version, count(*)::int from durable.runs where workflow = 'order' group by 1 order by 1"
        assert connection.execute(versions).fetchall() == [("1", ORDERS), ("2", ORDERS)]
        assert audit(connection, facts["batch"]) == []
        charged = "select count(*) from orders.payments where batch = %s and kind = 'charge'"
        assert connection.execute(charged, [facts["batch"]]).fetchone() != (0,)


async def test_fresh_is_for_the_embedded_database_only(dsn: str) -> None:
    with pytest.raises(ConfigurationError, match="embedded"):
        await stage.perform(stage.Play(dsn=dsn, fresh=True))


# ---------------------------------------------------------------- the audit

BATCH = "b"


@pytest.fixture(scope="module")
def kept(module_dsn: str) -> str:
    """Books of small orders that have ended: the database that holds them. (Nobody here approves large ones.)"""
    given = [order for order in shop.read_orders(40) if not order["email"].startswith("orders@")][:24]
    with psycopg.connect(module_dsn) as connection:
        shop.create(connection)
        shop.open_batch(connection, BATCH, given)
    with Durable(module_dsn, workflows=[orders.order]) as app, app.worker():
        starts = [Start({"batch": BATCH} | one, key=f"{BATCH}/{one['id']}", tags={"batch": BATCH}) for one in given]
        for run in app.start_many(orders.order, starts):
            with suppress(RunFailed):
                run.result(timeout=LIMIT)
    return module_dsn


@pytest.fixture
def books(kept: str) -> Iterator[psycopg.Connection[Any]]:
    """To be tampered with; all is undone afterwards."""
    with psycopg.connect(kept) as connection:
        yield connection
        connection.rollback()


def test_the_audit_finds_nothing(books: psycopg.Connection[Any]) -> None:
    assert audit(books, BATCH) == []


A_CHARGE = "from orders.payments p where p.batch = %(batch)s and p.kind = 'charge'"


TAMPERINGS = {
    "a double charge": ("payments", f"""
        insert into orders.payments (batch, order_id, kind, cents)
        select batch, order_id, kind, cents {A_CHARGE} limit 1"""),
    "a refund without a charge": ("payments", f"""
        update orders.payments set kind = 'refund' where id = (select min(p.id) {A_CHARGE})"""),
    "a missing refund": ("payments", """
        delete from orders.payments where id in
        (select id from orders.payments where batch = %(batch)s and kind = 'refund' limit 1)"""),
    "a missing charge": ("payments", f"delete from orders.payments where id = (select min(p.id) {A_CHARGE})"),
    "a cent too much": ("payments", f"""
        update orders.payments set cents = cents + 1 where id = (select min(p.id) {A_CHARGE})"""),
    "a charge for no order": ("payments", """
        insert into orders.payments (batch, order_id, kind, cents) values (%(batch)s, 'nobody', 'charge', 1)"""),
    "a lost entry": ("ledger", """
        delete from orders.ledger where id = (select min(id) from orders.ledger where batch = %(batch)s)"""),
    "an unbalanced ledger": ("ledger", """
        update orders.ledger set cents = cents + 1 where batch = %(batch)s and account = 'bank'"""),
    "lost stock": ("stock", """
        update orders.stock set on_hand = on_hand - 1 where batch = %(batch)s and sku = 'cup'"""),
    "forgotten reservations": ("stock", """
        update orders.stock set reserved = reserved + 1 where batch = %(batch)s and sku = 'cup'"""),
    "stock out of nowhere": ("stock", """
        update orders.stock set initial = initial - 1 where batch = %(batch)s and sku = 'cup'"""),
    "two parcels": ("shipments", """
        insert into orders.shipments (batch, order_id, carrier, goods)
        select batch, order_id, carrier, '{}' from orders.shipments
        where batch = %(batch)s and not recalled limit 1"""),
    "no parcels": ("shipments", "update orders.shipments set recalled = true where batch = %(batch)s"),
    "no mails": ("mails", "delete from orders.mails where batch = %(batch)s"),
    "two mails": ("mails", """
        insert into orders.mails (key, batch, order_id)
        select 'another', batch, order_id from orders.mails where batch = %(batch)s limit 1"""),
    "lost runs": ("runs", "delete from durable.runs where tags ->> 'batch' = %(batch)s"),
    "stuck runs": ("runs", """
        update durable.runs set status = 'running', finished_at = null, error = null
        where tags ->> 'batch' = %(batch)s and status = 'failed'"""),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERINGS)
def test_the_audit_finds(books: psycopg.Connection[Any], what: str) -> None:
    check, tampering = TAMPERINGS[what]
    assert books.execute(tampering.encode(), {"batch": BATCH}).rowcount >= 1
    found = audit(books, BATCH)
    assert check in {finding.check for finding in found}
    assert all(finding.check in CHECKS and finding.text for finding in found)


def test_the_audit_knows_its_batch_only(books: psycopg.Connection[Any]) -> None:
    books.execute("update orders.payments set batch = 'another' where batch = %s", [BATCH])
    assert {finding.check for finding in audit(books, BATCH)} >= {"payments", "ledger"}
    assert audit(books, "no such batch") == []
    assert str(Finding("stock", "cup", "lost")) == "stock: cup: lost"


# ---------------------------------------------------------------- the orders


def test_the_file_has_300_orders_of_every_kind() -> None:
    given = [orders.Order.model_validate({"batch": "b"} | order) for order in shop.read_orders()]
    assert len(given) == len({order.id for order in given}) == 300
    known = {sku for sku, *_ in shop.STOCK}
    prices = {sku: cents for sku, _, cents, _ in shop.STOCK}
    wrong = [o for o in given if not o.lines or any(x.sku not in known or x.quantity < 1 for x in o.lines)]
    totals = [sum(prices.get(line.sku, 0) * line.quantity for line in order.lines) for order in given]
    assert len(wrong) == 8
    assert sum(total >= orders.LARGE for total in totals) == 40
    assert sum(order.email.endswith("@bounce.example") for order in given) == 8
    assert sum(order.country == "AQ" for order in given) == 6
    assert len({order.country for order in given}) >= 10


def test_any_number_of_orders_can_be_had() -> None:
    many = shop.read_orders(650)
    assert len({order["id"] for order in many}) == 650
    assert many[300]["lines"] == many[0]["lines"]
    assert shop.read_orders(3) == shop.read_orders()[:3]


def test_the_example_names_the_same_file() -> None:
    linked = ROOT / "examples" / "orders" / "orders.jsonl"
    assert linked.resolve() == Path(shop.__file__).with_name("orders.jsonl")
