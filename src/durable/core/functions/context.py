"""What a workflow's body sees: the operations that it may await, and what it may ask without waiting."""

from __future__ import annotations

import inspect
import logging
import random
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, MutableMapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias, TypeVar, overload

from durable.core.functions import outgoing
from durable.core.functions.blocks import BlockCommand
from durable.core.functions.branches import JoinCommand, RaceCommand
from durable.core.functions.commands import (
    CheckpointCommand,
    ChildCommand,
    Operation,
    ReceiveCommand,
    SignalCommand,
    SleepCommand,
    StepCommand,
)
from durable.core.functions.loops import LoopCommand
from durable.core.functions.maps import MapCommand
from durable.core.functions.values import All, Failures, First, MapResults, Message, Policy, RaceResult, Result
from durable.core.state import EntryKind
from durable.define.annotations import annotation_of
from durable.define.builder import Builder, check_name
from durable.define.function import WorkflowFunction
from durable.define.nodes import RAISE, Workflow
from durable.define.options import UNSET, Seconds, Unset, checked_seconds, make_options
from durable.define.payload import ANY, LAST_YEAR, Schema
from durable.define.retry import Retry
from durable.define.steps import default_name, step_work
from durable.errors import DefinitionError, PayloadError
from durable.values import Break, ContinueAsNew, Suspend

if TYPE_CHECKING:
    from durable.core.functions.scope import Scope

T = TypeVar("T")
S = TypeVar("S")
Out = TypeVar("Out")
AnyWorkflow: TypeAlias = WorkflowFunction[Any, Any] | Builder[Any] | Workflow | str

STEP_KINDS: Final = ("critical", "timeout", "exhausted", "interrupted", "rollback")
BLOCK_SOURCES: Final = ("step", "join", "race", "block", "rollback")

_logger = logging.getLogger("durable.workflow")


class ReplayLogger(logging.LoggerAdapter[logging.Logger]):
    """Silent while the body passes again what it has passed before; puts run and workflow into every record."""

    def __init__(self, scope: Scope) -> None:
        body = scope.body
        super().__init__(_logger, {"run": str(body.run.id), "workflow": body.run.workflow})
        self._scope = scope

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's name
        replays = self._scope.body.undoing or self._scope.body.replaying(self._scope.path)
        return not replays and super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs


class Context:
    """The first argument of a workflow's body, and of each block, branch and iteration in it.

    Only its operations may be awaited, each before the next is started. A name is unique in its scope; one that was not
    given is the default (a step's function, a signal) with ``#2``, ``#3`` on repeats. `run_id` is the run's; `logger`
    is silent during replay; `random` draws the same numbers again on replay.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self.run_id: uuid.UUID = scope.body.run.id
        self.logger: logging.LoggerAdapter[logging.Logger] = ReplayLogger(scope)

    def __repr__(self) -> str:
        return f"<Context of run {self.run_id}{f', in {self._scope.path!r}' if self._scope.path else ''}>"

    # ---------------------------------------------------------------- steps

    @overload
    def step(self, fn: Callable[..., Awaitable[T | Suspend]], /, *args: Any, **options: Any) -> Operation[T]: ...
    @overload
    def step(self, fn: Callable[..., T | Suspend], /, *args: Any, **options: Any) -> Operation[T]: ...
    def step(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        name: str | None = None,
        retry: Retry | int | Unset | None = UNSET,
        timeout: Seconds | Unset | None = UNSET,
        compensate: Callable[..., Any] | Unset | None = UNSET,
        transactional: bool | Unset | None = UNSET,
        at_most_once: bool | Unset = UNSET,
        on_cancel: bool = False,
        ephemeral: bool = False,
    ) -> Operation[Any]:
        """Call ``fn(*args)``, sync or async, with effects of whatever kind; its result is journaled, and never computed
        anew. A first parameter that is declared as a StepContext is given one.

        - `name`: default: the function's. `retry`, `timeout`, `compensate`, `transactional`, `at_most_once`: as for
          :func:`durable.step`; the compensator is called ``compensate([ctx,] output, *args)``.
        - `on_cancel`: it may still run after the run was canceled, as clean-up.
        - `ephemeral`: its entry may be written together with the next one: a crash in between runs it again.

        Raises StepFailed (StepTimeout, StepInterrupted) once it has failed for good.
        """
        options = {
            "retry": retry,
            "timeout": timeout,
            "compensate": compensate,
            "transactional": transactional,
            "at_most_once": at_most_once,
        }
        return self._step(fn, args, name, options, on_cancel=on_cancel, ephemeral=ephemeral)

    def try_step(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        catch: Collection[str] = ("critical", "timeout", "exhausted"),
        name: str | None = None,
        **options: Any,
    ) -> Operation[Result[Any]]:
        """As :meth:`step`, but a failure of one of the kinds in `catch` is a value: ``Result(ok, value, failure)``.

        A rollback that the step raised is caught only if `catch` has ``"rollback"``.
        """
        kinds = self._catch(catch, STEP_KINDS, "ctx.try_step")
        on_cancel, ephemeral = options.pop("on_cancel", False), options.pop("ephemeral", False)
        return self._step(fn, args, name, options, catch=kinds, on_cancel=on_cancel, ephemeral=ephemeral)

    def _step(
        self, fn: Any, args: tuple[Any, ...], name: str | None, options: Mapping[str, Any], **how: Any
    ) -> StepCommand[Any]:
        scope = self._scope
        default = default_name(fn) if name is None and callable(fn) else None
        key = scope.key(default, name, what="a step")
        where = f"{scope.place}, step {key!r}"
        try:
            work = step_work(fn, args, make_options(where=where, **options), where)
        except DefinitionError as error:
            raise scope.fault(error) from error
        return StepCommand(scope, key, work, **how)

    # ---------------------------------------------------------------- parts of the body

    def block(
        self, name: str, fn: Callable[[Context], Awaitable[T]], *, retry: Retry | int | None = None
    ) -> Operation[T]:
        """A named part of the body, ``await fn(ctx)``, with names of its own. Yields what `fn` returns.

        `retry`: if it fails, what failed within it is taken up anew; what has succeeded is not. Default: no retry.
        """
        policy = None if retry is None else Retry.coerce(retry)
        key = self._scope.key(None, name, what="ctx.block")
        return BlockCommand(self._scope, key, fn, policy)

    def try_block(
        self, name: str, fn: Callable[[Context], Awaitable[T]], *, catch: Collection[str] = ("step", "join", "race")
    ) -> Operation[Result[T]]:
        """As :meth:`block`, but a failure of a step, join or race within it is a value: ``Result(ok, value, failure)``.

        Any other exception passes through unless `catch` has ``"block"``; so does a rollback without ``"rollback"``.
        """
        sources = self._catch(catch, BLOCK_SOURCES, "ctx.try_block")
        key = self._scope.key(None, name, what="ctx.try_block")
        return BlockCommand(self._scope, key, fn, None, sources)

    def join(self, name: str, branches: Mapping[str, Callable[[Context], Awaitable[Any]]]) -> Operation[dict[str, Any]]:
        """Run branches side by side, each an async function of a context of its own. Yields their results by name.

        All are allowed to end. Raises JoinFailed, with the branches that failed.
        """
        key = self._scope.key(None, name, what="ctx.join")
        return JoinCommand(self._scope, key, self._branches(branches, "ctx.join"))

    def race(self, name: str, branches: Mapping[str, Callable[[Context], Awaitable[T]]]) -> Operation[RaceResult[T]]:
        """Run branches side by side; the first to finish wins: ``RaceResult(winner, value)``. The others are canceled.

        A branch that fails is out of the race. Raises RaceFailed if all did.
        """
        key = self._scope.key(None, name, what="ctx.race")
        return RaceCommand(self._scope, key, self._branches(branches, "ctx.race"))

    @overload
    def loop(
        self, name: str, body: Callable[[Context, S], Awaitable[S | Break[T]]], state: S, *, history: int = 20,
        interval: int | None = None,
    ) -> Operation[T]: ...  # fmt: skip
    @overload
    def loop(
        self, name: str, body: Callable[[Context, Any], Awaitable[Any]], state: Any = None, *, history: int = 20,
        interval: int | None = None,
    ) -> Operation[Any]: ...  # fmt: skip
    def loop(
        self,
        name: str,
        body: Callable[[Context, Any], Awaitable[Any]],
        state: Any = None,
        *,
        history: int = 20,
        interval: int | None = None,
    ) -> Operation[Any]:
        """Call ``await body(ctx, state)`` again and again; yields the value of the ``Break(value)`` that it returns.

        - With a `state`, the body returns the next one; without, it returns nothing to go on. A state is journaled, as
          the type that the body's parameter declares.
        - The journal keeps the last `history` iterations, and is pruned every `interval` (default: `history`)
          iterations; those with something to undo are kept.
        """
        key = self._scope.key(None, name, what="ctx.loop")
        where = f"{self._scope.place}, loop {key!r}"
        self._check_number(history, f"{where}: history")
        self._check_number(history if interval is None else interval, f"{where}: interval")
        try:
            schema = _state_schema(body)
        except DefinitionError as error:
            raise self._scope.fault(DefinitionError(f"{where}: {error}")) from error
        return LoopCommand(self._scope, key, body, state, schema, history, interval or history)

    def map(
        self,
        name: str,
        workflow: AnyWorkflow,
        items: Iterable[Any],
        *,
        concurrency: int = 10,
        policy: Policy | type[All] = All(),  # noqa: B008 - a frozen value
        version: str | None = None,
    ) -> Operation[MapResults[Any]]:
        """Start a child run of `workflow` for each item, at most `concurrency` at a time. Yields the results in order.

        `policy`: ``All()``: one failure fails it; ``Failures(n)``: up to n (or a share of them, 0.1) may fail, and have
        None as their result; ``First(n)``: the first n successes, the rest is canceled. Raises JoinFailed.
        """
        key = self._scope.key(None, name, what="ctx.map")
        where = f"{self._scope.place}, map {key!r}"
        self._check_number(concurrency, f"{where}: concurrency")
        chosen: Any = policy() if policy is All else policy
        if not isinstance(chosen, All | Failures | First):
            raise self._scope.fault(DefinitionError(f"{where}: policy must be All(), Failures(n) or First(n)"))
        named, its = self._workflow(workflow, version, where)
        return MapCommand(self._scope, key, named, its, list(items), concurrency, chosen)

    # ---------------------------------------------------------------- waiting

    def sleep(self, duration: Seconds, *, name: str | None = None) -> Operation[None]:
        """Wait so long: seconds or a timedelta. Its end is fixed when it begins; a restart does not prolong it."""
        key = self._scope.key("sleep", name, what="ctx.sleep")
        where = f"{self._scope.place}, {key!r}"
        return SleepCommand(self._scope, key, timedelta(seconds=self._seconds(duration, where, negative=True)))

    def sleep_until(self, when: datetime, *, name: str | None = None) -> Operation[None]:
        """Wait until `when`, a datetime with a time zone. One in the past is over at once."""
        key = self._scope.key("sleep", name, what="ctx.sleep_until")
        where = f"{self._scope.place}, {key!r}"
        given: Any = when
        if not isinstance(given, datetime) or given.utcoffset() is None:
            raise self._scope.fault(DefinitionError(f"{where}: needs a datetime with a time zone, not {when!r}"))
        if when.year > LAST_YEAR:
            raise self._scope.fault(DefinitionError(f"{where}: {when!r} is too far away: at most the year {LAST_YEAR}"))
        return SleepCommand(self._scope, key, when.astimezone(UTC))

    def wait_for_signal(
        self,
        signal: str,
        *,
        name: str | None = None,
        type: Any = None,  # noqa: A002 - the name that users expect
        timeout: Seconds | None = None,
        on_timeout: Any = RAISE,
    ) -> Operation[Any]:
        """Wait for a signal; yields its payload, as `type`. One that came before, even before the start, is taken.

        `timeout`: seconds or a timedelta; then SignalTimeout is raised, or `on_timeout` is the answer.
        """
        key = self._scope.key(signal, name, what="ctx.wait_for_signal")
        where = f"{self._scope.place}, wait {key!r}"
        check_name(signal, where=where, what="the signal's name", reserved="")
        payload, limit = self._schema(type, where), self._limit(timeout, where)
        if on_timeout is not RAISE:
            if limit is None:
                raise self._scope.fault(DefinitionError(f"{where}: on_timeout without timeout is never used"))
            try:
                on_timeout = ANY.dump(on_timeout)
            except PayloadError as error:
                raise self._scope.fault(DefinitionError(f"{where}: on_timeout can't be stored: {error}")) from error
        return SignalCommand(self._scope, key, signal, payload, limit, on_timeout)

    def receive(
        self,
        *names: str,
        limit: int = 1,
        timeout: Seconds | None = None,
        completable: bool = False,
        name: str | None = None,
        type: Any = None,  # noqa: A002 - the name that users expect
    ) -> Operation[list[Message[Any]]]:
        """Wait for messages of any of these names (none: of any); yields the first, or up to `limit` that are there.

        - `timeout`: seconds or a timedelta; then the answer is an empty list.
        - `completable`: each message is to be answered: ``await message.complete(reply)``; the sender's ``request``
          gets the reply. Until then no other may be received so, and a run that fails leaves it in its inbox.
        """
        scope = self._scope
        key = scope.key("receive", name, what="ctx.receive")
        where = f"{scope.place}, {key!r}"
        for signal in names:
            check_name(signal, where=where, what="a message's name", reserved="")
        self._check_number(limit, f"{where}: limit")
        if completable and scope.uncompleted:
            open_ = ", ".join(map(repr, scope.uncompleted.values()))
            raise DefinitionError(
                f"{where}: the message {open_} has not been completed: await message.complete(reply) before the next "
                "one is received"
            )
        payload, wait = self._schema(type, where), self._limit(timeout, where)
        return ReceiveCommand(scope, key, names, payload, limit, wait, completable=completable)

    # ---------------------------------------------------------------- other runs

    def child(
        self,
        workflow: AnyWorkflow,
        input: Any = None,  # noqa: A002 - the name that users expect
        *,
        name: str | None = None,
        version: str | None = None,
        compensate: bool = False,
    ) -> Operation[Any]:
        """Start a run of another workflow and wait for its result. Raises ChildFailed if it fails or is canceled.

        `compensate`: when this run rolls back, the finished child is rolled back too.
        """
        named, its = self._workflow(workflow, version, f"{self._scope.place}, ctx.child")
        key = self._scope.key(named, name, what="ctx.child")
        return ChildCommand(self._scope, key, named, its, input, compensate=compensate)

    def start(
        self,
        workflow: AnyWorkflow,
        input: Any = None,  # noqa: A002 - the name that users expect
        *,
        name: str | None = None,
        version: str | None = None,
        key: str | None = None,
    ) -> Operation[uuid.UUID]:
        """Start a run of another workflow, exactly once, and go on without waiting for it. Yields its id."""
        scope = self._scope
        named, its = self._workflow(workflow, version, f"{scope.place}, ctx.start")
        step_id = scope.key(f"start {named}", name, what="ctx.start")
        return StepCommand(scope, step_id, outgoing.start(step_id, named, its, input, key))

    def send(
        self, run_id: uuid.UUID | str, signal: str, payload: Any = None, *, name: str | None = None
    ) -> Operation[bool]:
        """Send a signal to another run, exactly once. Yields False if that has ended; an unknown run is StepFailed."""
        scope = self._scope
        step_id = scope.key(f"send {signal}", name, what="ctx.send")
        return StepCommand(scope, step_id, outgoing.send(step_id, run_id, signal, payload))

    def continue_as_new(self, input: Any = None) -> NoReturn:  # noqa: A002 - the name that users expect
        """End this run, and go on in a new one that begins with `input`: it takes the key, the parent and the messages
        that nobody has received. Never returns."""
        self._scope.check_usable("ctx.continue_as_new")
        raise ContinueAsNew(input)

    # ---------------------------------------------------------------- going back, and changing code

    def checkpoint(self, name: str) -> Operation[int]:
        """A point to which ``raise Rollback(to=name)`` goes back. Yields how often that has happened."""
        scope = self._scope
        if scope.in_branch:
            raise scope.fault(DefinitionError(f"{scope.place}: ctx.checkpoint belongs outside of branches"))
        return CheckpointCommand(scope, scope.key(None, name, what="ctx.checkpoint"), name)

    def removed(self, name: str, kind: str) -> Any:  # _Done: to be awaited or not, as one likes
        """Says that the code had an operation of this name and kind here (``step``, ``sleep``, ``join`` ...), which
        runs in flight may have journaled. Needs no await."""
        kinds = sorted(k.value for k in REMOVABLE)
        if kind not in kinds:
            raise self._scope.fault(DefinitionError(f"ctx.removed({name!r}): kind must be one of {', '.join(kinds)}"))
        key = self._scope.key(name.partition("#")[0], None, what="ctx.removed")
        self._scope.body.remove(key, EntryKind(kind))
        return _Done()

    def patched(self, id: str) -> bool:  # noqa: A002 - the name that users expect
        """Whether to take the new path of changed code: True in runs that come here first under this code, False in
        those that have passed it. Asked per scope: each iteration of a loop has its own answer."""
        self._scope.check_usable("ctx.patched")
        check_name(id, where=self._scope.place, what="the id of ctx.patched")
        return self._scope.patched(id)

    # ---------------------------------------------------------------- without effects

    def now(self) -> datetime:
        """The time at which the last operation ended; the same on replay. In UTC."""
        return self._scope.now()

    @property
    def random(self) -> random.Random:
        """Random numbers, the same on replay. Not for secrets."""
        return self._scope.random

    def uuid4(self) -> uuid.UUID:
        """A random UUID, the same on replay. Not for secrets."""
        return uuid.UUID(int=self._scope.random.getrandbits(128), version=4)

    # ---------------------------------------------------------------- arguments

    def _branches(self, branches: Any, what: str) -> dict[str, Any]:
        if not isinstance(branches, Mapping) or not branches:
            error = f"{self._scope.place}: {what} needs a mapping of names to functions, with at least one"
            raise self._scope.fault(DefinitionError(error))
        for name, fn in branches.items():
            check_name(name, where=self._scope.place, what=f"the name of a branch of {what}")
            if not callable(fn):
                error = f"{self._scope.place}: branch {name!r} of {what} must be a function of a context, not {fn!r}"
                raise self._scope.fault(DefinitionError(error))
        return dict(branches)

    def _catch(self, catch: Collection[str], known: tuple[str, ...], what: str) -> frozenset[str]:
        wrong = sorted({*([catch] if isinstance(catch, str) else catch)} - set(known))
        if wrong or isinstance(catch, str):
            error = f"{self._scope.place}: {what}(catch={catch!r}): a list of any of {', '.join(known)}"
            raise self._scope.fault(DefinitionError(error))
        return frozenset(catch)

    def _workflow(self, workflow: AnyWorkflow, version: str | None, where: str) -> tuple[str, str | None]:
        if isinstance(workflow, str):
            check_name(workflow, where=where, what="the workflow's name")
            return workflow, version
        if not isinstance(workflow, WorkflowFunction | Builder | Workflow):
            raise self._scope.fault(DefinitionError(f"{where}: {workflow!r} is no workflow, nor the name of one"))
        return workflow.name, version or workflow.version

    def _check_number(self, value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._scope.fault(DefinitionError(f"{where} must be a whole number of at least 1, not {value!r}"))

    def _schema(self, annotation: Any, where: str) -> Schema:
        try:
            return ANY if annotation is None else Schema(annotation)
        except DefinitionError as error:
            raise self._scope.fault(DefinitionError(f"{where}: type: {error}")) from error

    def _limit(self, timeout: Seconds | None, where: str) -> timedelta | None:
        return None if timeout is None else timedelta(seconds=self._seconds(timeout, f"{where}: timeout"))

    def _seconds(self, value: Any, where: str, *, negative: bool = False) -> float:
        if negative and isinstance(value, int | float | timedelta) and not isinstance(value, bool):
            value = max(value, timedelta(0)) if isinstance(value, timedelta) else max(value, 0.0)
        try:
            return checked_seconds(value, where)
        except DefinitionError as error:
            raise self._scope.fault(error) from error


class _Done:
    """Nothing to wait for, awaited or not."""

    def __await__(self) -> Any:
        return iter(())


REMOVABLE: Final = frozenset(EntryKind) - {
    EntryKind.UNDO, EntryKind.RESULT, EntryKind.PATCH, EntryKind.ROLLBACK, EntryKind.CHOICE, EntryKind.ITERATION,
    EntryKind.BRANCH, EntryKind.PARALLEL, EntryKind.ROUTE,
}  # fmt: skip


def _state_schema(body: Callable[..., Any]) -> Schema:
    """The type of a loop's state, by the annotation of the parameter that takes it."""
    try:
        parameters = list(inspect.signature(body).parameters.values())
    except (ValueError, TypeError):
        return ANY
    if len(parameters) < 2:
        raise DefinitionError("its body is called with a context and the state: async def body(ctx, state)")
    annotation = annotation_of(body, parameters[1].name)
    return ANY if annotation is Any else Schema(annotation)
