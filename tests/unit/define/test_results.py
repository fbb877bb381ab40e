"""Results are loaded as the types that the handlers declare."""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from durable.define.builder import Builder, define
from durable.define.results import load_result, load_run_result
from durable.errors import PayloadError


class Parcel(BaseModel):
    id: int


def parcel(ctx: Any) -> Parcel: ...


def number(ctx: Any) -> int: ...


def untyped(ctx): ...  # type: ignore[no-untyped-def]


def load(builder: Builder[Any], text: str) -> Any:
    return load_result(builder.workflow.nodes[0], text)


def test_each_kind() -> None:
    assert load(define("w").step("n", parcel), '{"id":1}') == Parcel(id=1)
    mixed = define("w").parallel("n", {"a b": parcel, "class": number, "c": untyped})
    assert load(mixed, '{"a b":{"id":1},"class":2,"c":[3]}') == {"a b": Parcel(id=1), "class": 2, "c": [3]}
    assert load(define("w").parallel("n", {"a": untyped}), '{"a":1}') == {"a": 1}
    route = define("w").route("n", untyped, {"p": parcel, "u": untyped})
    assert load(route, '{"branch":"p","value":{"id":1}}') == {"branch": "p", "value": Parcel(id=1)}
    assert load(route, '{"branch":"u","value":{"id":1}}') == {"branch": "u", "value": {"id": 1}}
    assert load(route, '{"branch":"gone","value":5}') == {"branch": "gone", "value": 5}
    assert load(define("w").loop("n", parcel), '[{"id":1},{"id":2}]') == [Parcel(id=1), Parcel(id=2)]
    last = define("w").loop("n", parcel, keep="last")
    assert load(last, '{"id":1}') == Parcel(id=1)
    assert load(last, "null") is None
    assert load(define("w").sleep("n", 1), "null") is None
    assert load(define("w").child_workflow("n", "c"), '{"id":1}') == {"id": 1}


def test_a_signals_payload_or_the_value_of_its_timeout() -> None:
    late = define("w").wait_for_signal("n", "s", type=Parcel, timeout=1, on_timeout={"late": True})
    assert load(late, '{"id":1}') == Parcel(id=1)
    assert load(late, '{ "late": true }') == {"late": True}
    with pytest.raises(PayloadError):
        load(late, '{"late":false}')
    with pytest.raises(PayloadError):
        load(define("w").wait_for_signal("n", "s", type=Parcel), "null")


def test_the_result_of_a_run() -> None:
    builder = define("w").step("a", parcel).step("b", number)
    assert load_run_result(builder.workflow, '{"a":{"id":1},"b":2,"gone":3}') == {"a": Parcel(id=1), "b": 2, "gone": 3}
    assert load_run_result(define("w", result=parcel).step("a", number).workflow, '{"id":1}') == Parcel(id=1)


def test_text_that_does_not_match() -> None:
    with pytest.raises(PayloadError):
        load(define("w").step("n", parcel), '{"id":"x"}')
