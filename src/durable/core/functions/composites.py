"""Operations with bodies of their own: blocks, joins, races, loops; and maps over child runs.

Each drives its coroutines when it is asked for its answer. That it has ended follows from what it holds: its own entry
is derived, and shows people how it went. Only two things are read back from such an entry, since they could not be
worked out anew: who won a race, and the state that an iteration ended with.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from durable.core.finish import object_text
from durable.core.functions import errors
from durable.core.functions.answers import Answer, Diverged, Raised, Returned
from durable.core.functions.body import Strand
from durable.core.functions.commands import Operation, child_result
from durable.core.functions.scope import Scope
from durable.core.functions.values import All, Failures, First, MapResults, Policy, RaceResult, Result
from durable.core.state import Entry, EntryKind, Failure
from durable.define.payload import Schema
from durable.define.retry import Retry
from durable.errors import ChildFailed, DefinitionError, PayloadError
from durable.values import Break, Canceled, ContinueAsNew, JsonText, Rollback

if TYPE_CHECKING:
    from durable.core.functions.context import Context

T = TypeVar("T")
Inner: TypeAlias = Callable[["Context"], Awaitable[Any]]


class Composite(Operation[T]):
    """What has coroutines within it."""

    def strands(self) -> list[Strand]:
        """Those that are alive."""
        raise AssertionError(f"{type(self).__name__} says what is in it")

    def leaves(self) -> Iterator[Operation[Any]]:
        for strand in self.strands():
            yield from strand.leaves()

    def close(self) -> None:
        for strand in self.strands():
            strand.close()

    def conclude(
        self, outer: Strand, ended: Answer, shown: JsonText | None = None, extra: Mapping[str, Any] | None = None
    ) -> Answer:
        """It has ended: `outer` is past it, and its entry is derived."""
        entry = _entry(self.key, self.kind, ended, outer.time, self.parent, shown, extra)
        begun = self.body.frame.get(self.key)
        self.body.derive(replace(entry, attempt=begun.attempts + 1) if begun is not None else entry)
        return ended


def _entry(
    key: str,
    kind: EntryKind,
    ended: Answer,
    time: datetime | None,
    parent: str | None,
    shown: JsonText | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Entry:
    if isinstance(ended, Raised):
        failure = errors.failure(ended.error)
        return Entry(key, kind, "failed", error=failure, finished_at=time, parent=parent, extra=extra)
    text = errors.display(ended.value) if shown is None else shown
    return Entry(key, kind, "completed", text, finished_at=time, parent=parent, extra=extra)


def _passes(ended: Answer | None) -> bool:
    """Whether it goes through everything that surrounds it: a rollback, a cancel, the end of the run."""
    return isinstance(ended, Raised) and not isinstance(ended.error, Exception)


class BlockCommand(Composite[T]):
    """A named part of the body. `retry`: when it fails, what failed in it is taken up anew. `catch`: of a try_block."""

    kind = EntryKind.BLOCK

    def __init__(
        self, scope: Scope, key: str, fn: Inner, retry: Retry | None = None, catch: frozenset[str] | None = None
    ) -> None:
        super().__init__(scope, key)
        self.fn, self.retry, self.catch = fn, retry, catch
        self.failed: BaseException | None = None  # it is to be retried
        self._inner: Strand | None = None

    def strands(self) -> list[Strand]:
        return [self._inner] if self._inner is not None else []

    def leaves(self) -> Iterator[Operation[Any]]:
        if self.failed is not None or self.waits:
            yield self
        else:
            yield from super().leaves()

    @property
    def waits(self) -> bool:
        """Whether its next attempt is not due yet."""
        begun = self.body.frame.get(self.key)
        return begun is not None and begun.due is not None and begun.due > self.body.now

    @property
    def attempt(self) -> int:
        begun = self.body.frame.get(self.key)
        return begun.attempts + 1 if begun is not None else 1

    def resolve(self, strand: Strand) -> Answer | None:
        self.body.find(self)
        if self.waits and not self.body.undoing:
            self.body.pass_over(self.key)
            return Raised(Canceled()) if self.body.canceling else None
        if self._inner is None:
            inner = Scope(self.body, self.key, strand.scope.uncompleted, in_branch=strand.scope.in_branch)
            self._inner = Strand(self.body, inner, self.fn, strand)
        self._inner.advance()
        ended = self._inner.ended
        if ended is None:
            return None
        if self._may_retry(ended):
            assert isinstance(ended, Raised)
            self.failed = ended.error
            return None
        strand.absorb(self._inner)
        return self._answer(strand, ended)

    def _answer(self, strand: Strand, ended: Answer) -> Answer:
        if isinstance(ended, Returned):
            self.conclude(strand, ended)
            return ended if self.catch is None else Returned(Result(ok=True, value=ended.value))
        if isinstance(ended.error, Canceled | ContinueAsNew):
            return ended
        caught = errors.caught(ended.error, self.catch, source="block") if self.catch is not None else None
        if caught is None and isinstance(ended.error, Rollback):  # perhaps to a checkpoint in it: then it goes on
            return ended
        assert self._inner is not None
        self.body.leave(self._inner.scope)
        self.conclude(strand, ended)
        return caught or ended

    def _may_retry(self, ended: Answer) -> bool:
        if self.retry is None or not isinstance(ended, Raised) or self.body.undoing or self.body.canceling:
            return False
        if self.key in self.body.journal or self.body.faulted is not None:
            return False
        error = ended.error
        takes = isinstance(error, Exception) and errors.failure(error).kind != "critical" and self.retry.takes(error)
        return takes and not self.retry.exhausted(self.attempt)


class Branches(Composite[T]):
    """What a join and a race share: named branches, side by side."""

    def __init__(self, scope: Scope, key: str, branches: Mapping[str, Inner]) -> None:
        super().__init__(scope, key)
        self.branches = dict(branches)
        self._running: dict[str, Strand] = {}
        self._halted = False

    def strands(self) -> list[Strand]:
        return list(self._running.values())

    def leaves(self) -> Iterator[Operation[Any]]:
        return iter(()) if self._halted else super().leaves()

    def start(self, strand: Strand, names: list[str]) -> None:
        for name in names:
            if name not in self._running:
                scope = Scope(self.body, self.branch(name), in_branch=True)
                self._running[name] = Strand(self.body, scope, self.branches[name], strand)

    def branch(self, name: str) -> str:
        return f"{self.key}/{name}"

    def advance(self) -> Raised | None:
        """Take each branch as far as it comes; or what one of them raised that goes through everything: then the others
        end where they are."""
        through = self._advance()
        if through is not None:
            self._halted = True
            self.close()
        return through

    def _advance(self) -> Raised | None:
        for name, strand in self._running.items():
            if strand.ended is None:
                strand.advance()
                if strand.ended is not None:
                    self._ended(name, strand)
            if self.body.faulted is not None:
                return Raised(self.body.faulted)
        for strand in self._running.values():
            ended = strand.ended
            if isinstance(ended, Raised) and isinstance(ended.error, ContinueAsNew):
                error = DefinitionError(f"{strand.scope.place}: ctx.continue_as_new belongs outside of branches")
                return Raised(strand.scope.fault(error))
            if isinstance(ended, Raised) and _passes(ended) and not isinstance(ended.error, Canceled):
                return ended
        return None

    def _ended(self, name: str, strand: Strand) -> None:
        ended = strand.ended
        assert ended is not None
        if _passes(ended):
            return
        key = self.branch(name)
        self.body.reach(key)
        self.body.derive(_entry(key, EntryKind.BRANCH, ended, strand.time, self.key))

    def errors(self) -> dict[str, BaseException]:
        """What failed branches raised."""
        ended = {name: strand.ended for name, strand in self._running.items()}
        return {name: e.error for name, e in ended.items() if isinstance(e, Raised)}

    def canceled(self) -> bool:
        """Whether all branches have ended, some of them by a cancel."""
        return any(isinstance(error, Canceled) for error in self.errors().values())


class JoinCommand(Branches[dict[str, Any]]):
    """All branches start, all are allowed to end; results by name."""

    kind = EntryKind.JOIN

    def resolve(self, strand: Strand) -> Answer | None:
        self.body.find(self)
        self.start(strand, list(self.branches))
        if (through := self.advance()) is not None:
            return through
        ended = {name: inner.ended for name, inner in self._running.items()}
        if any(end is None for end in ended.values()):
            return None
        for inner in self._running.values():
            strand.absorb(inner)
        if self.canceled():
            return Raised(Canceled())
        if failed := self.errors():
            return self.conclude(strand, Raised(errors.branches_failed(self.kind, self.key, failed, len(ended))))
        results = {name: end.value for name, end in ended.items() if isinstance(end, Returned)}
        shown = object_text({name: errors.display(value) for name, value in results.items()})
        return self.conclude(strand, Returned(results), shown)


class RaceCommand(Branches[RaceResult[Any]]):
    """The first branch to finish wins; what is left of the others is ended."""

    kind = EntryKind.RACE

    def resolve(self, strand: Strand) -> Answer | None:
        entry = self.body.find(self)
        won: str | None = (entry.extra or {}).get("winner") if entry is not None else None
        if won is not None and won not in self.branches:
            raise Diverged(self.body.difference(f"race {self.key!r} won by {won!r}", "a race without that branch"))
        alone = won is not None and not self.body.undoing
        self.start(strand, [won] if alone and won is not None else list(self.branches))
        if alone:
            self.body.pass_over(*(self.branch(name) for name in self.branches if name != won))
        if (through := self.advance()) is not None:
            return through
        won = won or self._first()
        if won is not None:
            return self._won(strand, won)
        if any(inner.ended is None for inner in self._running.values()):
            return None
        for inner in self._running.values():
            strand.absorb(inner)
        if self.canceled():
            return Raised(Canceled())
        failed = self.errors()
        return self.conclude(strand, Raised(errors.branches_failed(self.kind, self.key, failed, len(failed))))

    def _first(self) -> str | None:
        """The branch that has finished, the first of several: the one whose last entry was written first."""
        done = [(inner.seq, name) for name, inner in self._running.items() if isinstance(inner.ended, Returned)]
        places = list(self.branches)
        return min(done, key=lambda d: (d[0], places.index(d[1])))[1] if done else None

    def _won(self, strand: Strand, won: str) -> Answer | None:
        winner = self._running[won]
        if winner.ended is None:  # while it is undone, or its code has changed
            return None
        strand.absorb(winner)
        assert isinstance(winner.ended, Returned)
        lost = [name for name in self._running if name != won]
        if not self.body.undoing:
            for name in lost:
                self._running.pop(name).close()
        if self.key not in self.body.journal:
            self.body.lost += [self.branch(name) for name in lost]
            for name in lost:
                self.body.forget_unwritten(self.branch(name))
        value = winner.ended.value
        shown = object_text({"winner": errors.display(won), "value": errors.display(value)})
        return self.conclude(strand, Returned(RaceResult(won, value)), shown, {"winner": won})


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


class MapCommand(Operation[MapResults[T]]):
    """A child run for each item, a bounded number of them at a time."""

    kind = EntryKind.MAP

    def __init__(
        self,
        scope: Scope,
        key: str,
        workflow: str,
        version: str | None,
        items: list[Any],
        concurrency: int,
        policy: Policy,
    ) -> None:
        super().__init__(scope, key)
        self.workflow, self.version, self.items = workflow, version, items
        self.concurrency, self.policy = concurrency, policy
        self.finished: dict[int, Any] = {}
        self.failures: dict[int, BaseException] = {}
        self._left = list(range(len(items)))

    def item(self, place: int) -> str:
        """The journal key of one item."""
        return f"{self.key}[{place}]"

    def resolve(self, strand: Strand) -> Answer | None:
        self.body.find(self)
        self.body.pass_over(self.key)
        self._look(strand)
        answer = self._answer()
        if answer is None:
            return Raised(Canceled()) if self.body.canceling else None
        if self.key not in self.body.journal and any(self.item(place) in self.body.frame for place in self._left):
            self.body.lost.append(self.key)
        shown = errors.display({"items": len(self.items), "failed": len(self.failures)})
        self.body.derive(_entry(self.key, self.kind, answer, strand.time, self.parent, shown))
        return answer

    @property
    def startable(self) -> list[int]:
        """The items whose children may be started now."""
        if self._decided():
            return []
        window = self._left[: self.concurrency]
        return [place for place in window if self.item(place) not in self.body.frame]

    @property
    def started(self) -> list[int]:
        """The items whose children run."""
        return [place for place in self._left if self.item(place) in self.body.frame]

    def _look(self, strand: Strand) -> None:
        fresh = not self.finished and not self.failures
        window = list(self._left) if fresh else self._left[: self.concurrency]
        for place in window:
            entry = self.body.journal.get(self.item(place))
            if entry is None:
                continue
            strand.passed(entry)
            self._left.remove(place)
            if entry.status == "failed":
                self.failures[place] = errors.raised(entry)
            else:
                try:
                    self.finished[place] = child_result(self.body, entry)
                except PayloadError as error:
                    raise self.body.unreadable(entry, error) from error

    def _decided(self) -> bool:
        """Whether no further child is needed, or of use."""
        many = len(self.items)
        match self.policy:
            case All():
                return bool(self.failures)
            case Failures() as policy:
                return len(self.failures) > policy.allowed(many)
            case First(enough):
                return len(self.finished) >= enough or many - len(self.failures) < enough

    def _answer(self) -> Answer | None:
        if isinstance(self.policy, First) and len(self.finished) >= self.policy.enough:
            return self._results()
        open_ = any(self.item(place) in self.body.frame for place in self._left)
        if open_ or (self._left and not self._decided()):
            return None
        failed = self._decided() if not isinstance(self.policy, First) else True
        if not failed:
            return self._results()
        told = {str(place): error for place, error in sorted(self.failures.items())}
        if not told:  # fewer items than successes that were asked for
            text = f"map {self.key!r} has {len(self.items)} items, and {self.policy} wants more of them to succeed"
            return Raised(
                errors.remembering(DefinitionError(text), Failure("durable.errors.DefinitionError", text), self.key)
            )
        return Raised(errors.branches_failed(self.kind, self.key, told, len(self.items)))

    def _results(self) -> Returned:
        failures = {place: error for place, error in self.failures.items() if isinstance(error, ChildFailed)}
        if isinstance(self.policy, First):
            first = sorted(self.finished)[: self.policy.enough]
            return Returned(MapResults([self.finished[place] for place in first], self.finished, failures))
        results = [self.finished.get(place) for place in range(len(self.items))]
        return Returned(MapResults(results, self.finished, failures))
