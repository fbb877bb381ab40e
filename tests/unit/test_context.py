"""What a handler sees of its run."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest

from durable.core.results import load_result, node_of, schema_of
from durable.core.state import Entry, EntryKind, Run, View
from durable.core.transition import Call, Purpose
from durable.define.nodes import (
    ChildWorkflow,
    Loop,
    Node,
    Parallel,
    Route,
    Sleep,
    Step,
    WaitForSignal,
    Work,
    Workflow,
)
from durable.define.payload import ANY, Schema
from durable.define.registry import Registry
from durable.engine.context import StepContext
from durable.errors import PayloadError
from durable.values import Status

RUN_ID = uuid.UUID("01900000-0000-7000-8000-000000000001")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Order:
    id: int


ORDER = Work(print, result=Schema(Order))
NODES: tuple[Node, ...] = (
    Step("read", ORDER),
    Parallel("build", {"api": ORDER, "ui": Work(print)}),
    Route("target", Work(print), {"cloud": ORDER}),
    Loop("poll", ORDER),
    Loop("last", ORDER, keep="last"),
    Sleep("settle", Work(print)),
    WaitForSignal("signoff", "signoff", payload=Schema(Order), on_timeout='"late"'),
    ChildWorkflow("rollout", "rollout"),
    Step("open", Work(print)),
)
RESULTS = {
    "read": '{"id":1}',
    "build": '{"api":{"id":2},"ui":{"id":3}}',
    "target": '{"branch":"cloud","value":{"id":4}}',
    "poll": '[{"id":5},{"id":6}]',
    "last": '{"id":7}',
    "settle": "null",
    "signoff": '{"id":8}',
    "rollout": '{"id":9}',
}
LOADED = {
    "read": Order(1),
    "build": {"api": Order(2), "ui": {"id": 3}},
    "target": {"branch": "cloud", "value": Order(4)},
    "poll": [Order(5), Order(6)],
    "last": Order(7),
    "settle": None,
    "signoff": Order(8),
    "rollout": {"id": 9},
}


class NoLoan:
    def connection(self) -> Any: ...
    def async_connection(self) -> Any: ...


def journal(**results: str) -> Mapping[str, Entry]:
    return {name: Entry(name, EntryKind.STEP, "completed", text) for name, text in results.items()}


def a_view(entries: Mapping[str, Entry] | None = None, text: str = '{"id":1}', schema: Schema = ANY) -> View:
    run = Run(RUN_ID, "order", "1", Status.RUNNING, 1, 0, text, "default", NOW)
    return View(run, Workflow("order", "1", NODES, input=schema), Registry(), entries or {}, ())


def a_context(view: View | None = None, step_id: str = "open", **facts: Any) -> StepContext[Any]:
    facts = {"purpose": Purpose.STEP, "work": ORDER, **facts}
    return StepContext(Call(step_id, **facts), view or a_view(), lending=NoLoan(), cancelled=threading.Event())


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("name", RESULTS)
def test_results_have_the_types_of_their_handlers(name: str) -> None:
    ctx = a_context(a_view(journal(**RESULTS)))
    assert ctx.results[name] == LOADED[name]
    assert ctx.results[name] is ctx.results[name]


def test_results_are_a_mapping_of_what_has_finished_in_the_order_of_definition() -> None:
    entries = {**journal(poll="[]", read='{"id":1}'), "open": Entry("open", EntryKind.STEP, "suspended", "1")}
    ctx = a_context(a_view(entries))
    assert list(ctx.results) == ["read", "poll"]
    assert len(ctx.results) == 2
    assert dict(ctx.results) == {"read": Order(1), "poll": []}
    assert "open" not in ctx.results
    assert repr(ctx.results) == "<results of read, poll>"


@pytest.mark.parametrize(("entries", "there"), [({}, "none yet"), (journal(read="1", poll="[]"), "'read', 'poll'")])
def test_a_missing_result_says_which_there_are(entries: Mapping[str, Entry], there: str) -> None:
    with pytest.raises(KeyError, match=f"no finished node 'reed'; finished: {there}"):
        _ = a_context(a_view(entries)).results["reed"]


def test_the_value_of_on_timeout_need_not_match_the_payload() -> None:
    assert a_context(a_view(journal(signoff='"late"'))).results["signoff"] == "late"


def test_a_result_that_no_longer_matches_says_whose() -> None:
    with pytest.raises(PayloadError, match="the result of step 'read' of workflow 'order'"):
        _ = a_context(a_view(journal(read='"x"'))).results["read"]


def test_load_result_of_what_has_not_finished() -> None:
    with pytest.raises(KeyError):
        load_result(Workflow("order", "1", NODES), "read", {})


@pytest.mark.parametrize(
    ("step_id", "node"),
    [("read", "read"), ("build/api", "build"), ("poll[12]", "poll"), ("undo:target/cloud", "target"), ("gone", None)],
)
def test_journal_keys_lead_to_their_node(step_id: str, node: str | None) -> None:
    found = node_of(Workflow("order", "1", NODES), step_id)
    assert (found.name if found else None) == node
    assert node_of(None, step_id) is None


@pytest.mark.parametrize(
    ("step_id", "typed"),
    [("read", True), ("build/api", True), ("build/ui", False), ("target/cloud", True), ("poll[3]", True),
     ("signoff", True), ("rollout", False), ("build/gone", False), ("", False)],
)  # fmt: skip
def test_journal_keys_lead_to_their_type(step_id: str, typed: bool) -> None:
    assert (schema_of(Workflow("order", "1", NODES), step_id) is not ANY) is typed


# ---------------------------------------------------------------- facts


def test_the_input_is_typed_and_loaded_once() -> None:
    ctx = a_context(a_view(schema=Schema(Order)))
    assert ctx.input == Order(1)
    assert ctx.input is ctx.input


def test_an_input_that_does_not_match_says_where() -> None:
    with pytest.raises(PayloadError, match="the input of the run, for step 'open' of workflow 'order'"):
        _ = a_context(a_view(text='"x"', schema=Schema(Order))).input


def test_plain_facts() -> None:
    ctx = a_context(attempt=3)
    assert (ctx.run_id, ctx.step_id, ctx.attempt) == (RUN_ID, "open", 3)
    assert ctx.idempotency_key == f"{RUN_ID}:open"
    assert ctx.idempotency_key == a_context(attempt=4).idempotency_key
    assert (ctx.item, ctx.iteration, ctx.snapshot, ctx.resume_data, ctx.output, ctx.app) == (None,) * 6
    assert repr(ctx) == f"<StepContext of step 'open', run {RUN_ID}, attempt 3>"
    ctx.progress(1)  # nobody listens
    ctx.heartbeat()


def test_re_entry_after_suspend() -> None:
    ctx = a_context(snapshot='{"a":1}', resume_data='{"ok":true}')
    assert ctx.snapshot == {"a": 1}
    assert ctx.resume_data == {"ok": True}


@pytest.mark.parametrize(("type_", "output"), [(Schema(Order), Order(1)), (ANY, {"id": 1})])
def test_a_compensator_sees_the_output_as_its_steps_type(type_: Schema, output: Any) -> None:
    facts: dict[str, Any] = {"purpose": Purpose.UNDO, "output": '{"id":1}', "undoes": "read", "output_type": type_}
    assert a_context(step_id="undo:read", **facts).output == output


def test_items() -> None:
    view = a_view(schema=Schema(Order))
    fed = Loop("fed", ORDER, feedback=lambda result: result)
    assert a_context(view, "poll[0]", iteration=0, loop=NODES[3]).item == Order(1)
    assert a_context(view, "poll[1]", iteration=1, item='{"id":2}', loop=NODES[3]).item == Order(2)
    assert a_context(view, "fed[1]", iteration=1, item='{"id":2}', loop=fed).item == {"id": 2}
    undo: dict[str, Any] = {"purpose": Purpose.UNDO, "undoes": "poll[1]", "iteration": 1}
    assert a_context(view, "undo:poll[1]", item='{"id":2}', **undo).item == Order(2)
    ctx = a_context(view, "poll[0]", iteration=0, loop=NODES[3])
    ctx.give_item(None)
    assert ctx.item is None


def test_cancelled_follows_the_flag() -> None:
    flag = threading.Event()
    ctx: StepContext[Any] = StepContext(Call("open", Purpose.STEP, ORDER), a_view(), lending=NoLoan(), cancelled=flag)
    assert not ctx.cancelled
    flag.set()
    assert ctx.cancelled


def test_every_record_has_run_workflow_and_step(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        a_context(attempt=2).logger.info("charged %s", 42, extra={"card": "visa"})
    record: Any = caplog.records[0]
    assert record.getMessage() == "charged 42"
    assert (record.run, record.workflow, record.step, record.attempt) == (str(RUN_ID), "order", "open", 2)
    assert record.card == "visa"


def test_progress_without_a_loop_is_reported_directly() -> None:
    seen: list[Mapping[str, Any]] = []
    options: dict[str, Any] = {"lending": NoLoan(), "cancelled": threading.Event(), "on_progress": seen.append}
    ctx: StepContext[Any] = StepContext(Call("open", Purpose.STEP, ORDER), a_view(), **options)
    ctx.progress(1, 2)
    assert seen == [{"done": 1, "total": 2}]
