"""A loop's own bookkeeping: which iterations are done, what the next one gets, what the whole of it answers."""

from __future__ import annotations

from durable.core.state import Entry, View
from durable.define.nodes import Loop


def iterations(view: View, node: Loop) -> list[Entry]:
    """The finished iterations, in order."""
    done: list[Entry] = []
    while (entry := view.journal.get(f"{node.name}[{len(done)}]")) is not None and entry.status == "completed":
        done.append(entry)
    return done


def next_item(last: Entry | None) -> str | None:
    """What the next iteration gets: `feedback`'s answer, or the result of the one before; None for the first."""
    if last is None:
        return None
    fed_back: str | None = (last.extra or {}).get("next")
    return fed_back if fed_back is not None else last.result


def loop_result(node: Loop, done: list[Entry]) -> str:
    """The results of all iterations, or of the last."""
    if node.keep == "last":
        return (done[-1].result or "null") if done else "null"
    return "[" + ",".join(entry.result or "null" for entry in done) + "]"
