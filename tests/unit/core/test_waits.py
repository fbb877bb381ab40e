"""Sleeps and waits for signals."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.unit.core.model import START, Sim, World, calls, once

from durable import errors
from durable.define.builder import define
from durable.values import Status, WaitingFor

MINUTE = timedelta(minutes=1)


# ---------------------------------------------------------------- sleep


@pytest.mark.behaviour("SD-19", "SN-13")
@pytest.mark.parametrize(
    "duration",
    [60, MINUTE, START + MINUTE, lambda ctx: 60, lambda ctx: 60.0, lambda ctx: MINUTE, lambda ctx: START + MINUTE],
    ids=["seconds", "timedelta", "datetime", "a number", "a float", "a timedelta", "a datetime"],
)
def test_a_sleep_parks_until_its_time(duration: Any) -> None:
    flow = define("nap").step("a", once(1)).sleep("nap", duration).step("b", once(2))
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.waits() == (WaitingFor.SLEEP, "nap")
    assert run.rest() == MINUTE
    assert run.run.current_step == 1
    assert world.jobs == [], "nothing lies in the queue for later"
    world.skip(59)
    assert run.has(Status.SUSPENDED)
    world.skip(1)
    assert run.result == {"a": 1, "nap": None, "b": 2}
    assert run.journal["nap"].started_at == START
    assert run.journal["nap"].finished_at == START + MINUTE


@pytest.mark.behaviour("SN-37")
@pytest.mark.parametrize(
    "duration", [0, START - MINUTE, lambda ctx: -60, lambda ctx: -MINUTE, lambda ctx: START - MINUTE]
)
def test_a_sleep_that_is_over_already_does_not_park(duration: Any) -> None:
    flow = define("nap").sleep("nap", duration).step("after", once("done"))
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.result == {"nap": None, "after": "done"}
    assert "suspended" not in run.statuses


def test_a_computed_sleep_is_computed_once_and_retried_until_it_is() -> None:
    when = once(ValueError(), 60)
    flow = define("nap").sleep("nap", when)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.waits() == (WaitingFor.RETRY, "nap")
    world.skip(1)
    assert run.waits() == (WaitingFor.SLEEP, "nap")
    assert run.pause()
    assert run.resume()
    world.drain()
    assert run.rest() == MINUTE
    world.skip(60)
    assert run.status is Status.COMPLETED
    assert calls(when) == 2


def test_a_time_that_is_none_fails_the_sleep() -> None:
    naive = START.replace(tzinfo=None)
    for wrong in (naive, "tomorrow", True, errors.NonRetryable("never")):
        flow = define("nap").sleep("nap", once(wrong)).step("b", once(1))
        world = World(flow)
        run = world.start(flow)
        world.drive()
        assert run.status is Status.FAILED
        assert (run.journal["nap"].status, run.journal["nap"].kind) == ("failed", "sleep")
        assert run.keys() == []


# ---------------------------------------------------------------- signals


@pytest.mark.behaviour("SD-17", "SD-18", "SN-38", "SN-14", "SD-21")
def test_a_wait_takes_its_signal_and_yields_the_payload() -> None:
    flow = (
        define("approve")
        .step("prepare", once(1))
        .wait_for_signal("approved", "approved")
        .step("finish", lambda ctx: ctx.results["approved"])
    )
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.waits() == (WaitingFor.SIGNAL, "approved")
    assert (run.run.current_step, run.run.wake_at, world.jobs) == (1, None, [])
    assert not run.resume("other", 1)
    assert run.signal("other", 1), "buffered, for whoever waits for it"
    world.drain()
    assert run.waits() == (WaitingFor.SIGNAL, "approved")
    assert run.resume("approved", {"by": "me"})
    world.drain()
    assert run.result == {"prepare": 1, "approved": {"by": "me"}, "finish": {"by": "me"}}
    assert list(run.taken.values()) == ["approved"]
    assert run.journal["approved"].extra == {"signal": "approved"}
    assert not run.resume("approved", 2)


def test_a_signal_that_came_before_is_taken_and_the_oldest_first() -> None:
    flow = define("two").wait_for_signal("first", "go").wait_for_signal("second", "go")
    world = World(flow)
    run = world.start(flow)
    for n in (1, 2, 3):
        run.signal("go", n)
    world.drain()
    assert run.result == {"first": 1, "second": 2}
    assert [message.body for message in run.inbox] == ["3"]


def test_the_same_id_twice_is_one_message() -> None:
    flow = define("two").wait_for_signal("first", "go").wait_for_signal("second", "go")
    world = World(flow)
    run = world.start(flow)
    assert run.signal("go", 1, id="x")
    assert not run.signal("go", 1, id="x")
    world.drain()
    assert run.waits() == (WaitingFor.SIGNAL, "go")
    assert run.keys() == ["first"]


def waiting(**more: Any) -> Sim:
    flow = (
        define("wait").step("a", once(1), compensate=once(None)).wait_for_signal("w", "go", timeout=3 * MINUTE, **more)
    )
    world = World(flow)
    run = world.start(flow)
    world.drain()
    return run


def test_a_wait_times_out() -> None:
    run = waiting()
    assert run.rest() == 3 * MINUTE
    run.world.skip(179)
    assert run.has(Status.SUSPENDED)
    run.world.skip(1)
    assert run.has(Status.FAILED)
    assert run.error == "SignalTimeout: no signal 'go' came to 'w' within 0:03:00"
    assert run.run.error is not None
    assert run.run.error.kind == "timeout"
    assert run.journal["w"].status == "failed"
    assert run.undone() == ["a"]


@pytest.mark.parametrize("value", [None, {"late": True}, "no"])
def test_a_timeout_can_yield_a_value_instead(value: Any) -> None:
    run = waiting(on_timeout=value)
    run.world.skip(180)
    assert run.result == {"a": 1, "w": value}
    assert (run.journal["w"].extra or {})["timed_out"]


@pytest.mark.parametrize(("late", "taken"), [(0, True), (1, False)])
def test_a_message_counts_if_it_was_sent_before_the_deadline_however_late_it_is_read(late: int, taken: bool) -> None:
    run = waiting(on_timeout="none")
    run.pause()
    run.world.skip(180 + late)
    run.signal("go", "yes")
    run.world.skip(100)
    assert run.has(Status.PAUSED), "a wait's deadline does not end a pause"
    run.resume()
    run.world.drain()
    assert run.value("w") == ("yes" if taken else "none")


def test_a_timeout_of_zero_takes_what_is_there() -> None:
    flow = define("poll").wait_for_signal("w", "go", timeout=0, on_timeout="nothing").wait_for_signal("v", "go")
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.value("w") == "nothing"
    run.signal("go", 1)
    world.drain()
    assert run.value("v") == 1


def test_a_payload_of_the_wrong_type_fails_the_wait_and_a_retry_waits_anew() -> None:
    run = waiting(type=int)
    run.signal("go", "three")
    run.world.drain()
    assert run.has(Status.FAILED)
    assert run.error.startswith("PayloadError: signal 'go' for 'w'")
    assert run.inbox == []
    plain = define("wait").wait_for_signal("w", "go", type=int)
    world = World(plain)
    again = world.start(plain)
    again.signal("go", "three")
    world.drain()
    assert again.retry() == "accepted"
    world.drain()
    again.signal("go", 3)
    world.drain()
    assert again.result == {"w": 3}


def test_the_name_can_be_computed_and_stays_what_it_was() -> None:
    name = once(ValueError(), lambda ctx: f"approve.{ctx.input}")
    flow = define("named").wait_for_signal("w", name, timeout=MINUTE)
    world = World(flow)
    run = world.start(flow, 7)
    run.signal("approve.7", "early")
    world.drive()
    assert run.result == {"w": "early"}
    other = world.start(flow, 8)
    world.drain()
    assert other.waits() == (WaitingFor.SIGNAL, "approve.8")
    assert other.resume("approve.8")
    world.drain()
    assert other.result == {"w": None}
    assert calls(name) == 3


def test_a_retry_after_the_timeout_has_a_new_one() -> None:
    flow = define("wait").wait_for_signal("w", "go", timeout=MINUTE)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    world.skip(60)
    assert run.has(Status.FAILED)
    world.skip(1000)
    assert run.retry() == "accepted"
    world.drain()
    assert run.rest() == MINUTE
    run.signal("go", 1)
    world.drain()
    assert run.result == {"w": 1}


def test_a_waits_time_is_written_once() -> None:
    run = waiting()
    run.world.skip(60)
    run.signal("other")
    run.world.drain()
    run.pause()
    run.resume()
    run.world.drain()
    assert run.rest() == 2 * MINUTE
