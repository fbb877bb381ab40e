"""``durable.models.Run``: the run's row, for app code that reads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from durable import Durable, Status, define
from durable.models import Run

work = define("work").step("work", lambda ctx: ctx.input)


@pytest.fixture(params=["durable", "shop"])
def app(request: pytest.FixtureRequest, empty_dsn: str) -> Iterator[Durable]:
    with Durable(empty_dsn, schema=request.param, workflows=[work], auto_migrate=True) as app:
        yield app


@pytest.fixture
def session(app: Durable, empty_dsn: str) -> Iterator[Session]:
    engine = sa.create_engine(empty_dsn.replace("postgresql:", "postgresql+psycopg:", 1), poolclass=NullPool)
    with Session(engine.execution_options(schema_translate_map={"durable": app.schema})) as session:
        yield session


@pytest.mark.behaviour("SD-23")
def test_rows_are_read_like_any_model(app: Durable, session: Session) -> None:
    started = app.start(work, {"n": 1}, key="k", tags={"tenant": "acme"})
    app.start(work).cancel()
    [run] = session.scalars(sa.select(Run).where(Run.status == Status.PENDING, Run.tags["tenant"].astext == "acme"))
    assert (run.id, run.workflow, run.version, run.key) == (started.id, "work", "1", "k")
    assert (run.input, run.tags, run.finished_at) == ({"n": 1}, {"tenant": "acme"}, None)
    assert run.created_at.tzinfo is not None
    assert repr(run) == f"<Run {started.id}: work 1, pending>"
    assert session.scalar(sa.select(sa.func.count()).select_from(Run)) == 2
    assert session.get(Run, started.id) is run


def test_it_is_for_reading(app: Durable, session: Session) -> None:
    started = app.start(work)
    run = session.get_one(Run, started.id)
    run.status = "completed"
    with pytest.raises(TypeError, match=r"app\.cancel\(run_id\)"):
        session.commit()
    session.rollback()
    session.delete(session.get_one(Run, started.id))
    with pytest.raises(TypeError, match="for reading"):
        session.commit()
    session.rollback()
    session.add(Run(workflow="mine"))
    with pytest.raises(TypeError, match=r"app\.start\(\)"):
        session.flush()
    session.rollback()
    assert started.status().status is Status.PENDING


def test_its_attributes_are_the_columns() -> None:
    from durable.store.tables import runs

    annotated = {name for name in Run.__annotations__ if not name.startswith("_")} if Run.__annotations__ else set()
    assert annotated <= set(runs.columns.keys())
    assert {attribute.key for attribute in sa.inspect(Run).column_attrs} == set(runs.columns.keys())
