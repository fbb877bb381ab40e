"""Blocks: named parts of a body, which may be tried again, or whose failure is a value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from durable.core.functions import errors
from durable.core.functions.answers import Answer, Raised, Returned
from durable.core.functions.body import Strand
from durable.core.functions.commands import Operation
from durable.core.functions.composites import Composite, Inner
from durable.core.functions.scope import Scope
from durable.core.functions.values import Result
from durable.core.state import EntryKind
from durable.define.retry import Retry
from durable.values import Canceled, ContinueAsNew, Rollback

if TYPE_CHECKING:
    pass

T = TypeVar("T")


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
