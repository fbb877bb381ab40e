"""Workflows that are functions: a coroutine that yields commands, driven against the journal.

`context.py` is what the body sees; it makes the commands of `commands.py`. `body.py` drives the coroutine, and those of
blocks, branches and iterations (`composites.py`, and a file for each kind), until nothing moves without a new entry.
`plan.py` says what to do then: the counterpart of ``core/graph.py``.
"""
