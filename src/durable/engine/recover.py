"""The sweep: what crashed, fell due, or was never heard of is put back to work.

Done by ``Durable.recover``, and by every worker, about once a second, as far as a look finds something to do. Sweeps
may overlap: each takes its rows with SKIP LOCKED, one run per transaction, and whatever it enqueues is fenced by the
revision.

A crash is charged on evidence only: a claim whose owner is gone, or a `doing` job of this run whose worker is gone.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from durable.core.crash import died
from durable.core.state import Run
from durable.engine.desk import Desk
from durable.engine.hold import Hold, take
from durable.engine.points import Point
from durable.store import read
from durable.store import sweep as queries

log = logging.getLogger(__name__)

PAGE: Final = 200
STOOD: Final = 3.0
"""Seconds after a restart of the database, or of one's own connection, until others may be called dead."""
LOOK_AGAIN: Final = 0.25
"""Seconds between the two looks at a run that seems to have no job: a live burst's row looks free now and then."""


@dataclass(slots=True)
class Recovered:
    """What one sweep did."""

    taken_over: int = 0
    due: int = 0
    rung: int = 0
    orphans: int = 0

    @property
    def runs(self) -> int:
        """How many runs were put back."""
        return self.taken_over + self.rung + self.orphans


async def sweep(desk: Desk, known: Collection[tuple[str, str]] = ()) -> Recovered:
    """One whole look: the dead, the due, the unheard, and every runnable run that has no job. `known`: the workflows
    and versions that this process can execute."""
    done = Recovered()
    await _let_workers_come_back(desk)
    done.taken_over = await take_over_from_dead(desk)
    done.due = await put_back_due(desk)
    done.rung = await ring_unread(desk)
    await put_back_known(desk, known)
    after: uuid.UUID | None = None
    while True:
        adopted, after = await adopt_orphans(desk, after)
        done.orphans += adopted
        if after is None:
            return done


async def _let_workers_come_back(desk: Desk) -> None:
    """After a restart of the database all locks are gone at once."""
    async with desk.pool.connection() as connection:
        age = await queries.server_age(desk.store, connection)
    await asyncio.sleep(max(0.0, STOOD - age))


async def take_over_from_dead(desk: Desk) -> int:
    """Claims and jobs of workers that are gone. A claimed run's job is no evidence of a second crash."""
    async with desk.pool.connection() as connection:
        dead = await queries.dead_workers(desk.store, connection)
        claims = await queries.claims_of(desk.store, connection, dead)
        jobs = await queries.doing_jobs_of(desk.store, connection, dead)
        spent = [job.id for job in jobs if job.run_id is None or job.run_id in claims]
        if spent:
            await queries.delete_jobs(desk.store, connection, spent)
    count = 0
    for run_id in claims:
        count += await take_over_claim(desk, run_id, dead)
    for job in jobs:
        if job.id not in spent:
            count += await _take_over_job(desk, job)
    if dead:
        async with desk.pool.connection() as connection:
            await queries.forget_workers(desk.store, connection, dead)
    return count


async def take_over_claim(desk: Desk, run_id: uuid.UUID, dead: Collection[int]) -> bool:
    """End the claim of a dead owner: the crash is charged, the run handed back."""
    hold = await take(desk, run_id, mode="skip")
    if hold is None:
        return False
    claim = hold.view.run.claim
    async with hold:
        if claim is None or not await _is_dead(desk, claim.worker, dead):
            await hold.drop()
            return False
        return await _charge(desk, hold)


async def _is_dead(desk: Desk, worker: int, dead: Collection[int]) -> bool:
    """Found without its lock, or forgotten since."""
    if worker in dead:
        return True
    async with desk.pool.connection() as connection:
        return not await queries.registered(desk.store, connection, worker)


async def _take_over_job(desk: Desk, job: queries.DeadJob) -> bool:
    """A job was in the hands of a worker that died; was its run? The job goes with the charge, in one transaction."""
    assert job.run_id is not None
    hold = await take(desk, job.run_id, mode="skip")
    if hold is None:
        return await _forget_if_gone(desk, job)
    async with hold:
        ours = await queries.delete_jobs(desk.store, hold.connection, [job.id])
        run = hold.view.run
        if not ours or run.claim is not None or await _had_ended(desk, run, job.args.get("revision")):
            await hold.drop()
            return False
        return await _charge(desk, hold)


async def _forget_if_gone(desk: Desk, job: queries.DeadJob) -> bool:
    """Somebody holds the row: the job stays, as evidence, until it is free. Or there is no such run any more."""
    assert job.run_id is not None
    async with desk.pool.connection() as connection:
        if not await read.exists(desk.store, connection, job.run_id):
            await queries.delete_jobs(desk.store, connection, [job.id])
    return False


async def _had_ended(desk: Desk, run: Run, revision: int | None) -> bool:
    """Whether the job for `revision` was through: the run has moved on, and what follows is enqueued, or waits."""
    if revision == run.revision:
        return False
    if revision is not None and run.waiting_for is not None:
        return True
    async with desk.pool.connection() as connection:
        return await queries.has_job(desk.store, connection, run.id, run.revision)


async def _charge(desk: Desk, hold: Hold) -> bool:
    run = hold.view.run
    transition = died(hold.view, hold.now, desk.limits())
    if transition is None:
        await hold.drop()
        return False
    log.warning("run %s: its worker died, taking it over", run.id, extra={"run": str(run.id), "workflow": run.workflow})
    desk.at(Point.IN_SWEEP, hold.view)
    await hold.write(transition)
    if run.claim is not None:
        await desk.tell_owner(run.id)
    return True


async def put_back_due(desk: Desk) -> int:
    """Timers: sleeps, retries, timeouts, deadlines, delayed starts."""
    async with desk.pool.connection() as connection:
        total = 0
        while (count := await queries.enqueue_due(desk.store, connection, PAGE)) > 0:
            total += count
            if count < PAGE:
                break
        return total


async def ring_unread(desk: Desk) -> int:
    """Messages that were committed a second ago and that nobody has read."""
    async with desk.pool.connection() as connection:
        late = await queries.unread(desk.store, connection, PAGE)
        for run_id in late:
            await queries.ring(desk.store, connection, run_id)
        await queries.settle_unread(desk.store, connection)
        return len(late)


async def put_back_known(desk: Desk, known: Collection[tuple[str, str]]) -> int:
    """Runs that were parked because no worker knew their definition, and that this one does know."""
    if not known:
        return 0
    async with desk.pool.connection() as connection:
        return await queries.enqueue_known(desk.store, connection, list(known), PAGE)


async def adopt_orphans(desk: Desk, after: uuid.UUID | None) -> tuple[int, uuid.UUID | None]:
    """One page of the walk over runnable runs: those that two looks find without a job at one revision are put back.

    Returns how many, and where the next page begins (None: the walk is through).
    """
    first = await _without_job(desk, after)
    if not first[0]:
        return 0, first[1]
    await asyncio.sleep(LOOK_AGAIN)
    second = await _without_job(desk, after)
    adopted = 0
    async with desk.pool.connection() as connection:
        for run_id, revision in first[0] & second[0]:
            adopted += await queries.adopt(desk.store, connection, run_id, revision)
    return adopted, first[1]


async def _without_job(desk: Desk, after: uuid.UUID | None) -> tuple[set[tuple[uuid.UUID, int]], uuid.UUID | None]:
    async with desk.pool.connection() as connection:
        found, following = await queries.orphans(desk.store, connection, after, PAGE)
    return set(found), following
