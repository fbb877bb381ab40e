"""Values of the core go into columns and come back the same, with a codec and without."""

from __future__ import annotations

import json
import uuid
import zlib
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durable.core.state import Begun, Ending, Failure
from durable.errors import PayloadError
from durable.store import codec
from durable.store.codec import Payloads
from durable.values import Status, WaitingFor


class Zip:
    def encode(self, plain: bytes, /) -> bytes:
        return zlib.compress(plain)

    def decode(self, stored: bytes, /) -> bytes:
        return zlib.decompress(stored)


ways = pytest.mark.parametrize("payloads", [Payloads(), Payloads(Zip())], ids=["plain", "zip"])

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
zones = st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=45))])
times = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=zones)  # noqa: DTZ001 - given a zone


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


failures = st.builds(
    Failure,
    type=text,
    message=text,
    kind=st.sampled_from(["error", "critical", "timeout"]),
    step=maybe(text),
    attempts=st.integers(1, 9),
    traceback=maybe(text),
    details=maybe(st.dictionaries(text, json_values, max_size=3)),
)
begun = st.builds(
    Begun,
    attempts=st.integers(0, 9),
    crashes=st.integers(0, 9),
    since=maybe(times),
    due=maybe(times),
    waits=maybe(st.sampled_from(WaitingFor)),
    name=maybe(text),
    deadline=maybe(times),
    names=maybe(st.lists(text, max_size=3).map(tuple)),
    child=maybe(st.uuids()),
    resume_data=maybe(json_values.map(json.dumps)),
    running=st.booleans(),
)
endings = st.builds(
    Ending,
    status=st.sampled_from([Status.FAILED, Status.CANCELED]),
    error=maybe(failures),
    reason=maybe(text),
    answer_to=maybe(text),
    to=maybe(text),
    compensate=st.booleans(),
    until=maybe(times),
    stop=st.booleans(),
)


@ways
@given(value=json_values)
def test_payloads(payloads: Payloads, value: Any) -> None:
    plain = json.dumps(value)
    stored = payloads.encode(plain)
    json.loads(stored)  # the column is JSON in any case
    assert payloads.decode(stored) == plain
    assert payloads.decode(json.dumps(json.loads(stored))) == plain if stored != plain else True  # as jsonb writes it


@ways
@given(frame=st.dictionaries(text, begun, max_size=3))
def test_frames(payloads: Payloads, frame: dict[str, Begun]) -> None:
    stored = codec.frame_text(frame, payloads)
    assert codec.frame(stored, payloads) == frame
    for step, raw in json.loads(stored).items():  # what the database looks at stands there in the plain
        assert raw.get("waits") == frame[step].waits
        assert raw.get("name") == frame[step].name
        names = frame[step].names
        assert raw.get("names") == (None if names is None else list(names))


@ways
@given(ending=maybe(endings))
def test_endings(payloads: Payloads, ending: Ending | None) -> None:
    assert codec.ending(codec.ending_text(ending, payloads), payloads) == ending


@ways
@given(failure=maybe(failures))
def test_failures(payloads: Payloads, failure: Failure | None) -> None:
    assert codec.failure(payloads.load(payloads.dump(codec.failure_json(failure)))) == failure


def test_defaults_are_left_out() -> None:
    assert codec.frame_text({"a": Begun(attempts=1)}, Payloads()) == '{"a":{"attempts":1}}'
    assert codec.failure_json(Failure("E", "m")) == {"type": "E", "message": "m"}
    when = datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=1)))
    assert codec.frame_text({"a": Begun(due=when)}, Payloads()) == '{"a":{"due":"2026-01-01T00:00:00+00:00"}}'


@pytest.mark.parametrize("plain", ['{"~durable":"aGk="}', '{"~durable": "aGk="}', '{"~durable-plain":"aGk="}'])
def test_a_payload_that_looks_encoded(plain: str) -> None:
    for payloads in (Payloads(), Payloads(Zip())):
        assert payloads.decode(payloads.encode(plain)) == plain


def test_plain_values_are_read_through_a_codec() -> None:
    payloads = Payloads(Zip())
    for plain in ('{"n": 1}', "null", '{"~durable": 1}', '{"~durable":"x","more":1}'):
        assert payloads.decode(plain) == plain


def test_a_codec_that_is_missing_or_another() -> None:
    stored = Payloads(Zip()).encode('"secret"')
    with pytest.raises(PayloadError, match="pass codec="):
        Payloads().decode(stored)

    class Other(Zip):
        def decode(self, stored: bytes, /) -> bytes:
            raise ValueError("wrong key")

    with pytest.raises(PayloadError, match=r"could not decode it \(ValueError: wrong key\)"):
        Payloads(Other()).decode(stored)


def test_only_small_plain_things_are_kept_in_our_documents() -> None:
    assert Payloads().dump({"id": uuid.UUID(int=1), "waiting_for": WaitingFor.SLEEP}) == (
        '{"id":"00000000-0000-0000-0000-000000000001","waiting_for":"sleep"}'
    )
    with pytest.raises(TypeError, match="object"):
        Payloads().dump(object())
