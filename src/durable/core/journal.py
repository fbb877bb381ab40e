"""A journal that is carried from one step to the next, and remembers that it was compared with the code."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from durable.core.state import Entry
from durable.define.nodes import Workflow

AT_ONCE: Final = 2**20
"""More entries than one transition writes."""


def placed(entries: Iterable[Entry], revision: int) -> tuple[Entry, ...]:
    """Entries with their place in the journal, `seq`: behind all that was written at an earlier revision, whatever of
    it has been pruned since."""
    return tuple([entry.placed(revision * AT_ONCE + n) for n, entry in enumerate(entries)])


class Journal(dict[str, Entry]):
    """The entries of a run by step id, in the order in which they were written. Not changed once it is made: what is
    written later goes into another one.

    `agrees_with` is the definition that a builder's journal was compared with. What that definition adds then agrees
    with it by itself, so one comparison after a load is enough. With any other definition, and once something was
    deleted, it is compared anew.
    """

    agrees_with: Workflow | None = None

    def after(self, written: Iterable[Entry], gone: Collection[str] = ()) -> Journal:
        """The journal once these entries stand in it, and those step ids are deleted."""
        if gone:
            journal = Journal((key, entry) for key, entry in self.items() if key not in gone)
        else:
            journal = Journal(self)
            journal.agrees_with = self.agrees_with
        for entry in written:
            journal.pop(entry.step_id, None)  # of a suspended step: it is written anew, behind all others
            journal[entry.step_id] = entry
        return journal
