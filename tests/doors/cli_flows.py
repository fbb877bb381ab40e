"""Workflows for the command line's tests: imported by name, in this process and in workers."""

from __future__ import annotations

import asyncio

from pydantic import BaseModel

from durable import AsyncDurable, Durable, NonRetryable, StepContext, define


class Greeting(BaseModel):
    name: str
    times: int = 1


def greet(ctx: StepContext[Greeting]) -> str:
    return " ".join([f"hello {ctx.input.name}"] * ctx.input.times)


def refuse(ctx: StepContext[object]) -> None:
    raise NonRetryable("not \x1b[31mtoday")


async def for_ever(ctx: StepContext[object]) -> None:
    await asyncio.Event().wait()


def log_it(ctx: StepContext[object]) -> None:
    ctx.logger.warning("from the handler")


hello = define("hello", input=Greeting).step("greet", greet)
failing = define("failing").step("refuse", refuse)
asking = define("asking").wait_for_signal("answer", "answer", type=int)
endless = define("endless").step("wait", for_ever)
logging = define("logging").step("log", log_it)

app = AsyncDurable(workflows=[hello, asking, endless, logging])
sync_app = Durable(workflows=[hello])
empty_app = AsyncDurable()
no_app = "a string"
