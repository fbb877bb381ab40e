"""What the hooks of an app are to be told: written with the transition that it tells of, deleted when it was told.

A delivery that is taken is nobody else's for the time of its visibility; if its taker dies, it is due again then. All
times are the engine's. Asked on an autocommit connection, no statement here keeps a lock for longer than itself.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Final

from psycopg import AsyncClientCursor

from durable.core.state import Run
from durable.core.transition import Report, ReportKind
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.flush import Flush
from durable.store.query import Statements, statement
from durable.values import JsonText

VISIBILITY: Final = timedelta(seconds=30)
"""How long after its last renewal a taken delivery is due again."""


class DeliverySql(Statements):
    write = statement("""
-- hooks are to be told this of the run
insert into {schema}.deliveries (run_id, queue, kind, body, due)
values (%(run)s, %(queue)s, %(kind)s, %(body)s, {schema}.engine_now())
""")

    # One that no hook has refused yet holds back what came after it: so a run's deliveries are told in their order.
    # With its limit the look for it is one by the primary key, and no join over the backlog.
    take = statement("""
-- hooks: what is due, and is nobody else's from now on
with due as materialized (
  select run_id, seq from {schema}.deliveries d
  where queue = %(queue)s and kind = any (%(kinds)s) and due <= (select {schema}.engine_now())
    and (select earlier.seq from {schema}.deliveries earlier
         where earlier.run_id = d.run_id and earlier.kind = d.kind and earlier.seq < d.seq and earlier.error is null
         limit 1) is null
  order by due limit %(limit)s for update skip locked
)
update {schema}.deliveries d set attempts = attempts + 1, due = (select {schema}.engine_now()) + %(visibility)s
from due where d.run_id = due.run_id and d.seq = due.seq
returning d.run_id, d.seq, d.kind, d.body::text, d.attempts, d.error::text
""")

    renew = statement("""
-- hooks: these are being told still
update {schema}.deliveries d set due = (select {schema}.engine_now()) + %(visibility)s
from unnest(%(runs)s::uuid[], %(seqs)s::bigint[]) as flying (run_id, seq)
where d.run_id = flying.run_id and d.seq = flying.seq
""")

    delete = statement("""
-- hooks: this was told, or is given up
delete from {schema}.deliveries where run_id = %(run)s and seq = %(seq)s
""")

    refuse = statement("""
-- hooks: one of them raised; later once more, unless somebody else has taken it meanwhile
update {schema}.deliveries set error = %(error)s, due = {schema}.engine_now() + %(backoff)s
where run_id = %(run)s and seq = %(seq)s and attempts = %(attempts)s
""")


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery that was taken. `attempts` counts this one. `body` and `refused` are as they stand in their columns:
    what is to be told, and the errors of the hooks that raised last time, by the hook's name."""

    run_id: uuid.UUID
    seq: int
    kind: ReportKind
    body: JsonText
    attempts: int
    refused: JsonText | None


def queue(db: Store, flush: Flush, run: Run, reports: Iterable[Report]) -> None:
    """In the transaction that moves the run."""
    for report in reports:
        values = {"run": run.id, "queue": run.queue, "kind": report.kind, "body": db.payloads.dump(report.body)}
        flush.add(statements(db.schema).write, values)


async def take(
    db: Store, connection: Connection, queue: str, kinds: Collection[ReportKind], limit: int
) -> list[Delivery]:
    """Up to `limit` that are due, in the order in which they were written. Of each run and kind one at a time, beside
    those that come again because a hook raised."""
    values = {"queue": queue, "kinds": list(kinds), "limit": limit, "visibility": VISIBILITY}
    cursor = await AsyncClientCursor(connection).execute(statements(db.schema).take, values)  # planned for what is due
    return sorted((Delivery(*row) for row in await cursor.fetchall()), key=lambda delivery: delivery.seq)


async def renew(db: Store, connection: Connection, taken: Collection[tuple[uuid.UUID, int]]) -> None:
    """They are in good hands still: nobody else's for the time of visibility from now."""
    values = {"runs": [run for run, _ in taken], "seqs": [seq for _, seq in taken], "visibility": VISIBILITY}
    await connection.execute(statements(db.schema).renew, values)


async def delete(db: Store, connection: Connection, delivery: Delivery) -> None:
    """It was told, or is given up."""
    await connection.execute(statements(db.schema).delete, {"run": delivery.run_id, "seq": delivery.seq})


async def refuse(
    db: Store, connection: Connection, delivery: Delivery, errors: Mapping[str, str], backoff: timedelta
) -> None:
    """These hooks raised: it is due again after `backoff`."""
    values = {"run": delivery.run_id, "seq": delivery.seq, "attempts": delivery.attempts, "backoff": backoff}
    await connection.execute(statements(db.schema).refuse, values | {"error": db.payloads.dump(errors)})


@lru_cache
def statements(schema: str) -> DeliverySql:
    """The statements for one schema."""
    return DeliverySql(schema)
