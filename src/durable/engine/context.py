"""What a handler sees of its run: facts, earlier results, and the run's own transaction when it asks for it."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from durable.core.results import Results, node_of
from durable.core.state import View
from durable.core.transition import Call
from durable.define.nodes import Loop
from durable.define.payload import ANY, LOOSE, Schema
from durable.errors import PayloadError
from durable.values import JsonText

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

Input = TypeVar("Input")
Progress = Callable[[Mapping[str, Any]], None]

_UNSET: Any = object()
_logger = logging.getLogger("durable.step")


class Flag(Protocol):
    """A threading.Event, as far as it matters here: nobody waits for it."""

    def is_set(self) -> bool: ...
    def set(self) -> None: ...


class Lending(Protocol):
    """What the context asks for a connection: :class:`durable.engine.borrow.Loan`."""

    def connection(self) -> Connection: ...
    def async_connection(self) -> Awaitable[AsyncConnection]: ...


class StepLogger(logging.LoggerAdapter[logging.Logger]):
    """Puts run, workflow, step and attempt into every record; keeps the caller's own `extra`."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs


class StepContext(Generic[Input]):
    """The one argument of a handler. Use it from the handler's own thread or task; it is dead when the handler ends.

    - `run_id`, `step_id`; `attempt`, 1-based.
    - `iteration`, 0-based, in a loop; else None.
    - `idempotency_key`: the same at every attempt of this step of this run: hand it to systems that know such keys.
    - `logger`: has run, workflow, step and attempt in every record.
    - `app`: the Durable or AsyncDurable that runs the step; None if there is none.
    """

    def __init__(
        self,
        call: Call,
        view: View,
        *,
        lending: Lending,
        cancelled: Flag,
        app: Any = None,
        on_progress: Progress | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._call, self._view, self._lending, self._cancelled = call, view, lending, cancelled
        self._on_progress, self._loop = on_progress, loop
        self._loaded: dict[str, Any] = {}
        self.app = app
        self.run_id: uuid.UUID = view.run.id
        self.step_id = call.step_id
        self.attempt = call.attempt
        self.iteration = call.iteration
        self.results: Mapping[str, Any] = Results(view.workflow, view.journal)

    def __repr__(self) -> str:
        return f"<StepContext of step {self.step_id!r}, run {self.run_id}, attempt {self.attempt}>"

    @property
    def idempotency_key(self) -> str:
        return f"{self.run_id}:{self.step_id}"

    @functools.cached_property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        facts = {"run": str(self.run_id), "workflow": self._view.run.workflow}
        return StepLogger(_logger, facts | {"step": self.step_id, "attempt": self.attempt})

    @property
    def input(self) -> Input:
        """The run's input, as the type that the workflow declares."""
        workflow = self._view.workflow
        schema = ANY if workflow is None else workflow.input
        return cast(Input, self._load("the input of the run", schema, self._view.run.input))

    @property
    def item(self) -> Any:
        """In a loop: what this iteration works on. The run's input, or what `map_input` gave, in the first; then what
        the iteration before returned, or what `feedback` made of that. None outside of loops."""
        if "item" in self._loaded:
            return self._loaded["item"]
        if self._call.iteration is None and self._call.item is None:
            return None
        if self._call.item is None:
            return self.input
        loop = self._call.loop or node_of(self._view.workflow, self._call.undoes or self._call.step_id)
        typed = isinstance(loop, Loop) and loop.feedback is None and self._call.iteration != 0
        return self._load("item", loop.work.result if typed and isinstance(loop, Loop) else ANY, self._call.item)

    @property
    def snapshot(self) -> Any:
        """What the handler gave to ``Suspend``, when it is entered again; None before."""
        return self._load("snapshot", ANY, self._call.snapshot)

    @property
    def resume_data(self) -> Any:
        """What ``resume()`` brought; None before."""
        return self._load("resume_data", ANY, self._call.resume_data)

    @property
    def output(self) -> Any:
        """In a compensator: what the step returned that it undoes, as that step's declared type; else None."""
        return self._load("output", self._call.output_type, self._call.output)

    @property
    def cancelled(self) -> bool:
        """Whether the attempt should end: it ran out of time, the run is canceled, or the worker stops. A sync handler
        that runs long should look at it, since nothing can interrupt a thread.

        What it returns then is its result all the same. To end without one, raise ``asyncio.CancelledError``: at a
        shutdown the step is handed back, and its attempt does not count."""
        return self._cancelled.is_set()

    def progress(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Says how far the step has come; shown in ``status``, not journaled. Raises PayloadError if it is no JSON."""
        said = {"done": done, "total": total, "message": message}
        self._report({name: value for name, value in said.items() if value is not None})

    def heartbeat(self, details: Any = None) -> None:
        """Says that the step is alive, and something about it, shown as progress is. Raises PayloadError likewise."""
        self._report({"heartbeat": details})

    def connection(self) -> Connection:
        """For a sync handler: a SQLAlchemy connection in the run's own transaction. What is written through it commits
        with the step's journal entry, or not at all: exactly once.

        The same at each call. ``commit()`` is refused, ``close()`` harmless, ``rollback()`` undoes what the step has
        written; ``begin()`` and ``begin_nested()`` are savepoints; ORM by ``Session(bind=conn)``. From the moment that
        it is handed out the attempt has 30 s: take it last.
        """
        return self._lending.connection()

    def async_connection(self) -> Awaitable[AsyncConnection]:
        """As :meth:`connection`, for an async handler: ``conn = await ctx.async_connection()``."""
        return self._lending.async_connection()

    def give_item(self, value: Any) -> None:
        """The engine's: what `map_input` gave."""
        self._loaded["item"] = value

    def _load(self, what: str, schema: Schema, text: JsonText | None) -> Any:
        if text is None:
            return None
        if what not in self._loaded:
            try:
                self._loaded[what] = schema.load(text)
            except PayloadError as error:
                raise error.at(f"{what}, for step {self.step_id!r} of workflow {self._view.run.workflow!r}") from None
        return self._loaded[what]

    def _report(self, what: Mapping[str, Any]) -> None:
        if self._on_progress is None:
            return
        what = json.loads(LOOSE.dump(dict(what)))
        if self._loop is None:
            self._on_progress(what)
        else:  # from whatever thread; in order
            self._loop.call_soon_threadsafe(self._on_progress, what)
