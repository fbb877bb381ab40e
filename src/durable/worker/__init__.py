"""What executes runs: a process, or a block of one, that takes jobs from the queue."""

from durable.worker.worker import Worker

__all__ = ["Worker"]
