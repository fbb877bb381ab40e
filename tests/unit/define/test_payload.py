"""Payloads: what comes back as it was is stored, all else is refused with its place."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import sys
import uuid
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, computed_field, field_serializer
from typing_extensions import TypedDict

from durable.define.payload import ANY, DURATION, LOOSE, MAX_DEPTH, NOTHING, Schema, canonical_hash
from durable.errors import DefinitionError, PayloadError

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
scalars: st.SearchStrategy[Any] = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | texts
scalars |= st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))


class Color(enum.StrEnum):
    RED = "red"


class Order(BaseModel):
    id: int
    price: Decimal = Decimal(1)
    extra: Any = None


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


class Pair(TypedDict):
    a: int
    b: tuple[int, str]


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


# ---------------------------------------------------------------- plain values


@given(values)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    for schema in (ANY, LOOSE):
        back = schema.load(schema.dump(value))
        assert back == value
        assert repr(back) == repr(value)  # 1 is not 1.0 is not True


@given(values)
def test_a_declared_plain_type_takes_the_same_values_and_gives_the_same_text(value: Any) -> None:
    declared: dict[type, list[Any]] = {dict: [dict[str, Any]], list: [list[Any]], type(None): [None]}
    for annotation in (type(value), *declared.get(type(value), [])):
        schema = Schema(annotation)
        text = schema.dump(value)
        assert text == ANY.dump(value) == schema._typed_text(value)  # which checks that it comes back
        assert repr(schema.load(text)) == repr(value)


@pytest.mark.parametrize("annotation", [dict, dict[str, Any]])
@pytest.mark.parametrize("value", [{"a": (1,)}, {1: 2}, {"a": math.nan}, {"a": 2**63}, {"a": "\0"}, {"a": Point(1)}])
def test_a_declared_plain_type_refuses_what_does_not_come_back(annotation: Any, value: Any) -> None:
    with pytest.raises(PayloadError):
        Schema(annotation).dump(value)


@given(values)
def test_the_text_is_compact_json(value: Any) -> None:
    assert ANY.dump(value) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize(
    ("value", "path", "why"),
    [
        (math.nan, "", "no JSON number"),
        ({"a": [1, math.inf]}, ".a[1]", "no JSON number"),
        (2**63, "", "64 bits"),
        ([-(2**63) - 1], "[0]", "64 bits"),
        ("a\0b", "", "u0000"),
        ({"k\0": 1}, "", "u0000"),
        ("\ud800", "", "surrogate"),
        ({"a": {"\udfff": 1}}, ".a", "surrogate"),
        ({"a": (1, 2)}, ".a", "tuple would come back as a list"),
        ({1, 2}, "", "set would come back as a list"),
        ({1: "a"}, "", "the key 1"),
        ({None: 1}, "", "the key None"),
        (b"x", "", "bytes"),
        (Order(id=1), "", "an Order"),
        ([Point(1)], "[0]", "a Point"),
        (datetime.now(UTC), "", "a datetime"),
        (Decimal(1), "", "a Decimal"),
        (object(), "", "an object"),
        (nested(MAX_DEPTH + 1), None, "nested too deeply"),
    ],
)
def test_what_plain_json_cannot_hold_is_refused_with_its_place(value: Any, path: str | None, why: str) -> None:
    with pytest.raises(PayloadError, match=why) as caught:
        ANY.dump(value)
    if path is not None:
        assert caught.value.path == path
    str(caught.value).encode()  # the message itself can be stored and printed


@pytest.mark.parametrize("schema", [ANY, LOOSE, Schema(list), Schema(list[Any])])
def test_depth_is_limited_without_a_recursion_error(schema: Schema) -> None:
    deepest = nested(MAX_DEPTH)
    assert schema.load(schema.dump(deepest)) == deepest
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    for value in (nested(MAX_DEPTH + 1), nested(5_000), nested(100_000), cyclic):
        with pytest.raises(PayloadError):
            schema.dump(value)


def test_a_stack_that_is_nearly_full_gives_no_recursion_error() -> None:
    def dive(left: int) -> str:
        return ANY.dump(nested(MAX_DEPTH)) if left == 0 else dive(left - 1)

    with pytest.raises(PayloadError, match="nested"):
        dive(sys.getrecursionlimit() - len_of_stack() - 60)


def len_of_stack() -> int:
    frame, count = sys._getframe(), 0
    while frame.f_back is not None:
        frame, count = frame.f_back, count + 1
    return count


def test_an_escaped_backslash_before_u0000_is_no_null_character() -> None:
    assert ANY.load(ANY.dump("\\u0000")) == "\\u0000"


def test_subclasses_that_equal_a_plain_value_are_taken() -> None:
    assert ANY.dump({"c": Color.RED, Color.RED: 1}) == '{"c":"red","red":1}'


@pytest.mark.parametrize("text", ["", "{", "nope", "NaN", "[Infinity]", "[" * 100_000, "{'a': 1}", "9" * 5000])
def test_text_that_is_no_json(text: str) -> None:
    for schema in (ANY, Schema(Order)):
        with pytest.raises(PayloadError):
            schema.load(text)


# ---------------------------------------------------------------- declared types


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Order, Order(id=3, price=Decimal("1.10"))),
        (Point, Point(1.5)),
        (Pair, {"a": 1, "b": (1, "x")}),
        (tuple[int, str], (1, "a")),
        (dict[int, str], {1: "a"}),
        (set[int], {1, 2}),
        (frozenset[str], frozenset({"a"})),
        (datetime, datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)),
        (date, date(2026, 1, 2)),
        (timedelta, timedelta(days=-1, microseconds=3)),
        (Decimal, Decimal("1.000")),
        (uuid.UUID, uuid.UUID(int=5)),
        (Color, Color.RED),
        (bytes, b"abc"),
        (Order | None, None),
        (Order | Point, Point(2)),
        (list[Order], [Order(id=1), Order(id=2)]),
        (Literal["a", 1], 1),
        (None, None),
        (int, 5),
        (float, 5),
    ],
)
def test_declared_types_come_back(annotation: Any, value: Any) -> None:
    schema = Schema(annotation)
    back = schema.load(schema.dump(value))
    assert back == value
    if annotation is not float:
        assert type(back) is type(value)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, "5"),
        (int, 2**63),
        (float, math.nan),
        (float | None, math.nan),
        (str, "a\0"),
        (str, "\ud800"),
        (str, 5),
        (Order, {"id": 1}),
        (Order, Point(1)),
        (Order, Order(id=1, extra=(1, 2))),
        (Order, Order(id=1, extra=math.nan)),
        (Order, Order(id=2**64)),
        (Point, Point(math.inf)),
        (list, [(1, 2)]),
        (dict[str, Any], {"a": {1}}),
        (dict[str, Any], {"a": Decimal(1)}),
        (list[int], (1, 2)),
        (bytes, b"\xff"),
        (Any | None, {1, 2}),
        (int, object()),
    ],
)
def test_what_would_come_back_as_something_else_is_refused(annotation: Any, value: Any) -> None:
    with pytest.raises(PayloadError):
        Schema(annotation).dump(value)


def test_the_message_says_where_and_what() -> None:
    with pytest.raises(
        PayloadError, match=r"at \.extra\.a\[0\]: a tuple would come back as a list \(declared: Order\)"
    ):
        Schema(Order).dump(Order(id=1, extra={"a": [(1,)]}))
    with pytest.raises(PayloadError, match="does not match Order: id: Field required"):
        Schema(Order).load("{}")


def test_a_subclass_that_would_lose_its_class_is_refused() -> None:
    class Special(Order):
        more: int = 1

    with pytest.raises(PayloadError, match="a Special would come back as an Order"):
        Schema(Order).dump(Special(id=1))


def test_a_type_without_eq_is_taken_if_it_is_stable() -> None:
    @dataclasses.dataclass(eq=False)
    class Plain:
        x: int

    schema = Schema(Plain)
    assert schema.load(schema.dump(Plain(3))).x == 3


def test_computed_aliased_and_excluded_fields() -> None:
    class Rich(BaseModel):
        model_config = ConfigDict(extra="forbid", validate_by_name=True, validate_by_alias=True)
        width: int = Field(alias="w")
        secret: str = Field(default="", exclude=True)

        @computed_field  # type: ignore[prop-decorator]
        @property
        def double(self) -> int:
            return self.width * 2

    schema = Schema(Rich)
    assert schema.load(schema.dump(Rich(w=2, secret="s"))).double == 4


def test_an_error_in_a_users_serializer_is_a_payload_error() -> None:
    class Broken(BaseModel):
        x: int

        @field_serializer("x")
        def _x(self, _: int) -> int:
            raise RuntimeError("no")

    for schema in (Schema(Broken), LOOSE):
        with pytest.raises(PayloadError, match="can't be turned into JSON"):
            schema.dump(Broken(x=1))


def test_types_that_cannot_be_stored_are_found_at_definition() -> None:
    class Opaque: ...

    for annotation in (Opaque, list[Opaque], 5, "Missing"):
        with pytest.raises(DefinitionError):
            Schema(annotation)


# ---------------------------------------------------------------- loose, coerced, prepared


def test_loose_dumps_what_pydantic_can_serialise() -> None:
    value = {"o": Order(id=1), "t": (1, 2), "d": date(2026, 1, 1), "c": Color.RED, "p": Point(1), 1: {3}}
    plain = {"o": {"id": 1, "price": "1", "extra": None}, "t": [1, 2], "d": "2026-01-01", "c": "red",
             "p": {"x": 1, "y": 0.0}, "1": [3]}  # fmt: skip
    assert json.loads(LOOSE.dump(value)) == plain


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        (math.nan,),
        {1: math.nan},
        Order(id=1, extra=math.nan),
        Point(math.nan),
        [Point(math.inf)],
        (2**63,),
        ("\0",),
        ("\ud800",),
        Order(id=2**70),
        object(),
        [object()],
    ],
)
def test_loose_still_refuses_what_json_or_postgres_cannot_hold(value: Any) -> None:
    with pytest.raises(PayloadError):
        LOOSE.dump(value)


def test_an_input_takes_plain_json_that_matches() -> None:
    schema = Schema.of_input(Order)
    assert schema.dump({"id": 1}) == schema.dump(Order(id=1)) == '{"id":1,"price":"1","extra":null}'
    wrongs: list[Any] = [{"id": "x"}, {}, None, [], Point(1), "x"]
    for wrong in wrongs:
        with pytest.raises(PayloadError):
            schema.dump(wrong)
    assert Schema.of_input(Any) is ANY


def test_prepare_is_applied_first() -> None:
    assert Schema(str, prepare=lambda v: v.upper()).dump("a") == '"A"'
    assert NOTHING.dump(object()) == "null"


@pytest.mark.parametrize("value", [5, 2.5, -3, timedelta(minutes=5), timedelta(seconds=-1.5), datetime.now(UTC)])
def test_durations_come_back(value: Any) -> None:
    back = DURATION.load(DURATION.dump(value))
    assert back == value
    assert isinstance(back, float if isinstance(value, int | float) else type(value))


@pytest.mark.parametrize(
    "value",
    [
        True,
        None,
        "soon",
        math.nan,
        math.inf,
        10**400,
        timedelta.max,
        timedelta.min,
        datetime.max.replace(tzinfo=UTC),
        datetime(2026, 1, 1),  # noqa: DTZ001
    ],
)
def test_what_is_no_duration(value: Any) -> None:
    with pytest.raises(PayloadError):
        DURATION.dump(value)


# ---------------------------------------------------------------- hash


@given(st.dictionaries(texts, values, max_size=6))
def test_the_hash_does_not_depend_on_order_or_layout(value: dict[str, Any]) -> None:
    turned = dict(reversed(list(value.items())))
    assert canonical_hash(ANY.dump(value)) == canonical_hash(json.dumps(turned, indent=2))


def test_the_hash_tells_values_apart() -> None:
    assert len({canonical_hash(t) for t in ("1", "1.0", '"1"', "true", "null", "[]", "{}", '{"a":1}')}) == 8
    with pytest.raises(PayloadError):
        canonical_hash("nope")


def test_payload_errors_can_be_told_where() -> None:
    error = PayloadError("bad", path=".a").at("the result of step 'x'")
    assert str(error) == "the result of step 'x': at .a: bad"
    assert error.at("elsewhere") is error
