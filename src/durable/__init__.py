"""Workflows that survive crashes, on PostgreSQL alone.

    from durable import Durable

    app = Durable()
    order = app.define("order", input=Order).step("charge", charge, compensate=refund).step("ship", ship)
    with app.worker():
        print(app.start(order, Order(id=17)).result())

What defines workflows is imported at once; the app object, with its database drivers, when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from durable.define.builder import define
from durable.define.options import branch, step
from durable.define.retry import Retry
from durable.errors import (
    ChildFailed,
    ConfigurationError,
    DefinitionError,
    DuplicateStepName,
    DurableError,
    HistoryDiverged,
    JoinFailed,
    LoopLimitExceeded,
    NonRetryable,
    PayloadError,
    RetryRefused,
    RunCanceled,
    RunExists,
    RunFailed,
    RunNotFound,
    SchemaMismatch,
    SignalTimeout,
    StepFailed,
    StepInterrupted,
    StepTimeout,
    UnknownBranch,
    WorkflowNotRegistered,
)
from durable.values import Status, Suspend, WaitingFor

if TYPE_CHECKING:
    from durable.define.builder import Builder
    from durable.define.nodes import Workflow
    from durable.durable import AsyncDurable, Durable
    from durable.engine.context import StepContext
    from durable.handles import AsyncRun, ResumeResult, Run, Start
    from durable.snapshots import ErrorInfo, HistoryEvent, Page, RunSnapshot, RunStatus, StepSnapshot

__version__ = "0.1.0"

_LATE: Final = {
    "AsyncDurable": "durable.durable",
    "AsyncRun": "durable.handles",
    "Builder": "durable.define.builder",
    "Durable": "durable.durable",
    "ErrorInfo": "durable.snapshots",
    "HistoryEvent": "durable.snapshots",
    "Page": "durable.snapshots",
    "ResumeResult": "durable.handles",
    "Run": "durable.handles",
    "RunSnapshot": "durable.snapshots",
    "RunStatus": "durable.snapshots",
    "Start": "durable.handles",
    "StepContext": "durable.engine.context",
    "StepSnapshot": "durable.snapshots",
    "Workflow": "durable.define.nodes",
}

__all__ = [
    "AsyncDurable",
    "AsyncRun",
    "Builder",
    "ChildFailed",
    "ConfigurationError",
    "DefinitionError",
    "DuplicateStepName",
    "Durable",
    "DurableError",
    "ErrorInfo",
    "HistoryDiverged",
    "HistoryEvent",
    "JoinFailed",
    "LoopLimitExceeded",
    "NonRetryable",
    "Page",
    "PayloadError",
    "ResumeResult",
    "Retry",
    "RetryRefused",
    "Run",
    "RunCanceled",
    "RunExists",
    "RunFailed",
    "RunNotFound",
    "RunSnapshot",
    "RunStatus",
    "SchemaMismatch",
    "SignalTimeout",
    "Start",
    "Status",
    "StepContext",
    "StepFailed",
    "StepInterrupted",
    "StepSnapshot",
    "StepTimeout",
    "Suspend",
    "UnknownBranch",
    "WaitingFor",
    "Workflow",
    "WorkflowNotRegistered",
    "branch",
    "define",
    "step",
]


def __getattr__(name: str) -> Any:
    module = _LATE.get(name)
    if module is None:
        raise AttributeError(f"module 'durable' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
