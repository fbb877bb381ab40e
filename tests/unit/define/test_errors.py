"""The exception tree: its shape, its messages, and that errors survive pickling."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from durable import errors


class CardDeclined(Exception): ...


FAILURE = {"type": "CardDeclined", "message": "no funds", "step": "charge", "attempts": 3}

EXAMPLES: list[errors.DurableError] = [
    errors.DefinitionError("bad", workflow="w", node="n"),
    errors.DuplicateStepName("n", workflow="w", kind="step"),
    errors.ConfigurationError("bad"),
    errors.SchemaMismatch("old", found="0001", needed="0002"),
    errors.WorkflowNotRegistered("w", "2", known=[("w", "1")]),
    errors.RunNotFound("42"),
    errors.RetryRefused("run 42 is paused"),
    errors.RunExists(run_id="42", workflow="w", key="k", what="input"),
    errors.PayloadError("bad", path=".a", where="the input"),
    errors.HistoryDiverged("node 'a' is gone", workflow="w", run_id="42"),
    errors.StepFailed("charge", kind="exhausted", attempts=3, error=FAILURE, workflow="w", run_id="42"),
    errors.StepTimeout("charge", timeout=3.0, workflow="w"),
    errors.StepInterrupted("charge", crashes=5),
    errors.UnknownBranch("x", ["a", "b"], node="r", workflow="w"),
    errors.LoopLimitExceeded("l", 10, workflow="w"),
    errors.SignalTimeout("approval", step="wait", timeout=60.0),
    errors.ChildFailed(step="c", run_id="43", status="canceled", error=FAILURE, child="rollout"),
    errors.JoinFailed("p", {"a": FAILURE, "b": FAILURE}),
    errors.RaceFailed("p", {"a": FAILURE, "b": FAILURE}),
    errors.RequestTimeout("quote", run_id="42", timeout=5.0, workflow="w"),
    errors.RunFailed("42", FAILURE, ["reserve"], workflow="w"),
    errors.RunCanceled("too late", run_id="42"),
    errors.NonRetryable("no", 1),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_every_error_is_documented_told_and_copied(error: errors.DurableError) -> None:
    assert isinstance(error, errors.DurableError)
    assert type(error).__doc__
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error) != ""
        assert twin.args == error.args
        assert twin.__dict__ == error.__dict__


def test_the_examples_are_complete() -> None:
    def below(cls: type[Any]) -> set[type[Any]]:
        return {cls}.union(*(below(sub) for sub in cls.__subclasses__() if sub.__module__ == errors.__name__))

    assert below(errors.DurableError) - {errors.DurableError} == {type(e) for e in EXAMPLES}


def test_timeouts_are_timeout_errors() -> None:
    assert isinstance(errors.StepTimeout("s"), TimeoutError)
    assert isinstance(errors.StepTimeout("s"), errors.StepFailed)
    assert isinstance(errors.SignalTimeout("s"), TimeoutError)


def test_caused_by_compares_the_recorded_name() -> None:
    error = errors.StepFailed("charge", error=FAILURE)
    assert error.caused_by(CardDeclined)
    assert not error.caused_by(ValueError)
    assert not errors.StepFailed("charge").caused_by(ValueError)
    qualified = {"type": f"{CardDeclined.__module__}.CardDeclined"}
    assert errors.StepFailed("charge", error=qualified).caused_by(CardDeclined)


def test_messages_say_what_where_and_what_to_do() -> None:
    told = {type(e).__name__: str(e) for e in EXAMPLES}
    assert told["StepFailed"] == (
        "workflow 'w', run '42', step 'charge': failed after 3 attempts (exhausted): CardDeclined: no funds"
    )
    assert told["UnknownBranch"] == "workflow 'w', node 'r': there is no branch 'x': it has 'a', 'b'"
    assert "could not be undone: reserve" in told["RunFailed"]
    assert "'a': CardDeclined: no funds; 'b'" in told["JoinFailed"]
    assert "known versions of it: 1" in told["WorkflowNotRegistered"]
    assert "started with another input" in told["RunExists"]
