"""The tea shop of ``durable demo`` as an app of one's own. Run both from the root of the repository:

durable worker examples.orders.app:app      # one or more of these, in other terminals
python -m examples.orders.app 20            # takes the first twenty orders, and waits until they have ended
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime

import psycopg

from durable import AsyncDurable, AsyncRun, RunCanceled, RunFailed, Start
from durable.demo import shop
from durable.demo.audit import audit
from durable.demo.orders import Receipt, order

app = AsyncDurable(workflows=[order])


async def take_orders(count: int) -> int:
    """Starts a run for each order, shows how each ended, and audits the books; returns the exit code."""
    batch = f"{datetime.now(UTC):%Y-%m-%d-%H%M%S}"
    given = shop.read_orders(count)
    async with app:
        await app.migrate()
        with psycopg.connect(app.store.dsn) as connection:
            shop.create(connection)
            shop.open_batch(connection, batch, given)
        starts = [Start({"batch": batch} | one, key=f"{batch}/{one['id']}", tags={"batch": batch}) for one in given]
        for run, one in zip(await app.start_many(order, starts), given, strict=True):
            print(one["id"], run.id, flush=True)
            try:
                receipt = await ended(run)
                print(f"  {receipt.cents / 100:.2f} by {receipt.carrier}, approved by {receipt.approved_by}")
            except (RunFailed, RunCanceled) as error:
                print(f"  {error}")
        with psycopg.connect(app.store.dsn) as connection:
            findings = audit(connection, batch)
    print("\n".join(map(str, findings)) or "the books add up")
    return 1 if findings else 0


async def ended(run: AsyncRun[Receipt]) -> Receipt:
    """The result of a run; while it waits for somebody, what that somebody can do."""
    try:
        return await run.result(timeout=5)
    except TimeoutError as error:
        print(f"  {error}")
    if (await run.status()).waiting_name == "approval":
        print(f"""  durable signal {run.id} approval '{{"approved": true, "by": "me"}}'""", flush=True)
    return await run.result()


if __name__ == "__main__":
    sys.exit(asyncio.run(take_orders(int(sys.argv[1]) if len(sys.argv) > 1 else 300)))
