"""What the operations take and give: a start, a run's handle, the answer to resume. The handles only pass on."""

# ruff: noqa: A002 - input= and id= are the names that users expect

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

from durable.arguments import RunId, Seconds, Tag
from durable.snapshots import HistoryEvent, RunSnapshot
from durable.values import Status

if TYPE_CHECKING:
    from durable.durable import AsyncDurable, Durable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Start:
    """One of the runs of ``start_many``: its input, and what ``start`` takes beside it."""

    input: Any = None
    key: str | None = None
    tags: Mapping[str, Tag] | None = None
    id: RunId | None = None
    priority: int = 0
    delay: Seconds | None = None
    timeout: Seconds | None = None


class StartOptions(TypedDict, total=False):
    """What ``start`` takes beside workflow and input, for its types."""

    version: str | None
    id: RunId | None
    key: str | None
    tags: Mapping[str, Tag] | None
    priority: int
    delay: Seconds | None
    timeout: Seconds | None
    connection: Any


@dataclass(frozen=True, slots=True)
class ResumeResult:
    """What came of ``resume``; true if it was accepted. `status` is the run's, read right afterwards."""

    accepted: bool
    status: Status

    def __bool__(self) -> bool:
        return self.accepted


class _Handle:
    """The id of a run. Two handles of one run are equal."""

    id: uuid.UUID
    uncommitted: bool
    """It was started in a transaction of the caller's: ``result`` waits until that is committed."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Handle) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"


class AsyncRun(_Handle, Generic[T]):
    """A run, to be asked. `T` is the type of its result. The methods are those of AsyncDurable, without the id."""

    def __init__(self, app: AsyncDurable, run_id: uuid.UUID, *, uncommitted: bool = False) -> None:
        self._app, self.id, self.uncommitted = app, run_id, uncommitted

    async def status(self, children: int = 100) -> RunSnapshot:
        return await self._app.status(self.id, children)

    async def result(self, timeout: Seconds | None = None) -> T:
        result: T = await self._app.result(self, timeout)
        return result

    async def signal(
        self, name: str, payload: Any = None, *, id: str | uuid.UUID | None = None, connection: Any = None
    ) -> bool:
        return await self._app.signal(self.id, name, payload, id=id, connection=connection)

    async def request(
        self, name: str, payload: Any = None, timeout: Seconds = 5.0, *, id: str | uuid.UUID | None = None
    ) -> Any:
        return await self._app.request(self.id, name, payload, timeout, id=id)

    async def resume(self, name: str | None = None, data: Any = None) -> ResumeResult:
        return await self._app.resume(self.id, name, data)

    async def pause(self) -> bool:
        return await self._app.pause(self.id)

    async def cancel(self, *, reason: str | None = None, compensate: bool = False, connection: Any = None) -> bool:
        return await self._app.cancel(self.id, reason=reason, compensate=compensate, connection=connection)

    async def retry(self) -> AsyncRun[T]:
        await self._app.retry(self.id)
        return self

    async def fork(self, from_step: str | None = None, input: Any = None, *, connection: Any = None) -> AsyncRun[T]:
        return await self._app.fork(self.id, from_step, input, connection=connection)

    def watch(self) -> AsyncGenerator[RunSnapshot, None]:
        return self._app.watch(self.id)

    async def history(self) -> list[HistoryEvent]:
        return await self._app.history(self.id)


class Run(_Handle, Generic[T]):
    """A run, to be asked. `T` is the type of its result. The methods are those of Durable, without the id."""

    def __init__(self, app: Durable, run_id: uuid.UUID, *, uncommitted: bool = False) -> None:
        self._app, self.id, self.uncommitted = app, run_id, uncommitted

    def status(self, children: int = 100) -> RunSnapshot:
        return self._app.status(self.id, children)

    def result(self, timeout: Seconds | None = None) -> T:
        result: T = self._app.result(self, timeout)
        return result

    def signal(
        self, name: str, payload: Any = None, *, id: str | uuid.UUID | None = None, connection: Any = None
    ) -> bool:
        return self._app.signal(self.id, name, payload, id=id, connection=connection)

    def request(
        self, name: str, payload: Any = None, timeout: Seconds = 5.0, *, id: str | uuid.UUID | None = None
    ) -> Any:
        return self._app.request(self.id, name, payload, timeout, id=id)

    def resume(self, name: str | None = None, data: Any = None) -> ResumeResult:
        return self._app.resume(self.id, name, data)

    def pause(self) -> bool:
        return self._app.pause(self.id)

    def cancel(self, *, reason: str | None = None, compensate: bool = False, connection: Any = None) -> bool:
        return self._app.cancel(self.id, reason=reason, compensate=compensate, connection=connection)

    def retry(self) -> Run[T]:
        self._app.retry(self.id)
        return self

    def fork(self, from_step: str | None = None, input: Any = None, *, connection: Any = None) -> Run[T]:
        return self._app.fork(self.id, from_step, input, connection=connection)

    def watch(self) -> Generator[RunSnapshot, None, None]:
        return self._app.watch(self.id)

    def history(self) -> list[HistoryEvent]:
        return self._app.history(self.id)
