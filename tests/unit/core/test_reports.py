"""What hooks are to be told of a transition of a function workflow: each failure once, whoever carries it on."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from durable.core.moves import move
from durable.core.reports import reports
from durable.core.state import Ending, Entry, EntryKind, Failure, Run, View
from durable.core.transition import FailedAttempt, Transition
from durable.define.nodes import Workflow
from durable.define.registry import Registry
from durable.values import Status

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RUN = Run(
    id=uuid.UUID(int=1),
    workflow="order",
    version="2",
    status=Status.RUNNING,
    revision=3,
    current_step=0,
    input="null",
    queue="durable",
    created_at=NOW,
)
DECLINED = Failure("shop.CardDeclined", "no funds", "exhausted", "charge", 3)
CHARGE = Entry("charge", EntryKind.STEP, "failed", error=DECLINED, attempt=3, finished_at=NOW)


async def body(ctx: Any) -> None: ...


ORDER = Workflow("order", "2", body=body)


def view(*entries: Entry, **run: Any) -> View:
    return View(replace(RUN, **run), ORDER, Registry(), {entry.step_id: entry for entry in entries}, ())


def told(seen: View, transition: Transition) -> list[Mapping[str, Any]]:
    return [report.body for report in reports(seen, transition, NOW, {"error"})]


def fails(seen: View, failure: Failure, **write: Any) -> Transition:
    return move(seen, NOW, Status.FAILED, error=failure, **write)


def test_a_failed_step_is_told_when_it_is_journaled() -> None:
    seen = view()
    (report,) = told(seen, move(seen, NOW, Status.RUNNING, entries=(CHARGE,)))
    assert (report["step"], report["attempt"], report["will_retry"]) == ("charge", 3, False)


def test_what_the_body_passes_on_is_not_told_again() -> None:
    seen = view(CHARGE)
    assert told(seen, fails(seen, DECLINED)) == []
    assert told(seen, fails(seen, replace(DECLINED, kind="critical", attempts=1))) == []


@pytest.mark.behaviour("RV-11")
def test_an_error_of_the_body_is_one_of_the_run() -> None:
    seen = view(CHARGE)
    own = Failure("ValueError", "line 7")
    (report,) = told(seen, fails(seen, own))
    assert "step" not in report
    assert report["error"]["message"] == "line 7"
    (report,) = told(seen, fails(seen, replace(DECLINED, step=None)))  # the body's own, whatever it says
    assert report["error"]["type"] == "shop.CardDeclined"


def test_a_wait_that_the_body_did_not_catch_is_an_error_of_the_run() -> None:
    late = Failure("durable.errors.SignalTimeout", "no approval came", "timeout", "approval")
    wait = Entry("approval", EntryKind.SIGNAL, "failed", error=late, finished_at=NOW)
    seen = view()
    assert told(seen, move(seen, NOW, Status.RUNNING, entries=(wait,))) == []  # the body may catch it
    seen = view(wait)
    (report,) = told(seen, fails(seen, late))
    assert report["error"]["step"] == "approval"


@pytest.mark.parametrize("own_error", [False, True])
def test_a_join_is_told_if_not_all_that_failed_was(own_error: bool) -> None:
    branch = Entry("fulfil/pay", EntryKind.BRANCH, "failed", error=DECLINED, finished_at=NOW)
    branches: dict[str, Any] = {"pay": {"type": DECLINED.type, "message": DECLINED.message}}
    if own_error:
        branches["pick"] = {"type": "KeyError", "message": "'shelf'"}
    failure = Failure("durable.errors.JoinFailed", "1 of 2", "exhausted", "fulfil", details={"branches": branches})
    join = Entry("fulfil", EntryKind.JOIN, "failed", error=failure, finished_at=NOW)
    seen = view(replace(CHARGE, step_id="fulfil/pay/charge"), branch)
    found = told(seen, fails(seen, failure, entries=(join,)))
    assert [report["error"]["type"] for report in found] == ["durable.errors.JoinFailed"] * own_error


def test_a_nested_join_is_looked_into() -> None:
    inner = {"type": "durable.errors.JoinFailed", "message": "1 of 1",
             "details": {"branches": {"pay": {"type": DECLINED.type, "message": DECLINED.message}}}}  # fmt: skip
    failure = Failure("durable.errors.JoinFailed", "1 of 1", step="outer", details={"branches": {"inner": inner}})
    seen = view(CHARGE)
    assert told(seen, fails(seen, failure)) == []


def test_the_run_is_told_when_its_rollback_begins_and_not_when_it_ends() -> None:
    own = Failure("ValueError", "line 7")
    ending = Ending(Status.FAILED, own)
    seen = view()
    (report,) = told(seen, move(seen, NOW, Status.COMPENSATING, error=own, ending=ending))
    assert report["error"]["message"] == "line 7"
    seen = view(status=Status.COMPENSATING, ending=ending)
    assert told(seen, fails(seen, own)) == []


def test_a_rollback_to_a_checkpoint_or_by_a_cancel_is_no_error() -> None:
    seen = view()
    for ending in (Ending(Status.FAILED, Failure("Rollback", ""), to="paid"), Ending(Status.CANCELED)):
        assert told(seen, move(seen, NOW, Status.COMPENSATING, ending=ending)) == []


def test_the_limit_of_a_bodys_step_is_what_its_failure_says() -> None:
    seen = view()
    for details, limit in (({"limit": 5}, 5), ({"limit": None}, None), (None, None)):
        failure = Failure("ValueError", "", step="charge", details=details)
        attempt = FailedAttempt("charge", 1, "failed", failure, NOW, NOW, NOW)
        (report,) = told(seen, move(seen, NOW, Status.RUNNING, attempts=(attempt,)))
        assert report["limit"] == limit


def test_an_interrupted_attempt_is_no_failure() -> None:
    seen = view()
    attempt = FailedAttempt("charge", 1, "interrupted", Failure("x", ""), NOW, NOW)
    assert told(seen, move(seen, NOW, Status.RUNNING, attempts=(attempt,))) == []
