"""Stored runs against today's code: their journals are replayed, and nothing is executed or written."""

from durable.replaying.database import stored
from durable.replaying.recording import Recording, read_recordings, to_line
from durable.replaying.verdict import Fit, Verdict, replayed

__all__ = ["Fit", "Recording", "Verdict", "read_recordings", "replayed", "stored", "to_line"]
