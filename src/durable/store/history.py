"""A run's history, composed from what the tables keep of it: nothing is written only to be shown.

Each source tells its part: ``events`` the lifecycle, ``attempts`` what failed, ``journal`` what ended (and when it had
begun), ``inbox`` what arrived, the run's frame what still is open. The order is that of time. What one transaction
wrote has one time: there `_Rank` keeps causes before effects.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import IntEnum
from typing import Any, Final, TypeAlias

from durable.core.state import Begun, EntryKind
from durable.snapshots import ErrorInfo, HistoryEvent
from durable.values import WaitingFor

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sources:
    """The rows of one run; payloads and errors are read already."""

    run: Row
    events: Sequence[Row]
    journal: Sequence[Row]
    attempts: Sequence[Row]
    signals: Sequence[Row]
    frame: Mapping[str, Begun]


class _Rank(IntEnum):
    """What comes first of that which happened at the same time."""

    CREATED = 0
    STARTED = 1
    RESUMED = 2
    MESSAGE = 3
    OUTCOME = 4  # of what had begun before
    STEP = 5  # what began then, and perhaps ended at once
    DISCARDED = 6
    PARKED = 7  # suspended, paused: because of a step's wait or failure
    COMPENSATING = 8
    UNDONE = 9
    ENDED = 10


_LIFECYCLE: Final = {
    "created": _Rank.CREATED,
    "started": _Rank.STARTED,
    "resumed": _Rank.RESUMED,
    "branch_discarded": _Rank.DISCARDED,
    "suspended": _Rank.PARKED,
    "paused": _Rank.PARKED,
    "compensating": _Rank.COMPENSATING,
    "completed": _Rank.ENDED,
    "failed": _Rank.ENDED,
    "canceled": _Rank.ENDED,
}
_CODE: Final = frozenset({
    EntryKind.STEP, EntryKind.BRANCH, EntryKind.ITERATION, EntryKind.CHOICE, EntryKind.RESULT,
    EntryKind.BLOCK, EntryKind.JOIN, EntryKind.RACE, EntryKind.MAP,
})  # fmt: skip
_OPEN: Final = frozenset({WaitingFor.SIGNAL, WaitingFor.CHILD, WaitingFor.RESUME, WaitingFor.ROLLBACK})
_WAITS: Final = frozenset({EntryKind.SIGNAL, EntryKind.RECEIVE, EntryKind.CHILD})
_LAST: Final = 2**63

# (time, rank, place of the step in the journal, attempt, before or after): see compose()
_Key: TypeAlias = tuple[datetime, int, int, int, int]
_Item: TypeAlias = tuple[_Key, HistoryEvent]


def compose(sources: Sources) -> list[HistoryEvent]:
    """All that happened to the run, in order."""
    sources = replace(sources, journal=with_beginnings(sources.journal))
    place = {entry["step_id"]: entry["seq"] for entry in sources.journal}
    steps = [*_failed_attempts(sources, place), *_journaled(sources), *_open(sources)]
    items = [*_lifecycle(sources, steps), *_messages(sources), *steps]
    return [event for _, event in sorted(items, key=lambda item: item[0])]


def with_beginnings(journal: Sequence[Row]) -> list[Row]:
    """The rows in their order; one that does not say when it began did so with the first step in it."""
    inside: dict[str, datetime] = {}
    rows: list[Row] = []
    for row in journal:  # what is in a step comes before it
        began = row["started_at"] or inside.get(row["step_id"])
        rows.append({**row, "started_at": began})
        parent, at = row["parent"], began or row["finished_at"]
        if parent is not None:
            inside[parent] = min(inside.get(parent, at), at)
    return rows


def error_info(raw: Mapping[str, Any] | None) -> ErrorInfo | None:
    """A recorded failure, as it is shown."""
    if raw is None:
        return None
    known = {name: raw[name] for name in ErrorInfo.__dataclass_fields__ if raw.get(name) is not None}
    return ErrorInfo(**{"type": "Error", "message": "", **known})


def parent_of(step_id: str) -> str | None:
    """``build`` of ``build/api`` and of ``build[2]``: names hold none of these signs."""
    if step_id.startswith(("undo:", "choice:", "input:")):
        return None
    if step_id.endswith("]"):
        return step_id.rpartition("[")[0]
    return step_id.rpartition("/")[0] or None


def _item(rank: _Rank, event: HistoryEvent, place: int = 0, attempt: int = 0, after: int = 0) -> _Item:
    return (event.at, rank, place, attempt, after), event


def _lifecycle(sources: Sources, steps: Sequence[_Item]) -> Iterator[_Item]:
    """The transitions. When it was created, started and completed says the run's row. `started` is written with the
    first step's outcome, but is what came before the step."""
    run, rows = sources.run, list(sources.events)
    kinds = {row["kind"] for row in rows}
    if "created" not in kinds:
        rows.insert(0, {"kind": "created", "at": run["created_at"], "seq": 0})
    if "started" not in kinds and run["started_at"] is not None:
        rows.append({"kind": "started", "at": run["started_at"], "seq": 0})
    if "completed" not in kinds and run["status"] == "completed":
        rows.append({"kind": "completed", "at": run["finished_at"], "seq": _LAST})
    first = min((event.at for _, event in steps), default=None)
    for row in rows:
        data = dict(row.get("data") or {})
        error = error_info(data.pop("error", None))
        event = HistoryEvent(row["kind"], row["at"], row.get("step_id"), error=error, data=data or None)
        if event.kind == "started" and first is not None:
            event = replace(event, at=max(run["created_at"], min(event.at, first)))
        if event.step is not None:
            event = replace(event, parent=parent_of(event.step))
        yield _item(_LIFECYCLE.get(event.kind, _Rank.OUTCOME), event, row["seq"])


def _messages(sources: Sources) -> Iterator[_Item]:
    for row in sources.signals:
        data = {"name": row["name"], "id": row["message_id"], "taken_by": row["taken_by"]}
        event = HistoryEvent("message_received", row["sent_at"], payload=row["body"], data=data)
        yield _item(_Rank.MESSAGE, event, row["seq"])


def _span(
    began: HistoryEvent, ended: HistoryEvent | None, place: int, outcome: _Rank = _Rank.OUTCOME
) -> Iterator[_Item]:
    """Something that began, and how it ended; if at the same moment, then one right after the other."""
    attempt = began.attempt or 0
    yield _item(_Rank.STEP, began, place, attempt)
    if ended is not None:
        rank = _Rank.STEP if ended.at == began.at else outcome
        yield _item(rank, ended, place, attempt, 1)


def _failed_attempts(sources: Sources, place: Mapping[str, int]) -> Iterator[_Item]:
    before: dict[str, Row] = {}
    for row in sources.attempts:
        step_id = row["step_id"]
        began, ended = _attempt(row, before.get(step_id), f"attempt_{row['kind']}", parent_of(step_id))
        ended = replace(ended, next_attempt_at=row["next_attempt_at"])
        yield from _span(began, ended, place.get(step_id, _LAST))
        before[step_id] = row


def _journaled(sources: Sources) -> Iterator[_Item]:
    before: dict[str, Row] = {row["step_id"]: row for row in sources.attempts}
    told = {(row["step_id"], row["attempt"], row["finished_at"]) for row in sources.attempts}
    taken: dict[str, list[Row]] = defaultdict(list)
    for signal in sources.signals:
        if signal["taken_by"] is not None and signal["taken_at"] is not None:
            taken[signal["taken_by"]].append(signal)
    for row in sources.journal:
        if (row["extra"] or {}).get("copied"):  # it happened to the run that this one was forked from
            continue
        kind, step_id = EntryKind(row["kind"]), row["step_id"]
        if kind is EntryKind.RESULT and row["started_at"] is None:  # what a body returned: no handler ran for it
            continue
        if kind is EntryKind.SLEEP or kind in _WAITS:
            yield from _wait(row, kind)
        elif kind is EntryKind.UNDO:
            yield _undone(row)
        elif kind in _CODE:
            if (step_id, row["attempt"], row["finished_at"]) not in told:
                yield from _ran(row, before.get(step_id))
            for signal in taken[step_id]:  # what resume() brought to a step that had returned Suspend
                event = HistoryEvent(
                    "wait_satisfied", signal["taken_at"], step_id, row["parent"], payload=signal["body"]
                )
                yield _item(_Rank.OUTCOME, event, row["seq"])


def _ran(row: Row, before: Row | None) -> Iterator[_Item]:
    """The attempt that ended a step, or in which it returned Suspend."""
    if row["status"] == "suspended":
        began, ended = _attempt(row, before, "wait_waiting", row["parent"])
        ended = replace(ended, payload=row["result"], data={"signal": row["step_id"]})
    elif row["status"] == "completed":
        began, ended = _attempt(row, before, "attempt_succeeded", row["parent"])
        ended = replace(ended, payload=row["result"])
    else:
        began, ended = _attempt(row, before, "attempt_failed", row["parent"])
    yield from _span(began, ended, row["seq"])


def _attempt(row: Row, before: Row | None, kind: str, parent: str | None) -> tuple[HistoryEvent, HistoryEvent]:
    """Begin and end of an attempt. Where only the step's own beginning is known, a later attempt did not begin before
    the one before it had ended."""
    ended = HistoryEvent(kind, row["finished_at"], row["step_id"], parent, row["attempt"], row["error"])
    at = row["started_at"] or ended.at
    if before is not None and before["finished_at"] <= ended.at:
        at = max(at, min(before["next_attempt_at"] or before["finished_at"], ended.at))
    return HistoryEvent("attempt_started", at, row["step_id"], parent, row["attempt"]), ended


def _wait(row: Row, kind: EntryKind) -> Iterator[_Item]:
    step_id, parent, extra = row["step_id"], row["parent"], row["extra"] or {}
    at = row["started_at"] or row["finished_at"]
    data = {key: extra[key] for key in ("signal", "child") if key in extra} or None
    if kind is EntryKind.SLEEP:
        began, ended = "sleep_waiting", "sleep_elapsed"
    else:
        began, ended = "wait_waiting", "wait_timed_out" if extra.get("timed_out") else "wait_satisfied"
    end = HistoryEvent(ended, row["finished_at"], step_id, parent, error=row["error"], payload=row["result"], data=data)
    yield from _span(HistoryEvent(began, at, step_id, parent, data=data), end, row["seq"])


def _undone(row: Row) -> _Item:
    kind = "compensated" if row["status"] == "completed" else "compensation_failed"
    step_id = row["step_id"].removeprefix("undo:")
    event = HistoryEvent(kind, row["finished_at"], step_id, row["parent"], row["attempt"], row["error"])
    return _item(_Rank.UNDONE, event, row["seq"])


def _open(sources: Sources) -> Iterator[_Item]:
    """What the frame knows of: steps that run under a claim, sleeps and waits that are not over."""
    suspended = {row["step_id"] for row in sources.journal if row["status"] == "suspended"}
    last = {row["step_id"]: row for row in sources.attempts}
    for step_id, begun in sources.frame.items():
        if begun.since is None:
            continue
        at, parent, event = begun.since, parent_of(step_id), None
        if begun.running:
            before = last.get(step_id)
            if before is not None:
                at = max(at, before["next_attempt_at"] or before["finished_at"])
            event = HistoryEvent("attempt_started", at, step_id, parent, begun.attempts + 1)
        elif begun.waits is WaitingFor.SLEEP:
            event = HistoryEvent("sleep_waiting", at, step_id, parent, data=_awaited(begun))
        elif begun.waits in _OPEN and step_id not in suspended:
            event = HistoryEvent("wait_waiting", at, step_id, parent, data=_awaited(begun))
        if event is not None:
            yield from _span(event, None, _LAST)


def _awaited(begun: Begun) -> dict[str, Any] | None:
    times = {"until": begun.due, "deadline": begun.deadline}
    about: dict[str, Any] = {name: time.isoformat() for name, time in times.items() if time is not None}
    about |= {"signal": begun.name} if begun.name is not None else {}
    about |= {"signals": list(begun.names)} if begun.names is not None else {}
    about |= {"child": str(begun.child)} if begun.child is not None else {}
    return about or None
