"""How user functions are called: async ones on the event loop, sync ones in a thread.

What an attempt has to call, and in which order, is written once, as a generator (a *script*) that yields :class:`Ask`
values and is sent the answers; :func:`play` runs it. Neighbouring sync functions, and the script's own code between
them, share one hop into a thread. Whoever writes a script does not see which kind a function is.

Interruption. Cancelling the task that plays a script raises CancelledError in an async function, as everywhere in
asyncio. A thread cannot be interrupted: it is told (`Interruption.tell`) and awaited, never abandoned. What it
returned then counts; the script goes on only with what it asks `late`, that is with what a finished handler still
needs to become an outcome.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Generic, TypeAlias, TypeVar

from durable.core.frozen import value
from durable.define.options import is_async

T = TypeVar("T")


@value(frozen=True, slots=True)
class Ask:
    """A function of the user's to be called. `late`: it is asked after the handler has finished."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    late: bool = False


Script: TypeAlias = Generator[Ask, Any, T]


@value(frozen=True, slots=True)
class Returned(Generic[T]):
    """The script ran to its end."""

    value: T


@value(frozen=True, slots=True)
class Raised:
    """A function of the user's, or the script, raised this: any BaseException, CancelledError included."""

    error: BaseException


@value(frozen=True, slots=True)
class _Awaiting:
    """A sync function returned an awaitable: the loop must await it."""

    awaitable: Awaitable[Any]


class Interruption(ABC):
    """Whether a script that `task` plays was interrupted while a thread ran it."""

    task: asyncio.Task[Any]
    came = False

    def come(self) -> None:
        self.came = True
        self.tell()

    @abstractmethod
    def tell(self) -> None:
        """Pass it on to the function in the thread."""

    def forbids(self, ask: Ask) -> bool:
        return self.came and not ask.late


class Threads:
    """The threads that sync functions run in: at most `size`, made when needed."""

    def __init__(self, size: int) -> None:
        self._pool = ThreadPoolExecutor(size, thread_name_prefix="durable-step")

    async def run(self, fn: Callable[[], T], interruption: Interruption) -> T:
        """`fn()` in a thread, with a copy of the caller's contextvars. `fn` must not raise.

        If the awaiting task is cancelled before a thread took `fn` up, it never runs, and CancelledError is raised;
        later, the interruption comes and `fn` is awaited to its end: then the cancellation is spent.
        """
        job = self._pool.submit(contextvars.copy_context().run, fn)
        waiter = asyncio.wrap_future(job)
        while not waiter.done():
            try:
                await asyncio.wait({waiter})
            except asyncio.CancelledError:
                if job.cancel():
                    raise
                interruption.come()
        return waiter.result()

    async def close(self) -> None:
        """Ends the threads. Waits, without blocking the loop, for functions that still run."""
        await asyncio.to_thread(self._pool.shutdown)


async def play(script: Script[T], threads: Threads, interruption: Interruption) -> Returned[T] | Raised:
    """Runs `script` to its end. Never raises what user code raised, whatever it is: that is in the answer."""
    state = _guarded(_send, script, None)
    while not isinstance(state, _OVER):
        if isinstance(state, Ask) and interruption.forbids(state):
            state = Raised(asyncio.CancelledError())
        elif isinstance(state, Ask) and not is_async(state.fn):
            try:
                state = await threads.run(functools.partial(_in_thread, script, state, interruption), interruption)
            except asyncio.CancelledError as error:
                state = Raised(error)
        else:
            try:
                answer = await (state.fn(*state.args) if isinstance(state, Ask) else state.awaitable)
            except BaseException as error:
                if isinstance(error, GeneratorExit) and _current_task() is not interruption.task:
                    raise  # the loop is being torn down: not the user's
                script.close()
                return Raised(error)  # kept in no variable: this frame is in its traceback
            state = _guarded(_send, script, answer)
    script.close()
    return state


_State: TypeAlias = Ask | _Awaiting | Returned[T] | Raised
_OVER: Final = (Returned, Raised)


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs here any more
        return None


def _in_thread(script: Script[T], ask: Ask, interruption: Interruption) -> _State[T]:
    """Plays `script` from `ask` on, up to its end or to something that only the loop can do."""
    state: _State[T] = ask
    while isinstance(state, Ask) and not is_async(state.fn) and not interruption.forbids(state):
        state = _guarded(_call, script, state)
    return state


def _call(script: Script[T], ask: Ask) -> _State[T]:
    answer = ask.fn(*ask.args)
    return _Awaiting(answer) if inspect.isawaitable(answer) else _send(script, answer)


def _send(script: Script[T], answer: Any) -> _State[T]:
    try:
        return script.send(answer)
    except StopIteration as end:
        return Returned(end.value)


def _guarded(fn: Callable[[Script[T], Any], _State[T]], script: Script[T], argument: Any) -> _State[T]:
    try:
        return fn(script, argument)
    except BaseException as error:
        return Raised(error)
