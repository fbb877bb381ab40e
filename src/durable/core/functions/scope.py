"""Scopes: where names of operations are unique. The body has one; so has each block, branch and iteration."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from durable.core.functions.commands import ReplyCommand
from durable.define.builder import check_name
from durable.define.payload import ANY
from durable.errors import DefinitionError, DuplicateStepName, PayloadError
from durable.values import JsonText

if TYPE_CHECKING:
    from durable.core.functions.body import Body, Strand
    from durable.core.functions.commands import Operation


class Scope:
    """The operations of one coroutine. `path` is the journal key of what the coroutine is the body of; "" for the
    workflow's own."""

    def __init__(
        self, body: Body, path: str, uncompleted: dict[int, str] | None = None, *, in_branch: bool = False
    ) -> None:
        self.body, self.path, self.in_branch = body, path, in_branch
        self.place = f"workflow {body.workflow.name!r}" + (f", in {path!r}" if path else "")  # for messages
        self.strand: Strand | None = None
        self.uncompleted: dict[int, str] = {} if uncompleted is None else uncompleted  # messages, by seq
        self._counts: dict[str, int] = {}
        self._given: set[str] = set()
        self._open: Operation[Any] | None = None
        self._epoch = ""
        self._patches: dict[str, bool] = {}
        self._random: random.Random | None = None

    # ---------------------------------------------------------------- keys

    def key(self, default: str | None, name: str | None, *, what: str) -> str:
        """The journal key of a new operation: of its explicit `name`, or of its default one, counted on repeats."""
        self.check_usable(what)
        if name is not None:
            check_name(name, where=self.place, what=f"the name of {what}")
            if name in self._given or name in self._counts:
                raise self.fault(DuplicateStepName(name, workflow=self.body.workflow.name))
            self._given.add(name)
            return self.path_of(name)
        if default is None:
            raise self.fault(DefinitionError(f"{self.place}: {what} has no name of its own: give it name="))
        check_name(default, where=self.place, what=f"the default name of {what} (give it another by name=)")
        count = self._counts.get(default, 0) + 1
        if count == 1 and default in self._given:
            count += 1
        self._counts[default] = count
        return self.path_of(default if count == 1 else f"{default}#{count}")

    def path_of(self, segment: str) -> str:
        """The journal key of something in this scope."""
        return f"{self.path}/{segment}{self._epoch}" if self.path else f"{segment}{self._epoch}"

    def begin_epoch(self, epoch: int) -> None:
        """The run went back to a checkpoint of this scope: what comes now has keys and random numbers of its own."""
        self._epoch = f":r{epoch}"
        self._random = None
        self._patches.clear()

    # ---------------------------------------------------------------- rules

    def opened(self, operation: Operation[Any]) -> None:
        """An operation was created: it must be awaited before the next."""
        self._open = operation

    def awaited(self, operation: Operation[Any]) -> bool:
        """Whether it may be awaited now: once, by the coroutine of its own scope."""
        mine, self._open = self._open is operation, None
        return mine

    def check_usable(self, what: str) -> None:
        """Raises DefinitionError if the context may not be used here and now."""
        current = self.body.current
        if current is None:
            if self.body.closing:
                return
            raise DefinitionError(
                f"{self.place}: {what} is for the body alone, not for handlers of its steps: those are called with "
                "plain values, and have a StepContext of their own"
            )
        if current is not self.strand:
            raise self.fault(
                DefinitionError(
                    f"{self.place}: {what} uses the context of the code around it: use the one that the function of "
                    "this block, branch or iteration is given"
                )
            )
        self.check_closed()

    def check_closed(self) -> None:
        """Raises DefinitionError if an operation was created and not awaited."""
        if self._open is not None:
            raise self.fault(
                DefinitionError(
                    f"{self.place}: {self._open.key!r} was started and not awaited: await each operation before the "
                    "next one, or run them side by side in ctx.join"
                )
            )

    def fault(self, error: DefinitionError) -> DefinitionError:
        """The code breaks a rule: the run fails by `error`, whatever the body makes of it."""
        self.body.faulted = self.body.faulted or error
        return error

    # ---------------------------------------------------------------- what needs no await

    def patched(self, id_: str) -> bool:
        """Whether this run takes the new path; the first answer in this scope is kept."""
        if id_ not in self._patches:
            self._patches[id_] = self.body.patch(self.path_of(f"patch:{id_}"), self.path)
        return self._patches[id_]

    @property
    def random(self) -> random.Random:
        """Random numbers that a replay draws again."""
        if self._random is None:
            seed = f"{self.body.seed}:{self.path}{self._epoch}"
            self._random = random.Random(seed)  # noqa: S311 - repeatable on purpose
        return self._random

    def now(self) -> datetime:
        """When the last operation of its coroutine ended; before the first one, when the run began."""
        assert self.strand is not None
        if self.strand.time is None:
            self.body.wants_start = True  # that it begins now must be written before anybody builds on it
        return (self.strand.time or self.body.now).astimezone(UTC)

    def complete(self, message: int, reply: Any) -> ReplyCommand:
        """Answer a received message."""
        key = self.key("complete", None, what="message.complete()")
        try:
            return ReplyCommand(self, key, message, ANY.dump(reply))
        except PayloadError as error:
            raise error.at(f"{self.place}: the reply {key!r}") from None

    def plain(self, text: JsonText | None) -> Any:
        return None if text is None else json.loads(text)
