"""What a body awaits: operations that one journal entry answers. Those with bodies of their own are in `composites.py`.

An operation is a command: creating it does nothing but take its journal key. Awaiting yields it to the driver, which
sends back what the journal says, or leaves the coroutine where it is.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from durable.core.functions import errors
from durable.core.functions.answers import Answer, Raised, Returned
from durable.core.functions.values import Message, Result
from durable.core.state import Entry, EntryKind
from durable.define.nodes import RAISE, Work
from durable.define.payload import Schema
from durable.define.results import load_run_result
from durable.values import Canceled, JsonText

if TYPE_CHECKING:
    from durable.core.functions.body import Body, Strand
    from durable.core.functions.scope import Scope

T = TypeVar("T")


class Operation(Generic[T]):
    """Something that a body awaits. `key` is that of its journal entry, taken when it is created."""

    kind: ClassVar[EntryKind]
    on_cancel: bool = False

    def __init__(self, scope: Scope, key: str) -> None:
        self.scope, self.key, self.body = scope, key, scope.body
        scope.opened(self)

    @property
    def parent(self) -> str | None:
        return self.scope.path or None

    def __await__(self) -> Generator[Operation[T], Any, T]:
        if self.body.current is None:  # the coroutine is being closed: operations do nothing any more
            return None  # type: ignore[return-value]
        answer: T = yield self
        return answer

    def __bool__(self) -> bool:
        raise TypeError(f"{self.key!r} has no value yet: await it")

    def __repr__(self) -> str:
        return f"<{self.kind.value} {self.key!r}: await it>"

    def resolve(self, strand: Strand) -> Answer | None:
        """What the journal answers; None: nothing yet."""
        entry = self.body.find(self)
        if entry is None:
            return Raised(Canceled()) if self.body.canceling and not self.on_cancel else None
        strand.passed(entry)
        return self.body.load(self, entry)

    def answer(self, entry: Entry) -> Answer:
        if entry.status == "failed":
            return Raised(errors.raised(entry))
        return Returned(self.load(entry))

    def load(self, entry: Entry) -> Any:
        """The value of a completed entry, as its declared type. Raises PayloadError."""

    def leaves(self) -> Iterator[Operation[Any]]:
        """The operations within it that nothing answers yet."""
        yield self

    def close(self) -> None:
        """End the coroutines within it."""


class StepCommand(Operation[T]):
    """A step. `catch`: the kinds of failure that are answered as a Result instead of being raised; None: all raised."""

    kind = EntryKind.STEP

    def __init__(
        self,
        scope: Scope,
        key: str,
        work: Work,
        *,
        catch: frozenset[str] | None = None,
        on_cancel: bool = False,
        ephemeral: bool = False,
    ) -> None:
        super().__init__(scope, key)
        self.work, self.catch, self.on_cancel, self.ephemeral = work, catch, on_cancel, ephemeral

    def resolve(self, strand: Strand) -> Answer | None:
        if self.body.undoing:
            self.body.works[self.key] = self.work
        return super().resolve(strand)

    def answer(self, entry: Entry) -> Answer:
        answer = super().answer(entry)
        if self.catch is None:
            return answer
        if isinstance(answer, Returned):
            return Returned(Result(ok=True, value=answer.value))
        return errors.caught(answer.error, self.catch, source="step") or answer

    def load(self, entry: Entry) -> Any:
        return self.work.result.load(entry.result or "null")


class SleepCommand(Operation[None]):
    kind = EntryKind.SLEEP

    def __init__(self, scope: Scope, key: str, until: timedelta | datetime) -> None:
        super().__init__(scope, key)
        self.until = until


class SignalCommand(Operation[T]):
    """A wait for one signal of one name. `on_timeout`: JSON text, or RAISE."""

    kind = EntryKind.SIGNAL

    def __init__(
        self, scope: Scope, key: str, signal: str, payload: Schema, timeout: timedelta | None, on_timeout: Any
    ) -> None:
        super().__init__(scope, key)
        self.signal, self.payload, self.timeout, self.on_timeout = signal, payload, timeout, on_timeout

    def load(self, entry: Entry) -> Any:
        if (entry.extra or {}).get("timed_out") and self.on_timeout is not RAISE:
            return self.scope.plain(entry.result)
        return self.payload.load(entry.result or "null")


class ReceiveCommand(Operation[list[Message[T]]]):
    """A wait for up to `limit` messages of any of these names; no names: of any."""

    kind = EntryKind.RECEIVE

    def __init__(
        self,
        scope: Scope,
        key: str,
        names: Sequence[str],
        payload: Schema,
        limit: int,
        timeout: timedelta | None,
        *,
        completable: bool,
    ) -> None:
        super().__init__(scope, key)
        self.names, self.payload, self.limit, self.timeout = tuple(names), payload, limit, timeout
        self.completable = completable

    def load(self, entry: Entry) -> list[Message[T]]:
        seqs: Iterable[int] = (entry.extra or {}).get("messages", ())
        plain: list[dict[str, Any]] = self.scope.plain(entry.result)
        return [self._message(seq, raw) for seq, raw in zip(seqs, plain, strict=True)]

    def _message(self, seq: int, raw: dict[str, Any]) -> Message[T]:
        body = self.payload.load(json.dumps(raw["body"], ensure_ascii=False))
        sent_at = datetime.fromisoformat(raw["sent_at"])
        if not self.completable:
            return Message(raw["id"], raw["name"], body, sent_at)
        self.body.reserved.add(seq)
        self.scope.uncompleted[seq] = raw["name"]
        return Message(raw["id"], raw["name"], body, sent_at, lambda reply: self.scope.complete(seq, reply))


class ReplyCommand(Operation[None]):
    """A message is completed: its sender gets `reply`."""

    kind = EntryKind.REPLY

    def __init__(self, scope: Scope, key: str, message: int, reply: JsonText) -> None:
        super().__init__(scope, key)
        self.message, self.reply = message, reply

    def load(self, entry: Entry) -> None:
        self.body.reserved.discard(self.message)
        self.scope.uncompleted.pop(self.message, None)


class ChildCommand(Operation[T]):
    """A run of another workflow, awaited. `given` is its input, dumped when it is started."""

    kind = EntryKind.CHILD

    def __init__(
        self, scope: Scope, key: str, workflow: str, version: str | None, given: Any, *, compensate: bool = False
    ) -> None:
        super().__init__(scope, key)
        self.workflow, self.version, self.given, self.compensate = workflow, version, given, compensate

    def load(self, entry: Entry) -> Any:
        return child_result(self.body, entry)


class CheckpointCommand(Operation[int]):
    kind = EntryKind.CHECKPOINT

    def __init__(self, scope: Scope, key: str, name: str) -> None:
        super().__init__(scope, key)
        self.name = name

    def load(self, entry: Entry) -> int:
        self.body.checkpoints.append((self.scope, self.name, entry))
        epochs = self.body.epochs.get(self.key, ())
        if epochs:
            self.scope.begin_epoch(epochs[-1])
        return len(epochs)


def child_result(body: Body, entry: Entry) -> Any:
    """What a child run yielded, as the type that its workflow declares, where that is known here."""
    extra = entry.extra or {}
    workflow = body.registry.find(extra.get("workflow", ""), extra.get("version", ""))
    text = entry.result or "null"
    return json.loads(text) if workflow is None else load_run_result(workflow, text)


def start_id(run_id: uuid.UUID, key: str) -> uuid.UUID:
    """The id of a run that a body starts without waiting for it: the same whenever the same start is repeated."""
    return uuid.uuid5(run_id, f"start:{key}")
