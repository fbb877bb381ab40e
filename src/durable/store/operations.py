"""What app code does to a run: each a call of one SQL function, on whatever connection the caller has.

A :class:`Query` is the statement, its parameters and how to read its answer; the sync and the async facade execute the
same ones. On a connection of SQLAlchemy's it goes through SQLAlchemy, which then begins its transaction: a statement
that went past it would be rolled back without a word. On psycopg's it has a cursor of its own, whatever the connection
makes of rows and placeholders.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar, cast

import psycopg
from psycopg.rows import tuple_row

from durable.core.state import MessageKind
from durable.define.payload import canonical_hash
from durable.errors import PayloadError
from durable.store import flush
from durable.store.codec import clean
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.errors import translated
from durable.store.query import Statement
from durable.values import JsonText

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Begun:
    """A job that was put into the hands of the worker that was named. `given`: what it is told beside the run."""

    id: int
    run: uuid.UUID
    given: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of a message."""

    answer: Literal["sent", "duplicate", "finished", "unknown"]
    begun: Begun | None = None


Resumed: TypeAlias = Literal["accepted", "refused", "busy", "unknown"]
ForkAnswer: TypeAlias = Literal["forked", "unknown", "no_step", "undone", "rolled_back"]


@dataclass(frozen=True, slots=True)
class Query(Generic[T]):
    """A statement that can run anywhere: `sql` has ``%(name)s`` placeholders, each in a cast."""

    sql: str
    params: Mapping[str, Any]
    read: Callable[[Sequence[tuple[Any, ...]]], T]

    @property
    def statement(self) -> Statement:
        """`sql`, for a flush."""
        return _statement(self.sql)


@dataclass(frozen=True, slots=True)
class Start:
    """A run to be started. `input` is JSON text; `queue` is the run's, `delay` and `timeout` are from now on."""

    id: uuid.UUID
    workflow: str
    version: str
    input: JsonText
    queue: str
    key: str | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    delay: timedelta | None = None
    timeout: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The run that is there now. If it was not `created`, `same` says whether workflow, version and input are equal."""

    id: uuid.UUID
    created: bool
    same: bool
    begun: Begun | None = None


@dataclass(frozen=True, slots=True)
class Forked:
    """What came of a fork. `steps`: those that there are, if there is ``no_step`` of that name; those ``undone``."""

    answer: ForkAnswer
    steps: tuple[str, ...] = ()


def start(db: Store, run: Start, *, worker: int | None = None, queue: str | None = None) -> Query[Started]:
    """Start one run. `worker`: the queue's id of the one in this process, serving `queue`, that begins it at once.
    Raises PayloadError for an input over the limit."""
    sql = f"""
select id, created, same, job from "{db.schema}".start_run(
  p_id => cast(%(id)s as uuid), p_workflow => cast(%(workflow)s as text), p_version => cast(%(version)s as text),
  p_input => cast(%(input)s as json), p_input_hash => cast(%(input_hash)s as text),
  p_queue => cast(%(queue)s as text), p_key => cast(%(key)s as text), p_tags => cast(%(tags)s as jsonb),
  p_priority => cast(%(priority)s as int), p_delay => cast(%(delay)s as interval),
  p_timeout => cast(%(timeout)s as interval), p_worker => cast(%(worker)s as bigint)
)"""
    params = _started(db, run) | {
        "id": run.id,
        "tags": json.dumps(_tags(run)),
        "delay": run.delay,
        "timeout": run.timeout,
        "worker": worker if run.queue == queue else None,
    }
    return Query(sql, params, _begun)


def start_many(db: Store, runs: Iterable[Start]) -> Query[list[Started]]:
    """Start many runs in one round trip; the answers are in their order."""
    documents = []
    for run in runs:
        fields = _started(db, run) | {
            "id": str(run.id),
            "tags": _tags(run),
            "delay": _interval(run.delay),
            "timeout": _interval(run.timeout),
        }
        text = fields.pop("input")  # stays the text that it is
        documents.append(f'{json.dumps(fields)[:-1]}, "input": {text}}}')
    sql = f'select id, created, same from "{db.schema}".start_runs(cast(%(runs)s as json))'
    return Query(sql, {"runs": f"[{','.join(documents)}]"}, lambda rows: [Started(*row) for row in rows])


def send(
    db: Store,
    run_id: uuid.UUID,
    kind: MessageKind,
    name: str | None = None,
    body: JsonText | None = None,
    message_id: str | None = None,
    *,
    wants_reply: bool = False,
    worker: int | None = None,
    queue: str | None = None,
) -> Query[Sent]:
    """Put a message into a run's inbox. Never waits for the run. Raises PayloadError for a body over the limit.

    `wants_reply`: its sender waits until it is completed; see ``read.answer``. `worker`: the queue's id of the one in
    this process, serving `queue`, that looks into the inbox at once.
    """
    sql = f"""
select answer, run, job from "{db.schema}".post_message(
  cast(%(run)s as uuid), cast(%(kind)s as text), cast(%(name)s as text), cast(%(body)s as json), cast(%(id)s as text),
  cast(%(wants_reply)s as boolean), cast(%(worker)s as bigint), cast(%(queue)s as text)
)"""
    where = f"the payload of {kind.value} {name!r}"
    params = {
        "run": run_id,
        "kind": kind.value,
        "name": _storable(name, "the name"),
        "body": _sealed(db, body, where),
        "id": _storable(message_id, "the message's id"),
        "wants_reply": wants_reply,
        "worker": worker,
        "queue": queue,
    }
    return Query(sql, params, _sent)


def _sent(rows: Sequence[tuple[Any, ...]]) -> Sent:
    answer, run, job = rows[0]
    return Sent(answer, None if job is None else Begun(job, run, {}))


def resume(db: Store, run_id: uuid.UUID, name: str, body: JsonText | None = None) -> Query[Resumed]:
    """Send a signal only to a run that waits for it now. Waits a second for its row; holds it till the transaction's
    end."""
    sql = f"""
select "{db.schema}".resume_wait(cast(%(run)s as uuid), cast(%(name)s as text), cast(%(body)s as json))"""
    body = _sealed(db, body, f"the data of resume {name!r}")
    params = {"run": run_id, "name": _storable(name, "the name"), "body": body}
    return Query(sql, params, lambda rows: cast(Resumed, rows[0][0]))


def definition_of(db: Store, run_id: uuid.UUID) -> Query[tuple[str, str] | None]:
    """The name and version of a run's workflow; None if there is no such run."""
    sql = f'select workflow, version from "{db.schema}".runs where id = cast(%(run)s as uuid)'
    return Query(sql, {"run": run_id}, lambda rows: (rows[0][0], rows[0][1]) if rows else None)


def fork(
    db: Store, run_id: uuid.UUID, new_id: uuid.UUID, step: str | None = None, input_: JsonText | None = None
) -> Query[Forked]:
    """Start a run with a copy of another one's journal up to `step`. That one is not locked, and stays as it is.

    `input_`: None for the same. Raises PayloadError for one over the limit.
    """
    sql = f"""
select answer, steps from "{db.schema}".fork_run(
  cast(%(run)s as uuid), cast(%(id)s as uuid), cast(%(step)s as text), cast(%(input)s as json), cast(%(hash)s as text)
)"""
    params = {
        "run": run_id,
        "id": new_id,
        "step": _storable(step, "the step"),
        "input": _sealed(db, input_, "the input"),
        "hash": None if input_ is None else canonical_hash(input_),
    }
    return Query(sql, params, lambda rows: Forked(rows[0][0], tuple(rows[0][1] or ())))


# ---------------------------------------------------------------- on which connection


def execute(query: Query[T], connection: Any) -> T:
    """On a sync connection: psycopg's (or a cursor of it), SQLAlchemy's Connection, a Session, a scoped_session.

    Raises TypeError for any other; for an async one it names AsyncDurable.
    """
    if _is(connection, "sqlalchemy.orm", "scoped_session"):
        connection = connection()
    if _is(connection, "sqlalchemy.orm", "Session"):
        connection = connection.connection()
    with translated(), _unwrapped():
        if _is(connection, "sqlalchemy", "Connection"):
            result = connection.execute(_text(query), dict(query.params))
            return query.read([tuple(row) for row in result])
        if isinstance(connection, psycopg.Cursor):
            connection = connection.connection
        if isinstance(connection, psycopg.Connection):
            with psycopg.Cursor(connection, row_factory=tuple_row) as cursor:
                return query.read(cursor.execute(query.sql.encode(), query.params).fetchall())
    raise _refused(connection, "Durable", "sync", _async(connection), "AsyncDurable")


async def execute_async(query: Query[T], connection: Any) -> T:
    """On an async connection: psycopg's (or a cursor of it), SQLAlchemy's AsyncConnection, an AsyncSession.

    Raises TypeError for any other; for a sync one it names Durable.
    """
    if _is(connection, "sqlalchemy.ext.asyncio", "async_scoped_session"):
        connection = connection()
    if _is(connection, "sqlalchemy.ext.asyncio", "AsyncSession"):
        connection = await connection.connection()
    with translated(), _unwrapped():
        if _is(connection, "sqlalchemy.ext.asyncio", "AsyncConnection"):
            result = await connection.execute(_text(query), dict(query.params))
            return query.read([tuple(row) for row in result])
        if isinstance(connection, psycopg.AsyncCursor):
            connection = connection.connection
        if isinstance(connection, psycopg.AsyncConnection):
            async with psycopg.AsyncCursor(connection, row_factory=tuple_row) as cursor:
                await cursor.execute(query.sql.encode(), query.params)
                return query.read(await cursor.fetchall())
    raise _refused(connection, "AsyncDurable", "async", _sync(connection), "Durable")


def _begun(rows: Sequence[tuple[Any, ...]]) -> Started:
    id_, created, same, job = rows[0]
    begun = None if job is None else Begun(job, id_, {"revision": 0})
    return Started(id_, created, same, begun)


async def execute_own(query: Query[T], connection: Connection) -> T:
    """On a connection of the app's own, which nobody else uses meanwhile: in one flush."""
    with translated():
        return query.read((await flush.send(connection, query.statement, query.params)).rows)


_statement = lru_cache(Statement.of)
_NO_TEXT: Final = "a NUL or half a surrogate pair can't be stored"
_SYNC: Final = (("sqlalchemy", "Connection"), ("sqlalchemy.orm", "Session"), ("sqlalchemy.orm", "scoped_session"))
_ASYNC: Final = tuple(
    ("sqlalchemy.ext.asyncio", name) for name in ("AsyncConnection", "AsyncSession", "async_scoped_session")
)


def _sync(connection: object) -> bool:
    return isinstance(connection, psycopg.Connection | psycopg.Cursor) or any(_is(connection, *it) for it in _SYNC)


def _async(connection: object) -> bool:
    return isinstance(connection, psycopg.AsyncConnection | psycopg.AsyncCursor) or any(
        _is(connection, *it) for it in _ASYNC
    )


def _is(value: object, module: str, name: str) -> bool:
    """isinstance, for a class of a module that is slow to import: if nobody has, `value` is none of it."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(value, getattr(loaded, name))


def _refused(connection: object, facade: str, takes: str, belongs: bool, other: str) -> TypeError:
    cls = type(connection)
    what = f"{cls.__module__}.{cls.__qualname__}"
    if belongs:
        return TypeError(f"{facade} takes {takes} connections; for this one ({what}) use {other}")
    return TypeError(f"connection= takes a {takes} connection of psycopg or SQLAlchemy, or a session; this is a {what}")


def _text(query: Query[Any]) -> Any:
    """For any driver that SQLAlchemy knows. It has been imported, or there would be no connection of its."""
    return sys.modules["sqlalchemy"].text(re.sub(r"%\((\w+)\)s", r":\1", query.sql))


class _unwrapped:  # noqa: N801 - a with block
    """SQLAlchemy wraps the driver's errors; ours are told by the driver's."""

    def __enter__(self) -> None: ...

    def __exit__(self, cls: object, error: BaseException | None, trace: object) -> None:
        original = getattr(error, "orig", None)
        if isinstance(original, psycopg.Error) and original.diag.constraint_name is not None:
            raise original from error


def _started(db: Store, run: Start) -> dict[str, Any]:
    return {
        "workflow": run.workflow,
        "version": run.version,
        "input": _sealed(db, run.input, f"the input of workflow {run.workflow!r}"),
        "input_hash": canonical_hash(run.input),
        "queue": run.queue,
        "key": _storable(run.key, "the key"),
        "priority": run.priority,
    }


def _storable(text: str | None, where: str) -> str | None:
    """`text`, if a text column takes it."""
    if clean(text) != text:
        raise PayloadError(_NO_TEXT, where=where)
    return text


def _tags(run: Start) -> dict[str, Any]:
    """The tags of `run`, as a jsonb column takes them."""
    try:
        tags: dict[str, Any] = json.loads(json.dumps(dict(run.tags), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PayloadError(f"they are not JSON ({error})", where="the tags") from error
    if clean(tags) != tags:
        raise PayloadError(_NO_TEXT, where="the tags")
    return tags


def _sealed(db: Store, text: JsonText | None, where: str) -> JsonText | None:
    return None if text is None else db.payloads.encode(db.payloads.check(text, where))


def _interval(span: timedelta | None) -> str | None:
    return None if span is None else f"{span.total_seconds():.6f} seconds"
