"""The run's row as a SQLAlchemy ORM model, for app code that reads: joins to its own tables, admin pages, reports.

    session.scalars(select(Run).where(Run.workflow == "order", Run.status == Status.FAILED.value))

With another schema than ``durable``: ``engine.execution_options(schema_translate_map={"durable": "shop"})``. `input`
and `error` are as they are stored: with a codec, encoded. What is to change goes through the app, as in
``app.cancel(run.id)``; a session that would write a row raises TypeError.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped

from durable.store.tables import metadata, runs


class Base(DeclarativeBase):
    """Of durable's own models: their metadata is not the app's, so that its Alembic leaves our tables alone."""

    metadata = metadata


class Run(Base):
    """A run. ``app.status(id)`` shows more: its steps, results and children."""

    __table__ = runs

    if TYPE_CHECKING:
        id: Mapped[uuid.UUID]
        workflow: Mapped[str]
        version: Mapped[str]
        status: Mapped[str]
        revision: Mapped[int]
        current_step: Mapped[int]
        input: Mapped[Any]
        input_hash: Mapped[str]
        queue: Mapped[str]
        priority: Mapped[int]
        key: Mapped[str | None]
        tags: Mapped[dict[str, Any]]
        parent_id: Mapped[uuid.UUID | None]
        parent_step: Mapped[str | None]
        root_id: Mapped[uuid.UUID]
        frame: Mapped[dict[str, Any]]
        waiting_for: Mapped[str | None]
        waiting_name: Mapped[str | None]
        wake_at: Mapped[datetime | None]
        deadline: Mapped[datetime | None]
        claim_worker: Mapped[int | None]
        claim_token: Mapped[uuid.UUID | None]
        pausing: Mapped[bool]
        ending: Mapped[dict[str, Any] | None]
        undo_cursor: Mapped[int | None]
        retries: Mapped[int]
        error: Mapped[Any]
        reason: Mapped[str | None]
        created_at: Mapped[datetime]
        started_at: Mapped[datetime | None]
        finished_at: Mapped[datetime | None]

    def __repr__(self) -> str:
        return f"<Run {self.id}: {self.workflow} {self.version}, {self.status}>"


@event.listens_for(Run, "before_insert")
@event.listens_for(Run, "before_update")
@event.listens_for(Run, "before_delete")
def _refuse(_mapper: object, _connection: object, run: Run) -> NoReturn:
    raise TypeError(
        f"durable.models.Run is for reading: change run {run.id} through the app, as in app.cancel(run_id); "
        "app.start() makes a new one"
    )
