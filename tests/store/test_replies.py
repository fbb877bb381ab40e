"""A message that wants a reply: which run of a chain has it, what it was answered, and when no answer can come."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from tests.store.kit import read, rows, started, transition

from durable.core.state import MessageKind, Run
from durable.core.transition import Successor, Transition
from durable.errors import RunNotFound
from durable.store import operations
from durable.store.apply import apply
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.inbox import load_inbox
from durable.store.operations import Sent
from durable.store.read import Answer, answer
from durable.values import Status


async def write(store: Store, connection: Connection, made: Transition) -> Run:
    async with connection.transaction():
        await apply(store, connection, made)
    return made.after


async def ask(store: Store, connection: Connection, run_id: uuid.UUID, message: str = "m-1") -> str:
    query = operations.send(store, run_id, MessageKind.SIGNAL, "quote", "1", message, wants_reply=True)
    return (await operations.execute_async(query, connection)).answer


async def reply(store: Store, connection: Connection, run: Run, text: str = '{"price": 1.50}') -> Run:
    (message,) = await load_inbox(store, connection, run.id)
    return await write(
        store, connection, transition(run, after={"status": Status.RUNNING}, replies={message.seq: text})
    )


async def end(store: Store, connection: Connection, run: Run, status: Status = Status.COMPLETED, **parts: Any) -> Run:
    now = (await rows(connection, "select durable.engine_now()"))[0][0]
    after = {"status": status, "finished_at": now, **parts.pop("after", {})}
    return await write(store, connection, transition(run, after=after, **parts))


async def go_on(store: Store, connection: Connection, run: Run) -> Run:
    """continue_as_new; the successor."""
    new = uuid.uuid4()
    await end(store, connection, run, after={"successor": new}, successor=Successor(new, run.version, "2"))
    return await read(store, connection, new)


def found(answer: Answer) -> tuple[uuid.UUID, bool, str | None, bool]:
    return answer.run.id, answer.replied, answer.reply, answer.too_late


async def test_a_request_is_a_message_that_wants_a_reply(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    assert await ask(store, connection, run.id) == "sent"
    plain = operations.send(store, run.id, MessageKind.SIGNAL, "quote", "2", "m-2")
    assert await operations.execute_async(plain, connection) == Sent("sent")
    wanted = "select message_id, wants_reply, replied_at from durable.inbox where run_id = %s order by seq"
    assert await rows(connection, wanted, run.id) == [("m-1", True, None), ("m-2", False, None)]


async def test_it_has_no_reply_and_then_it_has(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    await ask(store, connection, run.id)
    assert found(await answer(store, connection, run.id, "m-1")) == (run.id, False, None, False)
    run = await reply(store, connection, run)
    assert found(await answer(store, connection, run.id, "m-1")) == (run.id, True, '{"price": 1.50}', False)
    await end(store, connection, run)
    answered = await answer(store, connection, run.id, "m-1")
    assert (answered.replied, answered.run.status, answered.run.workflow) == (True, Status.COMPLETED, "order")
    assert await ask(store, connection, run.id) == "duplicate"  # asked again, it is found again


async def test_an_ended_run_replies_no_more(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    await ask(store, connection, run.id)
    await end(store, connection, run, Status.CANCELED, after={"reason": "enough"})
    answered = await answer(store, connection, run.id, "m-1")
    assert found(answered) == (run.id, False, None, True)
    assert (answered.run.status, answered.run.reason) == (Status.CANCELED, "enough")
    assert await ask(store, connection, run.id, "m-2") == "finished"


async def test_a_message_that_moved_is_found_from_everywhere(store: Store, connection: Connection) -> None:
    first = await started(store, connection)
    await ask(store, connection, first.id)
    second = await go_on(store, connection, first)
    third = await go_on(store, connection, second)
    for run in (first, second, third):
        assert found(await answer(store, connection, run.id, "m-1")) == (third.id, False, None, False)
    await reply(store, connection, third)
    for run in (first, second, third):
        assert found(await answer(store, connection, run.id, "m-1")) == (third.id, True, '{"price": 1.50}', False)


async def test_an_answer_of_an_earlier_run_is_found_from_its_successor(store: Store, connection: Connection) -> None:
    first = await started(store, connection)
    await ask(store, connection, first.id)
    second = await go_on(store, connection, await reply(store, connection, first))
    assert await ask(store, connection, second.id) == "duplicate"
    assert found(await answer(store, connection, second.id, "m-1"))[:3] == (first.id, True, '{"price": 1.50}')


async def test_what_was_taken_without_a_reply_is_not_answered_by_a_successor(
    store: Store, connection: Connection
) -> None:
    first = await started(store, connection)
    await ask(store, connection, first.id)
    (message,) = await load_inbox(store, connection, first.id)
    taken = transition(first, after={"status": Status.RUNNING}, taken={message.seq: "wait"})
    second = await go_on(store, connection, await write(store, connection, taken))
    assert found(await answer(store, connection, second.id, "m-1")) == (first.id, False, None, True)


async def test_a_message_that_crosses_the_end_is_still_on_its_way(store: Store, connection: Connection) -> None:
    """It came after the successor had taken the inbox over, and is sent on by its doorbell."""
    first = await started(store, connection)
    await go_on(store, connection, first)
    late = "insert into durable.inbox (run_id, kind, message_id, sent_at) values (%s, 'signal', 'late', now())"
    await connection.execute(late.encode(), [first.id])
    assert found(await answer(store, connection, first.id, "late")) == (first.id, False, None, False)


async def test_a_message_that_nobody_has(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    for run_id in (run.id, uuid.uuid4()):
        with pytest.raises(RunNotFound):
            await answer(store, connection, run_id, "m-1")


class Reversed:
    def encode(self, plain: bytes, /) -> bytes:
        return plain[::-1]

    decode = encode


async def test_it_goes_through_the_codec(module_dsn: str, connection: Connection) -> None:
    store = Store(module_dsn, codec=Reversed())
    run = await started(store, connection)
    await ask(store, connection, run.id)
    await reply(store, connection, run, '"secret"')
    assert (await answer(store, connection, run.id, "m-1")).reply == '"secret"'
    assert await rows(
        connection, "select reply::text like '%%secret%%' from durable.inbox where run_id = %s", run.id
    ) == [(False,)]
