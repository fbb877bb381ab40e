"""``durable demo``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from durable.cli.options import Where
from durable.cli.problems import UsageError


async def demo(
    *,
    orders: int = 300,
    seed: int = 0,
    processes: int = 2,
    function: Annotated[bool, Parameter(negative=())] = False,
    fresh: Annotated[bool, Parameter(negative="--keep", show_default=False)] = False,
    where: Where = Where(),  # noqa: B008  # frozen
) -> int:
    """Orders of a tea shop, two worker processes, and a kill -9 in the middle; then the books are audited.

    Exits 1 if they do not add up. What it leaves behind can be looked at with the other commands.

    Parameters
    ----------
    orders
        How many.
    seed
        In which order they come in; the same one is the same order.
    processes
        How many workers; one of them is killed.
    function
        Take the workflow that is written as an async function, instead of the list of nodes.
    fresh
        Begin with an empty database (the embedded one only); --keep: leave what is there.
    """
    from durable.demo.stage import Play, perform

    if orders < 1 or processes < 2:
        raise UsageError("--orders is at least 1, and --processes at least 2: one is killed")
    play = Play(
        dsn=where.dsn,
        schema=where.schema,
        orders=orders,
        seed=seed,
        processes=processes,
        function=function,
        fresh=fresh,
        json=where.output == "json",
    )
    return await perform(play)
