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
from durable.define.function import workflow
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
    RaceFailed,
    RequestTimeout,
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
from durable.values import Break, Canceled, Rollback, Status, Suspend, WaitingFor

if TYPE_CHECKING:
    from durable.core.functions.context import Context
    from durable.core.functions.values import (
        All,
        Failures,
        First,
        MapResults,
        Message,
        RaceResult,
        Result,
        TryFailure,
    )
    from durable.define.builder import Builder
    from durable.define.function import WorkflowFunction
    from durable.define.nodes import Workflow
    from durable.durable import AsyncDurable, Durable
    from durable.engine.context import StepContext
    from durable.engine.hooks import ErrorReport, StatusChange
    from durable.handles import AsyncRun, ResumeResult, Run, Start
    from durable.snapshots import ErrorInfo, HistoryEvent, Page, RunSnapshot, RunStatus, StepSnapshot

__version__ = "0.1.0"

_LATE: Final = {
    "All": "durable.core.functions.values",
    "AsyncDurable": "durable.durable",
    "AsyncRun": "durable.handles",
    "Builder": "durable.define.builder",
    "Context": "durable.core.functions.context",
    "Durable": "durable.durable",
    "ErrorInfo": "durable.snapshots",
    "ErrorReport": "durable.engine.hooks",
    "Failures": "durable.core.functions.values",
    "First": "durable.core.functions.values",
    "HistoryEvent": "durable.snapshots",
    "MapResults": "durable.core.functions.values",
    "Message": "durable.core.functions.values",
    "Page": "durable.snapshots",
    "RaceResult": "durable.core.functions.values",
    "Result": "durable.core.functions.values",
    "ResumeResult": "durable.handles",
    "Run": "durable.handles",
    "RunSnapshot": "durable.snapshots",
    "RunStatus": "durable.snapshots",
    "Start": "durable.handles",
    "StatusChange": "durable.engine.hooks",
    "StepContext": "durable.engine.context",
    "StepSnapshot": "durable.snapshots",
    "TryFailure": "durable.core.functions.values",
    "Workflow": "durable.define.nodes",
    "WorkflowFunction": "durable.define.function",
}

__all__ = [
    "All",
    "AsyncDurable",
    "AsyncRun",
    "Break",
    "Builder",
    "Canceled",
    "ChildFailed",
    "ConfigurationError",
    "Context",
    "DefinitionError",
    "DuplicateStepName",
    "Durable",
    "DurableError",
    "ErrorInfo",
    "ErrorReport",
    "Failures",
    "First",
    "HistoryDiverged",
    "HistoryEvent",
    "JoinFailed",
    "LoopLimitExceeded",
    "MapResults",
    "Message",
    "NonRetryable",
    "Page",
    "PayloadError",
    "RaceFailed",
    "RaceResult",
    "RequestTimeout",
    "Result",
    "ResumeResult",
    "Retry",
    "RetryRefused",
    "Rollback",
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
    "StatusChange",
    "StepContext",
    "StepFailed",
    "StepInterrupted",
    "StepSnapshot",
    "StepTimeout",
    "Suspend",
    "TryFailure",
    "UnknownBranch",
    "WaitingFor",
    "Workflow",
    "WorkflowFunction",
    "WorkflowNotRegistered",
    "branch",
    "define",
    "step",
    "workflow",
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
