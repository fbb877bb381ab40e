"""What this PostgreSQL gives anyone: the least that a durable step can be, by pgbench, without any Python.

A transaction locks a run's row, writes about 100 bytes into a journal, and moves the run's cursor.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import psycopg

from benchmarks.cases import STEPS
from benchmarks.load import TEXT, Load
from benchmarks.server import program
from durable.postgres import binaries

SETTINGS: Final = (
    "pgbench, prepared statements, a client for each run in flight, 2 threads; a transaction: `select ... for update` "
    "of one of 100,000 runs, insert into a journal, update of the run"
)

_TABLES: Final = """
create table run (id int primary key, cursor int not null) with (fillfactor = 80);
create table journal (run int, seq int, body json, at timestamptz default now(), primary key (run, seq));
insert into run select id, 0 from generate_series(1, 100000) as id;
vacuum analyze run;
"""
_SCRIPT: Final = f"""\\set id random(1, 100000)
begin;
select cursor from run where id = :id for update \\gset
insert into journal values (:id, :cursor, '{{"text": "{TEXT}"}}');
update run set cursor = cursor + 1 where id = :id;
commit;
"""
_MANY: Final = 2_000  # steps of a measurement that is no quick one


async def transactions(load: Load) -> list[float]:
    """Transactions a second."""
    _create(load.dsn)
    clients = load.in_flight * load.processes
    seconds = 6 if load.runs * load.steps >= _MANY else 1
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "step.sql")
        script.write_text(_SCRIPT, encoding="utf-8")  # noqa: ASYNC240 (a small file)
        pgbench = program("pgbench", binaries.find().folder)
        options = {"-M": "prepared", "-f": script, "-c": clients, "-j": min(2, clients), "-T": seconds}
        given = [str(part) for option in options.items() for part in option]
        said = await _run([pgbench, "-n", *given, load.dsn])
    found = re.search(r"tps = ([0-9.]+)", said)
    if found is None:
        raise RuntimeError(f"pgbench did not say how fast it was: {said[-500:]}")
    return [float(found[1])]


def _create(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        for command in filter(str.strip, _TABLES.split(";")):
            connection.execute(command.encode())


async def _run(command: list[str]) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"pgbench has failed: {said.decode()[-500:]}")
    return said.decode()


CASES: Final[dict[str, Callable[[Load], Awaitable[list[float]]]]] = dict.fromkeys(STEPS, transactions)


def versions() -> dict[str, str]:
    return {"pgbench": binaries.find().version}
