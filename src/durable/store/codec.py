"""Between the core's values and the columns.

A payload is JSON text on both sides; a user's :class:`Codec` (encrypt, compress, offload) may sit in between. What it
made stands in the column as ``{"~durable":"<base64>"}``, so that the column stays JSON and values written by callers of
the SQL functions, which know no codec, are read like all others. What user code said passes through it wherever it
stands: inputs, results, messages, errors, and what the frame or an entry's ``extra`` keep of them.

Times in JSON are ISO 8601 in UTC; fields that have their default are left out.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, Final, Protocol

from durable.core.state import Begun, Claim, Ending, Entry, EntryKind, Failure, Message, MessageKind, Run
from durable.errors import PayloadError
from durable.values import JsonText, Status, WaitingFor

MAX_PAYLOAD: Final = 8 * 1024**2


class Codec(Protocol):
    """Turns the bytes of a payload into others and back: to encrypt, compress or offload it."""

    def encode(self, plain: bytes, /) -> bytes: ...
    def decode(self, stored: bytes, /) -> bytes: ...


_MARKS: Final = '{"~durable'
_STORED: Final = re.compile(r'\{"~durable(-plain)?": ?"([A-Za-z0-9+/=]*)"\}')  # jsonb writes the space


class Payloads:
    """Payload text on its way into a column and out of it, with one codec and one limit."""

    def __init__(self, codec: Codec | None = None, limit: int = MAX_PAYLOAD) -> None:
        self.limit = limit
        self._codec = codec

    def check(self, text: JsonText, where: str) -> JsonText:
        """`text` itself, if it is no larger than the limit. To be asked where a payload comes in; what is made of such
        payloads (a result of results) is not measured again."""
        if len(text) * 4 > self.limit and (size := len(text.encode())) > self.limit:
            raise PayloadError(
                f"{size:,} bytes are more than max_payload={self.limit:,}: store it elsewhere and pass a reference, "
                "or raise max_payload",
                where=where,
            )
        return text

    def encode(self, text: JsonText) -> JsonText:
        if self._codec is not None:
            return f'{{"~durable":"{base64.b64encode(self._codec.encode(text.encode())).decode()}"}}'
        if text.startswith(_MARKS):  # it could not be told from one that went through a codec
            return f'{{"~durable-plain":"{base64.b64encode(text.encode()).decode()}"}}'
        return text

    def decode(self, stored: JsonText) -> JsonText:
        """Raises PayloadError if it can't be read: it went through a codec that is not here, or is another."""
        if not stored.startswith(_MARKS) or (found := _STORED.fullmatch(stored)) is None:
            return stored
        data = base64.b64decode(found[2])
        if found[1]:
            return data.decode()
        if self._codec is None:
            raise PayloadError("it was stored through a codec, and none is set here: pass codec= as its writer does")
        try:
            return self._codec.decode(data).decode()
        except Exception as error:
            raise PayloadError(f"the codec could not decode it ({type(error).__name__}: {error})") from error

    def encoded(self, text: JsonText | None) -> JsonText | None:
        return None if text is None else self.encode(text)

    def decoded(self, stored: JsonText | None) -> JsonText | None:
        return None if stored is None else self.decode(stored)

    # ---- what is JSON of our own, and holds something that user code said

    def dump(self, value: Any) -> JsonText | None:
        """A document of ours (a failure, an event's data, an entry's extra) for its column."""
        if value is None:
            return None
        text = _dumps(value)
        if "\\u0000" in text or "\\ud" in text:  # an error's message may be anything; jsonb would refuse it
            text = _dumps(clean(value))
        return self.encode(text)

    def load(self, stored: JsonText | None) -> Any:
        return None if stored is None else json.loads(self.decode(stored))


def failure_json(failure: Failure | None) -> dict[str, Any] | None:
    return None if failure is None else _trimmed(failure)


def failure(raw: Mapping[str, Any] | None) -> Failure | None:
    return None if raw is None else Failure(**raw)


def frame_text(frame: Mapping[str, Begun], payloads: Payloads) -> str:
    """Not encoded as a whole: the database looks for `waits`, `name` and `names` in it."""
    if not frame:
        return "{}"
    steps = {step: _trimmed(begun) for step, begun in frame.items()}
    for step in steps.values():
        if "resume_data" in step:
            step["resume_data"] = payloads.encode(step["resume_data"])
    return _dumps(steps)


def frame(text: str, payloads: Payloads) -> dict[str, Begun]:
    return {} if text == "{}" else {step: _begun(raw, payloads) for step, raw in json.loads(text).items()}


def _begun(raw: dict[str, Any], payloads: Payloads) -> Begun:
    for name in ("since", "due", "deadline"):
        if name in raw:
            raw[name] = datetime.fromisoformat(raw[name])
    if "waits" in raw:
        raw["waits"] = WaitingFor(raw["waits"])
    if "child" in raw:
        raw["child"] = uuid.UUID(raw["child"])
    if "names" in raw:
        raw["names"] = tuple(raw["names"])
    if "resume_data" in raw:
        raw["resume_data"] = payloads.decode(raw["resume_data"])
    return Begun(**raw)


def ending_text(ending: Ending | None, payloads: Payloads) -> str | None:
    if ending is None:
        return None
    return payloads.dump(_trimmed(ending) | ({"error": failure_json(ending.error)} if ending.error else {}))


def ending(text: str | None, payloads: Payloads) -> Ending | None:
    if text is None:
        return None
    raw = payloads.load(text)
    if "until" in raw:
        raw["until"] = datetime.fromisoformat(raw["until"])
    status = Status.FAILED if raw["status"] == Status.FAILED else Status.CANCELED
    return Ending(**{**raw, "status": status, "error": failure(raw.get("error"))})


# ---- rows, in the order of the columns in durable.store.sql

RUN_COLUMNS: Final = (
    "id, workflow, version, status, revision, current_step, input::text, queue, created_at, key, tags::text, priority, "
    "parent_id, parent_step, frame::text, waiting_for, waiting_name, wake_at, deadline, claim_worker, claim_token, "
    "pausing, ending::text, undo_cursor, retries, cleanup, seed, chain, predecessor, successor, error::text, reason, "
    "started_at, finished_at"
)


def run(row: Sequence[Any], payloads: Payloads) -> Run:
    (
        id_, workflow, version, status, revision, current_step, input_, queue, created_at, key, tags, priority,
        parent_id, parent_step, frame_, waiting_for, waiting_name, wake_at, deadline, claim_worker, claim_token,
        pausing, ending_, undo_cursor, retries, cleanup, seed, chain, predecessor, successor, error, reason,
        started_at, finished_at,
    ) = row  # fmt: skip
    return Run(
        id=id_,
        workflow=workflow,
        version=version,
        status=Status(status),
        revision=revision,
        current_step=current_step,
        input=payloads.decode(input_),
        queue=queue,
        created_at=created_at,
        key=key,
        tags=json.loads(tags),
        priority=priority,
        parent_id=parent_id,
        parent_step=parent_step,
        frame=frame(frame_, payloads),
        waiting_for=WaitingFor(waiting_for) if waiting_for is not None else None,
        waiting_name=waiting_name,
        wake_at=wake_at,
        deadline=deadline,
        claim=Claim(claim_worker, claim_token) if claim_token is not None else None,
        pausing=pausing,
        ending=ending(ending_, payloads),
        undo_cursor=undo_cursor,
        retries=retries,
        cleanup=cleanup,
        seed=seed,
        chain=chain,
        predecessor=predecessor,
        successor=successor,
        error=failure(payloads.load(error)),
        reason=reason,
        started_at=started_at,
        finished_at=finished_at,
    )


_PLAIN: Final = (
    "current_step", "waiting_name", "wake_at", "deadline", "pausing", "undo_cursor", "retries", "cleanup", "successor",
    "started_at", "finished_at",
)  # fmt: skip
_plain_columns: Final = attrgetter(*_PLAIN)


def run_changes(before: Run, after: Run, payloads: Payloads) -> dict[str, Any]:
    """The columns that a transition changes, as parameters. A step of many changes two or three."""
    changes: dict[str, Any] = {"revision": after.revision}
    was, now = _plain_columns(before), _plain_columns(after)
    if was != now:
        changes |= {name: value for name, old, value in zip(_PLAIN, was, now, strict=True) if value != old}
    if after.status is not before.status:
        changes["status"] = after.status.value
    if after.waiting_for is not before.waiting_for:
        changes["waiting_for"] = after.waiting_for.value if after.waiting_for is not None else None
    if after.frame != before.frame:
        changes["frame"] = frame_text(after.frame, payloads)
    if after.claim != before.claim:
        changes["claim_worker"] = after.claim.worker if after.claim is not None else None
        changes["claim_token"] = after.claim.token if after.claim is not None else None
    if after.ending != before.ending:
        changes["ending"] = ending_text(after.ending, payloads)
    if after.error != before.error:
        changes["error"] = payloads.dump(failure_json(after.error))
    if after.reason != before.reason:
        changes["reason"] = clean(after.reason)
    return changes


ENTRY_COLUMNS: Final = (
    "step_id, kind, status, result::text, error::text, attempt, started_at, finished_at, parent, extra::text, seq"
)


def entry(row: Sequence[Any], payloads: Payloads) -> Entry:
    step_id, kind, status, result, error, attempt, started_at, finished_at, parent, extra, seq = row
    return Entry(
        step_id=step_id,
        kind=EntryKind(kind),
        status=status,
        result=payloads.decoded(result),
        error=failure(payloads.load(error)),
        attempt=attempt,
        started_at=started_at,
        finished_at=finished_at,
        parent=parent,
        extra=_extra(extra, payloads),
        seq=seq,
    )


def _extra(text: str | None, payloads: Payloads) -> dict[str, Any] | None:
    """What an entry remembers. A fork's copy says so beside what may have gone through a codec."""
    raw: dict[str, Any] | None = payloads.load(text)
    if raw is None or "~durable" not in raw:
        return raw
    stored = json.dumps({"~durable": raw.pop("~durable")}, separators=(",", ":"))
    return {**payloads.load(stored), **raw}


def entry_values(entry: Entry, payloads: Payloads) -> dict[str, Any]:
    """An entry as parameters; their names are apart from those of the run's columns, with which it is written."""
    return {
        "step_id": entry.step_id,
        "seq": entry.seq,
        "kind": entry.kind.value,
        "entry_status": entry.status,
        "result": payloads.encoded(entry.result),
        "entry_error": payloads.dump(failure_json(entry.error)),
        "attempt": entry.attempt,
        "began_at": entry.started_at,
        "ended_at": entry.finished_at,
        "parent": entry.parent,
        "extra": payloads.dump(dict(entry.extra) if entry.extra is not None else None),
    }


MESSAGE_COLUMNS: Final = "seq, kind, name, body::text, sent_at, state = 'new', message_id"


def message(row: Sequence[Any], payloads: Payloads) -> Message:
    seq, kind, name, body, sent_at, fresh, id_ = row
    return Message(seq, MessageKind(kind), name, payloads.decoded(body), sent_at, fresh, id_)


def _trimmed(value: Any) -> dict[str, Any]:
    """A flat dataclass without the fields that have their default."""
    return {f.name: v for f in dataclasses.fields(value) if (v := getattr(value, f.name)) != f.default}


def _dumps(value: Any) -> str:
    return json.dumps(value, default=_plain, separators=(",", ":"))


def clean(value: Any) -> Any:
    """Without what PostgreSQL can't hold in a text: NUL, and halves of surrogate pairs."""
    match value:
        case str():
            return value.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case Mapping():
            return {clean(name): clean(inner) for name, inner in value.items()}
        case list() | tuple():
            return [clean(inner) for inner in value]
        case _:
            return value


def _plain(value: Any) -> str | dict[str, Any]:
    match value:
        case datetime():
            return value.astimezone(UTC).isoformat()
        case uuid.UUID():
            return str(value)
        case Mapping():
            return dict(value)
        case _:
            raise TypeError(f"{type(value).__name__} has no place in a frame")
