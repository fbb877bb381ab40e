"""The worker that fetches jobs and performs them: procrastinate's, with a loop of its own between the two.

There, each job costs a fetch, a finish, and records for the log. Here one statement after the other finishes all jobs
that were performed meanwhile and fetches one for each free slot. So the busier the worker is, the more jobs share a
statement; while it has plenty to do, jobs that end even wait a moment for others. A slot is free as soon as its job is
over, whatever the queue knows of it; and what waits to be finished is never more than what one statement fetched.

While nothing waits in the queue, who inserts a job in this process may have it begun here with the commit, without a
fetch: it takes a `Seat`, and inserts the job as one that this worker has fetched.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, Self

import procrastinate
from procrastinate import jobs as queue_jobs
from procrastinate.job_context import JobContext
from procrastinate.worker import Worker as QueueWorker

from durable.worker.jobs import FINISH_TRIES, LastingJobManager, in_hands

log = logging.getLogger(__name__)

POLLING: Final = 5.0
"""Seconds after which the queue is looked at although nobody rang. What was not announced, or not heard, is seen
earlier: by the look around that a worker takes once a second."""
PLENTY: Final = 5
"""So many jobs in hand that can't begin yet are enough until others have been fetched."""
GATHERING: Final = 0.01
"""Seconds for which jobs that have ended wait for others then, at most."""


class Seat:
    """A slot that is kept for a job which is about to be inserted, as fetched by `worker`: ``with seat: ...``.

    `take` it once that is committed; else the slot is free again after the block.
    """

    def __init__(self, serving: LastingWorker, worker: int) -> None:
        self._serving, self.worker, self._taken = serving, worker, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._serving.leave(taken=self._taken)

    def take(self, job: int, queue: str, task: str, given: Mapping[str, Any], **more: Any) -> None:
        """The job is in the queue, in this worker's name: begin it. `more`: arguments that the queue does not know."""
        self._taken = True
        self._serving.begin(in_hands(job, queue, task, given, self.worker), **more)


class LastingWorker(QueueWorker):
    """Performs the jobs of one queue until `end`; without `wait`, until none waits and none is executing.

    - `concurrency`: jobs in hand at once; one that is fetched begins at once.
    - `fetch_batch`: jobs that one statement may fetch. None: as many as there are free slots.
    - `spare`: how many of the jobs in hand can't begin yet.
    """

    def __init__(
        self,
        app: procrastinate.App,
        *,
        queue: str,
        concurrency: int,
        wait: bool,
        fetch_batch: int | None = None,
        spare: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(
            app,
            queues=[queue],
            concurrency=concurrency,
            wait=wait,
            fetch_job_polling_interval=POLLING,
            install_signal_handlers=False,
        )
        assert isinstance(app.job_manager, LastingJobManager)
        self._manager = app.job_manager
        self._batch = min(fetch_batch or concurrency, concurrency)
        self._spare = spare
        self._performed: list[queue_jobs.Job] = []
        self._gathering: asyncio.TimerHandle | None = None
        self._seats = 0  # that are kept
        self._all_fetched = False  # nothing was left in the queue by the last look

    async def serve(self) -> None:
        """Work; returns when nothing is in hand any more, and the queue knows of all that was performed."""
        await self.run()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Fetch no more; `serve` returns when what runs has ended. On the loop that serves, as `nudge`."""
        self.stop()

    def nudge(self) -> None:
        """Look into the queue at once: something was put there."""
        self._new_job_event.set()

    def seat(self) -> Seat | None:
        """A slot for a job that is inserted now. None: all are taken, this worker ends, or others may wait for one."""
        worker = self._manager.worker
        if worker is None or not self._all_fetched or self._new_job_event.is_set() or not self._free:
            return None
        self._seats += 1
        return Seat(self, worker)

    def leave(self, *, taken: bool) -> None:
        """A seat is not kept any more."""
        self._seats -= 1
        if not taken:
            self.nudge()

    @property
    def running(self) -> list[int]:
        """The jobs that it has in hand: executes, or has performed without the queue knowing of it yet."""
        executing = [context.job for context in self._running_jobs.values()]
        return [job.id for job in (*executing, *self._performed) if job.id is not None]

    # ---------------------------------------------------------------- in place of procrastinate's

    def stop(self) -> None:
        super().stop()  # type: ignore[no-untyped-call]
        self._new_job_event.set()

    async def _periodic_deferrer(self) -> None:
        """There is nothing to defer; but if this side task ended, the watch over the others would end with it."""
        await asyncio.Event().wait()

    async def _fetch_and_process_jobs(self) -> None:
        self.nudge()
        while self._running_jobs or self._seats or not self._stop_event.is_set():
            await self._nudged()
            self._new_job_event.clear()
            if self._gathering is not None:
                self._gathering.cancel()
                self._gathering = None
            if self._free or self._performed:
                await self._exchange(min(self._free, self._batch))
        for _ in range(FINISH_TRIES):  # what is left then, recovery finishes
            if self._performed:
                await self._exchange(0)

    # ---------------------------------------------------------------- the loop

    @property
    def _free(self) -> int:
        """The slots for which a job may be fetched."""
        return 0 if self._stop_event.is_set() else self.concurrency - len(self._running_jobs) - self._seats

    async def _nudged(self) -> None:
        """Wait until a job was inserted or performed, or `end` called; or for the next look that nobody asked for."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.fetch_job_polling_interval):
                await self._new_job_event.wait()

    def _look_soon(self) -> None:
        """There may be jobs to fetch, and some to finish: maybe not worth a statement of their own yet."""
        if self._spare() < PLENTY:
            self.nudge()
        elif self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(GATHERING, self.nudge)

    async def _exchange(self, wanted: int) -> None:
        performed = self._performed.copy()  # they stay in hand until the queue knows
        self._all_fetched = False
        fetched = await self._manager.exchange(performed, wanted, self.queues)
        if fetched is None:
            self.nudge()
            if not self.wait and not self._running_jobs:
                self.stop()  # whoever does not wait is not kept waiting for the database either
            return
        del self._performed[: len(performed)]
        for job in fetched:
            self.begin(job)
        self._all_fetched = len(fetched) < wanted
        if 0 < wanted == len(fetched):
            self._look_soon()  # there may be more
        if not self.wait and not self.running and not self._seats:
            self.stop()  # nothing has ended meanwhile that could have put something there

    def begin(self, job: queue_jobs.Job, **more: Any) -> None:
        """Perform a job that is marked as this worker's."""
        task = asyncio.create_task(self._perform(job, more), name=f"{job.task_name} {job.id}")
        self._running_jobs[task] = JobContext(
            app=self.app,
            worker_name=self.worker_name,
            worker_queues=self.queues,
            job=job,
            start_timestamp=time.time(),
            abort_reason=lambda: None if job.id is None else self._job_ids_to_abort.get(job.id),
        )
        task.add_done_callback(self._ended)

    async def _perform(self, job: queue_jobs.Job, more: Mapping[str, Any]) -> None:
        try:
            await self.find_task(job.task_name)(**job.task_kwargs, **more)
        except asyncio.CancelledError:
            log.info("job %s was aborted", job.call_string)
        except Exception:  # of the engine's own: user code's are its outcome, the database's are left to recovery
            log.exception("job %s failed", job.call_string)

    def _ended(self, task: asyncio.Task[None]) -> None:
        job = self._running_jobs.pop(task).job
        self._performed.append(job)
        if job.id is not None:
            self._job_ids_to_abort.pop(job.id, None)
        self._look_soon()
