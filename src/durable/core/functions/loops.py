"""Loops: iterations that carry a state, and leave the journal again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from durable.core.functions import errors
from durable.core.functions.answers import Answer, Diverged, Raised, Returned
from durable.core.functions.body import Strand
from durable.core.functions.composites import Composite
from durable.core.functions.scope import Scope
from durable.core.state import Entry, EntryKind
from durable.define.payload import Schema
from durable.errors import DefinitionError, PayloadError
from durable.values import Break, Canceled, ContinueAsNew, JsonText, Rollback

if TYPE_CHECKING:
    from durable.core.functions.context import Context

T = TypeVar("T")


class LoopCommand(Composite[T]):
    """Iterations that carry a state. The journal keeps the last `history` of them, and is pruned every `interval`."""

    kind = EntryKind.LOOP

    def __init__(
        self,
        scope: Scope,
        key: str,
        fn: Callable[[Context, Any], Awaitable[Any]],
        state: Any,
        schema: Schema,
        history: int,
        interval: int,
    ) -> None:
        super().__init__(scope, key)
        self.fn, self.schema, self.history, self.interval = fn, schema, history, interval
        self.stateful = state is not None
        self._initial = state
        self._inner: Strand | None = None
        self._place = -1  # of the iteration that runs
        self._since: datetime | None = None  # it runs
        self._kept: list[Strand] = []  # of a rollback: the iterations of before

    def strands(self) -> list[Strand]:
        return [*self._kept, *([self._inner] if self._inner is not None else [])]

    def resolve(self, strand: Strand) -> Answer | None:
        self.body.find(self)
        if self._inner is None:
            self._begin(strand)
        while True:
            assert self._inner is not None
            self._inner.advance()
            ended = self._inner.ended
            if ended is None:
                return None
            strand.absorb(self._inner)
            if self.body.faulted is not None:
                return Raised(self.body.faulted)
            answer = self._ended(strand, ended)
            if answer is not None:
                return answer
            if self.body.overfull:
                return None

    def _begin(self, strand: Strand) -> None:
        """Take up the first iteration that has not ended; of a loop that is over, its last."""
        done = self.body.index(self.key)
        last = self._entry(done[-1]) if done else None
        over = last is not None and bool((last.extra or {}).get("stop"))
        place = 0 if last is None else done[-1] if over else done[-1] + 1
        before = [i for i in done if i < place]
        if self.body.undoing:
            self._replay(strand, before)
        self.body.pass_over(*(self._key(i) for i in before))
        if over:
            self.body.reach(self._key(place))
        self._iterate(strand, place)

    def _replay(self, strand: Strand, places: list[int]) -> None:
        """Pass iterations again that have ended, to learn how their steps are undone."""
        for place in places:
            if not self.stateful or place == 0 or self._key(place - 1) in self.body.journal:
                self._iterate(strand, place)
                assert self._inner is not None
                self._inner.advance()
                self._kept.append(self._inner)

    def _iterate(self, strand: Strand, place: int) -> None:
        state = self._state(place)
        fn = self.fn
        scope = Scope(self.body, self._key(place), strand.scope.uncompleted, in_branch=strand.scope.in_branch)
        before, own = self._entry(place - 1), self._entry(place)
        if before is not None:
            strand.reached(before.finished_at)
        elif own is not None:
            strand.reached(own.started_at)
        self._place, self._since = place, strand.time
        self._inner = Strand(self.body, scope, lambda ctx: fn(ctx, state), strand)

    def _state(self, place: int) -> Any:
        if not self.stateful:
            return None
        if place == 0:
            return self.schema.load(self._dump(self._initial, "the state that it begins with"))
        text = self._before(place)
        if text is None:
            raise Diverged(self.body.difference(f"loop {self.key!r} past iteration {place}", "no state to go on from"))
        try:
            return self.schema.load(text)
        except PayloadError as error:
            what = f"the state of {self._key(place - 1)!r} {error.why}"
            raise Diverged(self.body.difference(what, "a type that it is not of")) from error

    def _before(self, place: int) -> JsonText | None:
        """The state that an iteration begins with, past the first. The last one says it itself if it stands alone."""
        before, own = self._entry(place - 1), self._entry(place)
        if before is not None:
            return before.result or "null"
        return (own.extra or {}).get("from") if own is not None else None

    def _ended(self, strand: Strand, ended: Answer) -> Answer | None:
        """An iteration has ended: the loop's answer, or None: the next one begins."""
        place = self._place
        if isinstance(ended, Raised):
            if not isinstance(ended.error, Canceled | ContinueAsNew | Rollback):
                self.conclude(strand, ended)
            return ended
        value = ended.value
        if isinstance(value, Break):
            self._derive(strand, place, errors.display(value.value), stop=True)
            self._prune(place + 1, at_end=True)
            return self.conclude(strand, Returned(value.value))
        if (value is None) is self.stateful:
            return Raised(strand.scope.fault(DefinitionError(self._wrong(value))))
        try:
            text = self._dump(value, f"the state after iteration {place}") if self.stateful else "null"
        except PayloadError as error:
            return self.conclude(strand, Raised(error))
        self._derive(strand, place, text, stop=False)
        self._prune(place + 1)
        self._iterate(strand, place + 1)
        return None

    def _derive(self, strand: Strand, place: int, text: JsonText, *, stop: bool) -> None:
        self.body.iterations += 1
        key = self._key(place)
        self.body.reach(key)
        extra: dict[str, Any] = {"iteration": place, "stop": stop}
        entry = Entry(key, EntryKind.ITERATION, "completed", text, finished_at=strand.time, parent=self.key)
        if stop and self.history == 1 and place:  # nothing else will tell when it began, and with what
            extra |= {"from": self._before(place)} if self.stateful else {}
            entry = replace(entry, started_at=self._since)
        self.body.derive(replace(entry, extra=extra))

    def _dump(self, value: Any, what: str) -> JsonText:
        try:
            return self.schema.dump(value)
        except PayloadError as error:
            raise error.at(f"loop {self.key!r}: {what}") from None

    def _wrong(self, value: Any) -> str:
        place = f"{self.scope.place}: loop {self.key!r}"
        if value is None:
            return f"{place} has a state, and its body returned nothing: return the next state, or Break(value)"
        return (
            f"{place} has no state, and its body returned {type(value).__name__}: give state=, or return Break(value)"
        )

    def _prune(self, count: int, *, at_end: bool = False) -> None:
        """Old iterations leave the journal, but for those that a rollback would have to undo."""
        if self.body.undoing or (count % self.interval and not at_end):
            return
        first = count - self.history
        if first <= 0:
            return
        keep = self._undoable(first)
        for step_id in [*self.body.journal, *self.body.unwritten]:
            place = self._place_of(step_id)
            if (
                place is not None
                and place < first
                and place not in keep
                and not (place + 1 in keep and step_id == self._key(place))
            ):
                self.body.prune(step_id)

    def _undoable(self, first: int) -> set[int]:
        """The iterations up to `first` that have something to undo; that one needs the state that it began with."""
        steps = (entry for entry in self.body.journal.values() if (entry.extra or {}).get("undo"))
        places = {self._place_of(entry.step_id) for entry in steps}
        return {place for place in places if place is not None and place <= first}

    def _place_of(self, step_id: str) -> int | None:
        start = f"{self.key}["
        if not step_id.startswith(start):
            return None
        return int(step_id[len(start) :].partition("]")[0])

    def _entry(self, place: int) -> Entry | None:
        key = self._key(place)
        return self.body.unwritten.get(key) or self.body.journal.get(key)

    def _key(self, place: int) -> str:
        return f"{self.key}[{place}]"
