"""The driver: a body's coroutine, replayed from the journal until nothing moves without a new entry.

No event loop: a coroutine yields an operation, and is sent what the journal answers. Branches and iterations are
coroutines of their own, driven by the operation that they belong to (``composites.py``).

What follows from the journal alone (a block has ended, an iteration, a join) is *derived*: its entry is written with
the next transition, and costs no transaction of its own.
"""

from __future__ import annotations

import contextvars
import inspect
import sysconfig
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from durable.core.frozen import value
from durable.core.functions.answers import Answer, Diverged, Guarding, Raised, Returned, Stuck, Unguarded
from durable.core.functions.commands import Operation
from durable.core.functions.scope import Scope
from durable.core.state import Begun, Entry, EntryKind, Failure, Run, View
from durable.define.nodes import Work, Workflow
from durable.define.registry import Registry
from durable.errors import DefinitionError, PayloadError
from durable.values import Rollback, WaitingFor

if TYPE_CHECKING:
    from durable.core.functions.context import Context
    from durable.core.transition import Call

SUSPECT: Final = "run:body"
"""In the frame: a worker died, and it is not known yet whether by the body or by the step that it was at."""
UNWRITTEN_LIMIT: Final = 500
"""Derived entries that may wait for the next write."""

_MARKERS: Final = frozenset({EntryKind.UNDO, EntryKind.PATCH, EntryKind.ROLLBACK, EntryKind.RESULT})
_STDLIB: Final = sysconfig.get_path("stdlib")
_LATE: Final = 2**63  # the seq of what is not written yet

Start: TypeAlias = "Callable[[Context], Any]"
"""What a coroutine is made by: the workflow's function, that of a block, a branch, an iteration."""


@value(frozen=True, slots=True)
class Frontier:
    """How far the journal takes a body: to its end, or to operations that nothing answers yet."""

    leaves: tuple[Operation[Any], ...] = ()
    ended: Answer | None = None
    diverged: Failure | None = None


class Body:
    """The coroutine of one run. Valid as long as the journal only grows; else it is closed, and another one made.

    `context` makes what its coroutines are given; `guard` surrounds every stretch of user code. `undoing`: it is driven
    to learn how steps are undone, finished branches and iterations included, and never goes beyond its journal.
    """

    def __init__(
        self,
        workflow: Workflow,
        run: Run,
        registry: Registry,
        context: Callable[[Scope], Context],
        guard: Guarding | None = None,
        *,
        undoing: bool = False,
    ) -> None:
        self.workflow, self.run, self.registry, self.undoing = workflow, run, registry, undoing
        self.context = context
        self.guard: Guarding = guard if guard is not None else Unguarded()
        self.seed = run.seed or run.id
        self.current: Strand | None = None
        self.closing = False
        self.canceling = False
        self.faulted: BaseException | None = None
        self.diverged: Failure | None = None
        self.wants_start = False  # ctx.now() was asked before there was a time
        self.works: dict[str, Work] = {}  # if it is `undoing`: of the steps that were passed
        self.passed: dict[str, Work] | None = None  # for the rollback: the steps of the whole journal
        self.checkpoints: list[tuple[Scope, str, Entry]] = []  # with their names; of scopes that have not ended
        self.epochs: dict[str, list[int]] = {}  # of each checkpoint that the run went back to
        self.reserved: set[int] = set()  # messages that were received and not completed
        self.iterations = 0  # that have ended in this drive
        self.unwritten: dict[str, Entry] = {}  # derived
        self.deferred: dict[str, Entry] = {}  # of steps: ephemeral ones, and the one that has just ended
        self.ready: tuple[int, Call] | None = None  # what follows at a revision, unless a message comes
        self.stale = False  # the journal will not only grow: this body is of no further use
        self.pruning: set[str] = set()
        self.lost: list[str] = []  # branches that lost a race: what is left of them is to be ended
        self.journal: Mapping[str, Entry] = {}
        self.frame: Mapping[str, Begun] = {}
        self.now = run.created_at
        self._context = contextvars.Context()
        self._unvisited: dict[str, None] = {}
        self._root: Strand | None = None

    # ---------------------------------------------------------------- driving

    def drive(self, view: View, now: datetime, *, canceling: bool = False) -> Frontier:
        """Go on as far as the journal of `view` answers."""
        self.run, self.journal, self.frame, self.now = view.run, view.journal, view.run.frame, now
        self.canceling, self.iterations = canceling, 0
        root = self._root or self._begin()
        try:
            root.advance()
            if self.diverged is not None:
                raise Diverged(self.diverged)
            self._check_all_reached()
        except Diverged as diverged:
            return Frontier(diverged=diverged.failure)
        if self.faulted is not None:
            return Frontier(ended=Raised(self.faulted))
        return Frontier(tuple(root.leaves()) if root.ended is None else (), root.ended)

    @property
    def over(self) -> bool:
        """Whether its coroutine has come to an end, well or badly."""
        return self.faulted is not None or (self._root is not None and self._root.ended is not None)

    def close(self) -> None:
        """End the coroutine: its ``finally`` and ``with`` blocks run, operations in them do nothing."""
        if self._root is not None:
            self._root.close()

    def written(self, entries: Iterable[Entry], pruned: Iterable[str]) -> None:
        """These entries stand in the journal now, those are gone from it."""
        for entry in entries:
            self.unwritten.pop(entry.step_id, None)
            self.deferred.pop(entry.step_id, None)
        for step_id in pruned:
            self.deferred.pop(step_id, None)
            self.pruning.discard(step_id)
        self.lost.clear()

    def _begin(self) -> Strand:
        undone: list[tuple[int, int]] = []
        for entry in self.journal.values():
            if entry.kind is EntryKind.ROLLBACK and entry.extra:
                checkpoint = self.journal.get(entry.extra["to"])
                self.epochs.setdefault(entry.extra["to"], []).append(entry.extra["epoch"])
                if checkpoint is not None:  # else pruned, with the iteration that it was in
                    undone.append((checkpoint.seq, entry.seq))
            if entry.kind is EntryKind.PATCH and entry.extra:
                undone.append((entry.extra["since"], entry.seq))
        steps = (e for e in self.journal.values() if e.kind not in _MARKERS and not _between(e, undone))
        begun = (key for key in self.frame if not key.startswith(("undo:", "run:")))
        self._unvisited = dict.fromkeys([*(entry.step_id for entry in steps), *begun])
        self._root = Strand(self, Scope(self, ""), self._start)
        return self._root

    def _start(self, ctx: Context) -> Coroutine[Any, Any, Any]:
        assert self.workflow.body is not None
        if not self.workflow.takes_input:
            return self.workflow.body(ctx)
        return self.workflow.body(ctx, self.workflow.input.load(self.run.input))

    # ---------------------------------------------------------------- the journal

    def find(self, operation: Operation[Any]) -> Entry | None:
        """The entry that answers `operation`, if there is one. Raises Diverged if it is another kind of thing."""
        key = operation.key
        self._unvisited.pop(key, None)
        entry, begun = self.journal.get(key), self.frame.get(key)
        if entry is not None and entry.kind is not operation.kind:
            raise Diverged(self.difference(f"{entry.kind.value} {key!r}", f"{operation.kind.value} {key!r}"))
        waits = begun.waits if begun is not None else None
        if waits is not None and operation.kind not in _WAITS.get(waits, {operation.kind}):
            raise Diverged(self.difference(f"a wait for {waits.value} {key!r}", f"{operation.kind.value} {key!r}"))
        if entry is None or entry.status == "suspended":
            return None
        return entry

    def load(self, operation: Operation[Any], entry: Entry) -> Answer:
        """What `entry` answers. Raises Diverged if it is no longer what the code declares."""
        try:
            return operation.answer(entry)
        except PayloadError as error:
            raise self.unreadable(entry, error) from error

    def unreadable(self, entry: Entry, error: PayloadError) -> Diverged:
        """Its result is no longer of the type that the code declares."""
        text = f"the result of {entry.kind.value} {entry.step_id!r} {error.why}"
        return Diverged(self.difference(text, "a type that it is not of"))

    def reach(self, key: str) -> None:
        """The code has come to what stands under this key."""
        self._unvisited.pop(key, None)

    def derive(self, entry: Entry) -> None:
        """An entry that follows from others; to be written with the next transition, unless it stands there already."""
        if entry.step_id not in self.journal and not self.undoing:
            self.unwritten[entry.step_id] = entry

    def defer(self, entry: Entry) -> None:
        """The entry of a step that is written with the next transition."""
        self.deferred[entry.step_id] = entry

    def checkpoint(self, name: str) -> Entry | None:
        """The checkpoint of this name to which the run may go back: the one passed last, if its scope has not ended."""
        return next((entry for _, passed, entry in reversed(self.checkpoints) if passed == name), None)

    def leave(self, scope: Scope) -> None:
        """A scope has ended: its checkpoints are out of reach."""
        self.checkpoints = [passed for passed in self.checkpoints if passed[0] is not scope]

    def prune(self, step_id: str) -> None:
        """An entry of an old iteration is not needed any more."""
        if self.unwritten.pop(step_id, None) is None:
            self.pruning.add(step_id)

    def forget_unwritten(self, path: str) -> None:
        """What was derived under this key is not to be written."""
        for key in [k for k in self.unwritten if k == path or k.startswith((f"{path}/", f"{path}["))]:
            del self.unwritten[key]

    @property
    def overfull(self) -> bool:
        """Whether enough has happened for one transition."""
        return len(self.unwritten) >= UNWRITTEN_LIMIT or self.iterations >= UNWRITTEN_LIMIT

    def patch(self, key: str, path: str) -> bool:
        """Whether the code may take its new path: the run took it before, or is here for the first time."""
        if key in self.journal or key in self.unwritten:
            return True
        if self.replaying(path):
            return False
        parent = path or None
        self.derive(Entry(key, EntryKind.PATCH, "completed", "true", finished_at=self.now, parent=parent))
        return True

    def replaying(self, path: str) -> bool:
        """Whether the journal holds more of this scope than its coroutine has come to."""
        if not path:
            return bool(self._unvisited)
        return any(key.startswith((f"{path}/", f"{path}[")) for key in self._unvisited)

    def pass_over(self, *paths: str) -> None:
        """What stands under these keys is not to be reached: iterations of before, branches that lost, removed code."""
        if self._unvisited:
            for path in paths:
                for key in [k for k in self._unvisited if k == path or k.startswith((f"{path}/", f"{path}["))]:
                    del self._unvisited[key]

    def remove(self, key: str, kind: EntryKind) -> None:
        """The code no longer has this operation; the journal may have it, if it is of this kind."""
        entry = self.journal.get(key)
        if entry is not None and entry.kind is not kind:
            fault = self.difference(f"{entry.kind.value} {key!r}", f"a removed {kind.value} {key!r}")
            self.diverged = self.diverged or fault
        self.pass_over(key)

    def index(self, key: str) -> list[int]:
        """The places ``key[i]`` of which the journal has an entry, in order."""
        start = len(key) + 1
        found = (
            k[start:-1] for k in self.journal if k.startswith(f"{key}[") and k.endswith("]") and k[start:-1].isdigit()
        )
        return sorted(map(int, found))

    def _check_all_reached(self) -> None:
        if not self._unvisited or self.canceling or self.undoing or self.faulted is not None:
            return
        keys = list(self._unvisited)
        kinds = {key: self.journal[key].kind.value if key in self.journal else "begun" for key in keys}
        missed = ", ".join(f"{kinds[key]} {key!r}" for key in keys[:5]) + (", ..." if len(keys) > 5 else "")
        raise Diverged(self.difference(missed, self.came_to()))

    def came_to(self) -> str:
        """Where the code is now, for messages."""
        root = self._root
        assert root is not None
        if isinstance(root.ended, Raised):
            return f"its end, by {type(root.ended.error).__name__}: {root.ended.error}"
        if root.ended is not None:
            return "its end"
        leaves = ", ".join(f"{leaf.kind.value} {leaf.key!r}" for leaf in list(root.leaves())[:5])
        return f"{leaves or 'nothing to wait for'}{root.whereabouts()}"

    def difference(self, expected: str, found: str) -> Failure:
        message = (
            f"workflow {self.run.workflow!r} {self.run.version!r}: the journal has {expected}, but the code came to "
            f"{found}. Deploy the old code again and `retry` the run, or cancel it; code that changes under running "
            "workflows needs ctx.patched(), ctx.removed() or a new version."
        )
        details = {"expected": expected, "found": found}
        return Failure("durable.errors.HistoryDiverged", message, "critical", details=details)


def _between(entry: Entry, undone: list[tuple[int, int]]) -> bool:
    """Whether it was written between a checkpoint and a rollback to it, or after a failure that was then taken up anew:
    the code may not come to it any more."""
    return any(since < entry.seq < until for since, until in undone)


_WAITS: Final[Mapping[WaitingFor, frozenset[EntryKind]]] = {
    WaitingFor.SLEEP: frozenset({EntryKind.SLEEP}),
    WaitingFor.SIGNAL: frozenset({EntryKind.SIGNAL, EntryKind.RECEIVE}),
    WaitingFor.CHILD: frozenset({EntryKind.CHILD}),
    WaitingFor.RESUME: frozenset({EntryKind.STEP}),
}


class Strand:
    """One coroutine of a body: the workflow's own, or that of a block, a branch, an iteration.

    `ended` is what it came to; `seq` the newest entry that it has passed; `time` when that was finished.
    """

    def __init__(self, body: Body, scope: Scope, start: Start, parent: Strand | None = None) -> None:
        self.body, self.scope = body, scope
        scope.strand = self
        self.waiting: Operation[Any] | None = None
        self.ended: Answer | None = None
        self.seq = -1
        self.time: datetime | None = parent.time if parent is not None else body.run.started_at
        self._started = False
        self._coroutine = _awaited(start, body.context(scope), scope)

    def advance(self) -> None:
        """Go on until nothing answers what it awaits."""
        if not self._started:
            self._started = True
            self._resume(Returned(None))
        while self.ended is None and self.waiting is not None and self.body.faulted is None:
            answer = self.waiting.resolve(self)
            if answer is None:
                return
            self.waiting = None
            self._resume(answer)

    def passed(self, entry: Entry) -> None:
        """It has come past this entry."""
        self.seq = max(self.seq, entry.seq or _LATE)
        self.reached(entry.finished_at)

    def absorb(self, inner: Strand) -> None:
        """It has come past all that an inner coroutine passed."""
        self.seq = max(self.seq, inner.seq)
        self.reached(inner.time)

    def reached(self, time: datetime | None) -> None:
        """It was at `time`, if not past it."""
        if time is not None and (self.time is None or time > self.time):
            self.time = time

    def leaves(self) -> Iterator[Operation[Any]]:
        """What it waits for."""
        if self.ended is None and self.waiting is not None:
            yield from self.waiting.leaves()

    def close(self) -> None:
        """End it."""
        if self.waiting is not None:
            self.waiting.close()
        body, before = self.body, (self.body.current, self.body.closing)
        body.current, body.closing = None, True
        try:
            with body.guard:
                body._context.run(self._coroutine.close)
        except BaseException as error:  # a body that misbehaves while it is closed harms nobody
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            body.current, body.closing = before

    def _resume(self, answer: Answer) -> None:
        body = self.body
        before, body.current = body.current, self
        try:
            with body.guard:
                if isinstance(answer, Raised):
                    awaited = body._context.run(self._coroutine.throw, answer.error)
                else:
                    awaited = body._context.run(self._coroutine.send, answer.value)
        except StopIteration as end:
            self._end(Returned(end.value))
        except KeyboardInterrupt:
            raise
        except Stuck as stuck:
            self._end(Raised(self.scope.fault(DefinitionError(_stuck(self.scope.place, stuck)))))
        except BaseException as error:
            self._end(Raised(error))
        else:
            self._await(awaited)
        finally:
            body.current = before
        if body.guard.touched is not None and body.faulted is None:
            where = f" (at {body.guard.touched})"
            self.ended = Raised(self.scope.fault(DefinitionError(_foreign(self.scope.place, "NoneType", where))))

    def _end(self, ended: Answer) -> None:
        self.ended = ended
        if not (isinstance(ended, Raised) and isinstance(ended.error, Rollback)):
            self.body.leave(self.scope)
        if isinstance(ended, Returned) and self.body.faulted is None:
            try:
                self.scope.check_closed()
            except DefinitionError as error:
                self.ended = Raised(error)

    def _await(self, awaited: Any) -> None:
        if isinstance(awaited, Operation):
            if awaited.scope is self.scope and self.scope.awaited(awaited):
                self.waiting = awaited
                return
            why = f"{awaited.key!r} is awaited a second time, or outside of the code that it was created in"
            self.scope.fault(DefinitionError(f"{self.scope.place}: {why}"))
        else:
            if hasattr(awaited, "cancel"):  # a task or future of asyncio: nobody will wait for it
                awaited.cancel()
            self.scope.fault(DefinitionError(_foreign(self.scope.place, type(awaited).__name__, self.whereabouts())))
        assert self.body.faulted is not None
        self.ended = Raised(self.body.faulted)
        self.close()

    def whereabouts(self) -> str:
        """`` at order.py:17`` of the line that it is at, in the user's own code."""
        frames = list(_frames(self._coroutine))
        own = [f for f in frames if not f[0].startswith(_STDLIB) or "site-packages" in f[0]]
        if not own:
            return ""
        file, line = own[-1]
        return f" (at {file}:{line})"


async def _awaited(start: Start, ctx: Context, scope: Scope) -> Any:
    made = start(ctx)
    if not inspect.isawaitable(made):
        name = getattr(start, "__qualname__", repr(start))
        raise scope.fault(
            DefinitionError(
                f"{scope.place}: {name} must be an async function of a context, or return an operation of it"
            )
        )
    return await made


def _frames(coroutine: Any) -> Iterator[tuple[str, int]]:
    """File and line of a suspended coroutine, and of what it awaits; without the driver's own."""
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None and frame.f_code is not _awaited.__code__:
            yield frame.f_code.co_filename, frame.f_lineno
        coroutine = getattr(coroutine, "cr_await", None)


def _foreign(place: str, what: str, where: str) -> str:
    return (
        f"{place}: the body awaits {'something' if what == 'NoneType' else f'a {what}'} that is no operation of its "
        f"context{where}: only ctx.* may be awaited there. Move the call into a step (await ctx.step(fn, ...)), use "
        "ctx.sleep instead of asyncio.sleep, and ctx.join instead of gather"
    )


def _stuck(place: str, stuck: Stuck) -> str:
    trace, where = stuck.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.endswith(("core/functions/body.py",)):
            where = f" (at {file}:{trace.tb_lineno})"
        trace = trace.tb_next
    return (
        f"{place}: the body ran for a second without awaiting anything{where}: other runs wait for it meanwhile. Move "
        "long computations into a step (await ctx.step(fn, ...))"
    )
