"""The app of the agent: ``durable worker examples.agent.app:app`` serves it."""

from __future__ import annotations

from examples.agent.agent import agent

from durable import AsyncDurable

app = AsyncDurable(workflows=[agent])
