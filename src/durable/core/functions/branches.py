"""Branches side by side: a join waits for all of them, a race for the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from durable.core.finish import object_text
from durable.core.functions import errors
from durable.core.functions.answers import Answer, Diverged, Raised, Returned
from durable.core.functions.body import Strand
from durable.core.functions.commands import Operation
from durable.core.functions.composites import Composite, Inner, derived_entry, passes
from durable.core.functions.scope import Scope
from durable.core.functions.values import RaceResult
from durable.core.state import EntryKind
from durable.errors import DefinitionError
from durable.values import Canceled, ContinueAsNew

if TYPE_CHECKING:
    pass

T = TypeVar("T")


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
            if isinstance(ended, Raised) and passes(ended) and not isinstance(ended.error, Canceled):
                return ended
        return None

    def _ended(self, name: str, strand: Strand) -> None:
        ended = strand.ended
        assert ended is not None
        if passes(ended):
            return
        key = self.branch(name)
        self.body.reach(key)
        self.body.derive(derived_entry(key, EntryKind.BRANCH, ended, strand.time, self.key))

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
