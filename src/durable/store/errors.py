"""What the database answers, in the engine's words. Invariants are constraints there; here they are known by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import psycopg

from durable.errors import DurableError, PayloadError


class RowBusy(DurableError):
    """Somebody else holds the run's row, and did not let go within ``lock_timeout``. Nothing was done."""


class StaleRevision(DurableError):
    """The run was moved on by somebody else since it was read. Nothing was written."""


class JournalConflict(DurableError):
    """The journal has an entry for this step already, and the first write wins. Nothing was written."""


class InboxNews(DurableError):
    """A message came to the run while its end was decided. Nothing was written, and the row is still locked."""


class InternalError(AssertionError):
    """The engine tried to do what must never happen. A bug in durable, never in app code."""


CONSTRAINTS: Final[Mapping[str, Callable[[str], Exception]]] = {
    "runs_revision": StaleRevision,
    "runs_legal_move": InternalError,
    "runs_successor": InternalError,
    "inbox_news": InboxNews,
    "runs_tags_check": lambda _: PayloadError("tags are an object of names and values", where="the tags"),
    "journal_pkey": JournalConflict,
}
"""What breaking a constraint means. Any other one of ours is the engine's fault."""


def translate(error: psycopg.Error) -> Exception:
    """The domain error for `error`; `error` itself if it is none of ours."""
    while isinstance(error, psycopg.errors.PipelineAborted) and isinstance(error.__context__, psycopg.Error):
        error = error.__context__  # what came after the error in a pipeline, and is raised in its place
    if isinstance(error, psycopg.errors.LockNotAvailable):
        return RowBusy("somebody else holds the row, and did not let go within lock_timeout")
    name = error.diag.constraint_name
    if name is None:
        return error
    message = error.diag.message_primary or str(error)
    if isinstance(error, psycopg.errors.UniqueViolation) and error.diag.message_detail:
        message = f"{message}: {error.diag.message_detail}"  # the key: which run, and which step
    if name in CONSTRAINTS:
        return CONSTRAINTS[name](message)
    if isinstance(error, psycopg.errors.CheckViolation) and name.startswith(("runs_", "journal_", "inbox_")):
        return InternalError(message)
    return error


@contextmanager
def translated() -> Iterator[None]:
    """Errors of the database that pass through the block become domain errors, with the first as their cause."""
    try:
        yield
    except psycopg.Error as error:
        meant = translate(error)
        if meant is error:
            raise
        raise meant from error
