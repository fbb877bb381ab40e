"""What a workflow is made of: frozen values, without behaviour.

Every function that a user hands in becomes a :class:`Work`: the function, and how it is to be run. A workflow is either
a list of nodes (made by ``define/builder.py``) or a body (``define/function.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, ClassVar, Final, Literal, TypeAlias

from durable.define.payload import ANY, Schema
from durable.define.retry import Retry


class _Raise(Enum):
    RAISE = "RAISE"


RAISE: Final = _Raise.RAISE
"""The default of ``on_timeout``: the wait fails with SignalTimeout."""


@dataclass(frozen=True, slots=True)
class Work:
    """User code and how it is run. `result` is the handler's return type, as a payload schema."""

    handler: Callable[..., Any]
    retry: Retry = field(default_factory=Retry)
    timeout: float | None = None  # seconds an attempt may take
    compensate: Work | None = None  # how it is undone: a Work of its own, with its own retry and timeout
    transactional: bool | None = None  # None: attached while short, detached when long
    at_most_once: bool = False
    result: Schema = ANY


@dataclass(frozen=True, slots=True)
class Step:
    kind: ClassVar[str] = "step"
    name: str
    work: Work


@dataclass(frozen=True, slots=True)
class Parallel:
    kind: ClassVar[str] = "parallel"
    name: str
    branches: Mapping[str, Work]


@dataclass(frozen=True, slots=True)
class Route:
    kind: ClassVar[str] = "route"
    name: str
    selector: Work
    branches: Mapping[str, Work]


@dataclass(frozen=True, slots=True)
class Loop:
    """`until(result, iteration)` or `while_(ctx, iteration)`, or neither: then `max_iterations` is the count."""

    kind: ClassVar[str] = "loop"
    name: str
    work: Work
    until: Callable[..., Any] | None = None
    while_: Callable[..., Any] | None = None
    map_input: Callable[..., Any] | None = None
    feedback: Callable[..., Any] | None = None
    max_iterations: int = 1_000
    keep: Literal["all", "last"] = "all"

    @property
    def conditional(self) -> bool:
        return self.until is not None or self.while_ is not None


@dataclass(frozen=True, slots=True)
class Sleep:
    kind: ClassVar[str] = "sleep"
    name: str
    until: timedelta | datetime | Work  # a Work returns seconds, a timedelta or an aware datetime


@dataclass(frozen=True, slots=True)
class WaitForSignal:
    kind: ClassVar[str] = "signal"
    name: str
    signal: str | Work  # a Work returns the name
    payload: Schema = ANY
    timeout: timedelta | None = None
    on_timeout: Any = RAISE  # otherwise JSON text of the value that the node yields


@dataclass(frozen=True, slots=True)
class ChildWorkflow:
    """`workflow` is a name, or a Work that returns a name or a Workflow. `version` None: the one defined last."""

    kind: ClassVar[str] = "child"
    name: str
    workflow: str | Work
    version: str | None = None
    map_input: Work | None = None  # None: the run's own input
    compensate: bool = False


Node: TypeAlias = Step | Parallel | Route | Loop | Sleep | WaitForSignal | ChildWorkflow


@dataclass(frozen=True, slots=True)
class Workflow:
    """A named, versioned definition. `place` is ``file:line`` of where it was defined."""

    name: str
    version: str
    nodes: tuple[Node, ...] = ()
    input: Schema = ANY
    result: Work | None = None  # None: {node: result}
    place: str = ""
    body: Callable[..., Coroutine[Any, Any, Any]] | None = None  # of a function: it has no nodes
    output: Schema = ANY  # what the body returns
    takes_input: bool = True
    cleans_up: bool = False  # the body has something to do when it is canceled
    cancel_timeout: float = 30.0  # seconds that it has for that
    by_name: Mapping[str, Node] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {node.name: node for node in self.nodes})
