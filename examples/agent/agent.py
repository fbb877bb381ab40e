"""An agent: a model that calls tools, in a loop, until it has an answer. One tool gives money away: a person decides.

The model is a script, so that the example needs no account and always does the same; a real one takes the place of
``ask_model`` and of nothing else. Each answer of the model and each call of a tool is a step: after a crash the
conversation goes on where it was, and no tool is called again that has been called.
"""

from __future__ import annotations

import os
import time
from typing import Any, Final, Literal

from pydantic import BaseModel
from sqlalchemy import text

from durable import Break, Context, NonRetryable, StepContext, Suspend, step, workflow

THINKING: Final = float(os.environ.get("THINKING", "0.2"))
"""Seconds that the model takes for an answer."""

TABLES: Final = """
create schema if not exists agent;
create table if not exists agent.refunds (invoice text not null, cents integer not null);
create table if not exists agent.mails (key text primary key, recipient text not null, body text not null);
"""
INVOICES: Final = {"R-17": {"customer": "ada@inbox.example", "cents": 4_900, "paid": 2}}


class ToolCall(BaseModel):
    """What the model wants to be done."""

    tool: Literal["look_up", "refund", "send_mail"]
    arguments: dict[str, Any]


class Said(BaseModel):
    """One entry of the conversation."""

    by: Literal["user", "model", "tool"]
    text: str
    calls: list[ToolCall] = []


class Conversation(BaseModel):
    said: list[Said]

    def and_then(self, *more: Said) -> Conversation:
        return Conversation(said=[*self.said, *more])


class Decision(BaseModel):
    """Whether a tool may be called, and who says so."""

    approved: bool
    by: str


# ---------------------------------------------------------------- the workflow


@workflow
async def agent(ctx: Context, question: str) -> str:
    return await ctx.loop("turn", turn, Conversation(said=[Said(by="user", text=question)]))


async def turn(ctx: Context, so_far: Conversation) -> Conversation | Break[str]:
    """The model speaks; then the tools that it wants are called, one after the other."""
    answer = await ctx.step(ask_model, so_far)
    if not answer.calls:
        return Break(answer.text)
    results = [Said(by="tool", text=await ctx.step(call_tool, call)) for call in answer.calls]
    return so_far.and_then(answer, *results)


# ---------------------------------------------------------------- the steps


@step(transactional=False)  # it takes long, and writes nothing
def ask_model(so_far: Conversation) -> Said:
    """The script. It goes by what the tools have said so far, as a model would."""
    time.sleep(THINKING)
    results = [said.text for said in so_far.said if said.by == "tool"]
    match results:
        case []:
            return _calling("I look at the invoice.", "look_up", invoice="R-17")
        case [_]:
            return _calling("It was paid twice.", "refund", invoice="R-17", cents=4_900)
        case [_, refunded]:
            return _calling("I tell the customer.", "send_mail", to="ada@inbox.example", body=refunded)
        case _:
            return Said(by="model", text=f"Invoice R-17 was paid twice: {results[1]}. The customer knows.")


def _calling(text_: str, tool: Any, **arguments: Any) -> Said:
    return Said(by="model", text=text_, calls=[ToolCall(tool=tool, arguments=arguments)])


def call_tool(ctx: StepContext[str], call: ToolCall) -> str | Suspend:
    """What the tool says. A refund waits for a decision: the run is parked, and nothing runs until there is one."""
    match call.tool:
        case "look_up":
            return str(INVOICES[call.arguments["invoice"]])
        case "refund" if ctx.resume_data is None:
            return Suspend(call.model_dump())
        case "refund":
            return refund(ctx, Decision.model_validate(ctx.resume_data), **call.arguments)
        case "send_mail":
            return send_mail(ctx, **call.arguments)
        case _:
            raise NonRetryable(f"there is no tool {call.tool!r}")


def refund(ctx: StepContext[str], decision: Decision, invoice: str, cents: int) -> str:
    """Exactly once: it commits with the record of the step, or not at all."""
    if not decision.approved:
        return f"{decision.by} has refused the refund"
    insert = text("insert into agent.refunds values (:invoice, :cents)")
    ctx.connection().execute(insert, {"invoice": invoice, "cents": cents})
    return f"{cents / 100:.2f} were given back, approved by {decision.by}"


def send_mail(ctx: StepContext[str], to: str, body: str) -> str:
    """The mail server is somebody else's (here it is a table): it knows a call that is repeated by its key."""
    insert = text("insert into agent.mails values (:key, :to, :body) on conflict (key) do nothing")
    ctx.connection().execute(insert, {"key": ctx.idempotency_key, "to": to, "body": body})
    return "sent"
