"""Results, read from the journal as the types that the handlers declare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from tests.unit.core.model import World, once

from durable.core.results import Results, load_result, node_of, schema_of
from durable.define.builder import define
from durable.define.payload import ANY
from durable.errors import PayloadError


@dataclass
class Money:
    cents: int


def pay(ctx: Any) -> Money:
    return Money(3)


FLOW = (
    define("w")
    .step("pay", pay)
    .parallel("p", {"x": pay})
    .route("r", lambda ctx: "x", {"x": pay})
    .loop("n", pay, max_iterations=1)
    .sleep("nap", 0)
    .wait_for_signal("go", "go", type=Money)
    .step("last", once(1))
).workflow


def results() -> Results:
    world = World(define("w").step("pay", pay).parallel("p", {"x": pay}).sleep("nap", 60))
    run = world.start("w")
    world.drain()
    return Results(run.view.workflow, run.journal)


def test_results_are_typed_and_loaded_once() -> None:
    found = results()
    assert found["pay"] == Money(3)
    assert found["pay"] is found["pay"]
    assert found["p"] == {"x": Money(3)}
    assert (list(found), len(found)) == (["pay", "p"], 2)
    assert repr(found) == "<results of pay, p>"


def test_what_has_not_finished_is_a_key_error_that_lists_what_has() -> None:
    with pytest.raises(KeyError, match="no finished node 'nap'; finished: 'pay', 'p'"):
        results()["nap"]
    with pytest.raises(KeyError, match="no finished node 'p/x'"):
        results()["p/x"]
    with pytest.raises(KeyError, match="none yet"):
        Results(None, {})["pay"]
    assert repr(Results(None, {})) == "<results of no node yet>"
    with pytest.raises(KeyError):
        load_result(FLOW, "unknown", {})


def test_a_type_that_changed_is_named() -> None:
    run = World(old := define("w").step("pay", once("three"))).start(old)
    run.world.drain()
    with pytest.raises(PayloadError, match="the result of step 'pay' of workflow 'w'"):
        load_result(FLOW, "pay", run.journal)


@pytest.mark.parametrize("key", ["pay", "undo:pay", "p/x", "undo:p/x", "r/x", "n[0]", "undo:n[0]", "go"])
def test_the_schema_behind_a_journal_key(key: str) -> None:
    assert schema_of(FLOW, key).load('{"cents":1}') == Money(1)


@pytest.mark.parametrize("key", ["p/gone", "p", "nap", "gone", "", "choice:r"])
def test_anything_else_is_plain_json(key: str) -> None:
    assert schema_of(FLOW, key) is ANY
    assert schema_of(None, key) is ANY
    assert node_of(None, key) is None
