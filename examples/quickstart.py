"""An order: take the money, wait until it is packed, ship it. Run it: python examples/quickstart.py"""

from pydantic import BaseModel

from durable import Durable, StepContext

app = Durable()  # no database is configured, so a PostgreSQL is started in ./.durable


class Order(BaseModel):
    item: str
    cents: int


def charge(ctx: StepContext[Order]) -> str:
    return f"payment of {ctx.input.cents} cents"


def refund(ctx: StepContext[Order]) -> None:
    print("giving back the", ctx.output)


def ship(ctx: StepContext[Order]) -> str:
    return f"{ctx.input.item} shipped after a {ctx.results['charge']}"


order = (
    app.define("order", input=Order)
    .step("charge", charge, compensate=refund)
    .wait_for_signal("packed", "packed")
    .step("ship", ship)
)

if __name__ == "__main__":
    with app.worker():
        run = app.start(order, Order(item="teapot", cents=7900))
        run.signal("packed")
        print(run.result(timeout=30)["ship"])
