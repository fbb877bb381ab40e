"""What went wrong, in a line or two on standard error: what, where, what to do. A traceback only for our own faults."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING, Final

from durable.errors import ConfigurationError, DefinitionError, DurableError, PayloadError, WorkflowNotRegistered

if TYPE_CHECKING:
    from cyclopts import CycloptsError

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
STILL_RUNNING: Final = 3


class UsageError(Exception):
    """An argument is wrong."""


def complain(error: Exception) -> int:
    """Say it; returns the exit code."""
    if isinstance(error, UsageError | ConfigurationError | DefinitionError | PayloadError):
        return say(str(error), USAGE)
    if isinstance(error, WorkflowNotRegistered):
        return say(f"{error}: --import MODULE, or --app MODULE:APP", USAGE)
    if isinstance(error, DurableError):
        return say(str(error), FAILED)
    if _of_database(error):
        return say(f"the database: {' '.join(str(error).split())}. Is it up, and is the DSN right?", FAILED)
    traceback.print_exception(error)
    return say("this is a bug of durable, or of the code that it has imported", FAILED)


def complain_of_usage(error: CycloptsError) -> int:
    chain = " ".join(error.command_chain or ())
    return say(f"{' '.join(str(error).split())} (`durable {chain}{' ' if chain else ''}--help`)", USAGE)


def say(text: str, code: int = FAILED) -> int:
    print(f"durable: {printable(text)}", file=sys.stderr)
    return code


def printable(text: str) -> str:
    """Without characters that a terminal would obey: what comes from runs may hold anything."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _of_database(error: Exception) -> bool:
    import psycopg
    from psycopg_pool import PoolTimeout

    return isinstance(error, psycopg.Error | PoolTimeout | OSError) and not os.environ.get("DURABLE_DEBUG")
