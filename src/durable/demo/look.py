"""How a batch stands, in one query: the facade's ``list`` would do, but twenty times a second it would be much."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import sql

from durable.demo import orders


@dataclass(frozen=True, slots=True)
class Standing:
    """How many orders are in which state, and how far all of them have come, from 0 to 1."""

    states: Mapping[str, int]
    share: float

    @property
    def total(self) -> int:
        return sum(self.states.values())

    @property
    def ended(self) -> int:
        return sum(self.states.get(state, 0) for state in ("completed", "failed", "canceled"))


class Look:
    """A connection that only reads."""

    def __init__(self, dsn: str, schema: str, batch: str) -> None:
        self._dsn, self._schema = dsn, sql.Identifier(schema)
        self._values = {"tags": json.dumps({"batch": batch})}
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self.interrupted = 0
        """Attempts that a crash has ended; known after the block."""

    async def __aenter__(self) -> Self:
        self._connection = await psycopg.AsyncConnection.connect(self._dsn, autocommit=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._connection is not None
        if kind is None:
            self.interrupted = (await self._rows(_INTERRUPTED, self._values))[0][0]
        await self._connection.close()

    async def standing(self) -> Standing:
        rows = await self._rows(_STANDING, self._values)
        states = {state: count for state, count, _ in rows}
        steps = sum(int(done) for _, _, done in rows)
        return Standing(states, steps / (len(orders.order.nodes) * max(1, sum(states.values()))))

    async def held_by(self, pid: int) -> int:
        """How many runs a worker process has in its hands; also a dead one, until they were taken over."""
        rows = await self._rows(_HELD, {"pid": pid})
        return int(rows[0][0]) if rows else 0

    async def _rows(self, query: str, values: Mapping[str, Any]) -> list[Any]:
        assert self._connection is not None
        cursor = await self._connection.execute(sql.SQL(query).format(schema=self._schema), values)
        return await cursor.fetchall()


_STANDING = """
select case when status in ('pending', 'suspended') then coalesce(waiting_for, status) else status end,
  count(*), sum(case when status in ('completed', 'failed', 'canceled') then 10 else current_step end)
from {schema}.runs where tags @> %(tags)s::jsonb and tags <> '{{}}' group by 1
"""

_HELD = """
select (select count(*) from {schema}.runs r where r.claim_worker = w.id)
  + (select count(*) from {schema}.procrastinate_jobs j where j.worker_id = w.queue_worker_id and j.status = 'doing'
     and not exists (select from {schema}.runs r where r.id = (j.args ->> 'run_id')::uuid and r.claim_worker = w.id))
from {schema}.workers w where w.pid = %(pid)s order by w.id desc limit 1
"""

_INTERRUPTED = """
select count(*) from {schema}.attempts a join {schema}.runs r on r.id = a.run_id
where a.kind = 'interrupted' and r.tags @> %(tags)s::jsonb and r.tags <> '{{}}'
"""
