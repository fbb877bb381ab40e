"""A child run for each of many items."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from durable.core.functions import errors
from durable.core.functions.answers import Answer, Raised, Returned
from durable.core.functions.body import Strand
from durable.core.functions.commands import Operation, child_result
from durable.core.functions.composites import derived_entry
from durable.core.functions.scope import Scope
from durable.core.functions.values import All, Failures, First, MapResults, Policy
from durable.core.state import EntryKind, Failure
from durable.errors import ChildFailed, DefinitionError, PayloadError
from durable.values import Canceled

if TYPE_CHECKING:
    pass

T = TypeVar("T")


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
        self.body.derive(derived_entry(self.key, self.kind, answer, strand.time, self.parent, shown))
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
