"""For the tests of those who use durable: drive workflows in process, move the clock, stop as a crash would."""

from durable.testing.harness import AsyncHarness, Harness

__all__ = ["AsyncHarness", "Harness"]
